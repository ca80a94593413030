"""What does one micro-step of training compute? The flow loss, towards the image, as published; the trajectory loss,
along the base's own trajectory; or both.

The formulas themselves are glance_utils'. Here they meet the draws: which samples, at which noise levels, how much
each counts. The training loop and the benchmarks call `step_losses`; nothing here knows of settings, processes or
optimizers.
"""

from dataclasses import dataclass, field

import torch

from glance.files.pipeline_images import call_with
from glance.training.draws import Draw
from glance_utils import add_noise, velocity_loss


SEGMENT_POWERS = {"uniform": 0, "length": 1, "length_squared": 2}


@dataclass(frozen=True)
class Flow:
    """The flow loss's data: the straight path from an image to noise, with its weight beside the trajectory loss."""

    latents: torch.Tensor  # (1, ...) float32, or (batch_size, ...)
    noise_scale: float = 1.0  # how much stronger than standard normal the pipeline's noise is
    call: dict = field(default_factory=dict)  # further arguments of the model's pipeline
    weight: float = 1.0


@dataclass(frozen=True)
class Trajectory:
    """The trajectory loss's data: points of the base's own trajectories, and the velocities from each to the next."""

    starts: torch.Tensor  # (captions, trajectories, timesteps, ...) float32: the points
    targets: torch.Tensor  # the same shape: the velocities
    captions: list[str]
    call: dict = field(default_factory=dict)  # as above, without the caption
    seeds: list[list[int]] | None = None  # (captions, trajectories), where what pictures say depends on them


@dataclass(frozen=True)
class Objective:
    """A phase's losses, one or both, at the noise levels of its timesteps."""

    sigmas: list[float]  # (timesteps,) in (0, 1]
    flow: Flow | None = None
    trajectory: Trajectory | None = None
    weights: torch.Tensor | None = None  # (timesteps,) how much each counts, 1 in the mean; alike where None


def segment_weights(lengths: list[float], kind: str) -> torch.Tensor:
    """Return how much each step counts by its length in sigma, (timesteps,), 1 in the mean.

    `kind` is one of SEGMENT_POWERS.
    """
    weights = torch.tensor(lengths) ** SEGMENT_POWERS[kind]
    return weights / weights.mean()


def flow_batch(flow: Flow, sigmas: list[float], noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the flow loss trains on, (noisy, target velocities), in the shape of the noise:
    (sigmas * batch_size, ...), the samples of a sigma side by side."""
    parts = (flow.noise_scale * noise).to(flow.latents.device).unflatten(0, (len(sigmas), -1))
    noisy = [add_noise(flow.latents, part, sigma) for part, sigma in zip(parts, sigmas)]
    return torch.cat(noisy), torch.cat([part - flow.latents for part in parts])


def trajectory_batch(trajectory: Trajectory, draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the trajectory loss trains on, (points, target velocities), (timesteps_per_step * batch_size, ...)
    each, where the trajectories are: on the CPU."""
    rows = draw.caption, torch.tensor(draw.trajectories), torch.tensor(draw.positions)[:, None]
    return trajectory.starts[rows].flatten(0, 1), trajectory.targets[rows].flatten(0, 1)


def mean_losses(model, points: torch.Tensor, targets: torch.Tensor, sigmas: list[float], **call) -> torch.Tensor:
    """Return glance_utils.velocity_loss at each of the sigmas, (sigmas,) float32.

    `points` and `targets` are (sigmas * batch_size, ...), the samples of a sigma side by side;
    model(points, one sigma for each, **call) gives the velocities, wherever the points are.
    """
    batch_size = len(points) // len(sigmas)
    velocities = model(points, [sigma for sigma in sigmas for _ in range(batch_size)], **call)
    targets = targets.to(velocities.device)
    parts = [part.unflatten(0, (len(sigmas), batch_size)) for part in (velocities, targets)]
    return torch.stack([velocity_loss(velocity, target) for velocity, target in zip(*parts)])


def step_losses(model, objective: Objective, draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a micro-step's loss, () float32, to go backward from, and what it is the weighted mean of: the loss at
    each of the draw's timesteps, (timesteps_per_step,), comparable within a timestep alone."""
    sigmas = [objective.sigmas[position] for position in draw.positions]
    losses = 0.0
    if objective.trajectory is not None:
        points, targets = trajectory_batch(objective.trajectory, draw)
        call = call_with(objective.trajectory.call, objective.trajectory.captions[draw.caption])
        if seeds := objective.trajectory.seeds:
            call["seeds"] = [seeds[draw.caption][index] for index in draw.trajectories] * len(sigmas)
        losses = mean_losses(model, points, targets, sigmas, **call)
    if objective.flow is not None:
        points, targets = flow_batch(objective.flow, sigmas, draw.noise)
        losses = losses + objective.flow.weight * mean_losses(model, points, targets, sigmas, **objective.flow.call)
    if objective.weights is None:
        return losses.mean(), losses
    return (losses * objective.weights[draw.positions].to(losses)).mean(), losses
