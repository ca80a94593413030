"""Which pictures go into a pipeline's call beside the prompt? Those of --pipeline_images, by the call's own names.

A recipe keeps the names alone: what was trained with some is drawn with others. A run is known by their content. The
prompts of a .jsonl file have pictures of their own.
"""

import hashlib
from pathlib import Path

from PIL import Image

from glance.command_line import Prompt
from glance.files.image_file import read_frames, read_image
from glance_utils import InputError


MOST_FRAMES = 10_000  # of a video that a call is given
EXAMPLE = """'{"image": "a.png"}'"""


def read_pipeline_images(files: dict) -> dict[str, Image.Image | list[Image.Image]]:
    """Return the pictures of {"image": "a.png", "mask_image": "m.png"}, or of lists of files, as instance images are
    read: upright, RGB in sRGB; of a file for an argument of that name all frames of the video. Raise InputError where
    one is not there or cannot be read."""
    return {argument: _read(argument, given, "video" in argument) for argument, given in files.items()}


def _read(argument: str, given, all_frames: bool = False) -> Image.Image | list[Image.Image]:
    if isinstance(given, list) and given:
        return [_read(argument, file) for file in given]
    if not isinstance(given, str):
        raise InputError(
            f"--pipeline_images: {argument} is {str(given)[:100]!r}; give a file, or a list of some, as in {EXAMPLE}"
        )
    name = f"--pipeline_images: {argument}: {given}"
    if not Path(given).is_file():
        raise InputError(f"{name}: no such file; give a picture")
    return read_frames(Path(given), name, MOST_FRAMES)[0] if all_frames else read_image(Path(given), name)


def call_with(call: dict, prompt: str) -> dict:
    """Return a call's arguments with this prompt and the pictures of its own, if it has some."""
    return call | pictures_of(prompt) | {"prompt": str(prompt)}


def pictures_of(prompt: str) -> dict:
    """Return the pictures that a prompt has of its own, {} for most; raise InputError as read_pipeline_images does."""
    if not isinstance(prompt, Prompt):
        return {}
    if prompt.pictures is None:  # read once, as each step of training asks for them
        prompt.pictures = read_pipeline_images(prompt.files)
    return prompt.pictures


def digest_of(value):
    """Return what JSON can hold of a call's argument: of a picture its size and a digest of its pixels."""
    if isinstance(value, Image.Image):
        return [*value.size, hashlib.sha256(value.tobytes()).hexdigest()]
    return str(value)


def check_given(names: list[str] | None, files: dict, prompts: list[str]) -> None:
    """Raise InputError where a pair or a sampler of pictures beside the prompt is to be drawn without them."""
    given = [files.keys() | getattr(prompt, "files", {}) for prompt in prompts]
    if missing := [name for name in names or () if not all(name in some for some in given)]:
        raise InputError(
            f"it was trained with a picture as {', '.join(missing)}; give one by --pipeline_images, as in {EXAMPLE}"
        )
