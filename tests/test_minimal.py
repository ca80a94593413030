"""demo/minimal.py, the method on one page, trains the product's own LoRAs."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT, run_train
from safetensors.torch import load_file

from glance_utils import PHASES


STEPS = 4  # the page has 60
SETTINGS = {
    "pretrained_model_name_or_path": ROOT / "demo/model",
    "instance_image": ROOT / "demo/glance.png",
    "pipeline_kwargs": '{"max_sequence_length": 16, "true_cfg_scale": 3.0, "negative_prompt": ""}',
    "resolution": 96,
    "rank": 8,
    "max_train_steps": STEPS,
}
LOSSES = {
    "flow": {},
    "trajectory": {"loss": "trajectory", "solver": "euler", "num_trajectories": 1},
}


@pytest.fixture(scope="module")
def minimal(tmp_path_factory):
    folder = tmp_path_factory.mktemp("minimal")
    (folder / "demo").mkdir()
    for name in ("model", "glance.png", "glance.txt"):
        (folder / "demo" / name).symlink_to(ROOT / "demo" / name)
    source = (ROOT / "demo/minimal.py").read_text()
    assert "STEPS, LEARNING_RATE = 60" in source
    (folder / "demo/minimal.py").write_text(source.replace("LEARNING_RATE = 60", f"LEARNING_RATE = {STEPS}"))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "demo.minimal"], cwd=folder, env=environment, check=True)
    return folder / "output" / "minimal"


@pytest.mark.processes
@pytest.mark.parametrize("loss", LOSSES)
def test_the_page_trains_the_products_loras(minimal, tmp_path, loss):
    output = run_train(SETTINGS | {"output_dir": tmp_path}, LOSSES[loss])
    for phase in PHASES:
        theirs = load_file(minimal / loss / phase / "pytorch_lora_weights.safetensors")
        ours = load_file(output / phase / "pytorch_lora_weights.safetensors")
        assert theirs.keys() == ours.keys()
        assert max((theirs[name] - ours[name]).abs().max().item() for name in ours) < 1e-5
    assert (minimal / f"{loss}.png").stat().st_size > 1000


def test_it_is_a_page():
    source = (ROOT / "demo/minimal.py").read_text()
    assert len(source.splitlines()) <= 100
    assert "from glance." not in source
