"""What a run survives: signals, kill -9, a full disk, a folder that vanishes, a second run in the same folder."""

import importlib.util
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import ROOT, contents, run_train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_glance_lora
from glance.ask.velocity import PipelineVelocity
from glance.files import checkpoints, faults
from glance.files.recipe import WEIGHT_NAME, read_recipe
from glance.training import log
from glance_utils import InputError


PHASES = ("slow", "fast")
FILES = {"instance.png", "glance.png", "README.md", "loss.csv", "loss.png", "sampler.json", "comfyui.json"}
FILES |= {"scheduler/scheduler_config.json", *(f"{phase}/{WEIGHT_NAME}" for phase in PHASES)}


def files_in(folder: Path) -> dict[str, bytes]:
    """All but checkpoints, whose zip files hold the time."""
    return {name: content for name, content in contents(folder).items() if not name.startswith("checkpoint-")}


@pytest.fixture
def at_step(monkeypatch):
    """at_step(n, act): act() is called before the run's n-th velocity is asked, the first being 1."""
    forward = PipelineVelocity.forward

    def call(number, act):
        count = 0

        def watched(self, noisy, sigmas, **kwargs):
            nonlocal count
            count += 1
            if count == number:
                act()
            return forward(self, noisy, sigmas, **kwargs)

        monkeypatch.setattr(PipelineVelocity, "forward", watched)

    return call


@pytest.fixture(scope="module")
def whole(pipelines, pair, tmp_path_factory):
    """The output folder of a run that nothing befell."""
    output = tmp_path_factory.mktemp("whole") / "output"
    base = {"pretrained_model_name_or_path": pipelines["flux"], "instance_image": pair, "output_dir": output}
    return run_train(base, {"gradient_accumulation_steps": 2})


def kill_self(number) -> None:
    os.kill(os.getpid(), number)


# --------------------------------------------------------------------------------------------------------------------
# Signals


@pytest.mark.parametrize("number, step", [(signal.SIGINT, 3), (signal.SIGTERM, 7), (signal.SIGTERM, 10)])
def test_a_signal_finishes_the_step_and_the_run_can_go_on(number, step, train, whole, at_step, tmp_path, capsys):
    """Also in the middle of an accumulated step, without --checkpointing_steps."""
    before = signal.getsignal(number)
    at_step(2 * step - 1, lambda: kill_self(number))
    with pytest.raises(SystemExit) as end:
        train(gradient_accumulation_steps=2)
    assert end.value.code == 128 + number and signal.getsignal(number) is before
    output, last = tmp_path / "output", capsys.readouterr().err.splitlines()[-1]
    assert last.endswith(f"{number.name}; go on with --resume_from_checkpoint {output}/checkpoint-{step}")
    assert [step for step, _ in checkpoints.find_checkpoints(output)] == [step]
    train(gradient_accumulation_steps=2, resume_from_checkpoint="latest")
    assert files_in(output) == files_in(whole)


def test_a_second_signal_ends_at_once(train, at_step, tmp_path):
    at_step(3, lambda: (kill_self(signal.SIGINT), kill_self(signal.SIGINT)))
    with pytest.raises(SystemExit) as end:
        train(checkpointing_steps=1)
    assert end.value.code == 130
    assert [step for step, _ in checkpoints.find_checkpoints(tmp_path / "output")] == [1, 2]


def test_a_signal_before_training_ends_the_run_in_one_line(train, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(train_glance_lora, "load_pair", lambda *args: kill_self(signal.SIGINT))
    with pytest.raises(SystemExit) as end:
        train()
    assert end.value.code == 130 and list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.processes
@pytest.mark.parametrize("script", ["train_glance_lora.py", "infer_glance.py"])
def test_ctrl_c_while_the_libraries_are_imported_ends_in_one_line(script):
    flags = "--pretrained_model_name_or_path=demo/model" if script == "train_glance_lora.py" else "--prompt=a"
    command = [sys.executable, "-X", "importtime", str(ROOT / script), flags]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    with subprocess.Popen(command, **pipes) as process:
        while "numpy" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        said = [line for line in process.stderr if not line.startswith("import time:")]
    assert process.returncode == 130 and len(said) == 1
    assert said[0].startswith(f"{script}: stopped by SIGINT; ")


def test_main_runs_outside_the_main_thread(train, whole, tmp_path):
    """Where no signal can be handled: in a notebook's or a server's thread."""
    thread = threading.Thread(target=train, kwargs={"gradient_accumulation_steps": 2})
    thread.start()
    thread.join()
    assert files_in(tmp_path / "output") == files_in(whole)


# --------------------------------------------------------------------------------------------------------------------
# Half-written files


def in_child(act) -> int:
    """act() in a forked process; its exit status, as os.waitpid gives it."""
    if not (child := os.fork()):
        try:
            act()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1]


STATE = {"settings": {"phase": "slow"}, "step": 3} | dict.fromkeys(("lora", "optimizer", "lr_scheduler", "generator"))


@pytest.mark.parametrize("where", ["write_bytes", "replace"])
def test_killed_while_a_checkpoint_is_replaced(where, tmp_path, monkeypatch):
    checkpoints.save_checkpoint(tmp_path, STATE | {"value": 1}, 3, None)

    def killed():
        owner = {"write_bytes": Path, "replace": os}[where]
        setattr(owner, where, lambda *rest: kill_self(signal.SIGKILL))
        checkpoints.save_checkpoint(tmp_path, STATE | {"value": 2}, 3, None)

    assert in_child(killed) == signal.SIGKILL
    assert checkpoints.load_checkpoint("latest", tmp_path)["value"] == 1


def test_a_checkpoint_that_was_never_written_is_none(tmp_path):
    checkpoints.save_checkpoint(tmp_path, STATE, 3, None)
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4" / ".training_state.pt.123").write_bytes(b"half")
    assert checkpoints.load_checkpoint("latest", tmp_path)["settings"] == {"phase": "slow"}


def test_every_file_is_renamed_into_place(train, monkeypatch, tmp_path):
    """And nothing is written to by its final name."""
    renamed, replace = set(), os.replace

    def watched(source, target):
        assert faults.LEFTOVER.fullmatch(Path(source).name), source
        renamed.add(str(Path(target).relative_to(tmp_path / "output")))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    output = train(checkpointing_steps=5)
    written = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    assert written == renamed == FILES | {"checkpoint-5/training_state.pt", "checkpoint-10/training_state.pt"}


def test_leftovers_of_a_killed_run_are_swept(train, tmp_path):
    output = tmp_path / "output"
    for folder in ("", "slow", "fast", "checkpoint-2", "checkpoint-9"):
        (output / folder).mkdir(parents=True, exist_ok=True)
    torch.save({}, output / "checkpoint-9" / "training_state.pt")
    (output / ".note").write_text("the user's own")
    for name in (".README.md.12", ".glance.png.3", "slow/.pytorch_lora_weights.safetensors.4"):
        (output / name).write_text("half")
    (output / "checkpoint-2" / ".training_state.pt.5").write_text("half")
    train()
    assert set(files_in(output)) == FILES | {".note"}
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-9"]


@pytest.mark.processes
@pytest.mark.long
def test_a_round_of_make_soak(tmp_path):
    command = [sys.executable, str(ROOT / "tests" / "soak.py"), "--rounds=1", "--seed=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "1 survived, 1 equal" in done.stdout, done.stdout + done.stderr[-3000:]


# --------------------------------------------------------------------------------------------------------------------
# Finished phases


class Death(BaseException):
    """Ends a run where it is, as kill -9 would."""


def die() -> None:
    raise Death


@pytest.mark.parametrize("every", [None, 2])
def test_a_finished_phase_is_not_trained_again(every, train, whole, at_step, tmp_path):
    settings = {"gradient_accumulation_steps": 2, "checkpointing_steps": every}
    at_step(11, die)  # in the fast phase's first step
    with pytest.raises(Death):
        train(**settings)
    at_step(11, lambda: pytest.fail("more than the fast phase's five steps"))
    train(**settings, resume_from_checkpoint="latest")
    assert files_in(tmp_path / "output") == files_in(whole)


def test_a_run_that_died_after_training_is_completed_without(train, whole, at_step, tmp_path):
    shutil.copytree(whole, tmp_path / "output")
    for name in ("glance.png", "README.md"):
        (tmp_path / "output" / name).unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_glance_lora, "train_phase", lambda *rest: pytest.fail("nothing is left to train"))
        train(gradient_accumulation_steps=2, resume_from_checkpoint="latest")
    assert files_in(tmp_path / "output") == files_in(whole)


@pytest.mark.parametrize("change", [{"seed": 3}, {"learning_rate": 1e-5}, {"instance_prompt": "a dog"}])
def test_a_phase_finished_with_other_settings_does_not_count(change, train, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "output")
    with pytest.raises(InputError, match="latest"):
        train(gradient_accumulation_steps=2, resume_from_checkpoint="latest", **change)


# --------------------------------------------------------------------------------------------------------------------
# The disk


@contextmanager
def full_disk(limit: int):
    """No file can grow beyond `limit` bytes, and the system says so."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def assert_one_line(error: pytest.ExceptionInfo, *words):
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_a_full_disk_keeps_the_last_checkpoint(train, whole, at_step, tmp_path):
    output, settings = tmp_path / "output", {"gradient_accumulation_steps": 2, "checkpointing_steps": 2}
    at_step(6, lambda: disk.__enter__())
    disk = full_disk(20000)
    with pytest.raises(InputError) as error:
        train(**settings)
    disk.__exit__(None, None, None)
    assert_one_line(error, "--output_dir", "File too large", f"{output}/checkpoint-2 is left to resume from")
    assert [path.name for path in output.glob("*checkpoint-*")] == ["checkpoint-2"]
    train(**settings, resume_from_checkpoint="latest")
    assert files_in(output) == files_in(whole)


def test_a_disk_too_full_for_the_lora_keeps_the_old_one(train, at_step, tmp_path):
    (tmp_path / "output" / "slow").mkdir(parents=True)
    (tmp_path / "output" / "slow" / WEIGHT_NAME).write_bytes(b"a good LoRA")
    disk = full_disk(20000)
    at_step(4, lambda: disk.__enter__())
    with pytest.raises(InputError) as error:
        train(overwrite_output_dir=True)
    disk.__exit__(None, None, None)
    assert_one_line(error, "File too large", "no checkpoint is left")
    assert files_in(tmp_path / "output" / "slow") == {WEIGHT_NAME: b"a good LoRA"}


def test_a_vanished_output_folder(train, at_step, tmp_path):
    at_step(4, lambda: shutil.rmtree(tmp_path / "output"))
    with pytest.raises(InputError) as error:
        train(checkpointing_steps=2)
    assert_one_line(error, "No such file or directory", "no checkpoint is left")


def test_a_folder_that_became_a_file(train, at_step, tmp_path):
    def swap():
        shutil.rmtree(tmp_path / "output")
        (tmp_path / "output").write_text("a file")

    at_step(4, swap)
    with pytest.raises(InputError) as error:
        train()
    assert_one_line(error, "--output_dir")


def test_a_folder_that_became_read_only(train, at_step, tmp_path):
    (tmp_path / "read-only").mkdir(mode=0o555)
    if os.access(tmp_path / "read-only", os.W_OK):
        pytest.skip("root writes anywhere")
    at_step(4, lambda: (tmp_path / "output").chmod(0o555))
    with pytest.raises(InputError) as error:
        train(checkpointing_steps=2)
    (tmp_path / "output").chmod(0o755)
    assert_one_line(error, "Permission denied", "checkpoint-2 is left")


# --------------------------------------------------------------------------------------------------------------------
# Two runs


@pytest.mark.processes
def test_a_second_run_in_the_same_folder_is_refused(train, at_step, tmp_path):
    output = tmp_path / "output"
    code = "import sys\nfrom glance.files.faults import locked\n"
    code += "with locked(sys.argv[1]): print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(output)]
    other = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"held\n"
    with pytest.raises(InputError) as error:
        train()
    assert_one_line(error, str(output), "another run")
    assert "apart" not in str(error.value)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(InputError, match="of one run were started apart"):
        patch.setenv("SLURM_STEP_NUM_TASKS", "2")
        train()
    assert [path.name for path in output.iterdir()] == [".lock"]
    other.kill()
    other.communicate()
    train(max_train_steps=1)  # a lock dies with its process
    assert set(files_in(output)) == FILES


def test_a_file_system_without_locks_does_not_stop_a_run(tmp_path, monkeypatch):
    def refuse(self):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(faults.FileLock, "_acquire", refuse)
    with faults.locked(tmp_path / "output"):
        assert (tmp_path / "output" / ".lock").exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.processes
def test_nothing_here_needs_posix():
    """As on Windows, whose Python has none of these modules; the libraries are imported before."""
    paths = [*ROOT.glob("*.py"), *ROOT.glob("glance/**/*.py")]
    modules = sorted(".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths)
    if importlib.util.find_spec("gradio") is None:  # which the page alone needs
        modules.remove("glance.web.layout")
    code = f"""
import sys
import accelerate.tracking, bitsandbytes, datasets, diffusers.loaders, filelock, peft, torch, transformers
from diffusers import FluxPipeline, BitsAndBytesConfig
import PIL.Image, PIL.ImageOps, yaml, tqdm.auto, safetensors.torch
for name in ("fcntl", "pwd", "grp", "resource", "termios", "tty", "pty", "syslog"):
    sys.modules[name] = None
for name in {modules}:
    __import__(name)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]


# --------------------------------------------------------------------------------------------------------------------
# Numbers


@pytest.fixture
def bad_gradient(monkeypatch):
    """A parameter's gradient is infinite in the third backward pass; the loss is not."""
    fresh_adapter, count = train_glance_lora.fresh_adapter, 0

    def spoil(gradient):
        nonlocal count
        count += 1
        return gradient * float("inf") if count == 3 else gradient

    def watched(*rest):
        parameters = fresh_adapter(*rest)
        parameters[1].register_hook(spoil)
        return parameters

    monkeypatch.setattr(train_glance_lora, "fresh_adapter", watched)


def test_an_infinite_gradient_stops_before_the_optimizer_step(train, bad_gradient, tmp_path):
    with pytest.raises(FloatingPointError) as error:
        train(checkpointing_steps=1)
    assert_one_line(error, "slow: the gradients' norm is", "at step 3")
    assert set(files_in(tmp_path / "output")) == {"instance.png"}
    state = checkpoints.load_checkpoint("latest", tmp_path / "output")
    assert state["step"] == 2 and all(value.isfinite().all() for value in state["lora"].values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="accelerate scales fp16's loss on a GPU alone")
def test_fp16s_scaler_leaves_a_step_with_infinite_gradients_out(train, bad_gradient):
    output = train(mixed_precision="fp16", phase="slow", checkpointing_steps=1)
    states = [checkpoints.load_checkpoint(output / f"checkpoint-{step}", output) for step in (2, 3, 5)]
    for name, value in states[0]["lora"].items():
        assert torch.equal(value, states[1]["lora"][name]) and states[2]["lora"][name].isfinite().all()
    assert any(not torch.equal(value, states[2]["lora"][name]) for name, value in states[0]["lora"].items())


def test_the_log_ends_with_each_timesteps_first_and_last_loss(train, caplog):
    with caplog.at_level("INFO"):
        output = train(phase="slow", max_train_steps=10, report_to="tensorboard")
    logs = EventAccumulator(str(next((output / "logs").rglob("events.out*")).parent))
    logs.Reload()
    changes, rows = [], {}
    for timestep in read_recipe(output / WEIGHT_NAME).timesteps:
        first, last = logs.Scalars(f"slow/loss_at_{timestep:.0f}")
        changes.append(f"{timestep:.0f}: {first.value:.3g} -> {last.value:.3g}")
        rows |= {event.step: ("slow", event.step, timestep, pytest.approx(event.value)) for event in (first, last)}
    assert any(message.endswith(", ".join(changes)) for message in caplog.messages)
    assert log.read_losses(output, ["slow"]) == [rows[step] for step in range(1, 11)]
