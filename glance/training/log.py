"""What does a run say of its losses: in the progress bar, to trackers, at a phase's end, in loss.csv, and where they
are no numbers?

Losses can be compared within a timestep alone: late timesteps have larger ones, and another order of the timesteps
would look like progress. So a mean is over all of a phase's timesteps, each with its newest loss.
"""

import csv
import io
import math
from pathlib import Path

import torch

from glance.files.atomic import replace_text
from glance.files.faults import LOSSES
from glance.files.pictures import save_png
from glance.training.loss_chart import draw_chart
from glance_utils import PHASES


CHART = "loss.png"
COLUMNS = ("phase", "step", "timestep", "loss")  # of loss.csv


def check_finite(value: float, name: str, phase: str, step: int, timestep: float) -> None:
    """Raise FloatingPointError where a loss or a norm is NaN or infinite: the run has diverged."""
    if not math.isfinite(value):
        raise FloatingPointError(
            f"{phase}: the {name} is {value} at step {step}, timestep {timestep:g}; no {phase} LoRA was written. "
            "Try a lower --learning_rate, or --mixed_precision bf16 instead of fp16"
        )


class LossLog:
    """The losses of a phase, by the timestep (0..1000) at which they were measured."""

    def __init__(self, phase: str, timesteps: list[float]):
        self.phase, self.timesteps = phase, timesteps
        self.measured = []  # (step counted from 1, position among the timesteps, loss)
        self.last = {}  # the newest loss of each position
        self.newest = {}

    def add(self, step: int, positions: list[int], losses: list[float]) -> float:
        """Note a micro-step's losses, one for each of its positions among the timesteps; return their mean."""
        self.measured += [(step, position, loss) for position, loss in zip(positions, losses)]
        self.last |= zip(positions, losses)
        mean = sum(losses) / len(losses)
        self.newest = {f"{self.phase}/loss": mean}
        self.newest |= {f"{self.phase}/loss_at_{self.timesteps[i]:.0f}": loss for i, loss in zip(positions, losses)}
        return mean

    def last_round(self) -> float | None:
        """Return the mean over all timesteps of each one's newest loss; None until all of them were trained on."""
        return sum(self.last.values()) / len(self.last) if len(self.last) == len(self.timesteps) else None

    def first_and_last(self) -> str:
        """Return each timestep's first loss and its last, as "1000: 0.21 -> 0.12, ...", of those trained on."""
        losses = {position: [] for position in range(len(self.timesteps))}
        for _, position, loss in self.measured:
            losses[position].append(loss)
        parts = [(self.timesteps[position], found) for position, found in losses.items() if found]
        return ", ".join(f"{timestep:.0f}: {found[0]:.3g} -> {found[-1]:.3g}" for timestep, found in parts)

    def rows(self) -> list[tuple]:
        """Return what COLUMNS name of each loss, in the order in which they were measured."""
        return [(self.phase, step, self.timesteps[position], loss) for step, position, loss in self.measured]

    def state(self) -> torch.Tensor:
        """Return all that was measured, (N, 3) float64, for a checkpoint."""
        return torch.tensor(self.measured, dtype=torch.float64).reshape(-1, 3)

    def restore(self, state: torch.Tensor) -> None:
        """Go on from another log's state, of the same phase and timesteps."""
        self.measured = [(int(step), int(position), loss) for step, position, loss in state.tolist()]
        self.last = {position: loss for _, position, loss in self.measured}


def read_losses(folder: str | Path, phases: list[str]) -> list[tuple]:
    """Return the rows of these phases in the folder's loss.csv; [] where there is none, or it is no such file."""
    try:
        with open(Path(folder, LOSSES), encoding="utf-8", newline="") as file:
            header, *rows = csv.reader(file)
        if tuple(header) != COLUMNS:
            return []
        return [
            (phase, int(step), float(timestep), float(loss)) for phase, step, timestep, loss in rows if phase in phases
        ]
    except (OSError, ValueError, csv.Error):
        return []


def write_losses(folder: str | Path, rows: list[tuple]) -> None:
    """Write the rows, of one phase after the other, as the folder's loss.csv, and as loss.png what they look like."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([COLUMNS, *rows])
    replace_text(Path(folder, LOSSES), text.getvalue())
    if rows:
        save_png(draw_chart(rows), Path(folder, CHART))


def join_losses(output_dir: Path) -> None:
    """Write what --parallel_phases left in each phase's own folder as one file, as one phase after the other does."""
    rows = []
    for phase in PHASES:  # one that an earlier run finished was joined then
        rows += read_losses(output_dir / phase, [phase]) or read_losses(output_dir, [phase])
    write_losses(output_dir, rows)
    for path in (output_dir / phase / name for phase in PHASES for name in (LOSSES, CHART)):
        path.unlink(missing_ok=True)
