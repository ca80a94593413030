"""Which image and caption does a run learn from? A file, a folder, a SimpleTuner JSON or one row of a data set.

A further source is one more of SOURCES and one more case in load_pair; what the sources hold is data from anyone.
"""

import argparse
import io
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageOps

from glance.ask.pipeline import first_line
from glance.config_file import check_text, read_caption
from glance.files.image_file import SUFFIXES, read_frames, read_image
from glance.files.simpletuner import caption_of, check_shape, directory_of, read_backend, side_of
from glance_utils import InputError


logger = logging.getLogger(__name__)

SOURCES = ("instance_image", "instance_data_dir", "data_backend_config", "dataset_name")


def one_image_in(directory: str, below: bool = False) -> Path:
    """Return the one file in a folder, or also `below` it, that is named as an image.

    macOS writes a hidden ._a.png beside a.png. Raise InputError where there is not just one.
    """
    if not os.path.isdir(directory):  # False, too, for a name that is too long
        raise InputError(f"{directory}: no such folder; it should hold one image and its caption")

    def refuse(error: OSError):
        raise InputError(f"{directory}: cannot be read ({error.strerror}); it should hold one image and its caption")

    images = images_in(directory, below, refuse)
    if len(images) != 1:
        names = f" ({', '.join(path.name for path in sorted(images)[:3])}, ...)" if images else ""
        raise InputError(
            f"{directory}: {len(images)} images found{names}; Glance learns from one, or name it: --instance_image"
        )
    return images[0]


def images_in(directory: str, below: bool, onerror=None) -> list[Path]:
    """Return the files in a folder, or also `below` it, that are named as images and not hidden."""
    images = []
    for folder, folders, files in os.walk(directory, onerror=onerror):
        folders[:] = [name for name in folders if below and not name.startswith(".")]
        paths = [Path(folder, name) for name in files if not name.startswith(".")]
        images += [path for path in paths if path.suffix.lower() in SUFFIXES and path.is_file()]
    return images


def find_backend(args: argparse.Namespace) -> dict:
    """Return the entry of a SimpleTuner dataloader JSON, looked for as given, then beside the --config file."""
    path = Path(args.data_backend_config)
    if not os.path.exists(path) and args.config:
        path = Path(args.config).parent / path.name
    return read_backend(path)


def read_dataset_row(args: argparse.Namespace) -> tuple[io.BytesIO, str]:
    """Return the image file of a data set's row, and its caption or --instance_prompt.

    Raise InputError where the data set, the column or the row is not there or cannot be read.
    """
    captioned = [image for image in images_in(args.dataset_name, below=True) if image.with_suffix(".txt").exists()]
    if captioned:  # which datasets would read as a data set of texts
        raise InputError(
            f"--dataset_name {args.dataset_name}: a folder of images with .txt captions is no data set; give "
            f"--instance_data_dir for the one pair in a folder, or --instance_image {min(captioned)}"
        )
    import datasets  # a second of imports
    import fsspec

    saved = any(os.path.exists(Path(args.dataset_name) / name) for name in ("state.json", "dataset_dict.json"))
    try:
        if saved:
            rows = datasets.load_from_disk(args.dataset_name)
        else:
            rows = datasets.load_dataset(args.dataset_name, cache_dir=args.cache_dir)
        rows = (rows[next(iter(rows))] if isinstance(rows, dict) else rows).with_format(None)
    except Exception as error:  # datasets raises a dozen kinds of its own
        raise InputError(f"--dataset_name {args.dataset_name}: {first_line(error)}") from None
    for column in (args.image_column, *([] if args.instance_prompt else [args.caption_column])):
        if column not in rows.column_names:
            raise InputError(f"--dataset_name: no column {column!r}; it has {', '.join(rows.column_names)}")
    if not 0 <= args.dataset_index < len(rows):
        raise InputError(f"--dataset_index is {args.dataset_index}; the data set has {len(rows)} rows")
    if not isinstance(rows.features[args.image_column], datasets.Image):
        raise InputError(f"--image_column {args.image_column}: it holds no images; name the column that does")
    try:
        # Undecoded, and no other column: the image is read as any other file.
        stored = datasets.Image(decode=False)
        row = rows.select([args.dataset_index]).cast_column(args.image_column, stored)
        image = row.select_columns(args.image_column)[0][args.image_column]
        content = image["bytes"]
        if content is None:
            with fsspec.open(image["path"]) as file:
                content = file.read()
        caption = None if args.instance_prompt else row.select_columns(args.caption_column)[0][args.caption_column]
    except Exception as error:  # what file systems, archives and decoders raise
        raise InputError(f"--dataset_index {args.dataset_index}: it cannot be read ({first_line(error)})") from None
    return io.BytesIO(content), args.instance_prompt or caption_in(caption, args)


def caption_in(value, args: argparse.Namespace) -> str:
    """Return the caption that a data set's row holds, of several the first; raise InputError where it is no text."""
    name = f"--caption_column {args.caption_column}"
    if isinstance(value, list) and value and all(isinstance(text, str | None) for text in value):
        captions = [text for text in value if text and text.strip()]
        if len(captions) > 1:
            logger.info(
                f"{name}: row {args.dataset_index} holds {len(captions)} captions; Glance learns from the first"
            )
        value = captions[0] if captions else ""
    if not isinstance(value, str):
        content = "nothing" if value is None else type(value).__name__
        raise InputError(
            f"{name}: row {args.dataset_index} holds {content}, not text; name a column of texts, or give "
            "--instance_prompt"
        )
    return check_text(value, name)


def chosen_size(
    args: argparse.Namespace, own_size: Callable[[], tuple[int, int]], resolution: int | None = None
) -> tuple[int, int]:
    """Return (height, width) in pixels, as asked for; own_size() says what is not, and is called only then."""
    resolution = resolution or args.resolution
    height, width = args.height or resolution, args.width or resolution
    if height and width:
        return height, width
    own_height, own_width = own_size()
    return height or own_height, width or own_width


def load_pair(
    args: argparse.Namespace, own_size: Callable[[], tuple[int, int]]
) -> tuple[Image.Image | None, str, tuple[int, int]]:
    """Return the image, cropped to (height, width) in pixels, its caption and that size.

    own_size() is the pipeline's own (height, width), for where neither a flag nor the data says one; own_size(height,
    width) is the one near these that it draws, for --aspect keep. The image is None where --instance_prompt stands
    alone: the base can draw it. Raise InputError where there are several sources, no readable image or no caption.
    """
    given = [name for name in SOURCES if getattr(args, name)]
    if not given and args.aspect == "keep":
        raise InputError("--aspect keep: there is no image whose aspect ratio to keep; give one, or leave it out")
    if not given and args.instance_prompt and args.instance_prompt.strip():
        return None, args.instance_prompt.strip(), chosen_size(args, own_size)
    if len(given) != 1:
        raise InputError(
            f"give one of {', '.join('--' + name for name in SOURCES)}, or --instance_prompt alone and the base draws "
            f"the image; found {', '.join(given) or 'none'}"
        )
    caption, entry = args.instance_prompt, {}
    if args.dataset_name:
        file, caption = read_dataset_row(args)
        name = f"--dataset_name {args.dataset_name}, row {args.dataset_index}"
    else:
        if args.data_backend_config:
            entry = find_backend(args)
            file = one_image_in(directory_of(entry), below=True)
        else:
            file = Path(args.instance_image) if args.instance_image else one_image_in(args.instance_data_dir)
        if not os.path.isfile(file):
            raise InputError(f"{file}: no such image file")
        if caption is None:
            caption = caption_of(entry, file) if entry else read_caption(file.with_suffix(".txt"))
        name = str(file)
    caption = caption.strip()
    if not caption:
        raise InputError("the caption is empty; describe the image in --instance_prompt or the .txt beside it")
    image = read_image(file, name)
    if entry and not (args.resolution or args.height or args.width or args.aspect == "keep"):
        check_shape(entry, *image.size)
    size = chosen_size(args, own_size, args.resolution or side_of(entry))
    kept = kept_size(image, size)
    if args.aspect == "keep":
        size = own_size(*kept)
    else:
        say_cropped(image, name, size, kept)
    return ImageOps.fit(image, size[::-1], Image.Resampling.LANCZOS), caption, size


def load_clip(args: argparse.Namespace, image: Image.Image, frames: int) -> list[Image.Image]:
    """Return what is learned of --instance_image in a call that draws so many `frames`: load_pair's image alone, or
    the first frames of the file, cropped as that is. Raise InputError where it holds too few."""
    if frames == 1:
        return [image]
    name = next(name for name in SOURCES if getattr(args, name))
    images = [image]
    if args.instance_image:
        images, _ = read_frames(Path(args.instance_image), args.instance_image, frames)
    if len(images) < frames:
        raise InputError(
            f"--{name} {getattr(args, name)}: it holds {len(images)} of the {frames} frames that are drawn; give "
            f"--num_frames {len(images)}, a video as --instance_image, or --loss trajectory, which needs none"
        )
    return [ImageOps.fit(frame, image.size, Image.Resampling.LANCZOS) for frame in images]


def kept_size(image: Image.Image, size: tuple[int, int]) -> tuple[int, int]:
    """Return the (height, width) with the image's aspect ratio that has as many pixels as `size`."""
    scale = math.sqrt(size[0] * size[1] / (image.height * image.width))
    return round(image.height * scale), round(image.width * scale)


def say_cropped(image: Image.Image, name: str, size: tuple[int, int], kept: tuple[int, int]) -> None:
    """Say how much of the image is left out at (height, width) `size`, where it is more than a fiftieth."""
    height, width = size
    share = min(width * image.height / (height * image.width), height * image.width / (width * image.height))
    if share < 0.98:
        logger.info(
            f"{name}: {1 - share:.0%} of its {image.width}x{image.height} pixels are cropped away at {width}x{height};"
            f" --aspect keep keeps all, at about {kept[1]}x{kept[0]}"
        )
