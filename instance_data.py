"""One image and its caption: from a file, a folder, a SimpleTuner dataloader JSON or one row of a data set."""

import argparse
import json
from pathlib import Path

from datasets import load_dataset, load_from_disk
from PIL import Image, ImageOps

from glance_utils import InputError, first_line


SOURCES = ("instance_image", "instance_data_dir", "data_backend_config", "dataset_name")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def read_caption(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no caption there; write one, or give --instance_prompt") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error})") from None


def one_image_in(directory: str) -> Path:
    if not Path(directory).is_dir():
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
    if not path.exists() and args.config:
        path = Path(args.config).parent / path.name
    try:
        backend = json.loads(path.read_text(encoding="utf-8-sig"))
        backend = backend[0] if isinstance(backend, list) else backend
        return {"caption_extension": ".txt", "image_dir": backend["image_dir"]} | backend
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise InputError(f"--data_backend_config {path}: cannot be read ({type(error).__name__}: {error})") from None


def read_dataset_row(args: argparse.Namespace) -> tuple[Image.Image, str]:
    saved = any((Path(args.dataset_name) / name).exists() for name in ("state.json", "dataset_dict.json"))
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
    row = rows[args.dataset_index]
    return row[args.image_column], args.instance_prompt or str(row[args.caption_column] or "")


def load_pair(args: argparse.Namespace) -> tuple[Image.Image, str, tuple[int, int]]:
    """The image, cropped to (height, width), its caption and that size; InputError where either is missing."""
    given = [name for name in SOURCES if getattr(args, name)]
    if len(given) != 1:
        raise InputError(
            f"give one of {', '.join('--' + name for name in SOURCES)}; found {', '.join(given) or 'none'}"
        )
    resolution, extension = args.resolution, ".txt"
    if args.dataset_name:
        image, caption = read_dataset_row(args)
    else:
        if args.data_backend_config:
            backend = read_backend(args)
            resolution = resolution or int(backend.get("resolution", 0))
            extension, directory = backend["caption_extension"], backend["image_dir"]
        else:
            directory = args.instance_data_dir
        image = Path(args.instance_image) if args.instance_image else one_image_in(directory)
        caption = args.instance_prompt
    if isinstance(image, Path):
        if not image.is_file():
            raise InputError(f"{image}: no such image file")
        if caption is None:
            caption = read_caption(image.with_suffix("." + extension.lstrip(".")))
    caption = caption.strip()
    if not caption:
        raise InputError("the caption is empty; describe the image in --instance_prompt or the .txt beside it")
    height, width = args.height or resolution or 1024, args.width or resolution or 1024
    return fit_image(image, height, width), caption, (height, width)


def fit_image(image: Path | Image.Image, height: int, width: int) -> Image.Image:
    """Upright, RGB (alpha over white), scaled to cover height x width and cropped at the center."""
    try:
        opened = Image.open(image) if isinstance(image, Path) else image
        opened = ImageOps.exif_transpose(opened)
        if "A" in opened.getbands() or "transparency" in opened.info:
            rgba = opened.convert("RGBA")
            opened = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
        elif opened.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip rather than scale
            opened = opened.convert("I").point(lambda value: value * (1 / 257)).convert("L")
        return ImageOps.fit(opened.convert("RGB"), (width, height), Image.Resampling.LANCZOS)
    except (OSError, ValueError, SyntaxError, AttributeError, Image.DecompressionBombError) as error:
        raise InputError(f"{image}: not a readable image ({error})") from None
