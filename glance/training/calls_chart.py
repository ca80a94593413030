"""What does the dial do for this model? Errors over numbers of model calls: calls.csv, and as a picture calls.png.

Both axes are logarithmic, as every call less costs more than the one before. The layout may be changed freely.
"""

import csv
import io
import logging
import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from glance.files.atomic import replace_text
from glance.files.faults import CALLS
from glance.files.pictures import save_png
from glance.training.loss_chart import gridlines


logger = logging.getLogger(__name__)

CHART = "calls.png"
COLUMNS = ("calls", "shipped", "calibrated", "with_loras")  # of calls.csv
SERIES = {"shipped": ("as shipped", "#888888"), "calibrated": ("calibrated", "#1f77b4")}
SERIES |= {"with_loras": ("with LoRAs", "#d62728")}
WIDTH, HEIGHT = 640, 400  # pixels
LEFT, TOP, RIGHT, BOTTOM = 64, 40, 110, 48  # pixels around what is plotted; the lines' names are on the right


def write_curve(folder: Path, curve: list[list] | None, with_loras: tuple[int, float] | None = None) -> None:
    """Write search.measure_curve's rows, [calls, error as shipped, error calibrated], as the folder's calls.csv and
    calls.png, with one point more, (calls, error) of this run's LoRAs, where there is one.

    Where there is no curve, what an earlier run left is taken away.
    """
    if curve is None:
        for name in (CALLS, CHART):
            (folder / name).unlink(missing_ok=True)
        return
    rows = [[*row, with_loras[1] if with_loras and with_loras[0] == row[0] else None] for row in curve]
    if with_loras and with_loras[0] not in [row[0] for row in curve]:
        rows = sorted([*rows, [with_loras[0], None, None, with_loras[1]]])
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([COLUMNS, *rows])
    replace_text(folder / CALLS, text.getvalue())
    save_png(draw_chart(rows), folder / CHART)


def say_curve(curve: list[list], steps: int) -> None:
    """Log search.measure_curve's rows as a table."""
    logger.info(f"  Error to {steps} steps by model calls, as the base is shipped and calibrated:")
    for calls, *errors in curve:
        cells = ["-" if error is None else f"{error:.4f}" for error in errors]
        logger.info(f"  {calls:5d}  {cells[0]:>7}  {cells[1]:>7}")


def draw_chart(rows: list[list]) -> Image.Image:
    """Return a picture of calls.csv's rows, (calls, error or None of each of SERIES); errors of 0 are not shown."""
    canvas = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(14)
    lines = {name: [(row[0], row[column]) for row in rows if row[column]] for column, name in enumerate(SERIES, 1)}
    logs = [math.log10(error) for line in lines.values() for _, error in line] or [0.0]
    low, high = math.floor(10 * min(logs)) / 10, math.ceil(10 * max(logs)) / 10 + 0.1
    first, last = (math.log(calls) for calls in (rows[0][0], rows[-1][0]))

    def place(calls: int, error: float) -> tuple[float, float]:
        across = (math.log(calls) - first) / (last - first or 1)
        down = (high - math.log10(error)) / (high - low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), TOP + down * (HEIGHT - TOP - BOTTOM)

    draw.text((LEFT, 12), "error to the base's full run, by model calls a picture", "black", font)
    for error in gridlines(low, high):
        _, y = place(rows[0][0], error)
        draw.line((LEFT, y, WIDTH - RIGHT, y), "gainsboro")
        draw.text((LEFT - 8, y), f"{error:g}", "dimgray", font, anchor="rm")
    for calls, *_ in rows:
        draw.text((place(calls, 1)[0], HEIGHT - BOTTOM + 8), str(calls), "dimgray", font, anchor="ma")
    names = []  # (y, name) of the lines' ends
    for name, line in lines.items():
        points = [place(*point) for point in line]
        if len(points) > 1:
            draw.line(points, SERIES[name][1], 2)
        for x, y in points:
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), SERIES[name][1])
        if points:
            names.append((*points[-1], name))
    write_names(draw, font, names)
    return canvas


def write_names(draw: ImageDraw.ImageDraw, font, names: list[tuple[float, float, str]]) -> None:
    """Write the names of SERIES beside where their lines end, (x, y, name), none over another."""
    lowest = 0.0
    for x, y, name in sorted(names, key=lambda end: end[1]):
        y = lowest = max(y, lowest + 16)
        draw.text((x + 10, y), SERIES[name][0], SERIES[name][1], font, anchor="lm")
