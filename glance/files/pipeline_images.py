"""Which pictures go into a pipeline's call beside the prompt? Those of --pipeline_images, by the call's own names."""

from pathlib import Path

from PIL import Image

from glance.files.image_file import read_image
from glance_utils import InputError


def read_pipeline_images(files: dict) -> dict[str, Image.Image | list[Image.Image]]:
    """Return the pictures of {"image": "a.png", "mask_image": "m.png"}, or of lists of files, as instance images are
    read: upright, RGB in sRGB. Raise InputError where one is not there or cannot be read."""
    return {argument: _read(argument, given) for argument, given in files.items()}


def _read(argument: str, given) -> Image.Image | list[Image.Image]:
    if isinstance(given, list) and given:
        return [_read(argument, file) for file in given]
    if not isinstance(given, str):
        raise InputError(
            f"--pipeline_images: {argument} is {str(given)[:100]!r}; give a file, or a list of some, as in "
            '\'{"image": "a.png"}\''
        )
    if not Path(given).is_file():
        raise InputError(f"--pipeline_images: {argument}: {given}: no such file; give a picture")
    return read_image(Path(given), f"--pipeline_images: {argument}: {given}")
