"""The grid of timesteps that loses least: found on the model's own trajectory, and measured.

A grid keeps a few of the model's own steps. Its Euler steps are chords of the trajectory that all the steps walk; what
a chord leaves out is how much the velocity changes under it.
"""

import torch

from ask_latents import loop_points
from ask_pipeline import replaced
from glance_utils import FixedSigmaScheduler, grid_positions, timesteps_to_sigmas


def best_positions(points: list[torch.Tensor], sigmas: list[float], count: int) -> list[int]:
    """The `count` steps of the trajectory, 0-based, whose chords miss its velocities least, by dynamic programming.

    `points` are the latents at `sigmas`, the last of which is 0. A segment costs its length times the sum, over the
    steps in it, of each one's length times its velocity's squared distance from the chord's.
    """
    points, steps = torch.stack(points).flatten(1).double(), len(sigmas) - 1
    lengths = [high - low for high, low in zip(sigmas, sigmas[1:])]
    energy = [0.0]  # sum over the steps so far of length * velocity**2
    for length, step in zip(lengths, points[1:] - points[:-1]):
        energy.append(energy[-1] + step.square().mean().item() / length)

    def cost(start: int, end: int) -> float:
        chord = (points[end] - points[start]).square().mean().item()
        return (sigmas[start] - sigmas[end]) * (energy[end] - energy[start]) - chord

    costs = {(start, end): cost(start, end) for start in range(steps) for end in range(start + 1, steps + 1)}
    # best[end]: the least cost of getting from the beginning to there, and the positions that it keeps
    best = {0: (0.0, [])}
    for _ in range(count):
        best = {
            end: min((best[start][0] + costs[start, end], best[start][1] + [start]) for start in best if start < end)
            for end in range(1, steps + 1)
            if any(start < end for start in best)
        }
    return best[steps][1]


def walk(pipe, timesteps: list[float], told, seed: int, **call) -> list[torch.Tensor]:
    """The latents before each of these steps of the pipeline and after the last, float32 on the CPU."""
    sigmas = timesteps_to_sigmas(timesteps)
    scheduler = FixedSigmaScheduler(sigmas, told(sigmas), like=pipe.scheduler)
    with replaced(pipe, "scheduler", scheduler):
        generator = torch.Generator().manual_seed(seed)
        return loop_points(pipe, num_inference_steps=len(timesteps), generator=generator, **call)


def choose_grid(pipe, base_timesteps: list[float], count: int, told, seed: int, **call) -> dict[str, tuple]:
    """{grid: (relative error, positions)} of the grids "auto", "glance" and "even", the best one first.

    The error is that of the final latents after `count` steps, to those of all the model's own steps with the same
    noise and guidance, relative to their size.
    """
    points = walk(pipe, base_timesteps, told, seed, **call)
    grids = {"auto": best_positions(points, [*timesteps_to_sigmas(base_timesteps), 0.0], count)}
    grids |= {grid: grid_positions(grid, count, len(base_timesteps)) for grid in ("glance", "even")}
    found = {}
    for grid, positions in grids.items():
        final = walk(pipe, [base_timesteps[position] for position in positions], told, seed, **call)[-1]
        found[grid] = ((final - points[-1]).norm() / points[-1].norm()).item(), positions
    return dict(sorted(found.items(), key=lambda item: item[1][0]))
