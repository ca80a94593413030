"""Can a picture be written, asked before it is drawn, and how does --compare put several into one?

What a kind of file can hold is asked of Pillow, not listed here. The layout of a comparison may be changed freely.
"""

import bisect
import io
import os
from collections.abc import Sequence
from pathlib import Path

from diffusers.utils import export_to_video
from PIL import Image, ImageDraw, ImageFont

from glance.ask.pipeline import first_line
from glance.files import faults
from glance.files.atomic import replace_file
from glance.files.image_file import knows_videos
from glance_utils import InputError


# Of a comparison, in pixels.
GAP = 12  # around a picture
LINE = 22  # height of a line of text
LEAST_WIDTH = 256  # of a picture
JPEG_LIMIT = 65500  # pixels; libjpeg itself says so on stderr
MOVING = ("WEBP", "GIF", "PNG", "AVIF")  # Pillow's kinds of file that play several frames
VIDEO = ".mp4"


def plays(path: Path) -> bool:
    """Return whether a file of this name can hold several frames."""
    return path.suffix.lower() == VIDEO or _kind(path) in MOVING


def files_of(output: Path, count: int, compare: bool) -> list[Path]:
    """Return the file of each of `count` pictures or, to `compare`, of each row of the comparison, which is kept until
    that is whole; `output` is the user's word for them all."""
    if compare:
        return [output.with_name(f"{output.stem}-row-{number:03d}.png") for number in range(count)]
    if count == 1:
        return [output]
    return [output.with_stem(f"{output.stem}-{number:03d}") for number in range(count)]


def check_output(output: Path, names: list[Path], size: tuple[int, int] | None) -> None:
    """Raise InputError where pictures of `size`, (width, height) in pixels if it is known, cannot be written.

    `names` are the files that will be, all of the kind that `output`, the user's word for them, says by its ending.
    """
    is_video = output.suffix.lower() == VIDEO
    if is_video and not knows_videos():
        raise InputError(
            f"--output {output}: {VIDEO} is written by imageio; pip install imageio imageio-ffmpeg, or end it in .webp"
        )
    if _kind(output) not in Image.SAVE and not is_video:
        raise InputError(f"--output {output}: not an image file name; end it in .png, .jpg, .webp or {VIDEO}")
    width, height = size or (64, 64)
    for trial in ((width, 1), (1, height)):  # limits are on the sides, and so it takes no time
        if not is_video and not _can_be_written(_kind(output), trial):
            raise InputError(
                f"--output {output}: {_kind(output)} holds no picture of {width}x{height}; end it in .png"
                if size
                else f"--output {output}: {_kind(output)} holds no such pictures; end it in .png"
            )
    for path in names:
        if path.is_dir():
            raise InputError(f"--output {path}: a folder; name a file in it")
    faults.check_writable(output.parent, "--output")
    _check_name(max(names, key=lambda path: len(path.name)))


def _kind(path: Path) -> str | None:
    """Return Pillow's word for the kind of file that a name says, such as PNG; None where it knows none."""
    return Image.registered_extensions().get(path.suffix.lower())


def _can_be_written(kind: str, size: tuple[int, int]) -> bool:
    """Return whether Pillow writes such a picture and, if it reads it, gets the same size back: some shrink it."""
    if kind == "JPEG" and max(size) > JPEG_LIMIT:
        return False
    buffer = io.BytesIO()
    try:
        Image.new("RGB", size).save(buffer, format=kind)
        buffer.seek(0)
        return kind not in Image.OPEN or Image.open(buffer, formats=[kind]).size == size
    except Exception:  # each kind refuses in its own way
        return False


def _check_name(path: Path) -> None:
    """Raise InputError where there can be no file of this name, such as one that is too long."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    trial = folder / f".{path.name}.{os.getpid()}"  # as atomic.replace_file names it
    try:
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise InputError(f"--output {path}: cannot be written ({error.strerror})") from None


def save_png(image: Image.Image, path: Path) -> None:
    """Write a picture as PNG, whole or not at all; raise OSError where it cannot be written."""
    replace_file(path, lambda temporary: image.save(temporary, format="PNG"))


def save_frames(frames: list[Image.Image], path: Path, fps: float) -> None:
    """Write a picture, or the frames of a video at so many a second, whole or not at all; where the kind of file plays
    none, the first frame. Raise InputError where it cannot be written."""
    kind = _kind(path)
    if kind == "JPEG":
        frames = [frame.convert("RGB") for frame in frames]  # some draw RGBA
    moving = {"save_all": True, "append_images": frames[1:], "duration": round(1000 / fps), "loop": 0}
    options = moving if len(frames) > 1 and kind in MOVING else {}

    def write(temporary: Path) -> None:
        if path.suffix.lower() == VIDEO:
            named = temporary.with_name(f"{temporary.name}{VIDEO}")  # the writer goes by the ending
            try:
                whole = [frame.convert("RGB") for frame in frames]
                export_to_video(whole, str(named), fps, quality=8, macro_block_size=2)
                named.replace(temporary)
            finally:
                named.unlink(missing_ok=True)
        else:
            frames[0].save(temporary, format=kind, **options)

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, write)
    except Exception as error:  # a full disk, a folder that went; and each kind refuses in its own way
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(
            f"--output {path}: cannot be written ({reason}); what was written before is still there"
        ) from None


def comparison_size(picture: tuple[int, int], columns: int, rows: int, details: int = 1) -> tuple[int, int]:
    """Return (width, height) of a comparison of pictures of this (width, height), all in pixels, with so many lines of
    details under each."""
    width, height = _shown_size(picture)
    return columns * (width + GAP) + GAP, rows * (height + (2 + details) * LINE + GAP) + GAP


def _shown_size(picture: tuple[int, int]) -> tuple[int, int]:
    """Return (width, height) of a picture in a comparison, where small ones are enlarged."""
    scale = max(1, round(LEAST_WIDTH / picture[0]))
    return scale * picture[0], scale * picture[1]


def draw_row(row: list[tuple], prompt: str) -> Image.Image:
    """Return a comparison of one prompt: its (label, image, details) beside each other, details of a line or more."""
    size = row[0][1].size
    font = ImageFont.load_default(16)
    width, height = _shown_size(size)
    lines = max(len(details.splitlines()) for _, _, details in row)
    canvas = Image.new("RGB", comparison_size(size, len(row), 1, lines), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((GAP, GAP), _shortened(prompt, font, canvas.width - 2 * GAP), "black", font)
    for column, (label, image, details) in enumerate(row):
        left, top = GAP + column * (width + GAP), GAP + LINE
        canvas.paste(image.convert("RGB").resize((width, height), Image.Resampling.NEAREST), (left, top))
        draw.text((left, top + height + 2), label, "black", font)
        for number, line in enumerate(details.splitlines(), 1):
            draw.text((left, top + height + number * LINE), line, "dimgray", font)
    return canvas


def _shortened(text: str, font, width: int) -> str:
    """Return the text on one line, as much of it as fits into `width` pixels."""
    text = " ".join(text.split())[:width]  # no letter is less than a pixel wide
    if font.getlength(text) <= width:
        return text
    fits = bisect.bisect(range(len(text)), width, key=lambda count: font.getlength(text[:count] + "..."))
    return text[: max(fits - 1, 0)].rstrip() + "..."


def stack_rows(rows: Sequence[Image.Image]) -> Image.Image:
    """Return several comparisons as one picture, below each other."""
    canvas = Image.new("RGB", (max(row.width for row in rows), sum(row.height - GAP for row in rows) + GAP), "white")
    top = 0
    for row in rows:
        canvas.paste(row, (0, top))
        top += row.height - GAP
    return canvas
