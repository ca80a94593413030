"""SimpleTuner's dataloader JSON means here what its documentation says, or is refused in one line."""

import json

import pytest
from conftest import REFUSED, flags, own_size
from PIL import Image

import train_glance_lora
from glance.files.instance_data import load_pair
from glance_utils import InputError


@pytest.fixture
def folder(tmp_path):
    """One square image with its caption, three lines, in a folder below; and what SimpleTuner keeps there."""
    below = tmp_path / "data" / "rings"
    below.mkdir(parents=True)
    Image.new("RGB", (640, 640), "red").save(below / "a_red_ring.png")
    below.joinpath("a_red_ring.txt").write_text("a ring\nof red\n")
    below.joinpath("a_red_ring.caption").write_text("in red")
    return tmp_path


def pair_of(folder, *entries, **settings):
    """The pair of a file with these entries; `data` is the folder, unless they say otherwise."""
    file = folder / "backend.json"
    file.write_text(json.dumps([{"instance_data_dir": str(folder / "data")} | entry for entry in entries]))
    args = flags(pretrained_model_name_or_path="b", data_backend_config=file, **settings)
    return load_pair(train_glance_lora.parse_args(args), own_size)


# The example of the documentation, and what is usual beside it.
WHOLE = {
    **{"id": "mine", "type": "local", "dataset_type": "image", "crop": True, "crop_style": "center"},
    **{"crop_aspect": "square", "resolution": 512, "minimum_image_size": 256, "maximum_image_size": 2048},
    **{"minimum_aspect_ratio": 0.5, "maximum_aspect_ratio": 3.0, "target_downsample_size": 512, "disabled": False},
    **{"resolution_type": "pixel_area", "prepend_instance_prompt": False, "instance_prompt": "something else"},
    **{"only_instance_prompt": False, "caption_strategy": "textfile", "cache_dir_vae": "/cache", "repeats": 9},
    **{"metadata_backend": "discovery", "text_embeds": "texts", "image_embeds": "latents", "start_epoch": 1},
    **{
        "start_step": 0,
        "end_step": None,
        "probability": 1.0,
        "vae_cache_clear_each_epoch": True,
        "crop_aspect": "square",
    },
}
TEXTS = {"id": "texts", "dataset_type": "text_embeds", "default": True, "type": "aws", "cache_dir": ""}
LATENTS = {"id": "latents", "type": "local"}  # an image's cache, by that entry's word alone


def test_a_whole_file(folder):
    image, caption, size = pair_of(folder, TEXTS, LATENTS, WHOLE, WHOLE | {"disabled": True}, {"disable": True})
    assert (image.size, size, caption) == ((512, 512), (512, 512), "a ring")


@pytest.mark.parametrize(
    ("entry", "side"),
    [
        *[({}, 1024), ({"resolution": None}, 1024), ({"resolution": 512}, 512), ({"resolution": 512.0}, 512)],
        *[({"resolution": 768, "resolution_type": "pixel"}, 768), ({"resolution_type": "area"}, 1024)],
        *[({"resolution": 768, "resolution_type": "pixel_area"}, 768), ({"resolution_type": None}, 1024)],
        ({"resolution": 1.0, "resolution_type": "area"}, 1024),
        ({"resolution": 1, "resolution_type": "area"}, 1024),
        ({"resolution": 1.05, "resolution_type": "area"}, 1024),
        ({"resolution": 0.25, "resolution_type": "area"}, 512),
        ({"resolution": 0.5, "resolution_type": "area"}, 704),
        ({"resolution": 4, "resolution_type": "area"}, 2048),
    ],
    ids=str,
)
def test_resolution(entry, side, folder):
    assert pair_of(folder, entry)[2] == (side, side)


def test_the_command_line_wins(folder):
    entry = {"resolution": 512, "caption_strategy": "filename", "minimum_image_size": 2000}
    assert pair_of(folder, entry, resolution=16)[2] == (16, 16)
    assert pair_of(folder, entry, height=16, instance_prompt="a blue dog")[1:] == ("a blue dog", (16, 512))


@pytest.mark.parametrize(
    ("entry", "wanted"),
    [
        *[({}, "a ring"), ({"caption_strategy": None}, "a ring"), ({"caption_strategy": "textfile"}, "a ring")],
        *[({"disable_multiline_split": True}, "a ring\nof red"), ({"caption_strategy": "filename"}, "a red ring")],
        *[({"caption_extension": ".caption"}, "in red"), ({"caption_extension": "caption"}, "in red")],
        ({"caption_strategy": "instanceprompt", "instance_prompt": "sks ring"}, "sks ring"),
        ({"only_instance_prompt": True, "instance_prompt": "sks ring"}, "sks ring"),
        ({"prepend_instance_prompt": True, "instance_prompt": "sks"}, "sks a ring"),
        (
            {"prepend_instance_prompt": True, "instance_prompt": "sks", "caption_strategy": "filename"},
            "sks a red ring",
        ),
        ({"instance_prompt": "sks ring"}, "a ring"),
    ],
    ids=str,
)
def test_captions(entry, wanted, folder, caplog):
    caplog.set_level("INFO")
    assert pair_of(folder, entry, resolution=16)[1] == wanted
    said = [record.message for record in caplog.records if "2 captions, one a line" in record.message]
    assert len(said) == ("a ring" in wanted and "of red" not in wanted)


def test_keys_as_the_guide_has_them(folder):
    entry = {"instance_data_dir": None, "image_dir": str(folder / "data"), "backend": "simple", "shuffle": True}
    assert pair_of(folder, entry | {"caption_extension": ".txt", "resolution": 1024})[1:] == ("a ring", (1024, 1024))
    assert pair_of(folder, {"image_dir": str(folder / "data")})[1] == "a ring"  # both, and the same


@pytest.mark.parametrize(
    ("entry", "word"),
    [
        ({"type": "aws"}, 'type "aws"'),
        ({"type": "huggingface"}, 'type "huggingface"'),
        ({"dataset_type": "video"}, 'dataset_type "video"'),
        ({"dataset_type": "text_embeds"}, "0 enabled entries of images"),
        ({"disabled": True}, "0 enabled entries of images"),
        ({"disable": True}, "0 enabled entries of images"),
        ({"instance_data_dir": None}, "found neither"),
        ({"instance_data_dir": ""}, "instance_data_dir"),
        ({"image_dir": "elsewhere"}, "'elsewhere'"),
        ({"instance_data_dir": 5}, "instance_data_dir 5: it takes a text"),
        ({"caption_strategy": "parquet"}, 'caption_strategy "parquet"'),
        ({"caption_strategy": "csv"}, 'caption_strategy "csv"'),
        ({"caption_strategy": ["textfile"]}, "caption_strategy"),
        ({"caption_strategy": "instanceprompt"}, "instance_prompt"),
        ({"prepend_instance_prompt": True, "instance_prompt": " "}, "instance_prompt"),
        ({"only_instance_prompt": "yes"}, "only_instance_prompt"),
        ({"instance_prompt": ["a", "b"]}, "instance_prompt"),
        *[({"caption_extension": text}, "caption_extension") for text in ("", ".", " ", "..", ".txt/", "/etc", 5, [])],
        ({"caption_shuffle": {"enable": True, "count": 3}}, "caption_shuffle"),
        ({"disabled": "no"}, "disabled"),
        ({"resolution_type": "megapixels"}, "resolution_type"),
        ({"resolution": 1.0}, "for megapixels resolution_type is area"),
        ({"resolution": 0}, "resolution 0"),
        ({"resolution": -512}, "resolution -512"),
        ({"resolution": 512.5}, "resolution 512.5"),
        ({"resolution": True}, "resolution true"),
        ({"resolution": "512"}, 'resolution "512"'),
        ({"resolution": float("nan")}, "resolution NaN"),
        ({"resolution": float("inf")}, "resolution Infinity"),
        ({"resolution": 1024, "resolution_type": "area"}, "counts megapixels"),
        ({"resolution": 0, "resolution_type": "area"}, "resolution 0"),
        ({"resolution": -1.0, "resolution_type": "area"}, "resolution -1.0"),
        ({"conditioning_data": "masks"}, "conditioning_data"),
        ({"conditioning": [{"type": "canny"}]}, "conditioning"),
        ({"is_regularisation_data": True}, "is_regularisation_data"),
        ({"slider_strength": 0.5}, "slider_strength"),
        ({"end_step": 300}, "end_step"),
        ({"start_epoch": 2}, "start_epoch"),
        # what would be left out or cropped otherwise
        ({"minimum_image_size": 768}, "minimum_image_size"),
        ({"minimum_image_size": 0.5, "resolution_type": "area", "resolution": 1}, "minimum_image_size"),
        ({"minimum_aspect_ratio": 1.2}, "minimum_aspect_ratio"),
        ({"maximum_aspect_ratio": 0.8}, "maximum_aspect_ratio"),
        ({"resolution": 512, "maximum_image_size": 600, "target_downsample_size": 768}, "target_downsample_size"),
        ({"crop": True, "crop_aspect": "random"}, "crop_aspect"),
    ],
    ids=str,
)
def test_what_cannot_be_followed_is_refused_in_one_line(entry, word, folder):
    with pytest.raises(InputError) as error:
        pair_of(folder, entry)
    assert word in str(error.value) and "\n" not in str(error.value) and "--data_backend_config" in str(error.value)


def test_several_images_are_refused(folder):
    with pytest.raises(InputError, match="2 enabled entries of images; Glance learns from one"):
        pair_of(folder, WHOLE, {"id": "other"})
    with pytest.raises(InputError, match="caption_filter_list"):
        pair_of(folder, WHOLE, TEXTS | {"caption_filter_list": ["ring"]})
    Image.new("RGB", (64, 64)).save(folder / "data" / "b.png")
    with pytest.raises(InputError, match="2 images found"):
        pair_of(folder, {})


def test_an_image_that_is_not_square(folder):
    """SimpleTuner keeps its shape unless it crops a square; where a size is given, that one is taken."""
    Image.new("RGB", (640, 480), "red").save(folder / "data" / "rings" / "a_red_ring.png")
    for entry in ({}, {"crop": True}, {"crop": True, "crop_aspect": "square", "crop_style": "center"}):
        assert pair_of(folder, entry)[2] == (1024, 1024)
    for entry in ({"crop": False}, {"crop": True, "crop_aspect": "preserve"}, {"crop": True, "crop_style": "random"}):
        with pytest.raises(InputError, match="the image is 640x480"):
            pair_of(folder, entry)
        assert pair_of(folder, entry, height=96, width=128)[2] == (96, 128)


@pytest.mark.parametrize("text", ["5", "[]", "[[]]", '"x"', "null", "{", "[" * 9000, '{"a": 1, "a": 2}', "\ud83d"])
def test_files_that_are_no_dataloader(text, folder):
    (folder / "backend.json").write_bytes(text.encode(errors="replace"))
    args = flags(pretrained_model_name_or_path="b", data_backend_config=folder / "backend.json")
    with pytest.raises(REFUSED, match="--data_backend_config .*backend.json") as error:
        load_pair(train_glance_lora.parse_args(args), own_size)
    assert "\n" not in str(error.value)
