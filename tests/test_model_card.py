"""The model card says what the run did and nothing else, and what it says to run draws the run's own picture."""

import os
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
from accelerate.state import AcceleratorState
from conftest import ROOT, picture_distance
from huggingface_hub import ModelCard, constants
from PIL import Image
from safetensors.torch import load_file, save_file

import infer_glance
from glance.files.recipe import WEIGHT_NAME
from glance.training import card_data, model_card


TRAJECTORY = {
    "loss": "trajectory",
    "learning_rate": 3e-2,
    "instance_image": None,
    "instance_prompt": 'a "red" ring, #1',
}
TRAJECTORY |= {"num_base_steps": 12, "num_inference_steps": 4, "max_train_steps": 2}
NOTHING_IN_PLAIN = "so there are no lines of plain diffusers for it"

# By run: the base, its flags, what its card says, and what it does not say.
RUNS = {
    "as published": (
        "flux",
        {},
        ["Each LoRA: 5 steps of rank 4 at learning rate 0.03, by the flow-matching loss, on one image and its caption"]
        + ["Left: the image that was given; right: with both LoRAs", "by diffusers alone", "cfg 1", "in 10 steps"],
        ["trajector", "glance_utils", "Errors:", "--seed"],
    ),
    "trajectory": (
        "sd3",
        TRAJECTORY | {"validation_prompt": "a blue disc", "grid": "even"},
        ["by the trajectory loss, on 4 of the base's own 12-step trajectories of one caption", "No image was learned"]
        + ["Left: what the base's 12 steps draw", "coefficients=", "without the LoRAs**: 0.", "One caption is all"]
        + ["On the validation prompts: without LoRAs 0.", "](./validation/step_0004.png)"],
        ["flow-matching loss", "diffusers alone"],
    ),
    "guidance in the LoRAs": (
        "qwen",
        TRAJECTORY
        | {"guidance": "fold", "negative_prompt": " ", "true_cfg_scale": 4.0, "solver": "euler"}
        | {"num_trajectories": 1, "seed": 3, "mixed_precision": "bf16"},
        ["The base drew with guidance, the LoRAs were trained without", "true_cfg_scale=1", "cfg 1", "have no effect"]
        + ["--dtype bfloat16", "--seed 3", "dtype=torch.bfloat16", "manual_seed(3)"],
        [],
    ),
    "on top of a LoRA": (
        "flux",
        {"max_train_steps": 1},
        ["Part of the base was `", "slow` at 0.5, added to its weights", "pipe.fuse_lora(lora_scale=0.5)"],
        [],
    ),
    "one phase": (
        "flux",
        {"phase": "fast"},
        ["The LoRA: 5 steps of rank 4", "Fast-LoRA of a pair", "--slow_lora FOLDER", "--compare"],
        ["glance.png", "widget", "Each LoRA", "ComfyUI", "```python"],
    ),
}


def draw_as_said(folder: Path, where: Path, monkeypatch) -> list[Path]:
    """Run the card's command and, where it has some, its lines of Python; return the pictures."""
    card = (folder / "README.md").read_text()
    drawing, comparing = [line.strip() for line in card.splitlines() if line.startswith("    python infer_glance.py ")]
    assert comparing.startswith(drawing.removesuffix("--output out.png")) and "--compare" in comparing
    monkeypatch.chdir(where)
    (where / "demo").symlink_to(ROOT / "demo")  # its base is named from the root
    AcceleratorState._reset_state(reset_partial_state=True)
    infer_glance.main(shlex.split(drawing)[2:])
    drawn = [Path("out.png").rename(where / "by_command.png")]
    lines = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert bool(lines) == (NOTHING_IN_PLAIN not in card)
    if lines:
        exec(compile(lines[1], "the card", "exec"), {})
        drawn.append(Path("out.png").rename(where / "by_lines.png"))
    return drawn


@pytest.mark.parametrize("name", RUNS)
def test_it_is_true_and_what_it_says_to_run_draws(name, train, trained, tmp_path, monkeypatch):
    base, settings, said, unsaid = RUNS[name]
    settings = settings | ({"base_lora": f"{trained(base) / 'slow'}:0.5"} if "on top" in name else {})
    folder = train(base, **settings) if settings else trained(base)
    card = (folder / "README.md").read_text()
    for words in said:
        assert words in card, words
    for words in unsaid:
        assert words not in card, words
    for picture in re.findall(r"!\[.*?\]\(\./(.*?)\)", card):
        Image.open(folder / picture)
    data = ModelCard(card).data
    assert data.pipeline_tag == "text-to-image" and data.base_model is None and data.library_name == "diffusers"
    assert {"lora", "template:sd-lora", "glance", "distillation", "diffusers"} <= set(data.tags)
    if name != "one phase":
        assert data.widget == [{"text": data.instance_prompt, "output": {"url": "glance.png"}}]
        by_command, by_lines = draw_as_said(folder, tmp_path, monkeypatch)
        assert picture_distance(by_command, by_lines) <= (1 if "on top" in name else 0)
        # In bfloat16 the preview's VAE still computes in float32.
        assert picture_distance(by_command, folder / "glance.png") <= (8 if "bf16" in settings.values() else 1)


def test_a_lora_of_the_base_without_a_prefix_is_added_too(train, trained, tmp_path, monkeypatch):
    """diffusers' pipelines find nothing in such a file, and say so in a warning alone."""
    weights = load_file(trained() / "slow" / WEIGHT_NAME)
    save_file(
        {name.removeprefix("transformer."): value for name, value in weights.items()}, tmp_path / "style.safetensors"
    )
    folder = train(base_lora=f"{tmp_path / 'style.safetensors'}:0.5", max_train_steps=1)
    (tmp_path / "here").mkdir()
    by_command, by_lines = draw_as_said(folder, tmp_path / "here", monkeypatch)
    assert picture_distance(by_command, by_lines) <= 1


def written_of(loss: str, captions: int, image: bool, **settings) -> str:
    """What the card says was trained."""
    args = {"num_trajectories": 4, "max_train_steps": 60, "rank": 8, "learning_rate": 1e-5, "flow_weight": 0}
    args |= {
        "train_coefficients_only": False,
        "parallel_phases": False,
        "custom_timesteps": {"slow": None, "fast": None},
    }
    answers = SimpleNamespace(timesteps=[0.0] * 50, image_latents=0 if image else None)
    prepared = SimpleNamespace(captions=["a red ring"] * captions, answers=answers)
    return getattr(model_card, f"by_{loss}")(SimpleNamespace(**args | settings), prepared)


def test_what_was_learned_from_is_said_of_each_loss():
    drawn = "one image, which the base drew of the caption in 50 steps"
    assert "one image and its caption" in written_of("flow", 1, True) and drawn in written_of("flow", 1, False)
    several = written_of("trajectory", 9, True)
    assert "4 of the base's own 50-step trajectories of each of 9 captions" in several and "No image" in several
    both = written_of("trajectory", 1, False, flow_weight=0.1)
    assert f"Beside it 0.1 times the flow-matching loss, on {drawn}" in both and "No image" not in both
    assert "Left out, to measure on: 2 of the captions." in written_of("endpoint", 9, False)
    assert "Left out, to measure on: 1 of each caption's 4." in written_of("endpoint", 3, False)
    assert "Left out, to measure on: 1 of these 4." in written_of("endpoint", 1, False)
    assert "Left out" not in written_of("endpoint", 3, False, num_trajectories=2)
    assert "LoRA" not in written_of("endpoint", 9, False, train_coefficients_only=True)


# --------------------------------------------------------------------------------------------------------------------
# What the hub reads


def settings_of(base, **given) -> SimpleNamespace:
    given = {"revision": None, "variant": None, "cache_dir": None, "push_to_hub": False} | given
    return SimpleNamespace(pretrained_model_name_or_path=str(base), **given)


@pytest.mark.parametrize(
    "base, name",
    [
        ("black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-dev"),
        ("/models/a: b #1", None),
        ("{here}/model", None),
        ("./model", None),
        ("model", None),
        ("some/model", None),
    ],
)
def test_a_base_of_the_hub_is_named_or_none(base, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("model", "some/model"):
        os.makedirs(folder)
    args = settings_of(base.replace("{here}", str(tmp_path)))
    data = card_data.front_matter(args, diffusers.FluxPipeline, {"prompt": "a red ring"}, [], True)
    assert data.base_model == name and data.base_model_relation == (name and "adapter")


LICENCES = {
    "license: apache-2.0": {"license": "apache-2.0"},
    "license: other\nlicense_name: my-own\nlicense_link: LICENSE.md": {"license": "other", "license_name": "my-own"},
    "license: other\nlicense_link: https://a.b/c": {"license": "other", "license_link": "https://a.b/c"},
    "license: [mit, apache-2.0]": {},
    "license: 'mit\n\n# a heading'": {},
    "license_name: my-own": {},
    "license: {a": {},
    "[1, 2]": {},
}


@pytest.mark.parametrize("text", LICENCES)
def test_the_licence_is_the_bases(text, tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text(f"---\n{text}\n---\n# A base\n")
    assert card_data.licence_of(settings_of(tmp_path)) == LICENCES[text]
    # the same from the hub's cache, where a link leads to the base's own page
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    repository = tmp_path / "cache" / "models--lab--base"
    for folder, name, content in (("refs", "main", "0" * 40), (f"snapshots/{'0' * 40}", "README.md", None)):
        (repository / folder).mkdir(parents=True)
        content = content or (tmp_path / "README.md").read_text()
        (repository / folder / name).write_text(content)
    link = {"license_link": "https://huggingface.co/lab/base/blob/main/LICENSE.md"} if "LICENSE.md" in text else {}
    assert card_data.licence_of(settings_of("lab/base", cache_dir=str(tmp_path / "cache"))) == LICENCES[text] | link


def test_no_licence_is_no_wait(tmp_path, monkeypatch):
    """Where it is neither beside the base nor in the cache; a run that pushes asks the hub, and goes on without it."""
    (tmp_path / "README.md").write_bytes(b"\xff\xfe no text")
    assert card_data.licence_of(settings_of(tmp_path)) == {}
    assert card_data.licence_of(settings_of(tmp_path / "nowhere")) == {}
    monkeypatch.setattr("huggingface_hub.file_download.get_hf_file_metadata", lambda *a, **k: pytest.fail("asked"))
    assert card_data.licence_of(settings_of("lab/base", cache_dir=str(tmp_path))) == {}


@pytest.mark.parametrize(
    "kind, call, tag",
    [
        ("FluxPipeline", {}, "text-to-image"),
        ("WanPipeline", {}, "text-to-video"),
        ("WanPipeline", {"num_frames": 1}, "text-to-image"),
        ("MochiPipeline", {"num_frames": 7}, "text-to-video"),
        ("FluxKontextPipeline", {}, "text-to-image"),
        ("FluxKontextPipeline", {"image": Image.new("RGB", (8, 8))}, "image-to-image"),
        ("WanPipeline", {"image": [Image.new("RGB", (8, 8))]}, "image-to-video"),
    ],
)
def test_the_task_is_what_the_call_does(kind, call, tag):
    assert card_data.pipeline_tag(getattr(diffusers, kind), {"prompt": "a red ring"} | call) == tag
