"""What the commands say: their own lines and progress bars, and nothing of what libraries have to tell."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, flags


pytestmark = pytest.mark.processes
BARS = "slow|fast|images|(base|Glance), \\d+ steps|encoding|drawing.*|choosing.*|preview|validation|Loading .*"
OWN = re.compile(rf"\d\d:\d\d:\d\d - (INFO|WARNING) - .*|({BARS}): .*|\s*")
TINY = {"resolution": 32, "dtype": "float32", "steps": 1, "warmup": 1, "rank": 4}


def said(*command, **variables) -> list[str]:
    """What a script writes to stderr that is not its own, as a user's shell would start it."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment["OMP_WAIT_POLICY"] = "passive"  # else threads without work take the other tests' time
    environment |= variables
    environment.pop("TRANSFORMERS_VERBOSITY", None)
    environment.pop("DIFFUSERS_VERBOSITY", None)
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [line for line in re.split(r"[\r\n]+", done.stderr) if not OWN.fullmatch(line)]


def test_make_demo(pipelines, pair, tmp_path):
    base = {"pretrained_model_name_or_path": pipelines["flux"]}
    train = base | {"instance_image": pair, "output_dir": tmp_path / "o", "resolution": 32, "max_train_steps": 1}
    assert "\tACCELERATE_USE_CPU=1 $(BIN)/python train_glance_lora.py" in (ROOT / "Makefile").read_text()
    assert said(sys.executable, "train_glance_lora.py", *flags(**train), ACCELERATE_USE_CPU="1") == []
    infer = base | {"lora": tmp_path / "o", "prompt": "a dog", "output": tmp_path / "out.png", "compare": True}
    assert said(sys.executable, "infer_glance.py", *flags(**infer)) == []


def test_a_benchmark(pipelines):
    """It imports diffusers' pipelines before anything is set up, which is when transformers speaks."""
    settings = flags(pretrained_model_name_or_path=pipelines["flux"], **TINY)
    assert said(sys.executable, "benchmarks/infer.py", *settings) == []
