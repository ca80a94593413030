"""Which image, caption and size does a SimpleTuner dataloader JSON mean, by SimpleTuner's documentation?

What Glance can follow is in the tables on top; a key that would change what is learned is refused, not overlooked.
"""

import json
import logging
import math
import re
from collections.abc import Iterable
from pathlib import Path

from glance.config_file import read_caption, read_text, unique_pairs
from glance.shared_flags import MAX_SIDE
from glance_utils import InputError


logger = logging.getLogger(__name__)

# Entries that lie beside the image's and change nothing here: caches, and what others are conditioned or measured on.
BESIDE = ("text_embeds", "image_embeds", "conditioning_image_embeds", "distillation_cache", "conditioning", "eval")
TYPES = {
    **dict.fromkeys(("type", "dataset_type", "instance_data_dir", "image_dir", "caption_strategy"), str),
    **dict.fromkeys(("caption_extension", "instance_prompt", "resolution_type", "crop_style", "crop_aspect"), str),
    **dict.fromkeys(("disabled", "disable", "only_instance_prompt", "prepend_instance_prompt", "crop"), bool),
    **dict.fromkeys(("disable_multiline_split", "is_regularisation_data", "is_regularization_data"), bool),
    **dict.fromkeys(("resolution", "minimum_image_size", "maximum_image_size", "target_downsample_size"), float),
    **dict.fromkeys(("minimum_aspect_ratio", "maximum_aspect_ratio", "slider_strength"), float),
    **dict.fromkeys(("start_epoch", "start_step", "end_epoch", "end_step"), float),
}
NAMES = {str: "a text", bool: "true or false", float: "a finite number"}
# Keys that change what is learned, each with the values that Glance can follow.
SUPPORTED = {
    "type": ("local",),
    "dataset_type": ("image",),
    "caption_strategy": ("textfile", "instanceprompt", "filename"),
    "resolution_type": ("pixel", "pixel_area", "area"),
    "is_regularisation_data": (False,),
    "is_regularization_data": (False,),
    "slider_strength": (0,),
    "conditioning": ([],),
    "conditioning_data": ("", []),
    "caption_filter_list": ("", []),
    "start_epoch": (0, 1),
    "start_step": (0, 1),
    "end_epoch": (0,),
    "end_step": (0,),
}


def refusal(key: str, value, hint: str) -> InputError:
    """Return the error for an entry's key whose value cannot be followed."""
    return InputError(f"--data_backend_config: {key} {json.dumps(value)[:100]}: {hint}")


def read_backend(path: str | Path) -> dict:
    """Return the one enabled entry of images, without its null keys.

    Raise InputError where there is none or several, or where it asks for what Glance does not do.
    """
    try:
        entries = json.loads(read_text(path, "--data_backend_config "), object_pairs_hook=unique_pairs)
    except (ValueError, RecursionError) as error:
        raise InputError(f"--data_backend_config {path}: not valid JSON ({error})") from None
    entries = entries if isinstance(entries, list) else [entries]
    for entry in entries:
        if not isinstance(entry, dict):
            raise InputError(f"--data_backend_config {path}: found {type(entry).__name__}; write a list of entries")
    entries = [{key: value for key, value in entry.items() if value is not None} for entry in entries]
    for key, value in [pair for entry in entries for pair in entry.items()]:
        check_type(key, value)
    entries = [entry for entry in entries if not (entry.get("disabled") or entry.get("disable"))]
    named = [entry.get(key) for entry in entries for key in BESIDE]  # a cache may be one by that alone
    images = [
        entry
        for entry in entries
        if entry.get("dataset_type") not in BESIDE and ("id" not in entry or entry["id"] not in named)
    ]
    if len(images) != 1:
        raise InputError(
            f"--data_backend_config {path}: {len(images)} enabled entries of images; Glance learns from one, so set "
            '"disabled": true in all others'
        )
    for entry in entries:  # also of those that cache what captions become
        check_supported(entry, ("caption_filter_list",))
    (entry,) = images
    check_supported(entry, SUPPORTED)
    if isinstance(shuffle := entry.get("caption_shuffle"), dict) and shuffle.get("enable", False) is not False:
        raise refusal("caption_shuffle", shuffle, "Glance learns from one caption; leave it out")
    extension = entry.get("caption_extension", ".txt")
    if not re.fullmatch(r"\.?\w+([.-]\w+)*", extension):
        raise refusal("caption_extension", extension, 'give one such as ".txt", or leave it out')
    directory_of(entry)
    side_of(entry)
    return entry


def check_type(key: str, value) -> None:
    """Raise InputError where a key of TYPES has a value of another type."""
    kind = TYPES.get(key)
    good = isinstance(value, kind) if kind in (str, bool) else type(value) in (int, float) and math.isfinite(value)
    if kind and not good:
        raise refusal(key, value, f"it takes {NAMES[kind]}")


def check_supported(entry: dict, keys: Iterable[str]) -> None:
    """Raise InputError where one of the keys, of SUPPORTED, has another value than Glance can follow."""
    for key in keys:
        supported = SUPPORTED[key]
        if entry.get(key, supported[0]) not in supported:
            accepted = " or ".join(json.dumps(value) for value in supported)
            raise refusal(
                key, entry[key], f"Glance learns from one local image as it is; give {accepted}, or leave it out"
            )


def directory_of(entry: dict) -> str:
    """Return the folder that holds the image, in itself or below; raise InputError where none is named.

    The guide "Glance-style single-sample LoRA" calls it image_dir.
    """
    given = {entry[key] for key in ("instance_data_dir", "image_dir") if key in entry}
    if len(given) != 1 or "" in given:
        raise InputError(
            "--data_backend_config: instance_data_dir (or image_dir) names the image's folder; found "
            f"{', '.join(map(repr, sorted(given))) or 'neither'}"
        )
    return given.pop()


def side_of(entry: dict) -> int | None:
    """Return the side in pixels of the square that `resolution` means; None where it is not given.

    Of an area in megapixels, 1.0 is 1024x1024; SimpleTuner rounds the sides to multiples of 64. Raise InputError where
    it is no whole number of pixels from 16 to MAX_SIDE.
    """
    if "resolution" not in entry:
        return None
    resolution, kind = entry["resolution"], entry.get("resolution_type", "pixel_area")
    if kind == "area":
        side = max(round(1024 * math.sqrt(max(resolution, 0)) / 64), resolution > 0) * 64
    else:
        side = resolution
    if side != int(side) or not 16 <= side <= MAX_SIDE:
        hint = f"{kind} counts " + (
            "megapixels" if kind == "area" else "pixels; for megapixels resolution_type is area"
        )
        raise refusal("resolution", resolution, f"{hint}; at most {MAX_SIDE} pixels a side")
    return int(side)


def caption_of(entry: dict, image: Path) -> str:
    """Return the image's caption by the entry's strategy: the text beside it unless another is named."""
    prompt, strategy = entry.get("instance_prompt", "").strip(), entry.get("caption_strategy", "textfile")
    only = strategy == "instanceprompt" or entry.get("only_instance_prompt")
    if (only or entry.get("prepend_instance_prompt")) and not prompt:
        raise refusal("instance_prompt", prompt, "the entry's captions are made of it; give one")
    if only:
        return prompt
    if strategy == "filename":
        caption = image.stem.replace("_", " ")
    else:
        file = image.with_suffix("." + entry.get("caption_extension", "txt").lstrip("."))
        caption = read_caption(file)
        captions = [line for line in caption.split("\n") if line.strip()]
        if len(captions) > 1 and not entry.get("disable_multiline_split"):
            caption = captions[0]
            logger.info(f"{file}: it holds {len(captions)} captions, one a line; Glance learns from the first")
    return f"{prompt} {caption}" if entry.get("prepend_instance_prompt") else caption


def check_shape(entry: dict, width: int, height: int) -> None:
    """Raise InputError where SimpleTuner would leave out an image of this size in pixels, or would not crop it to the
    square around its center."""
    size_text, ratio = f"the image is {width}x{height}", width / height
    kind = entry.get("resolution_type", "pixel_area")
    size = {"pixel": min(width, height), "pixel_area": math.sqrt(width * height), "area": width * height / 1e6}[kind]
    if size < entry.get("minimum_image_size", 0):
        raise refusal("minimum_image_size", entry["minimum_image_size"], f"{size_text}, which this leaves out")
    for key, fits in {
        "minimum_aspect_ratio": ratio >= entry.get("minimum_aspect_ratio", ratio),
        "maximum_aspect_ratio": ratio <= entry.get("maximum_aspect_ratio", ratio),
    }.items():
        if not fits:
            raise refusal(key, entry[key], f"{size_text}, which this leaves out")
    target = entry.get("target_downsample_size", entry.get("resolution"))
    if target != entry.get("resolution") and size > entry.get("maximum_image_size", math.inf):
        raise refusal(
            "target_downsample_size", target, f"{size_text}; Glance scales it to the resolution and no further"
        )
    square = {"crop": (True,), "crop_aspect": ("square",), "crop_style": ("center", "centre")}
    for key, supported in square.items():
        if entry.get(key, supported[0]) not in supported and round(ratio, 2) != 1:
            hint = "Glance crops to the size that is asked for, around the center"
            raise refusal(key, entry[key], f"{size_text}, and {hint}; give --aspect keep, or --height and --width")
    if entry.get("crop_aspect") == "random":
        raise refusal("crop_aspect", "random", 'Glance learns from one size; give "square"')
