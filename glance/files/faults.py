"""What may go wrong from outside, and how does a run meet it? Signals, a second run on its folder, a full disk.

Another cause from outside belongs here; what is wrong with an input is said where that input is read.
"""

import contextlib
import os
import re
import signal
import sys
import tempfile
import threading
from pathlib import Path

from filelock import FileLock, Timeout

from glance.command_line import is_first_process
from glance.files.checkpoints import STATE_NAME, find_checkpoints
from glance.files.recipe import WEIGHT_NAME
from glance.start import say_stopped
from glance_utils import InputError


# How many processes others than torch's launcher have started, which may know nothing of each other.
STARTED = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
TRAJECTORIES = "trajectories.safetensors"  # what the base drew before training
LOSSES = "loss.csv"
CALLS = "calls.csv"  # errors over numbers of model calls
# As atomic.replace_file names what it has not yet renamed.
LEFTOVER = re.compile(
    rf"\.({'|'.join(map(re.escape, (WEIGHT_NAME, STATE_NAME, TRAJECTORIES, LOSSES, CALLS)))}"
    r"|README\.md|\w+\.(json|png))\.\d+"
)


def leave(number: int, frame=None, hint: str | None = "not while training, so no checkpoint was written") -> None:
    """End the process after this signal, in one line and with the exit code that a shell gives it.

    Of several processes that a signal finds (it comes with a frame) the first one says so.
    """
    if hint and (frame is None or is_first_process()):
        say_stopped(number, hint)
    sys.exit(128 + number)


@contextlib.contextmanager
def signals_handled(handler=leave):
    """Call handler(number, frame) inside upon SIGINT or SIGTERM; outside the main thread they stay as they are."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    originals = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, original in originals.items():
            signal.signal(number, original)


@contextlib.contextmanager
def signals_noted(note):
    """Yield a list for the first SIGINT or SIGTERM, which also calls note(); a second one ends the run at once."""
    noted = []

    def handler(number, frame):
        if noted:
            leave(number, hint="asked twice, so this step was not finished; --resume_from_checkpoint takes the last")
        noted.append(number)
        note()

    with signals_handled(handler):
        yield noted


def check_writable(directory: str | Path, name: str) -> None:
    """Raise InputError where the folder cannot be created or written to; nothing is left behind."""
    path = Path(directory).absolute()
    try:
        with tempfile.TemporaryFile(dir=next(parent for parent in (path, *path.parents) if parent.exists())):
            pass
    except OSError as error:
        raise InputError(f"{name} {directory}: cannot be written ({error.strerror})") from None


@contextlib.contextmanager
def locked(output_dir: str | Path):
    """Lock the folder for this run, making it; raise InputError where another run holds it, or it cannot be written.

    The system releases the lock when the process dies, however it dies. A folder that is empty afterwards and was made
    here is removed again.
    """
    path = Path(output_dir).absolute() / ".lock"
    made = [parent for parent in path.parents if not parent.exists()]
    lock = FileLock(path, timeout=0.2, fallback_to_soft=False)  # it may just be taken away by a run that ends
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise InputError(f"--output_dir {path.parent}: cannot be written ({error.strerror})") from None
    try:
        lock.acquire()
    except Timeout:
        other = "another run is writing there; wait for it or name another folder"
        if any(os.environ.get(name, "1") != "1" for name in STARTED):
            other += "; or processes of one run were started apart: start them by `accelerate launch`"
        raise InputError(f"--output_dir {path.parent}: {other}") from None
    except OSError:  # a file system that knows no locks
        pass
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # the folder has gone; or Windows, which removes it on release
            path.unlink()
        lock.release()
        with contextlib.suppress(OSError):  # not empty, or gone
            for folder in made:
                folder.rmdir()


def sweep(output_dir: Path) -> None:
    """Remove what a killed run had begun to write; the folder is locked, so nobody is writing it now."""
    folders = [output_dir, *(path for path in output_dir.glob("*") if path.is_dir())]
    for path in [path for folder in folders for path in folder.glob(".*") if LEFTOVER.fullmatch(path.name)]:
        path.unlink(missing_ok=True)
    for path in output_dir.glob("checkpoint-*"):
        with contextlib.suppress(OSError):  # only an empty folder can be removed so
            path.rmdir()


@contextlib.contextmanager
def one_line_errors(output_dir: str | Path):
    """Turn an OSError inside into an InputError that says which checkpoint is left."""
    try:
        yield
    except OSError as error:
        left = [str(path) for _, path in find_checkpoints(output_dir)][-1:]
        hint = f"{left[0]} is left to resume from" if left else "no checkpoint is left to resume from"
        reason = error.strerror or type(error).__name__
        raise InputError(f"--output_dir {output_dir}: cannot be written ({reason}); {hint}") from None


@contextlib.contextmanager
def explained(
    label: str, hint: str = "try --mixed_precision bf16 or no; weights of the base may hold such numbers too"
):
    """Yield the label; raise a FloatingPointError inside again with it, as the picture's name, and what to try."""
    try:
        yield label
    except FloatingPointError as error:
        raise FloatingPointError(f"{label}: {error}; {hint}") from error
