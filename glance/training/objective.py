"""What does a phase learn, and by which random choices? Its losses and its draws, made of what the run prepared.

How a loss is computed is losses.py's business, how a choice is made draws.py's.
"""

from glance.training import losses
from glance.training.draws import Draws
from glance.training.prepare import Prepared
from glance.training.trajectories import trajectory_seeds
from glance_utils import PHASES, timesteps_to_sigmas


def make_objective(args, prepared: Prepared, phase: str) -> losses.Objective:
    """Return what the phase learns: of the image, of the base's own trajectories, or of both."""
    answers, steps, drawn = prepared.answers, prepared.steps, prepared.trajectories
    flow = trajectory = weights = None
    if args.loss == "trajectory":
        places = steps.places(phase)
        points = drawn.starts[:, :, places], drawn.targets[:, :, places]
        seeds = trajectory_seeds(args, prepared.captions) if answers.draws_conditions else None
        trajectory = losses.Trajectory(*points, prepared.captions, answers.train_call, seeds)
        weights = losses.segment_weights(drawn.lengths[places], args.segment_weights)
    if args.loss == "flow" or args.flow_weight:
        weight = args.flow_weight if args.loss == "trajectory" else 1.0
        flow = losses.Flow(prepared.latents, answers.noise_scale, answers.single_call, weight)
    return losses.Objective(timesteps_to_sigmas(steps.phases[phase]), flow, trajectory, weights)


def make_draws(args, accelerator, prepared: Prepared, phase: str) -> Draws:
    """Return the random choices of the phase, other ones than the other phase's."""
    return Draws(
        seed=args.seed + PHASES.index(phase),
        mode=args.flow_timesteps_mode,
        micro_steps=args.max_train_steps * args.gradient_accumulation_steps,
        timesteps=len(prepared.steps.phases[phase]),
        timesteps_per_step=args.timesteps_per_step,
        batch_size=args.train_batch_size,
        captions=len(prepared.captions),
        trajectories=args.num_trajectories,
        sample_shape=prepared.latents.shape[1:] if args.loss == "flow" or args.flow_weight else None,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
