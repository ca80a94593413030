"""Several processes, on CPUs by gloo: DDP, FSDP2, and the two phases on two halves of the processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.utils import is_deepspeed_available
from conftest import ROOT, contents, flags, long, picture_distance, run_train
from lifetimes import EXPECTED
from peak_memory import small_flux
from PIL import Image
from test_train import assert_close, lora, recipe_of

from glance.files.checkpoints import find_checkpoints
from glance.files.recipe import WEIGHT_NAME
from glance_utils import InputError


pytestmark = pytest.mark.processes
PHASES = ("slow", "fast")
KINDS = {"ddp": ["--multi_gpu"], "fsdp": ["--use_fsdp", "--fsdp_version=2"]}
KINDS["deepspeed"] = ["--use_deepspeed", "--zero_stage=2"]
ON_CPU = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
DEEPSPEED_ON_CPU = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu"}
# Gives memory back at once, so that it can be measured.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_TOP_PAD_": "0"}
COMMON = {"resolution": 32, "rank": 4, "max_train_steps": 4, "learning_rate": 1e-4}
VALIDATED = {"validation_prompt": "a blue disc"}
QUICK = {"no-gradient_checkpointing": True}  # as conftest.run_train; the others ask whether a step fits


def launch(kind: list[str], processes: int, *command) -> subprocess.CompletedProcess:
    """Run a script in several processes. `accelerate launch --cpu` starts but one where there is no MPI; its launcher
    for several GPUs, which is torchrun, serves CPUs as well."""
    launcher = "-m accelerate.commands.launch --num_machines=1 --main_process_port=0 --dynamo_backend=no"
    launcher = [*launcher.split(), "--mixed_precision=no", f"--num_processes={processes}", *kind]
    return subprocess.run(
        [sys.executable, *launcher, *map(str, command)],
        env=os.environ | ALLOCATOR | (DEEPSPEED_ON_CPU if "--use_deepspeed" in kind else ON_CPU),
        capture_output=True,
        text=True,
        timeout=200,
    )


def launch_runs(kind: list[str], processes: int, root: Path, runs: list[tuple]) -> subprocess.CompletedProcess:
    """tests/launched.py with these (settings, signal)."""
    (root / "runs.json").write_text(json.dumps([(flags(**run), number) for run, number in runs]))
    return launch(kind, processes, ROOT / "tests" / "launched.py", root / "runs.json")


def files_in(folder: Path) -> dict[str, bytes]:
    """What a user gets: all but checkpoints and what tests/launched.py keeps."""
    return {
        name: content
        for name, content in contents(folder).items()
        if "checkpoint-" not in name and name[-3:] not in (".pt", "txt")
    }


def assert_same_output(one: Path, other: Path) -> None:
    """The same files: equal texts and recipes, and what other processes may round otherwise nearly so."""
    assert files_in(one).keys() == files_in(other).keys()
    assert files_in(one)["README.md"] == files_in(other)["README.md"]  # up to the folder's own name
    assert [recipe_of(one / phase) for phase in PHASES] == [recipe_of(other / phase) for phase in PHASES]
    assert_close(one, other, 1e-5)
    assert all(picture_distance(one / name, other / name) <= 1 for name in ("instance.png", "glance.png"))


@pytest.fixture(scope="module")
def settings(pipelines, pair):
    """settings(base, output folder, **flags) of a run whose processes share a batch of four."""

    def call(base: str, output_dir, processes: int, **flags) -> dict:
        where = {"pretrained_model_name_or_path": pipelines[base], "instance_image": pair, "output_dir": output_dir}
        return COMMON | where | {"train_batch_size": 4 // processes} | flags

    return call


@pytest.fixture(scope="module")
def trajectory(tmp_path_factory) -> dict:
    """Flags of a run with six trajectories."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a blue disc\na green star\n")
    return {"loss": "trajectory", "prompts_file": path, "num_trajectories": 2, "num_base_steps": 20}


@pytest.fixture(scope="module")
def endpoint(trajectory) -> dict:
    """Flags of a run through all of its calls, whose sampler both processes find together."""
    found = {"num_model_calls": 4, "num_plans": 1, "num_trajectories": 2, "num_base_steps": 8, "guidance_scale": 3}
    return found | {"prompts_file": trajectory["prompts_file"], "gradient_accumulation_steps": 1, "lr_warmup_steps": 0}


@pytest.fixture(scope="module")
def single(settings, trajectory, endpoint, styles, tmp_path_factory):
    """single(name of a base, or "trajectory", "endpoint" or "fp8"): the folder of one process's run."""
    folders = {}

    def call(name: str) -> Path:
        if name not in folders:
            base, further = {
                "trajectory": ("flux", trajectory),
                "endpoint": ("sd3", endpoint),
                "fp8": ("flux", {"quantization": "fp8"}),
                "flux": ("flux", VALIDATED),
            }.get(name, (name, {}))
            further |= {"timesteps_per_step": 2, "base_lora": styles("qwen")[0]} if name == "qwen" else {}
            folders[name] = run_train(settings(base, tmp_path_factory.mktemp("single") / name, 1), further)
        return folders[name]

    return call


@pytest.fixture(scope="module")
def launched(settings, trajectory, endpoint, styles, tmp_path_factory):
    """launched(kind, processes): the folder of the output folders of several runs in one launch, the last one killed;
    the launch; how many seconds it lived on."""
    found = {}

    def call(kind: str, processes: int) -> tuple:
        if (kind, processes) not in found:
            root = tmp_path_factory.mktemp(f"{kind}-{processes}")
            stopped = settings("flux", root / "stopped", processes, **QUICK, **VALIDATED)
            runs = [(settings("flux", root / "flux", processes, **VALIDATED), 0)]
            qwen = {"timesteps_per_step": 2, "base_lora": styles("qwen")[0]}
            if processes == 2:
                runs += [
                    (settings("qwen", root / "qwen", 2, gradient_checkpointing=True, **qwen), 0),
                    (settings("flux", root / "trajectory", 2, **trajectory, **QUICK), 0),
                    (
                        settings(
                            "sd3", root / "bf16", 2, mixed_precision="bf16", validation_steps=2, **QUICK, **VALIDATED
                        ),
                        0,
                    ),
                    *[(settings("flux", root / "fp8", 2, quantization="fp8"), 0)] * (kind == "ddp"),
                    *[(settings("sd3", root / "endpoint", 2, **endpoint), 0)] * (kind == "ddp"),
                    (stopped, signal.SIGTERM),
                    (stopped | {"resume_from_checkpoint": "latest"}, 0),
                ]
            runs += [(settings("flux", root / "killed", processes, max_train_steps=1000, **QUICK), signal.SIGKILL)]
            done = launch_runs(KINDS[kind], processes, root, runs)
            killed = root / "killed" / "signal.txt"
            found[kind, processes] = root, done, time.time() - float(killed.read_text() if killed.exists() else 0)
        return found[kind, processes]

    return call


# --------------------------------------------------------------------------------------------------------------------
# DDP and FSDP2


RUNS = [("ddp", 2, "flux"), ("fsdp", 2, "flux"), long("fsdp", 4, "flux"), ("fsdp", 2, "trajectory")]
RUNS += [long("ddp", 2, "qwen"), long("fsdp", 2, "qwen"), long("ddp", 2, "trajectory")]
RUNS += [long("ddp", 2, "fp8"), ("ddp", 2, "endpoint")]


@pytest.mark.parametrize("kind, processes, base", RUNS)
def test_several_processes_equal_one_with_the_same_batch(kind, processes, base, launched, single):
    root, done, _ = launched(kind, processes)
    assert (root / base / "glance.png").exists(), done.stderr[-5000:]
    assert max(value.abs().max() for name, value in lora(single(base) / "slow").items() if "lora_B" in name) > 1e-4
    assert_close(root / base, single(base), 1e-5)
    assert picture_distance(root / base / "glance.png", single(base) / "glance.png") <= 1
    assert (root / base / "validation" / "step_0008.png").exists() == (base == "flux")
    for phase in PHASES:
        ranks = [torch.load(root / base / f"{phase}-rank-{rank}.pt") for rank in range(processes)]
        assert len(ranks[0]) == len(lora(single(base) / phase))
        for name, value in ranks[0].items():
            assert all(torch.equal(value, other[name]) for other in ranks[1:]), name


def test_what_two_processes_exchange(tmp_path):
    """The mean of gradients, zeros where a process has none; the first one's parameters; work, each job done once."""
    done = launch(KINDS["ddp"], 2, ROOT / "tests" / "exchange.py", tmp_path)
    assert done.returncode == 0, done.stderr[-5000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for found in (first, second):
        assert found["gradients"] == [[2.0] * 2, [2.0] * 2, None, [float("inf")] * 2]
        assert found["parameters"] == [[float(number)] * 2 for number in range(4)]
        for kind in ("whole", "sharded"):
            assert found[kind][1] == [[1.0] * 2, [2.0] * 2, [3.0] * 2]
    assert [found["whole"][0] for found in (first, second)] == [[1, 3], [2]]
    assert [found["sharded"][0] for found in (first, second)] == [[1, 3], [2, 3]]  # all compute, or none


def seen(folder: Path) -> list[dict]:
    """What each of two processes saw, by tests/launched.py."""
    return [json.loads((folder / f"seen-rank-{rank}.txt").read_text()) for rank in range(2)]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_each_trajectory_is_drawn_by_one_process(kind, launched):
    """Those that choose the sampler, the one that measures it, and the rest: six, three on each of the processes."""
    walks = [[tuple(walk) for walk in rank["walks"]] for rank in seen(launched(kind, 2)[0] / "trajectory")]
    whole = [[walk for walk in rank if walk[2] == 20] for rank in walks]
    captions = ["a red ring", "a blue disc", "a green star"]
    assert sorted(sum(whole, [])) == sorted((captions[index // 2], 1 + index, 20) for index in range(6))
    assert [len(rank) for rank in whole] == [3, 3]
    assert [len(rank) for rank in walks] == [5, 5]  # and each of the four ways to sample once


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_nothing_but_the_vae_waits_in_memory_for_its_turn(kind, launched):
    for base in ("flux", "qwen", "trajectory"):
        first, second = (rank["moments"] for rank in seen(launched(kind, 2)[0] / base))
        assert {moment: set(names) for moment, names in first.items()} == EXPECTED
        assert second == {moment: first[moment] for moment in second} and {"reading", "training"} <= set(second)


def test_a_sharded_base_in_half_precision_is_the_base(launched):
    """SD3 keeps a buffer in its files, and half precision rounds it. Bit for bit: two gradients have but one sum, and
    a tolerance that half precision's own rounding passes would let the buffer's pass too."""
    ddp, fsdp = (launched(kind, 2)[0] / "bf16" for kind in ("ddp", "fsdp"))
    for phase in PHASES:
        wanted, found = lora(ddp / phase), lora(fsdp / phase)
        assert all(torch.equal(value, found[name]) for name, value in wanted.items())
    names = [f"step_{step:04d}.png" for step in (2, 4, 6, 8)]
    assert sorted(path.name for path in (fsdp / "validation").iterdir()) == names
    for name in names:  # drawn by the first of two processes, or by both; an error may round up in one of them
        wanted, found = (np.asarray(Image.open(folder / "validation" / name)).astype(int) for folder in (ddp, fsdp))
        assert np.abs(wanted - found).mean() < 1


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_signal_to_one_process_stops_all_at_a_checkpoint_and_resumed_equals_uninterrupted(kind, launched):
    root, done, _ = launched(kind, 2)
    assert "stopped by SIGTERM; go on with" in done.stderr and done.stderr.count("go on with") == 1
    assert [step for step, _ in find_checkpoints(root / "stopped")] == [3]
    assert files_in(root / "stopped") == files_in(root / "flux")


def test_one_process_goes_on_from_what_two_left_with_the_same_batch(launched, settings, single, tmp_path):
    """Their checkpoint, and their finished LoRA; with half the batch it is another run."""
    stopped, run = launched("ddp", 2)[0] / "stopped", settings("flux", tmp_path, 1)
    shutil.copytree(stopped / "checkpoint-3", tmp_path / "checkpoint-3")
    with pytest.raises(InputError, match="its total_batch_size is 4, this run's is 2; use the same"):
        run_train(run, {"resume_from_checkpoint": "latest", "train_batch_size": 2})
    run_train(run, {"resume_from_checkpoint": "latest"})
    assert_close(tmp_path, single("flux"), 1e-5)
    for path in (tmp_path / "checkpoint-3", tmp_path / "slow", tmp_path / "fast"):
        shutil.rmtree(path)
    for phase in PHASES:
        shutil.copytree(stopped / phase, tmp_path / phase)
    content = files_in(tmp_path)
    with pytest.raises(InputError, match="latest: the LoRA in .* is of another run"):
        run_train(run, {"resume_from_checkpoint": "latest", "train_batch_size": 2})
    run_train(run, {"resume_from_checkpoint": "latest"})
    names = [f"{phase}/{WEIGHT_NAME}" for phase in PHASES]
    assert {name: files_in(tmp_path)[name] for name in names} == {name: content[name] for name in names}


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_the_first_of_several_processes_speaks(kind, launched):
    """Of torch's warnings none is left: no view of a block's output that FSDP would lose its hook on."""
    _, done, _ = launched(kind, 2)
    assert done.stderr.count("Done") == 5 + 2 * (kind == "ddp")
    assert "RANK" not in done.stderr and "UserWarning" not in done.stderr


def test_a_mistake_is_the_first_line_and_in_the_launchers_last(tmp_path):
    """Even where the first process is the last to find it: the launcher ends the others when one has ended."""
    late = tmp_path / "late.py"
    late.write_text(
        "import os, runpy, sys, time\n"
        "time.sleep(3 * (os.environ['RANK'] == '0'))\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        f"sys.argv[0] = {str(ROOT / 'train_glance_lora.py')!r}\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    done = launch(KINDS["ddp"], 2, late, "--rank=0")
    first, *_, last, _ = done.stderr.splitlines()
    assert first.startswith("train_glance_lora.py: error: argument --rank") and last.endswith(first)
    assert sum(line.startswith("train_glance_lora.py: error") for line in done.stderr.splitlines()) == 1


@pytest.mark.parametrize("kind, processes", [("ddp", 2), ("fsdp", 2), ("fsdp", 4)])
def test_a_killed_process_ends_the_launch(kind, processes, launched):
    root, done, ended = launched(kind, processes)
    assert done.returncode != 0 and ended < 60
    assert not (root / "killed" / "slow" / WEIGHT_NAME).exists()


@pytest.mark.skipif(not is_deepspeed_available(), reason="pip install deepspeed, which builds its operators here")
def test_zero_2_equals_one_process(settings, single, tmp_path):
    done = launch_runs(KINDS["deepspeed"], 2, tmp_path, [(settings("flux", tmp_path / "output", 2), 0)])
    assert done.returncode == 0, done.stderr[-5000:]
    assert_close(tmp_path / "output", single("flux"), 1e-5)
    for phase in PHASES:
        ranks = [torch.load(tmp_path / "output" / f"{phase}-rank-{rank}.pt") for rank in range(2)]
        assert all(torch.equal(value, ranks[1][name]) for name, value in ranks[0].items())


def test_no_process_but_the_first_ever_holds_the_whole_base(pipelines, tmp_path):
    """In its own memory: it has its rows and one parameter more. The first one maps the files, and holds the base only
    where it must convert it: the second of the two, in float32."""
    for dtype in (torch.bfloat16, torch.float32):
        shutil.copytree(pipelines["flux"], tmp_path / str(dtype))
        shutil.rmtree(tmp_path / str(dtype) / "transformer")
        small_flux().to(dtype).save_pretrained(tmp_path / str(dtype) / "transformer", max_shard_size="40MB")
    done = launch(KINDS["fsdp"], 2, ROOT / "tests" / "peak_memory.py", "share", *sorted(tmp_path.iterdir()))
    assert done.returncode == 0, done.stderr[-5000:]
    ranks = [json.loads(line) for line in done.stdout.splitlines()]
    for mapped, converted in ranks:
        assert mapped["held"] < 0.51 * mapped["model"]
        assert mapped["peak"] < mapped["held"] + 2 * mapped["largest"]
    peaks = sorted(converted["peak"] for _, converted in ranks)
    limit = converted["held"] + 2 * converted["largest"]
    assert peaks[0] < limit and peaks[1] < converted["model"] + limit


# --------------------------------------------------------------------------------------------------------------------
# --parallel_phases


def test_phases_in_parallel_equal_phases_in_turn(launched, settings, tmp_path):
    """On two halves of two processes each, under FSDP2; all files."""
    run = settings("flux", tmp_path / "output", 2, parallel_phases=True, **VALIDATED)
    done = launch_runs(KINDS["fsdp"], 4, tmp_path, [(run, 0)])
    assert done.returncode == 0, done.stderr[-5000:]
    assert_same_output(tmp_path / "output", launched("fsdp", 2)[0] / "flux")
    first, _ = seen(tmp_path / "output")
    assert {moment: set(names) for moment, names in first["moments"].items()} == EXPECTED


@pytest.mark.long
def test_phases_in_parallel_stop_together_and_go_on(single, settings, tmp_path):
    """On two halves of one process each, by one command line, which starts anew where there is nothing: the fast one
    is told to stop, and has then nothing to go on from."""
    go_on = {"resume_from_checkpoint": "latest"} | QUICK | VALIDATED
    run = settings("flux", tmp_path / "output", 1, parallel_phases=True, **go_on)
    done = launch_runs(KINDS["ddp"], 2, tmp_path, [(run, signal.SIGTERM)])
    output = tmp_path / "output"
    assert [step for step, _ in find_checkpoints(output / "fast")] == [3], done.stderr[-5000:]
    assert not (output / "fast" / WEIGHT_NAME).exists() and not (output / "README.md").exists()
    shutil.rmtree(output / "fast" / "checkpoint-3")
    done = launch_runs(KINDS["ddp"], 2, tmp_path, [(run, 0)])
    assert done.returncode == 0, done.stderr[-5000:]
    assert_same_output(output, single("flux"))


# --------------------------------------------------------------------------------------------------------------------
# Pictures


def test_two_processes_share_the_pictures(trained, infer, pipelines, tmp_path):
    settings = {"lora": trained("flux"), "prompt": ["a red ring", "a blue ring", "a dog"]}
    (tmp_path / "two").mkdir()
    output = {"pretrained_model_name_or_path": pipelines["flux"], "output": tmp_path / "two" / "out.png"}
    done = launch(KINDS["ddp"], 2, ROOT / "infer_glance.py", *flags(**output, **settings))
    assert done.returncode == 0, done.stderr[-5000:]
    single = infer(**settings)
    names = ["out-000.png", "out-001.png", "out-002.png"]
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == names
    for name in names:
        assert picture_distance(tmp_path / "two" / name, single.with_name(name)) <= 1
    assert done.stdout.count("out-*.png") == 1  # one process reports
    assert "3/3" not in done.stderr  # neither drew all
