"""Odd but honest images and captions simply work."""

import logging
import os
import struct

import datasets
import numpy as np
import pytest
from conftest import flags, own_size
from icc_profiles import as_srgb, grey_profile, ink_profile, rgb_profile
from PIL import Image, PngImagePlugin

import train_glance_lora
from glance.files.instance_data import load_pair
from glance_utils import InputError


pytestmark = pytest.mark.forged
PIXELS = np.zeros((40, 60, 3), np.uint8)
PIXELS[:20, :, 0], PIXELS[20:, :, 1] = 200, 100  # red above, green below
HALVES = Image.fromarray(PIXELS)


def trained_pixels(path, caption: bytes = b"two halves") -> np.ndarray:
    """The 16x16 pixels that a run would learn from."""
    path.with_suffix(".txt").write_bytes(caption)
    args = train_glance_lora.parse_args(flags(pretrained_model_name_or_path="b", instance_image=path, resolution=16))
    image, caption, _ = load_pair(args, own_size)
    assert (image.mode, image.size, caption) == ("RGB", (16, 16), "two halves")
    return np.asarray(image).astype(int)


SUFFIXES = [
    "jpg",
    "JPG",
    "jpeg",
    "Jpeg",
    "jpe",
    "jfif",
    "png",
    "PNG",
    "apng",
    "webp",
    "WebP",
    "gif",
    "bmp",
    "BMP",
    "dib",
]


@pytest.mark.parametrize("suffix", [*SUFFIXES, "tif", "TIFF"])
def test_suffixes_in_any_case_are_found_in_a_folder(suffix, tmp_path):
    HALVES.save(tmp_path / f"a.{suffix}", quality=95)
    (tmp_path / "a.txt").write_text("two halves")
    args = train_glance_lora.parse_args(
        flags(pretrained_model_name_or_path="b", instance_data_dir=tmp_path, resolution=16)
    )
    pixels = np.asarray(load_pair(args, own_size)[0]).astype(int)
    assert abs(pixels[2, 8] - (200, 0, 0)).max() < 12 and abs(pixels[-3, 8] - (0, 100, 0)).max() < 12


def test_only_images_count_in_a_folder(tmp_path):
    """What systems and people leave beside an image: hidden files, dangling links, folders, files of other kinds."""
    HALVES.save(tmp_path / "a.tif")
    (tmp_path / "a.txt").write_text("two halves")
    for name in ("._a.tif", ".a.png", ".hidden.jpg", "Thumbs.db", "desktop.ini", ".DS_Store", "a.svg", "a.png.part"):
        (tmp_path / name).write_bytes(b"x")
    for name in ("b.png", ".cache", "below"):
        (tmp_path / name).mkdir()
        HALVES.save(tmp_path / name / "c.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "itself.png").symlink_to(tmp_path / "itself.png")
    os.mkfifo(tmp_path / "pipe.png")
    args = flags(pretrained_model_name_or_path="b", instance_data_dir=tmp_path, resolution=16)
    assert load_pair(train_glance_lora.parse_args(args), own_size)[1] == "two halves"
    (tmp_path / "link.PNG").symlink_to(tmp_path / "a.tif")  # a second one after all
    with pytest.raises(InputError, match=r"2 images found \(a.tif, link.PNG, ...\)"):
        load_pair(train_glance_lora.parse_args(args), own_size)


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
        f"{tmp_path / f'a.{suffix}'}: it holds several pictures; the first is taken"
    ]


@pytest.mark.parametrize("size", [(8, 8), (8, 30_000), (30_000, 8), (12_000, 9_000), (61, 17)])
def test_any_aspect_ratio_and_no_word_about_large_photos(size, tmp_path, recwarn, caplog):
    Image.new("L", size, 77).save(tmp_path / "a.png", compress_level=1)
    assert (trained_pixels(tmp_path / "a.png") == 77).all()
    assert not recwarn.list and all("are cropped away" in record.message for record in caplog.records)


@pytest.mark.parametrize(
    "caption", [b"\xef\xbb\xbftwo halves", b"two halves\r\n", b"\xef\xbb\xbf\r\n two halves \r\n\r\n"]
)
def test_captions_with_a_mark_or_other_line_ends(caption, tmp_path):
    HALVES.save(tmp_path / "a.png")
    trained_pixels(tmp_path / "a.png", caption)


# --------------------------------------------------------------------------------------------------------------------
# What the numbers mean


def learned_colour(image: Image.Image, path, **how) -> list[int]:
    """The colour that a run learns from an image of a single one."""
    image.save(path, **how)
    pixels = trained_pixels(path)
    assert (pixels == pixels[0, 0]).all()
    return pixels[0, 0].tolist()


def uniform(values) -> Image.Image:
    """16x16 pixels of one number, its type the picture's."""
    return Image.fromarray(np.full((16, 16), values))


@pytest.mark.parametrize(
    ("value", "grey"),
    [
        *[(np.float32(0.5), 128), (np.float32(1), 255), (np.float32(77), 77), (np.float32(255), 255)],
        *[(np.float32(32768), 128), (np.int32(77), 77), (np.int32(32768), 128), (np.int32(65535), 255)],
        *[(np.uint16(32768), 128), (np.dtype(">u2").type(32768).astype(">u2"), 128)],
    ],
)
def test_numbers_of_16_and_32_bits_are_scaled_by_their_range(value, grey, tmp_path):
    assert learned_colour(uniform(value), tmp_path / "a.tif") == [grey] * 3


def test_a_photo_of_floats_is_the_photo(tmp_path):
    grey = np.random.RandomState(0).randint(0, 256, (16, 16)).astype(np.uint8)
    Image.fromarray(grey).save(tmp_path / "a.png")
    wanted = trained_pixels(tmp_path / "a.png")
    for name, values in {
        "unit": grey / np.float32(255),
        "byte": grey.astype(np.float32),
        "word": grey * np.float32(257),
        "long": grey.astype(np.int32),
        "long word": grey.astype(np.int32) * 257,
    }.items():
        Image.fromarray(values).save(tmp_path / f"{name}.tiff")
        assert abs(trained_pixels(tmp_path / f"{name}.tiff") - wanted).max() <= 1


def test_a_tiff_whose_0_is_white(tmp_path):
    for value in (np.uint16(16384), np.float32(0.25)):
        assert learned_colour(uniform(value), tmp_path / "a.tif", tiffinfo={262: 0}) == [191] * 3


@pytest.mark.parametrize(
    "values",
    [
        *[np.float32([0.1, np.nan]), np.float32([0.1, np.inf]), np.float32([-0.1, 0.9]), np.float32([0.5, 4.5])],
        *[np.float32([0, 0]), np.float32([0.01, 0.02]), np.float32([3, 9]), np.float32([0, 1e9]), np.int32([-5, 200])],
        *[np.int32([0, 1]), np.int32([0, 4095]), np.int32([0, 2**30]), np.uint16([0, 255])],
    ],
    ids=str,
)
def test_numbers_that_can_mean_several_things_are_refused(values, tmp_path):
    Image.fromarray(np.tile(values, (16, 8))).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match="a.tif: its values run from .* and what is white does not follow") as error:
        trained_pixels(tmp_path / "a.tif")
    assert "\n" not in str(error.value)


def test_a_row_of_a_data_set_is_read_as_a_file_is(tmp_path, caplog):
    columns = {"image": [uniform(np.float32(0.5)), GREY, HALVES, uniform(np.float32(7.5))], "text": ["two halves"] * 4}
    GREY.save(tmp_path / "linear.png", icc_profile=rgb_profile("srgb", 1))
    HALVES.save(tmp_path / "broken.png", exif=BROKEN_EXIF[0])
    columns["image"][1:3] = str(tmp_path / "linear.png"), str(tmp_path / "broken.png")
    features = datasets.Features(image=datasets.Image(), text=datasets.Value("string"))
    datasets.Dataset.from_dict(columns, features=features).with_format("numpy").save_to_disk(tmp_path / "rows")

    def row(index: int) -> np.ndarray:
        args = flags(pretrained_model_name_or_path="b", dataset_name=tmp_path / "rows", dataset_index=index)
        image, caption, _ = load_pair(train_glance_lora.parse_args([*args, "--resolution=16"]), own_size)
        assert caption == "two halves"
        return np.asarray(image).astype(int)

    assert (row(0) == 128).all() and abs(row(1) - 128).max() <= 1
    assert np.array_equal(row(2), trained_pixels(tmp_path / "broken.png"))
    with pytest.raises(InputError, match="row 3: its values run from 7.5 to 7.5"):
        row(3)


GREY = Image.new("RGB", (16, 16), (55, 55, 55))


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
def test_linear_light_is_learned_as_srgb(suffix, tmp_path):
    lossless = {"webp": {"lossless": True}, "jpg": {"quality": 100}}.get(suffix, {})
    found = learned_colour(GREY, tmp_path / f"a.{suffix}", icc_profile=rgb_profile("srgb", 1), **lossless)
    assert np.abs(np.array(found) - 128).max() <= 1


@pytest.mark.parametrize(("primaries", "gamma"), [("p3", 2.19921875), ("adobe", 2.19921875), ("srgb", 1.8)])
@pytest.mark.parametrize("colour", [(200, 120, 90), (90, 160, 100), (70, 70, 180)])
def test_photos_of_other_colour_spaces_are_learned_as_srgb(primaries, gamma, colour, tmp_path):
    found = learned_colour(
        Image.new("RGB", (16, 16), colour), tmp_path / "a.png", icc_profile=rgb_profile(primaries, gamma)
    )
    assert np.abs(np.array(found) - as_srgb(colour, primaries, gamma)).max() <= 2


@pytest.mark.parametrize("mode", ["L", "P", "LA", "RGBA", "I;16"])
def test_profiles_of_every_mode(mode, tmp_path):
    """A palette holds colours of the profile, alpha stays as it is, and grey may have an RGB profile too."""
    profiles = [rgb_profile("srgb", 1)] + [grey_profile(1)] * (mode in ("L", "LA", "I;16"))
    image = uniform(np.uint16(55 * 257)) if mode == "I;16" else Image.new("L", (16, 16), 55).convert(mode)
    for profile in profiles:
        found = learned_colour(image, tmp_path / "a.png", icc_profile=profile)
        assert np.abs(np.array(found) - 128).max() <= 1
    if mode in ("LA", "RGBA"):
        image.putalpha(51)
        found = learned_colour(image, tmp_path / "a.png", icc_profile=profiles[0])
        assert np.abs(np.array(found) - (128 * 0.2 + 255 * 0.8)).max() <= 1
    if mode == "P":
        found = learned_colour(image, tmp_path / "a.png", icc_profile=profiles[0], transparency=b"\0" * 256)
        assert found == [255] * 3


@pytest.mark.parametrize("suffix", ["tif", "jpg"])
def test_inks_are_what_their_profile_says(suffix, tmp_path):
    """All of this profile's inks are grey; L* 66.7 is 162 in sRGB. Without it cyan is a colour."""
    image = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    found = learned_colour(image, tmp_path / f"a.{suffix}", icc_profile=ink_profile(), quality=100)
    assert np.abs(np.array(found) - 162).max() <= 3
    assert learned_colour(image, tmp_path / f"b.{suffix}", quality=100)[0] < 10


@pytest.mark.parametrize(
    ("image", "profile"),
    [(GREY, b"no profile"), (GREY, grey_profile(1)), (GREY, ink_profile()), (GREY, rgb_profile("srgb", 1)[:200])],
    ids=["junk", "of grey images", "of inks", "cut"],
)
def test_a_profile_that_does_not_fit_is_left_out_with_a_word(image, profile, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        assert learned_colour(image, tmp_path / "a.png", icc_profile=profile) == [55] * 3
    (record,) = caplog.records
    assert "a.png: its ICC profile is left out" in record.message and "\n" not in record.message


def png_info(gamma=None, chromaticity=None, srgb=False) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    if srgb:
        info.add(b"sRGB", b"\0")
    if gamma:
        info.add(b"gAMA", struct.pack(">I", round(gamma * 100_000)))
    if chromaticity:
        info.add(b"cHRM", struct.pack(">8I", *(round(value * 100_000) for value in chromaticity)))
    return info


def test_what_a_png_without_a_profile_says_of_its_colours(tmp_path):
    srgb, p3 = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06), (0.3127, 0.329, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06)
    for info, wanted in {
        png_info(gamma=1): 128,
        png_info(gamma=1, chromaticity=srgb): 128,
        png_info(gamma=0.45455, chromaticity=srgb): 55,
        png_info(gamma=1, chromaticity=p3, srgb=True): 55,  # the chunk that wins
    }.items():
        for image in (GREY, GREY.convert("L")):
            assert learned_colour(image, tmp_path / "a.png", pnginfo=info) == [wanted] * 3
    GREY.save(tmp_path / "a.png", pnginfo=png_info(chromaticity=p3))
    with pytest.raises(InputError, match="a.png: its colours are not sRGB's"):
        trained_pixels(tmp_path / "a.png")


def test_adobe_rgb_that_only_the_exif_data_tell_of(tmp_path):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA005] = {1: "R03"}
    GREY.save(tmp_path / "a.jpg", exif=exif)
    with pytest.raises(InputError, match="a.jpg: its EXIF data says Adobe RGB"):
        trained_pixels(tmp_path / "a.jpg")
    learned_colour(GREY, tmp_path / "b.jpg", exif=exif, icc_profile=rgb_profile("adobe", 2.2))


BROKEN_EXIF = [b"Exif\0\0junkjunkjunk", b"Exif\0\0MM\0*", b"Exif\0\0II*\0\xff\xff\0\0\1", b"Exif\0\0", b"\xff" * 40]


@pytest.mark.parametrize("suffix", ["png", "webp", "jpg"])
def test_a_broken_exif_block_is_forgiven(suffix, tmp_path):
    lossless = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}.get(suffix, {})
    HALVES.save(tmp_path / "whole.png")
    wanted = trained_pixels(tmp_path / "whole.png")
    for block in BROKEN_EXIF:
        HALVES.save(tmp_path / f"a.{suffix}", exif=block, **lossless)
        assert abs(trained_pixels(tmp_path / f"a.{suffix}") - wanted).max() <= 10
    # The orientation is whole; what lies elsewhere is not.
    block = b"Exif\0\0II*\0" + struct.pack("<IH2HI2H2HIIHI", 8, 2, 0x0112, 3, 1, 6, 0, 0x8769, 4, 1, 2**30, 0, 0)
    HALVES.transpose(Image.Transpose.ROTATE_90).save(tmp_path / f"a.{suffix}", exif=block, **lossless)
    assert abs(trained_pixels(tmp_path / f"a.{suffix}") - wanted).max() <= 10
