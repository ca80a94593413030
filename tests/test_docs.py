"""What README.md and docs/ say can be copied, is copied and run; their flags, files and links are there."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, picture_distance, run_train
from PIL import Image
from safetensors import safe_open
from test_model_card import draw_as_said

import infer_glance
import train_glance_lora
from glance import page as web_page
from glance.files.recipe import WEIGHT_NAME
from glance_utils import PHASES


PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
BLOCKS = [block for page in PAGES for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)]
FLAG = r"(?<![\w-])--[a-z]\w+(?:-\w+)*"
LAUNCHERS = {"--config_file", "--num_processes", "--main_process_ip", "--machine_rank", "--multi_gpu", "--cpu"}
LAUNCHERS |= {"--use_fsdp", "--fsdp_version", "--dynamo_backend", "--rows"}  # the last is benchmarks/quality.py's


def block_with(words: str) -> str:
    [block] = [block for block in BLOCKS if words in block]
    return block


@pytest.fixture(scope="module")
def demo_lora(tmp_path_factory):
    """Both LoRAs of configs/demo.yaml, trained for two steps each."""
    output = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        config = {"config": "configs/demo.yaml", "resolution": None, "rank": None}  # the config's own
        return run_train(config, {"output_dir": output, "max_train_steps": 2})


def run(block: str, folder: Path, monkeypatch, **names) -> dict:
    monkeypatch.chdir(ROOT)
    exec(compile(block.replace("output/demo", str(folder)), "a page", "exec"), names)
    return names


def timesteps_in(folder: Path) -> list[float]:
    timesteps = []
    for phase in PHASES:
        with safe_open(folder / phase / WEIGHT_NAME, "pt") as file:
            timesteps += json.loads(file.metadata()["glance"])["timesteps"]
    return timesteps


def test_plain_diffusers_draws_the_same_picture_bit_for_bit(demo_lora, infer, monkeypatch):
    block = block_with("hand_off")
    names = run(block, demo_lora, monkeypatch)
    prompt = re.search(r'"(a small .*?)"', block)[1]
    ours = infer(ROOT / "demo/model", lora=demo_lora, prompt=prompt)
    assert np.array_equal(np.asarray(Image.open(ours)), np.asarray(Image.open(demo_lora / "plain.png")))
    assert names["SLOW"] + names["FAST"] == pytest.approx(timesteps_in(demo_lora), abs=1e-9)
    # README's own lines, with what that block has made
    from glance_utils import glance_inference

    names = {name: names[name] for name in ("SLOW", "FAST")} | {"glance_inference": glance_inference}
    fresh = run(block[: block.index("pipe.load_lora")], demo_lora, monkeypatch)["pipe"]
    image = run(block_with('{"slow": SLOW'), demo_lora, monkeypatch, pipe=fresh, **names)["image"]
    assert image.size == (96, 96) and np.asarray(image).std() > 0


def test_the_card_of_the_demo_draws_what_infer_draws(demo_lora, monkeypatch, tmp_path):
    drawn = draw_as_said(demo_lora, tmp_path, monkeypatch)
    assert all(picture_distance(path, demo_lora / "glance.png") <= 1 for path in drawn)
    assert picture_distance(*drawn) == 0


def test_the_header_can_be_read_as_shown(demo_lora, monkeypatch, capsys):
    run(block_with('["timesteps"])\n'), demo_lora, monkeypatch)
    assert capsys.readouterr().out.startswith("[1000.0, ")


def test_the_sigmas_for_comfyui_are_those_of_the_files(demo_lora, monkeypatch, capsys):
    run(block_with("sigma:.9f"), demo_lora, monkeypatch)
    sigmas = [float(sigma) for sigma in capsys.readouterr().out.split(",")]
    assert sigmas == pytest.approx([timestep / 1000 for timestep in timesteps_in(demo_lora)] + [0], abs=1e-8)


def test_a_training_step_in_ones_own_loop(monkeypatch, tmp_path):
    names = run(block_with("backward()"), tmp_path, monkeypatch)
    gradients = [parameter.grad for parameter in names["pipe"].transformer.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def test_inference_in_ones_own_pipeline(demo_lora, monkeypatch):
    names = run(block_with("Schedule(phases"), demo_lora, monkeypatch)
    assert names["image"].size == (96, 96) and np.asarray(names["image"]).std() > 0


def test_the_readme_is_read_in_five_minutes():
    for page in (ROOT / "README.md", ROOT / "README.ja.md"):
        lines = page.read_text().splitlines()
        assert len(lines) <= 180 and max(map(len, lines)) <= 120
    assert len((ROOT / "README.md").read_text().split()) <= 1800


def test_both_readmes_give_the_same_commands():
    def code(page: Path) -> list[str]:
        text = page.read_text()
        return re.findall(r"```.*?```", text, re.DOTALL) + re.findall(r"^    .*$", text, re.MULTILINE)

    assert code(ROOT / "README.md") == code(ROOT / "README.ja.md")


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.ja.md", ROOT / "CONTRIBUTING.md"], ids=lambda path: path.stem)
def test_what_a_page_names_is_there(page, capsys):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), target
    for name in re.findall(r"`((?:glance|demo|configs|tests|benchmarks|docs)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), name
    for module in (train_glance_lora, infer_glance, web_page):
        with pytest.raises(SystemExit):
            module.main(["--help"])
    known = set(re.findall(FLAG, capsys.readouterr().out)) | LAUNCHERS
    assert set(re.findall(FLAG, text)) <= known
