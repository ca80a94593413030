"""On which of the base's own trajectories are ways to sample tried? Each process draws its share, and tries on it.

One half of the captions is fitted on, and what comes of it is measured on the other.
"""

from dataclasses import dataclass

import torch
from accelerate import PartialState

from glance.training import distribution, stages
from glance.training.trajectories import MOST_FITTED, Teacher, list_jobs


@dataclass(frozen=True)
class Examples:
    """Trajectories of the base that this process tries plans on, those of a caption side by side."""

    numbers: list[int]  # of each of them, among those of all processes
    captions: list[str]
    seeds: list[int]
    points: torch.Tensor  # (trajectories, steps + 1, ...) float32 on the CPU
    fitted: torch.Tensor  # (trajectories,) bool: in the half on which weights are fitted
    own: int  # so many are this process's; others fill its share up, so that a sharded base computes on all

    def own_rows(self) -> torch.Tensor:
        """Return which of them are this process's, (trajectories,) bool."""
        return torch.arange(len(self.numbers)) < self.own

    def all_own(self) -> list[tuple[int, bool]]:
        """Return (number, whether it is fitted on) of those of all processes, by number."""
        return sorted(sum(distribution.gather_on_host([*zip(self.numbers, self.fitted.tolist())][: self.own]), []))

    def some(self, most: int) -> "Examples":
        """Return at most so many of all processes' trajectories, as many of either half, each where it is."""
        known, kept = self.all_own(), set()
        for half in (True, False):
            kept |= set(spread([number for number, fitted in known if fitted == half], most // 2))
        own = [row for row in range(self.own) if self.numbers[row] in kept]
        rows = filled(own)
        named = ([values[row] for row in rows] for values in (self.numbers, self.captions, self.seeds))
        return Examples(*named, self.points[rows], self.fitted[rows], len(own))

    def to_begin_with(self) -> list[torch.Tensor]:
        """Return the points of MOST_FITTED trajectories that are fitted on, (trajectories, ...) for each of the steps
        and the end; the same on all processes."""
        kept = spread([number for number, fitted in self.all_own() if fitted], MOST_FITTED)
        here = {self.numbers[row]: self.points[row] for row in range(self.own) if self.numbers[row] in kept}
        shared = {number: points for part in distribution.gather_on_host(here) for number, points in part.items()}
        return list(torch.stack([shared[number] for number in kept], dim=1))


def spread(numbers: list, most: int) -> list:
    """Return at most so many of the numbers, evenly spread over them."""
    count = min(most, len(numbers))
    return [numbers[index * len(numbers) // count] for index in range(count)]


def filled(rows: list[int]) -> list[int]:
    """Return the rows and, where a sharded base computes on all processes or on none, as many more as another has;
    at least one."""
    share = max(distribution.gather_on_host(len(rows))) if distribution.is_sharded() else 0
    return rows + [rows[-1] if rows else 0] * (max(share, 1) - len(rows))


def distance(examples: Examples, folds: list[tuple[torch.Tensor, bool]]) -> float:
    """Return how far the `ends` (trajectories, ...) of each fold, (ends, the half that was fitted on), are from the
    base's own in its other half, of the examples of all processes together; infinite where they are no numbers."""
    off = size = 0.0
    for ends, half in folds:
        measured = (examples.fitted != half) & examples.own_rows()
        exact = examples.points[measured, -1].double()
        parts = distribution.gather_on_host(((ends[measured] - exact).square().sum(), exact.square().sum()))
        off, size = off + sum(part for part, _ in parts), size + sum(part for _, part in parts)
    error = float((off / size) ** 0.5)
    return error if error == error else float("inf")


def draw_examples(args, teacher: Teacher, captions: list[str]) -> Examples:
    """Let the base draw --num_trajectories of each caption, each on one process, and return this process's."""
    state, jobs, points = PartialState(), list_jobs(args, captions), {}
    numbers = list(range(len(jobs)))

    def draw(number: int, advance) -> None:
        points[number] = torch.cat(teacher.draw(*jobs[number], advance=advance))

    stages.enter("drawing")
    distribution.share(numbers, draw, "drawing", len(teacher.timesteps))
    own = numbers[state.process_index :: state.num_processes]
    if not points:  # there are more processes than trajectories; this one computes with another's
        draw(numbers[-1], lambda: None)
    rows = [(own or [max(points)])[row] for row in filled(list(range(len(own))))]
    # Of several captions every other one is fitted on, of a single one the first half of its trajectories.
    seeds = args.num_trajectories
    fitted = [row // seeds % 2 == 0 if captions[1:] else row < seeds / 2 for row in rows]
    points = torch.stack([points[row] for row in rows])
    return Examples(rows, *map(list, zip(*(jobs[row] for row in rows))), points, torch.tensor(fitted), len(own))
