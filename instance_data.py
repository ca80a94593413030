"""One image and its caption: from a file, a folder, a SimpleTuner dataloader JSON or one row of a data set."""

import argparse
import json
import logging
import os
import warnings
from pathlib import Path

from datasets import load_dataset, load_from_disk
from PIL import Image, ImageOps

from command_line import check_text, read_text
from glance_utils import MAX_SIDE, InputError, first_line


logger = logging.getLogger(__name__)

SOURCES = ("instance_image", "instance_data_dir", "data_backend_config", "dataset_name")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # of Pillow's others some run programs, as EPS does
LEAST_SIDE = 8  # pixels; enlarged, fewer are bars or a single colour


def read_caption(path: Path) -> str:
    if not os.path.exists(path):
        raise InputError(f"{path}: no caption there; write one, or give --instance_prompt")
    return read_text(path, "caption ")


def one_image_in(directory: str) -> Path:
    if not os.path.isdir(directory):  # False, too, for a name that is too long
        raise InputError(f"{directory}: no such folder; it should hold one image and its caption")
    images = sorted(path for path in Path(directory).iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if len(images) != 1:
        names = f" ({', '.join(path.name for path in images[:3])}, ...)" if images else ""
        raise InputError(
            f"{directory}: {len(images)} images found{names}; Glance learns from one, or name it: --instance_image"
        )
    return images[0]


def read_backend(args: argparse.Namespace) -> dict:
    """The first entry of a SimpleTuner dataloader JSON, looked for as given, then beside the --config file."""
    path = Path(args.data_backend_config)
    if not os.path.exists(path) and args.config:
        path = Path(args.config).parent / path.name
    try:
        backend = json.loads(read_text(path, "--data_backend_config "))
        backend = backend[0] if isinstance(backend, list) else backend
        backend = {"caption_extension": ".txt", "resolution": 0, "image_dir": backend["image_dir"]} | backend
        for key, kind in {"image_dir": str, "caption_extension": str, "resolution": int | float}.items():
            if not isinstance(backend[key], kind):
                raise ValueError(f"{key} is a {type(backend[key]).__name__}")
        if not 0 <= backend["resolution"] <= MAX_SIDE:
            raise ValueError(f"resolution {backend['resolution']}")
        return backend
    except InputError:
        raise
    except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise InputError(f"--data_backend_config {path}: cannot be read ({type(error).__name__}: {error})") from None


def read_dataset_row(args: argparse.Namespace) -> tuple[Image.Image, str]:
    saved = any(os.path.exists(Path(args.dataset_name) / name) for name in ("state.json", "dataset_dict.json"))
    try:
        rows = load_from_disk(args.dataset_name) if saved else load_dataset(args.dataset_name)
        rows = rows[next(iter(rows))] if isinstance(rows, dict) else rows
    except Exception as error:  # datasets raises a dozen kinds of its own
        raise InputError(f"--dataset_name {args.dataset_name}: {first_line(error)}") from None
    for column in (args.image_column, *([] if args.instance_prompt else [args.caption_column])):
        if column not in rows.column_names:
            raise InputError(f"--dataset_name: no column {column!r}; it has {', '.join(rows.column_names)}")
    if not 0 <= args.dataset_index < len(rows):
        raise InputError(f"--dataset_index is {args.dataset_index}; the data set has {len(rows)} rows")
    try:
        row = rows[args.dataset_index]
    except Exception as error:  # what the image's decoder raises
        raise InputError(f"--dataset_index {args.dataset_index}: it cannot be read ({first_line(error)})") from None
    if not isinstance(row[args.image_column], Image.Image):
        raise InputError(f"--image_column {args.image_column}: it holds no images; name the column that does")
    caption = args.instance_prompt or str(row[args.caption_column] or "")
    return row[args.image_column], check_text(caption, f"--caption_column {args.caption_column}")


def chosen_size(args: argparse.Namespace, resolution: int | None = None) -> tuple[int, int]:
    """(height, width) in pixels."""
    resolution = resolution or args.resolution or 1024
    return args.height or resolution, args.width or resolution


def load_pair(args: argparse.Namespace) -> tuple[Image.Image | None, str, tuple[int, int]]:
    """The image, cropped to (height, width), its caption and that size; None for an image where --instance_prompt
    stands alone, which the base can draw; InputError where the caption is missing too."""
    given = [name for name in SOURCES if getattr(args, name)]
    if not given and args.instance_prompt and args.instance_prompt.strip():
        return None, args.instance_prompt.strip(), chosen_size(args)
    if len(given) != 1:
        raise InputError(
            f"give one of {', '.join('--' + name for name in SOURCES)}, or --instance_prompt alone and the base draws "
            f"the image; found {', '.join(given) or 'none'}"
        )
    resolution, extension = args.resolution, ".txt"
    if args.dataset_name:
        image, caption = read_dataset_row(args)
    else:
        if args.data_backend_config:
            backend = read_backend(args)
            resolution = resolution or int(backend["resolution"])
            extension, directory = backend["caption_extension"], backend["image_dir"]
        else:
            directory = args.instance_data_dir
        image = Path(args.instance_image) if args.instance_image else one_image_in(directory)
        caption = args.instance_prompt
    if isinstance(image, Path):
        if not os.path.isfile(image):
            raise InputError(f"{image}: no such image file")
        if caption is None:
            caption = read_caption(image.with_suffix("." + extension.lstrip(".")))
    caption = caption.strip()
    if not caption:
        raise InputError("the caption is empty; describe the image in --instance_prompt or the .txt beside it")
    height, width = chosen_size(args, resolution)
    return fit_image(image, height, width), caption, (height, width)


def fit_image(image: Path | Image.Image, height: int, width: int) -> Image.Image:
    """Upright, RGB (alpha over white), scaled to cover height x width and cropped at the center."""
    try:
        with warnings.catch_warnings(action="ignore"):  # Pillow's, of 90 to 180 million pixels: that can be a photo
            opened = Image.open(image, formats=FORMATS) if isinstance(image, Path) else image
            frames = getattr(opened, "n_frames", 1)
            upright = to_rgb(ImageOps.exif_transpose(opened))
            fitted = ImageOps.fit(upright, (width, height), Image.Resampling.LANCZOS)
    except Exception as error:  # Pillow's decoders raise a dozen kinds
        raise InputError(f"{image}: not a readable image ({first_line(error)}); save it as PNG or JPEG") from None
    if frames > 1:
        logger.warning(f"{image}: it holds {frames} pictures; Glance learns from the first")
    if min(upright.size) < LEAST_SIDE:
        raise InputError(f"{image}: {upright.width}x{upright.height} pixels are too few; give a larger image")
    return fitted


def to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip rather than scale
        return image.convert("I").point(lambda value: value * (1 / 257)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")
