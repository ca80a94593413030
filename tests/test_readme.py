"""What README.md says can be copied, is copied and run."""

import re
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, run_train
from PIL import Image

from glance.files.recipe import WEIGHT_NAME, read_recipe
from glance_utils import PHASES


BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def demo_lora(tmp_path_factory):
    """Both LoRAs of configs/demo.yaml, trained for two steps each."""
    output = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        config = {"config": "configs/demo.yaml", "resolution": None, "rank": None}  # the config's own
        return run_train(config, {"output_dir": output, "max_train_steps": 2})


def run(block: str, folder: Path, monkeypatch) -> dict:
    monkeypatch.chdir(ROOT)
    names = {}
    exec(compile(block.replace("output/demo", str(folder)), "README.md", "exec"), names)
    return names


def test_plain_diffusers_draws_the_same_picture_bit_for_bit(demo_lora, infer, monkeypatch):
    block = next(block for block in BLOCKS if "hand_off" in block)
    names = run(block, demo_lora, monkeypatch)
    prompt = re.search(r'"(a small .*?)"', block)[1]
    ours = infer(ROOT / "demo/model", lora=demo_lora, prompt=prompt)
    assert np.array_equal(np.asarray(Image.open(ours)), np.asarray(Image.open(demo_lora / "plain.png")))
    written = [read_recipe(demo_lora / phase / WEIGHT_NAME)["timesteps"] for phase in PHASES]
    assert names["SLOW"] + names["FAST"] == pytest.approx(sum(written, []), abs=1e-9)


def test_the_header_can_be_read_as_shown(demo_lora, monkeypatch, capsys):
    run(next(block for block in BLOCKS if "safe_open" in block), demo_lora, monkeypatch)
    assert capsys.readouterr().out.startswith("[1000.0, ")


def test_a_training_step_in_ones_own_loop(monkeypatch, tmp_path):
    names = run(next(block for block in BLOCKS if "backward()" in block), tmp_path, monkeypatch)
    gradients = [parameter.grad for parameter in names["pipe"].transformer.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def test_inference_in_ones_own_pipeline(demo_lora, monkeypatch):
    names = run(next(block for block in BLOCKS if "glance_inference" in block), demo_lora, monkeypatch)
    assert names["image"].size == (96, 96) and np.asarray(names["image"]).std() > 0
