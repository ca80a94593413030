"""Which of the model's own steps should a sampler keep, and how far should it go along its velocities?

A grid keeps a few of the model's own steps. Its Euler steps are chords of the trajectory that all the steps walk; what
a chord leaves out is how much the velocity changes under it. Half of that the previous step's velocity already tells,
so a fitted solver has two numbers a step, read off the same trajectory.

These are functions of a trajectory, but for `walk`, which draws one. Other ways to choose or to fit go here.
"""

import torch
from diffusers import DiffusionPipeline

from glance.ask.pipeline import Answer, Probe, replaced
from glance_utils import (
    as_floats,
    counts_image,
    grid_positions,
    model_timesteps,
    segment_slopes,
    timesteps_to_sigmas,
)


def most_positions(grid: str, count: int, base_steps: int) -> int:
    """Return the largest number of steps, `count` at most, for which the named grid keeps distinct ones."""
    counts = range(count, 0, -1)
    return next(fewer for fewer in counts if len(set(grid_positions(grid, fewer, base_steps))) == fewer)


def best_positions(points: list[torch.Tensor], sigmas: list[float], count: int) -> list[int]:
    """Return the `count` steps of the trajectory, 0-based, whose chords miss its velocities least.

    `points` are the latents (B, ...) at `sigmas`, the last of which is 0, of one trajectory or of B. A segment costs
    its length times the sum, over the steps in it, of each one's length times its velocity's squared distance from
    the chord's. The least sum of costs is found by dynamic programming.
    """
    points = torch.stack(points).flatten(1).double()
    sigmas = as_floats(sigmas)
    steps = len(sigmas) - 1
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


def at_positions(
    points: list[torch.Tensor], sigmas: list[float], positions: list[int]
) -> tuple[list[torch.Tensor], list[float], list[torch.Tensor]]:
    """Return a trajectory's points and sigmas at `positions` and at its end, and its own velocities at `positions`.

    Points and velocities are (B, ...); with N positions there are N + 1 points and sigmas, and N velocities.
    """
    sigmas = as_floats(sigmas)
    velocities = segment_slopes(points, sigmas)
    with_end = [*positions, len(points) - 1]
    return [points[i] for i in with_end], [sigmas[i] for i in with_end], [velocities[i] for i in positions]


def fit_coefficients(points: list[torch.Tensor], sigmas: list[float], positions: list[int]) -> list[list[float]]:
    """Return [a, c] for each step, such that a * velocity + c * the previous step's velocity is nearest to the slope
    of its chord, by least squares over all elements of one trajectory or several. The first step has c = 0.

    No model is called: the velocities are those of the trajectory's own steps. Two-step Adams-Bashforth has such
    numbers too, the same for any function; these are the model's.
    """
    points, sigmas, velocities = at_positions(points, sigmas, positions)
    coefficients = []
    for index, slope in enumerate(segment_slopes(points, sigmas)):
        basis = [part.flatten().double() for part in velocities[max(index - 1, 0) : index + 1][::-1]]
        solution = torch.linalg.lstsq(torch.stack(basis, dim=1), slope.flatten()[:, None].double()).solution
        # Rounded: the last digits depend on where in memory the numbers lay, and a file would be another each time.
        coefficients.append([round(value, 9) for value in (*solution.flatten().tolist(), 0.0)][:2])
    return coefficients


def segment_targets(points, sigmas, positions, coefficients=None) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return what the trajectory loss trains on: the points (B, ...) at `positions`, and the velocities (B, ...) with
    which a step from there lands on the next of them, Euler's or the fitted solver's.

    The fitted solver's step also goes along the velocity that the LoRA, not the base, predicted before: each target
    is what the one before it leaves to be done, over the steps of both phases.
    """
    starts, sigmas, _ = at_positions(points, sigmas, positions)
    targets = segment_slopes(starts, sigmas)
    previous = 0.0
    for index, (a, c) in enumerate(coefficients or ()):
        targets[index] = (targets[index] - c * previous) / a
        previous = targets[index]
    return starts[:-1], targets


def walk(
    pipe: DiffusionPipeline,
    timesteps: list[float],
    timestep_table,
    seed: int,
    coefficients=None,
    advance=lambda: None,
    **call,
) -> list[torch.Tensor]:
    """Return the latents (B, ...) before each of these steps of the pipeline and after the last, on the CPU.

    They are summed up in float32, whatever the pipeline computes in. `coefficients`, [a, c] for each step, are
    fit_coefficients' answer; Euler's steps without. advance() is called after each step.
    """
    sigmas = [*timesteps_to_sigmas(timesteps), 0.0]
    sign = -1 if counts_image(pipe.scheduler) else 1
    points = []
    previous = 0.0

    def on_step(index, model_output, sample):
        nonlocal previous
        velocity = sign * model_output.float()
        a, c = coefficients[index] if coefficients else (1.0, 0.0)
        if index == 0:
            points.append(sample.to(torch.float32, copy=True))  # some pipelines write into it
        points.append(points[-1] + (sigmas[index + 1] - sigmas[index]) * (a * velocity + c * previous))
        advance()
        if index == len(timesteps) - 1:
            raise Answer  # what some pipelines do to the final latents needs the VAE, which was freed
        previous = velocity
        return points[-1].to(sample)

    probe = Probe(sigmas[:-1], on_step, model_timesteps(timestep_table, sigmas[:-1]), pipe.scheduler)
    with replaced(pipe, "scheduler", probe):
        try:
            pipe(
                output_type="latent",
                num_inference_steps=len(timesteps),
                generator=torch.Generator().manual_seed(seed),
                **call,
            )
        except Answer:
            pipe.maybe_free_model_hooks()  # as at the end of its call, which it does not reach
            return [point.cpu() for point in points]
    raise RuntimeError(f"{type(pipe).__name__} ended before its {len(timesteps)} steps")


def relative_error(latents: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the norm of the difference by the norm of `exact`, of tensors of one shape."""
    return ((latents - exact).norm() / exact.norm()).item()
