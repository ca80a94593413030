"""Odd but honest images and captions simply work."""

import logging

import numpy as np
import pytest
from conftest import flags
from PIL import Image

import train_glance_lora
from instance_data import load_pair


PIXELS = np.zeros((40, 60, 3), np.uint8)
PIXELS[:20, :, 0], PIXELS[20:, :, 1] = 200, 100  # red above, green below
HALVES = Image.fromarray(PIXELS)


def trained_pixels(path, caption: bytes = b"two halves") -> np.ndarray:
    """The 16x16 pixels that a run would learn from."""
    path.with_suffix(".txt").write_bytes(caption)
    args = train_glance_lora.parse_args(flags(pretrained_model_name_or_path="b", instance_image=path, resolution=16))
    image, caption, _ = load_pair(args)
    assert (image.mode, image.size, caption) == ("RGB", (16, 16), "two halves")
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("suffix", ["jpg", "JPG", "jpeg", "Jpeg", "png", "PNG", "webp", "WebP"])
def test_suffixes_in_any_case_are_found_in_a_folder(suffix, tmp_path):
    HALVES.save(tmp_path / f"a.{suffix}", quality=95)
    (tmp_path / "a.txt").write_text("two halves")
    args = train_glance_lora.parse_args(
        flags(pretrained_model_name_or_path="b", instance_data_dir=tmp_path, resolution=16)
    )
    pixels = np.asarray(load_pair(args)[0]).astype(int)
    assert abs(pixels[2, 8] - (200, 0, 0)).max() < 12 and abs(pixels[-3, 8] - (0, 100, 0)).max() < 12


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        *[("CMYK", "jpg"), ("YCbCr", "jpg"), ("P", "png"), ("P", "webp"), ("RGBA", "png"), ("RGBA", "webp")],
        *[("RGB", "webp"), ("CMYK", "tiff"), ("LAB", "tiff")],
    ],
)
def test_modes_with_colour(mode, suffix, tmp_path):
    HALVES.convert(mode).save(tmp_path / f"a.{suffix}", quality=95)
    pixels = trained_pixels(tmp_path / f"a.{suffix}")
    assert abs(pixels[2, 8] - (200, 0, 0)).max() < 40 and abs(pixels[-3, 8] - (0, 100, 0)).max() < 40


def test_grey_of_8_and_16_bits_alike(tmp_path):
    grey = HALVES.convert("L")
    grey.save(tmp_path / "8.png")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    deep.save(tmp_path / "16.png")
    deep.save(tmp_path / "transparency.png", transparency=12345)
    Image.merge("LA", [grey, Image.new("L", grey.size, 255)]).save(tmp_path / "alpha.png")
    wanted = trained_pixels(tmp_path / "8.png")
    for name in ("16.png", "transparency.png", "alpha.png"):
        assert abs(trained_pixels(tmp_path / name) - wanted).max() <= 1


@pytest.mark.parametrize("turn", range(1, 9))
def test_every_exif_orientation_is_upright(turn, tmp_path):
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # of Image.Transpose, from upright to stored
    stored = HALVES if turn == 1 else HALVES.transpose(Image.Transpose(undo[turn]))
    exif = Image.Exif()
    exif[0x0112] = turn
    stored.save(tmp_path / "a.png", exif=exif)
    HALVES.save(tmp_path / "b.png")
    assert abs(trained_pixels(tmp_path / "a.png") - trained_pixels(tmp_path / "b.png")).max() <= 2


@pytest.mark.parametrize("suffix", ["png", "webp", "gif"])
def test_the_first_frame_of_an_animation_and_a_word_about_it(suffix, tmp_path, caplog):
    others = [Image.new("RGB", HALVES.size, "blue"), Image.new("RGB", HALVES.size, "white")]
    lossless = {"lossless": True} if suffix == "webp" else {}
    HALVES.save(tmp_path / f"a.{suffix}", save_all=True, append_images=others, **lossless)
    with caplog.at_level(logging.WARNING):
        pixels = trained_pixels(tmp_path / f"a.{suffix}")
    assert abs(pixels[2, 8] - (200, 0, 0)).max() < 12
    assert [record.message for record in caplog.records] == [
        f"{tmp_path / f'a.{suffix}'}: it holds 3 pictures; Glance learns from the first"
    ]


@pytest.mark.parametrize("size", [(8, 8), (8, 30_000), (30_000, 8), (12_000, 9_000), (61, 17)])
def test_any_aspect_ratio_and_no_word_about_large_photos(size, tmp_path, recwarn, caplog):
    Image.new("L", size, 77).save(tmp_path / "a.png", compress_level=1)
    assert (trained_pixels(tmp_path / "a.png") == 77).all()
    assert not recwarn.list and not caplog.records


@pytest.mark.parametrize(
    "caption", [b"\xef\xbb\xbftwo halves", b"two halves\r\n", b"\xef\xbb\xbf\r\n two halves \r\n\r\n"]
)
def test_captions_with_a_mark_or_other_line_ends(caption, tmp_path):
    HALVES.save(tmp_path / "a.png")
    trained_pixels(tmp_path / "a.png", caption)
