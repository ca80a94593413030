"""What picture is in an image file? The first, upright and in 8-bit sRGB.

Each way in which a file can mean other colours or another side up has its function here; none guesses in silence.
"""

import importlib.util
import io
import itertools
import logging
import warnings
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageCms

from glance.ask.pipeline import first_line
from glance_utils import InputError


logger = logging.getLogger(__name__)

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF")  # of Pillow's others some run programs, as EPS does
Image.init()
SUFFIXES = tuple(suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS)
VIDEOS = (".mp4", ".mov", ".webm", ".mkv", ".avi")
LEAST_SIDE = 8  # pixels; enlarged, fewer are bars or a single colour
UPRIGHT = {  # what turns the stored pixels, by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# The modes that each kind of ICC profile can stand for: neutral RGB is grey as well.
PROFILED = {"RGB ": ("RGB", "L"), "GRAY": ("L",), "CMYK": ("CMYK",)}
SRGB_GAMMA = 1 / 2.2  # as PNG files say of what is sRGB
SRGB_CHROMATICITY = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)  # white, red, green, blue


def read_image(file: Path | io.BytesIO, name: str) -> Image.Image:
    """Return the first picture of a file, upright, RGB in sRGB, alpha over white.

    Raise InputError, with that name, where it cannot be read, is too small or its numbers can mean several things.
    """
    images, further = read_frames(file, name, 1)
    if further:
        logger.warning(f"{name}: it holds several pictures; the first is taken")
    return images[0]


def read_frames(file: Path | io.BytesIO, name: str, count: int) -> tuple[list[Image.Image], bool]:
    """Return the first `count` pictures of a file, or as many as it holds, as read_image does, and whether it holds
    more; videos are read by imageio. Raise InputError likewise."""
    try:
        if isinstance(file, Path) and file.suffix.lower() in VIDEOS:
            images = _of_video(file, name, count + 1)
        else:
            with warnings.catch_warnings(action="ignore"):  # of 90 to 180 million pixels: that can be a photo
                with Image.open(file, formats=FORMATS) as opened:
                    images = _of_pictures(opened, name, count + 1)
    except InputError:
        raise
    except Exception as error:  # Pillow's decoders raise a dozen kinds
        raise InputError(f"{name}: not a readable image ({first_line(error)}); save it as PNG or JPEG") from None
    if not images:
        raise InputError(f"{name}: it holds no picture; give another file")
    if min(images[0].size) < LEAST_SIDE:
        width, height = images[0].size
        raise InputError(f"{name}: {width}x{height} pixels are too few; give a larger image")
    return images[:count], len(images) > count


def _of_pictures(opened: Image.Image, name: str, most: int) -> list[Image.Image]:
    """Return the pictures of an opened file, `most` of them; the last of so many only says that there are more."""
    held, images = min(getattr(opened, "n_frames", 1), most), []
    for number in range(held):
        if number and number == most - 1:
            images.append(images[0])
            break
        opened.seek(number)
        opened.load()
        images.append(upright(opened, name))
    return images


def knows_videos() -> bool:
    """Return whether what reads and writes videos is installed."""
    return all(map(importlib.util.find_spec, ("imageio", "imageio_ffmpeg")))


def _of_video(file: Path, name: str, most: int) -> list[Image.Image]:
    """Return the first frames of a video, `most` at most."""
    if not knows_videos():
        raise InputError(f"{name}: a video is read by imageio; pip install imageio imageio-ffmpeg, or give a .webp")
    import imageio.v3

    frames = itertools.islice(imageio.v3.imiter(file, plugin="FFMPEG"), most)
    return [Image.fromarray(frame).convert("RGB") for frame in frames]


def upright(image: Image.Image, name: str) -> Image.Image:
    """Return a loaded image in sRGB, turned as its EXIF data says; as it is stored where those cannot be read."""
    orientation = interoperability = None
    try:
        exif = image.getexif()
        orientation = exif.get(ExifTags.Base.Orientation)
        interoperability = exif.get_ifd(ExifTags.IFD.Interop).get(ExifTags.Interop.InteropIndex)
    except Exception as error:  # a broken block, of which Pillow raises a dozen kinds
        logger.warning(f"{name}: its EXIF data cannot be read ({first_line(error)}); the pixels are taken as stored")
    if interoperability == "R03" and not image.info.get("icc_profile"):
        raise InputError(f"{name}: its EXIF data says Adobe RGB and it has no ICC profile; save it as sRGB")
    image = to_srgb(image, name)
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def to_srgb(image: Image.Image, name: str) -> Image.Image:
    """Return an image as RGB in sRGB, by its ICC profile or PNG's gamma if it has one; alpha is laid over white."""
    image, info = to_8_bits(image, name), image.info
    alpha = None
    if image.mode in ("La", "RGBa"):  # colours that were multiplied by alpha
        image = image.convert(image.mode[:-1] + "A")
    if image.has_transparency_data:
        alpha = image.convert("RGBA").getchannel("A")
    if image.mode in ("1", "LA"):
        image = image.convert("L")
    elif image.mode not in ("L", "CMYK", "LAB"):
        image = image.convert("RGB")
    if info.get("icc_profile"):
        image = through_profile(image, info["icc_profile"], name)
    elif "srgb" not in info:
        image = through_gamma(image, info, name)
    image = image.convert("RGB")
    return image if alpha is None else Image.composite(image, Image.new("RGB", image.size, "white"), alpha)


def to_8_bits(image: Image.Image, name: str) -> Image.Image:
    """Return a grey image of 16 or 32 bits or of floats as one of 8 bits, others as they are.

    Where the type does not say what white is, the range does: 1 for floats, 255 or 65535 for whole numbers. Raise
    InputError where that leaves a picture with nothing brighter than a sixteenth of white, or no picture at all.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    low, high = values.min(), values.max()  # NaN if one is
    whole = image.mode != "F" or (values == np.round(values)).all()
    if image.mode.startswith("I;16"):
        whites = [65535]
    else:
        whites = [1] if image.mode == "F" else []
        whites += [255, 65535] if whole else []
    white = next((white for white in whites if high <= white), None)
    if not low >= 0 or white is None or high < white / 16:
        raise InputError(
            f"{name}: its values run from {low:g} to {high:g}, and what is white does not follow from that; save it "
            "with 8 or 16 bits a channel, as PNG or TIFF"
        )
    if getattr(image, "tag_v2", {}).get(262) == 0:  # a TIFF whose 0 is white
        values = white - values
    return Image.fromarray(np.round(values * (255 / white)).astype(np.uint8))


def through_profile(image: Image.Image, data: bytes, name: str) -> Image.Image:
    """Convert by an ICC profile; warn and return the image as it is where that is broken or for other images."""
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        space = profile.profile.xcolor_space
        if image.mode not in PROFILED.get(space, ()):
            raise ValueError(f"it is of {space.strip()} images, this one is {image.mode}")
        image = image.convert(PROFILED[space][0])
        return ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (OSError, ValueError, ImageCms.PyCMSError) as error:
        logger.warning(f"{name}: its ICC profile is left out ({first_line(error)}); the colours are taken as sRGB")
        return image


def through_gamma(image: Image.Image, info: dict, name: str) -> Image.Image:
    """Convert by what a PNG file without a profile says of its colours.

    Raise InputError for primaries other than sRGB's.
    """
    chromaticity = info.get("chromaticity") if image.mode == "RGB" else None
    if chromaticity and max(abs(a - b) for a, b in zip(chromaticity, SRGB_CHROMATICITY)) > 0.01:
        raise InputError(f"{name}: its colours are not sRGB's (cHRM) and it has no ICC profile; save it as sRGB")
    gamma = info.get("gamma") or SRGB_GAMMA
    if abs(gamma - SRGB_GAMMA) < 0.02:
        return image
    light = np.linspace(0, 1, 256) ** (1 / gamma)
    encoded = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return image.point(np.round(255 * encoded).astype(int).tolist() * len(image.getbands()))
