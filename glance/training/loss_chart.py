"""How do losses look? One panel for each phase, one line for each timestep, drawn by Pillow, which every run has.

The losses of different timesteps differ tenfold, so their axis is logarithmic. The layout may be changed freely.
"""

import math

from PIL import Image, ImageDraw, ImageFont


WIDTH, HEIGHT = 640, 400  # pixels of a panel
LEFT, TOP, RIGHT, BOTTOM = 64, 40, 190, 48  # pixels around what is plotted; the legend is on the right
COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2")


def draw_chart(rows: list[tuple]) -> Image.Image:
    """Return a picture of loss.csv's rows, (phase, step, timestep, loss) each, at least one."""
    phases = list(dict.fromkeys(phase for phase, *_ in rows))
    canvas = Image.new("RGB", (WIDTH * len(phases), HEIGHT), "white")
    logs = [math.log10(loss) for *_, loss in rows if loss > 0] or [0.0]
    low, high = math.floor(10 * min(logs)) / 10, math.ceil(10 * max(logs)) / 10 + 0.1
    for column, phase in enumerate(phases):
        panel = Image.new("RGB", (WIDTH, HEIGHT), "white")
        draw_panel(ImageDraw.Draw(panel), phase, [row[1:] for row in rows if row[0] == phase], low, high)
        canvas.paste(panel, (WIDTH * column, 0))
    return canvas


def draw_panel(draw: ImageDraw.ImageDraw, phase: str, rows: list[tuple], low: float, high: float) -> None:
    """Draw the rows (step, timestep, loss) of a phase; `low` and `high` are powers of ten that the axis spans."""
    font = ImageFont.load_default(14)
    last = max(step for step, *_ in rows)

    def place(step: float, loss: float) -> tuple[float, float]:
        across = (step - 1) / max(last - 1, 1)
        down = (high - math.log10(loss)) / (high - low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), TOP + down * (HEIGHT - TOP - BOTTOM)

    draw.text((LEFT, 12), f"{phase}: loss at each timestep", "black", font)
    for loss in gridlines(low, high):
        (left, y), (right, _) = place(1, loss), place(max(last, 2), loss)
        draw.line((left, y, right, y), "gainsboro")
        draw.text((LEFT - 8, y), f"{loss:g}", "dimgray", font, anchor="rm")
    for step in sorted({1, round((1 + last) / 2), last}):
        x = place(step, 10**low)[0]
        draw.text((x, HEIGHT - BOTTOM + 8), f"step {step}" if step == 1 else str(step), "dimgray", font, anchor="ma")
    for number, timestep in enumerate(sorted({timestep for _, timestep, _ in rows}, reverse=True)):
        color = COLORS[number % len(COLORS)]
        found = [(step, loss) for step, at, loss in rows if at == timestep and loss > 0]
        points = [place(*point) for point in found]
        if len(points) > 1:
            draw.line(points, color, 2)
        for x, y in points:
            draw.ellipse((x - 2, y - 2, x + 2, y + 2), color)
        if found:
            label = f"{timestep:.0f}: {found[0][1]:.3g} -> {found[-1][1]:.3g}"
            draw.text((WIDTH - RIGHT + 14, TOP + 20 * number), label, color, font)


def gridlines(low: float, high: float) -> list[float]:
    """Return round numbers between 10**low and 10**high."""
    decades = range(math.floor(low), math.ceil(high) + 1)
    return [
        factor * 10.0**power for power in decades for factor in (1, 2, 5) if low <= math.log10(factor) + power <= high
    ]
