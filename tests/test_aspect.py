"""What is cropped away is said, --aspect keep chooses a size that keeps the image, and pairs in a folder are found."""

import argparse

import numpy as np
import pytest
import torch
from accelerate import PartialState
from conftest import flags, own_size
from PIL import Image
from test_families import FAMILIES

from glance.files.instance_data import load_pair
from glance.files.recipe import WEIGHT_NAME, read_recipe
from glance.training import own_defaults
from glance.training.flags import parse
from glance.training.weightless import load_without_weights
from glance_utils import InputError


@pytest.fixture
def photo(tmp_path):
    """photo(width, height) is an image file of that size, its caption beside it."""

    def call(width: int, height: int):
        path = tmp_path / "photos" / f"{width}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.random.RandomState(0).randint(0, 255, (height, width, 3), dtype=np.uint8)).save(path)
        path.with_suffix(".txt").write_text("a red ring")
        return path

    return call


def settings(**given):
    return parse(flags(pretrained_model_name_or_path="b", **given))


@pytest.mark.parametrize(
    ("size", "line"),
    [
        ((480, 270), "44% of its 480x270 pixels are cropped away at 64x64; --aspect keep keeps all, at about 85x48"),
        ((270, 480), "44% of its 270x480 pixels are cropped away at 64x64; --aspect keep keeps all, at about 48x85"),
        ((500, 496), None),
    ],
)
def test_a_crop_is_said(size, line, photo, caplog):
    caplog.set_level("INFO")
    path = photo(*size)
    image, _, chosen = load_pair(settings(instance_image=path, resolution=64), own_size)
    assert (image.size, chosen) == ((64, 64), (64, 64))
    assert [record.message for record in caplog.records] == ([f"{path}: {line}"] if line else [])


def test_the_aspect_ratio_is_kept_with_as_many_pixels(photo, caplog):
    caplog.set_level("INFO")
    for given, wanted in (({}, (768, 1360)), ({"resolution": 512}, (384, 672))):
        image, _, size = load_pair(settings(instance_image=photo(1920, 1080), aspect="keep", **given), own_size)
        assert size == wanted and image.size == wanted[::-1]
    assert "cropped" not in caplog.text


@pytest.mark.parametrize("name", ["flux", "sd3", "qwen", "wan", "prx_pixel"])
def test_the_size_is_one_that_the_pipeline_draws(name, pipelines, tmp_path):
    """Multiples of as few pixels as it needs: of 16 and more where it would round 8 off."""
    base, extra = (pipelines[name], {}) if name in pipelines else (FAMILIES[name][0](tmp_path), FAMILIES[name][2])
    pipe = load_without_weights(str(base), torch.float32)
    args = settings().replace(pipeline_kwargs={key: value for key, value in extra.items() if key != "guidance_scale"})
    PartialState()  # for its log
    height, width = own_defaults.size_of(pipe, args, 151, 269)
    assert height % 8 == width % 8 == 0
    assert abs(height - 151) <= 16 and abs(width - 269) <= 16


def test_a_run_keeps_what_the_image_shows(train, photo, tmp_path):
    few = {"max_train_steps": 2, "checkpointing_steps": 2}
    output = train(instance_image=photo(480, 270), aspect="keep", resolution=64, **few)
    recipe = read_recipe(output / "slow" / WEIGHT_NAME)
    assert (recipe.height, recipe.width) == (48, 88)
    assert Image.open(output / "instance.png").size == (88, 48)
    plain = {"instance_image": photo(480, 270), "resolution": None, "height": 48, "width": 88}
    train(**plain, **few, resume_from_checkpoint="latest")  # the same run


def test_what_is_refused(photo):
    with pytest.raises(argparse.ArgumentError, match="--aspect keep chooses height and width; give --resolution"):
        settings(aspect="keep", width=64)
    with pytest.raises(InputError, match="--aspect keep: there is no image"):
        load_pair(settings(aspect="keep", instance_prompt="a ring"), own_size)


def test_a_folder_of_pairs_is_no_data_set(photo):
    first = [photo(64, 48), photo(65, 48)][0]
    with pytest.raises(InputError, match=f"give --instance_data_dir .*, or --instance_image {first}"):
        load_pair(settings(dataset_name=first.parent), own_size)
