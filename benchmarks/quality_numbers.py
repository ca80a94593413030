"""How are the numbers of benchmarks/quality.py computed from pictures, latents and features, and how are they shown?

Functions of tensors alone: a further number is one more of them, and one more of COLUMNS.
"""

import itertools
import math
import statistics
from pathlib import Path

import torch
from quality_rows import PLOTTED, Row

from glance.files.atomic import replace_file


MOST_SERIES = 7  # in the plot; all else stands in the table


def psnr(images: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the decibels between pictures in 0..1, from the mean square over all; inf where they are equal."""
    error = (images - reference).square().mean().item()
    return -10 * math.log10(error) if error else math.inf


def frechet(features: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the Frechet distance of two Gaussians with means and covariances of features (N, D), as FID has it."""
    (mean, cov), (mean_r, cov_r) = ((x.mean(0), torch.cov(x.T)) for x in (features.double(), reference.double()))
    values, vectors = torch.linalg.eigh(cov)
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_r @ root).clamp(min=0).sqrt().sum()
    return max(0.0, ((mean - mean_r).square().sum() + cov.trace() + cov_r.trace() - 2 * cross).item())


def diversity(latents: torch.Tensor, seeds: int) -> float:
    """Return the mean distance between pictures of one caption; latents (captions * seeds, ...)."""
    groups = latents.reshape(-1, seeds, latents[0].numel()).double()
    return (
        torch.cdist(groups, groups, compute_mode="donot_use_mm_for_euclid_dist").sum()
        / groups[:, :, 0].numel()
        / max(seeds - 1, 1)
    ).item()


def radial_power(images: torch.Tensor) -> torch.Tensor:
    """Return the mean power of pictures (N, 3, H, W) at 0, 1, 2, ... cycles a picture, all directions together."""
    gray = images.double().mean(1)
    power = torch.fft.fft2(gray - gray.mean((1, 2), keepdim=True)).abs().square().mean(0)
    vertical, horizontal = (size * torch.fft.fftfreq(size, dtype=torch.double).abs() for size in power.shape)
    radius = torch.hypot(vertical[:, None], horizontal[None]).round().long().flatten()
    sums, counts = (torch.zeros(radius.max() + 1, dtype=torch.double) for _ in range(2))
    return sums.index_add(0, radius, power.flatten()) / counts.index_add(0, radius, torch.ones_like(power.flatten()))


def fine_detail(images: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the power of the finer half of the frequencies over the reference's: below 1 is blurred, above noisy."""
    half = min(images.shape[-2:]) // 4  # half of the highest frequency
    return (radial_power(images)[half : 2 * half].sum() / radial_power(reference)[half : 2 * half].sum()).item()


COLUMNS = {
    "calls": ("model calls", "{:.0f}"),
    "work": ("full calls", "{:.1f}"),
    "seconds": ("seconds", "{:.3f}"),
    "error": ("error", "{:.4f}"),
    "training_error": ("on the training caption", "{:.4f}"),
    "psnr": ("PSNR", "{:.2f}"),
    "judge": ("judge", "{:.3f}"),
    "frechet": ("Frechet", "{:.3f}"),
    "diversity": ("diversity", "{:.3f}"),
    "detail": ("fine detail", "{:.3f}"),
    "rate": ("rate", "{:g}"),
    "spent": ("calls spent", "{:.0f}"),
    "tuning": ("and choosing", "{:.0f}"),
}


def by_name(results: dict, rows: list[Row]) -> dict[str, list[dict]]:
    """Return {row's name: the numbers of its seeds} of the rows that are measured, in the rows' order."""
    numbers_of = {row.name: [] for row in rows}
    for entry in results["rows"]:
        numbers_of.get(entry["name"], []).append(entry["numbers"])
    return {name: numbers for name, numbers in numbers_of.items() if numbers}


def make_table(results: dict, rows: list[Row]) -> str:
    """Return the table as Markdown: means over seeds, and behind the errors half the range."""
    measured = by_name(results, rows)
    extra = {key for numbers in measured.values() for key in numbers[0]} - set(COLUMNS)
    columns = COLUMNS | {name: (name, "{:.4f}") for name in sorted(extra)}
    columns = {
        key: column for key, column in columns.items() if any(key in numbers[0] for numbers in measured.values())
    }
    lines = [["row", *(title for title, _ in columns.values())], ["---"] * (len(columns) + 1)]
    for name, numbers in measured.items():
        line = [name]
        for key, (_, form) in columns.items():
            values = [of_seed[key] for of_seed in numbers if key in of_seed]
            text = form.format(statistics.fmean(values)) if values else ""
            if "error" in key and len(values) > 1:
                text += f" ± {(max(values) - min(values)) / 2:.4f}"
            line.append(text)
        lines.append(line)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def spread(heights: list[float], least: float) -> list[float]:
    """Return the heights, moved apart so that they are at least so far from each other, their order kept."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    placed = list(heights)
    for _ in range(100):  # each pass moves neighbours that are too near by half of what is missing
        for low, high in zip(order, order[1:]):
            missing = least - (placed[high] - placed[low])
            if missing > 1e-9:
                placed[low], placed[high] = placed[low] - missing / 2, placed[high] + missing / 2
    return placed


def series_of(results: dict, rows: list[Row]) -> dict[str, list[tuple[float, float]]]:
    """Return [(full model calls, error), ...] of the kinds that the plot shows, in PLOTTED's order: seven at most."""
    measured, series = by_name(results, rows), {}
    for kind in PLOTTED:
        points = [
            tuple(statistics.fmean(of_seed[key] for of_seed in measured[row.name]) for key in ("work", "error"))
            for row in rows
            if row.kind == kind and row.name in measured and row.settings.get("guided", True)
        ]
        if points := sorted(point for point in points if point[1] > 0):
            series[kind] = points
    return dict(itertools.islice(series.items(), MOST_SERIES))


def plot(results: dict, rows: list[Row], path: Path) -> None:
    """Write a plot of the error over full model calls, each series named at an end of its line."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    axes = figure.subplots()
    series = series_of(results, rows)
    ends = {kind: points[0 if PLOTTED[kind][1] == "left" else -1] for kind, points in series.items()}
    heights = {}
    for side in ("left", "right"):
        kinds = [kind for kind in ends if PLOTTED[kind][1] == side]
        heights |= zip(kinds, spread([math.log10(ends[kind][1]) for kind in kinds], 0.07))
    for kind, points in series.items():
        name, side, color = PLOTTED[kind]
        own = not color.startswith("0")  # grey is of the others
        axes.plot(*zip(*points), marker="o", markersize=5, linewidth=2 if own else 1.2, color=color, zorder=2 + own)
        look = {"color": color, "fontweight": "bold" if own else "normal", "va": "center"}
        look["ha"] = "right" if side == "left" else "left"
        axes.text(ends[kind][0] * (0.93 if side == "left" else 1.07), 10 ** heights[kind], name, **look)
    axes.set(xscale="log", yscale="log", xlabel="full model calls a picture", ylabel="relative error to the teacher")
    axes.set_xlim(1.9, 200)
    for axis, ticks in (
        (axes.xaxis, (4, 6, 8, 10, 14, 20, 40, 100)),
        (axes.yaxis, (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)),
    ):
        axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    replace_file(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))
