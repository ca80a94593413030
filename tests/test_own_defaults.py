"""What no flag says: the size is what the pipeline draws when it is not asked for one, and an image is one frame."""

import inspect
import json

import numpy as np
import pytest
import torch
from conftest import run_train
from diffusers import DiffusionPipeline
from PIL import Image
from test_families import FAMILIES

import train_glance_lora
from glance.ask import latents as ask_latents
from glance.ask import pipeline as ask
from glance.files.recipe import WEIGHT_NAME, read_recipe
from glance.training import own_defaults
from glance.training.weightless import load_without_weights
from glance_utils import InputError


RECIPE = f"slow/{WEIGHT_NAME}"


def test_the_size_asked_of_configs_is_the_one_that_is_drawn(pipelines):
    pipe = DiffusionPipeline.from_pretrained(pipelines["sd3"])
    drawn = pipe("a red ring", num_inference_steps=1).images[0]
    for dtype in (torch.float32, torch.bfloat16):
        asked = load_without_weights(str(pipelines["sd3"]), dtype)
        size = ask_latents.ask_size(asked, prompt="a red ring")
        assert size == drawn.size[::-1] == (64, 64)  # 32 latents of factor 2


@pytest.mark.parametrize("name", ["wan", "ltx", "hunyuan_video", "prx_pixel", "bria", "aura_flow"])
def test_a_size_in_the_signature_is_the_pipelines_own(name, tmp_path):
    """Video has its sides there; PRXPixel has no VAE, and Bria moves its VAE while it is built."""
    make, _, extra = FAMILIES[name]
    pipe = load_without_weights(str(make(tmp_path)), torch.float32)
    parameters = inspect.signature(type(pipe).__call__).parameters
    sides = tuple(parameters[side].default for side in ("height", "width"))
    square = {"prx_pixel": (1024, 1024), "bria": (256, 256)}  # a latent side of 64, of factor 4 with its patches
    assert ask_latents.ask_size(pipe, prompt="a red ring", **extra) == square.get(name, sides)


@pytest.fixture(autouse=True)
def lines(caplog):
    caplog.set_level("INFO")


def test_a_run_without_a_size_has_the_pipelines_own(train, tmp_path, caplog):
    output = train("sd3", resolution=None, checkpointing_steps=2, max_train_steps=2)
    assert "Size: 64x64, StableDiffusion3Pipeline's own" in caplog.text
    recipe = read_recipe(output / RECIPE)
    assert (recipe.height, recipe.width) == (64, 64)
    assert Image.open(output / "instance.png").size == Image.open(output / "glance.png").size == (64, 64)
    # said by a flag it is the same run, which is finished
    said = train("sd3", resolution=64, checkpointing_steps=2, max_train_steps=2, resume_from_checkpoint="latest")
    assert said == output and "slow: finished before" in caplog.text


def test_a_side_that_is_given_leaves_the_other_to_the_pipeline(train, capsys, caplog):
    train("sd3", resolution=None, height=32, dry_run=True)
    assert "transformer" in capsys.readouterr().out and "Size: 64x64" in caplog.text
    caplog.clear()
    output = train("sd3", resolution=None, height=32, phase="slow", max_train_steps=1)
    recipe = read_recipe(output / WEIGHT_NAME)
    assert (recipe.height, recipe.width) == (32, 64)


def test_a_size_that_is_said_asks_nothing(train, monkeypatch, caplog):
    monkeypatch.setattr(own_defaults, "load_without_weights", None)
    train("sd3", phase="slow", max_train_steps=1)
    assert "Size:" not in caplog.text


def test_a_pipeline_without_a_size_of_its_own_is_said_to_need_one(pair, tmp_path):
    make, _, _ = FAMILIES["glm"]
    with pytest.raises(InputError, match="GlmImagePipeline refuses .*without a size, so give --resolution, or --hei"):
        run_train(
            {"pretrained_model_name_or_path": make(tmp_path / "glm"), "instance_image": pair, "resolution": None},
            {"output_dir": tmp_path / "output"},
        )
    assert not (tmp_path / "output").exists()


def test_an_image_is_one_frame_of_video_and_inference_draws_one(pair, infer, tmp_path, caplog):
    make, size, _ = FAMILIES["wan"]
    base = make(tmp_path / "wan")
    settings = {"pretrained_model_name_or_path": base, "instance_image": pair, "resolution": size}
    settings |= {"output_dir": tmp_path / "output", "max_train_steps": 1, "phase": "both", "guidance": "fold"}
    output = run_train(settings, {})
    assert "num_frames: 1, as an image is learned, and WanPipeline draws video" in caplog.text
    assert read_recipe(output / RECIPE).pipeline_kwargs == {"num_frames": 1}
    picture = np.asarray(Image.open(infer(base, lora=output)))
    assert picture.shape[:2] == (size, size)
    # the same by a flag, so that a run that goes on finds it finished
    caplog.clear()
    run_train(settings, {"pipeline_kwargs": json.dumps({"num_frames": 1}), "resume_from_checkpoint": "latest"})
    assert "num_frames" not in caplog.text and "slow: finished before" in caplog.text


def test_the_name_of_the_frames_is_the_pipelines(tmp_path):
    """And without an image, which has one frame, the pipeline's own number stays."""
    make, size, _ = FAMILIES["sana_video"]
    base = make(tmp_path)
    settings = [f"--pretrained_model_name_or_path={base}", f"--resolution={size}"]
    args = train_glance_lora.parse_args([*settings, "--instance_prompt=a ring"])
    assert vars(own_defaults.with_one_frame(args)) == vars(args)
    args = train_glance_lora.parse_args([*settings, "--instance_image=image.png"])
    assert own_defaults.with_one_frame(args).pipeline_kwargs == {"frames": 1}
    assert "frames" in ask.arguments_of(type(DiffusionPipeline.from_pretrained(base)))
