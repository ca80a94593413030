"""Kill -9 training runs at random moments and resume them: `make soak`, or `python tests/soak.py --rounds 50`.

Every run trains both LoRAs on a tiny FLUX and writes a checkpoint after every step. A round draws the step after
which the run is killed, or that training is over, and how long after; resumes it with --resume_from_checkpoint latest
where there is something to resume, kills that again with even odds at a step of those that are left, and lets it end.
survived: whatever is on the disk after each kill is whole, and the run comes to its end.
equal: all its files are, byte for byte, those of the run that nothing befell.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # of the runs: another number gives other last bits
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402
from tiny_pipelines import make_flux  # noqa: E402
from tqdm.auto import tqdm  # noqa: E402

from glance import command_line as cli  # noqa: E402
from glance.files.checkpoints import find_checkpoints, load_checkpoint  # noqa: E402
from glance.files.faults import LEFTOVER  # noqa: E402
from glance.files.recipe import WEIGHT_NAME, read_recipe  # noqa: E402
from glance_utils import PHASES  # noqa: E402


FIRST, LAST = "instance.png", "README.md"  # written where training begins, and after all else
FILES = (FIRST, LAST, "glance.png", "loss.csv", "loss.png", "sampler.json", "comfyui.json")
FILES += ("scheduler/scheduler_config.json",)
FILES += tuple(f"{phase}/{WEIGHT_NAME}" for phase in PHASES)
STEPS = 20  # of each phase
MOMENTS = ("before the first checkpoint", "in the slow phase", "in the fast phase", "after training")
HALF = "amid the writing of a file"


def written_at(path: Path) -> float:
    """When the file was written, in seconds; 0 where it was not."""
    return path.stat().st_mtime if path.exists() else 0


def steps_done(output: Path) -> int:
    """How many steps a run has saved; one more where its last LoRA is there too."""
    if (output / "fast" / WEIGHT_NAME).exists():
        return 2 * STEPS + 1
    return max((step for step, _ in find_checkpoints(output)), default=0)


def train(flags: list[str], output: Path, steps: int = 0, seconds: float | None = None) -> int | None:
    """A training run in a process of its own: its exit code, or None where it was killed so many seconds after so many
    steps. The seconds count from what it has written, since a busy machine may slow all that comes before.

    Not a fork of this one: torch has threads, and a lock that one of them holds would be held in the fork for ever.
    """
    command, nowhere = [sys.executable, str(ROOT / "train_glance_lora.py"), *flags], subprocess.DEVNULL
    before = written_at(output / FIRST)  # by the run that this one resumes
    with subprocess.Popen(
        [*command, f"--output_dir={output}"], stdout=nowhere, stderr=nowhere, start_new_session=True
    ) as process:
        while seconds is not None and process.poll() is None:
            if written_at(output / FIRST) != before and steps_done(output) >= steps:
                break
            time.sleep(0.005)
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            return None


def make_inputs(root: Path) -> None:
    """A tiny FLUX, an image and its caption."""
    make_flux(root / "flux")
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (32, 32, 3), dtype=np.uint8)).save(root / "glance.png")
    (root / "glance.txt").write_text("a red ring")


def flags_of_run(root: Path) -> list[str]:
    """All but the output folder."""
    flags = {"pretrained_model_name_or_path": root / "flux", "instance_image": root / "glance.png", "resolution": 32}
    flags |= {"rank": 64, "max_train_steps": STEPS, "checkpointing_steps": 1, "checkpoints_total_limit": 3}
    return ["--no-gradient_checkpointing", *(f"--{name}={value}" for name, value in flags.items())]


def is_whole(output: Path) -> bool:
    """Whether every file that stands under its own name is complete."""
    try:
        for _, folder in find_checkpoints(output):
            load_checkpoint(str(folder), output)
        for path in output.glob(f"*/{WEIGHT_NAME}"):
            read_recipe(path)
        for path in output.glob("*.png"):
            Image.open(path).load()
        return True
    except (OSError, ValueError):
        return False


def where(output: Path, resumable: bool) -> str:
    """What a run was doing, by what it left: one of MOMENTS."""
    if (output / "fast" / WEIGHT_NAME).exists():
        return MOMENTS[3]
    return MOMENTS[2] if (output / "slow" / WEIGHT_NAME).exists() else MOMENTS[resumable]


def soak_round(flags: list[str], output: Path, duration: float, chance: random.Random, killed: Counter) -> bool:
    """One run, killed once or twice and resumed to its end; whether it survived."""
    kills, again = 1 + (chance.random() < 0.5), []
    while True:
        steps = chance.randint(steps_done(output), 2 * STEPS + 1)
        code = train(flags + again, output, steps, chance.uniform(0, duration / 10) if kills else None)
        if code is not None:
            return code == 0
        resumable = bool(find_checkpoints(output) or list(output.glob(f"*/{WEIGHT_NAME}")))
        killed[where(output, resumable)] += 1
        killed[HALF] += any(LEFTOVER.fullmatch(path.name) for path in output.rglob(".*"))
        if not is_whole(output):
            return False
        again = ["--resume_from_checkpoint=latest"] if resumable else []
        kills -= 1


def content(output: Path) -> list[bytes] | None:
    """The bytes of all that a run should leave, None where there is more or less than that."""
    found = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    found = {name for name in found if not name.startswith("checkpoint-")}
    if found != set(FILES):
        return None
    return [(output / name).read_bytes().replace(str(output).encode(), b".") for name in FILES]  # the card names it


def summary(killed: Counter, survived: int, equal: int) -> str:
    moments = ", ".join(f"{killed[moment]} {moment}" for moment in MOMENTS)
    kills = f"{sum(killed[moment] for moment in MOMENTS)} kills ({moments}; {killed[HALF]} of all {HALF})"
    return f"{kills}: {survived} survived, {equal} equal"


def main() -> int:
    parser = cli.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=cli.positive(int), default=50)
    parser.add_argument("--seed", type=cli.seed, default=0)
    args: argparse.Namespace = parser.parse()
    chance, killed, survived, equal = random.Random(args.seed), Counter(), 0, 0
    with tempfile.TemporaryDirectory() as root:
        flags, whole = flags_of_run(Path(root)), Path(root) / "whole"
        make_inputs(Path(root))
        if train(flags, whole) != 0:
            raise RuntimeError("a run that nothing befell should come to its end")
        duration, wanted = written_at(whole / LAST) - written_at(whole / FIRST), content(whole)
        for number in (progress := tqdm(range(args.rounds))):
            output = Path(root) / f"round-{number}"
            if soak_round(flags, output, duration, chance, killed):
                survived += 1
                equal += wanted is not None and content(output) == wanted
            progress.set_postfix_str(summary(killed, survived, equal))
    print(f"{args.rounds} rounds, {summary(killed, survived, equal)}")
    return 0 if survived == equal == args.rounds else 1


if __name__ == "__main__":
    sys.exit(main())
