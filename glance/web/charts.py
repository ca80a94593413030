"""What do the page's two charts show? Which LoRA acts at which noise level, and the error over the dial. As SVG.

The colours are for a light and a dark page alike; the layout may be changed freely.
"""

import math
from html import escape

from glance.training.loss_chart import gridlines


WIDTH, HEIGHT = 460, 230
LEFT, TOP, RIGHT, BOTTOM = 52, 16, 16, 40  # around what is plotted
SLOW, FAST, GRAY = "#e0712c", "#2f7fd1", "#888888"
SERIES = {"shipped": ("as shipped", GRAY), "calibrated": ("sampler", "#8a5cd1"), "with_loras": ("LoRAs", "#c2255c")}


def text(x: float, y: float, words: str, anchor: str = "middle", color: str = "currentColor") -> str:
    """Return a text of the chart."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}">{escape(words)}</text>'


def line(x: float, y: float, x2: float, y2: float, color: str = GRAY, more: str = "") -> str:
    """Return a straight line of the chart."""
    return f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}" {more}/>'


def dot(x: float, y: float, color: str, size: float = 3.5, more: str = "") -> str:
    """Return a point of the chart."""
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size}" fill="{color}" {more}/>'


def whole(name: str, parts: list[str]) -> str:
    """Return the chart of these parts, with a name for those who cannot see it."""
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(name)}" class="glance-chart">'
    return head + "".join(parts) + "</svg>"


def steps_chart(timesteps: list[float], swap: int | None) -> str:
    """Return the noise level before each step, 0..1, and the step after which the LoRAs swap; None: without LoRAs."""
    count = len(timesteps)

    def place(step: float, level: float) -> tuple[float, float]:
        return LEFT + step / count * (WIDTH - LEFT - RIGHT), TOP + (1 - level) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for level in (0, 0.5, 1):
        (x, y), (right, _) = place(0, level), place(count, level)
        parts += [line(x, y, right, y, more='stroke-opacity="0.3"'), text(x - 8, y + 4, f"{level:g}", "end")]
    for step in range(0, count + 1, max(1, round(count / 10))):
        parts.append(text(place(step, 0)[0], HEIGHT - BOTTOM + 18, str(step)))
    parts.append(text(place(count / 2, 0)[0], HEIGHT - 4, "steps done; noise left in the picture"))
    points = [place(step, level / 1000) for step, level in enumerate([*timesteps, 0])]
    for step, (start, end) in enumerate(zip(points, points[1:])):
        color = GRAY if swap is None else SLOW if step < swap else FAST
        parts += [line(*start, *end, color, 'stroke-width="2.5"'), dot(*start, color)]
    if swap is not None:
        x, bottom = place(swap, 0)
        parts.append(line(x, TOP, x, bottom, GRAY, 'stroke-dasharray="4 4"'))
        parts += [text(x - 8, TOP + 12, "slow", "end", SLOW), text(x + 8, TOP + 12, "fast", "start", FAST)]
    return whole("noise left over steps", parts)


def error_chart(
    curve: list[dict], found: list[tuple[int, float | None]], chosen: int, measured: float | None = None
) -> str:
    """Return the error to the base's full run over model calls, both logarithmic; "" where none is known.

    It shows calls.csv's rows, (calls, error) of each position of the dial as it was `found`, of which that with the
    `chosen` calls is drawn, and what was `measured` on the picture itself.
    """
    lines = {name: points for name in SERIES if (points := series(curve, name))}
    found = [(calls, error) for calls, error in found if error]
    points = [point for line in lines.values() for point in line] + found + ([(chosen, measured)] if measured else [])
    if not points:
        return ""
    every = [*(calls for calls, _ in points), chosen]
    first, last = math.log(min(every)), math.log(max(every))
    logs = [math.log10(error) for _, error in points]
    low, high = min(logs) - 0.15, max(logs) + 0.2
    low, high = min(low, (low + high) / 2 - 0.4), max(high, (low + high) / 2 + 0.4)

    def place(calls: float, error: float) -> tuple[float, float]:
        across = (math.log(calls) - first) / (last - first) if last > first else 0.5
        down = (high - math.log10(error)) / (high - low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), TOP + down * (HEIGHT - TOP - BOTTOM)

    parts = []
    for error in gridlines(low, high):
        y = place(every[0], error)[1]
        parts += [
            line(LEFT, y, WIDTH - RIGHT, y, more='stroke-opacity="0.3"'),
            text(LEFT - 8, y + 4, f"{error:g}", "end"),
        ]
    for calls in sorted(set(every)):
        parts.append(text(place(calls, 1)[0], HEIGHT - BOTTOM + 18, str(calls)))
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, "model calls a picture; error to the base's full run"))
    x = place(chosen, 1)[0]
    parts.append(line(x, TOP, x, HEIGHT - BOTTOM, GRAY, 'stroke-dasharray="4 4"'))
    for name, plotted in lines.items():
        placed = [place(*point) for point in plotted]
        parts += [line(*start, *end, SERIES[name][1], 'stroke-width="2"') for start, end in zip(placed, placed[1:])]
        parts += [dot(*point, SERIES[name][1]) for point in placed]
    parts += [dot(*place(*point), "none", 5, 'stroke="currentColor" stroke-width="1.5"') for point in found]
    for number, name in enumerate(lines):
        parts.append(text(WIDTH - RIGHT, TOP + 12 + 16 * number, SERIES[name][0], "end", SERIES[name][1]))
    if measured:
        x, y = place(chosen, measured)
        parts.append(dot(x, y, "currentColor", 5))
        before = x > WIDTH / 2
        parts.append(text(x + (-12 if before else 12), y + 4, "this picture", "end" if before else "start"))
    return whole("error over model calls", parts)


def series(curve: list[dict], name: str) -> list[tuple[int, float]]:
    """Return (calls, error) of a column of calls.csv where it holds one; what is no number is left out."""
    points = []
    for row in curve:
        try:
            calls, error = int(row["calls"]), float(row[name])
        except (KeyError, TypeError, ValueError):
            continue
        if 0 < calls and 0 < error < math.inf:
            points.append((calls, error))
    return points
