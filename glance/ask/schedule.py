"""Which timesteps does a pipeline walk, and what is its model told at them? Its own `__call__` says so in dry runs.

Timesteps here are 1000 * sigma in 0..1000, descending; a pipeline's own unit and direction end in `_walk`.
"""

from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput

from glance.ask.components import denoiser_name
from glance.ask.pipeline import PLAIN_BASE, dry_run, no_prediction
from glance_utils import InputError, counts_image, timesteps_to_sigmas


# What a FlowMatchEulerDiscreteScheduler must be told to leave given sigmas as they are.
UNSHIFTED = {"shift": 1.0, "use_dynamic_shifting": False, "shift_terminal": None}


def ask_timesteps(pipe: DiffusionPipeline, num_steps: int, **kwargs) -> list[float]:
    """Return the timesteps (0..1000), 1000 * sigma, that the pipeline walks in `num_steps` steps at this size.

    A pipeline that ships a list of its own steps walks that, whatever is asked: the answer then has its length.
    Raise InputError where the walk is not one strictly descending point a step.
    """
    return [timestep for timestep, _ in _ask_walk(pipe, num_steps, **kwargs)]


def has_own_steps(pipe: DiffusionPipeline, num_steps: int, **kwargs) -> bool:
    """Return whether the pipeline ships a list of its own steps, which are the same for another number of them."""
    few_steps = 3 if num_steps == 2 else 2  # a schedule that drops what it rounds to the same is then whole
    return _walk(pipe, num_steps, **kwargs) == _walk(pipe, few_steps, **kwargs)


def ask_timestep_table(pipe: DiffusionPipeline, num_steps: int, **kwargs) -> list[list[float]] | None:
    """Return a Schedule's timestep_table: [timestep, what the model is told there], ascending, from 0 to 1000; None
    where it is told just the timestep, 1000 * sigma.

    Some pipelines shift the sigmas of their schedule, but not the timesteps that go with them.
    """
    walk = _ask_walk(pipe, num_steps, **kwargs)
    if all(model_timestep is None for _, model_timestep in walk):
        return None
    rows = {(timestep, timestep if model_timestep is None else model_timestep) for timestep, model_timestep in walk}
    return [list(row) for row in sorted({(0.0, 0.0), (1000.0, 1000.0), *rows})]


def walks_given_sigmas(pipe: DiffusionPipeline, timesteps: list[float], **kwargs) -> bool:
    """Return whether the pipeline, given these timesteps (0..1000) as `sigmas`, walks and tells its model just them,
    with its scheduler's shifts switched off as UNSHIFTED does: then they can be drawn by diffusers alone."""
    if type(pipe.scheduler) is not FlowMatchEulerDiscreteScheduler or counts_image(pipe.scheduler):
        return False
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, **UNSHIFTED)
    sigmas, walked = timesteps_to_sigmas(timesteps), []

    def step(model_output, timestep, sample, *args, **kwargs):
        walked.append((float(scheduler.sigmas[len(walked)]), float(timestep) / scheduler.config.num_train_timesteps))
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=sample)

    scheduler.step = step
    try:
        dry_run(pipe, scheduler, sigmas=sigmas, num_inference_steps=len(sigmas), **kwargs)
    except InputError:  # it takes none
        return False
    pairs = zip(sigmas, walked)
    return len(walked) == len(sigmas) and all(abs(sigma - part) < 1e-6 for sigma, parts in pairs for part in parts)


def _ask_walk(pipe: DiffusionPipeline, num_steps: int, **kwargs) -> list[tuple[float, float | None]]:
    """Return `_walk`'s answer; raise InputError where it is no schedule of one step after another."""
    name, scheduler = type(pipe).__name__, type(pipe.scheduler).__name__
    walk = _walk(pipe, num_steps, **kwargs)
    if not walk:
        raise InputError(f"{name}: asked for {num_steps} steps, but it never called scheduler.step")
    if len(walk) != num_steps and not has_own_steps(pipe, num_steps, **kwargs):
        raise InputError(
            f"{name}: with its {scheduler} {num_steps} steps are {len(walk)} model calls; Glance needs one for each: "
            f"use {PLAIN_BASE}"
        )
    timesteps = [timestep for timestep, _ in walk]
    wrong = [timestep for timestep in timesteps if not 0 < timestep <= 1000]  # NaN among them
    wrong += [low for high, low in zip(timesteps, timesteps[1:]) if not low < high]
    if wrong:
        raise InputError(
            f"{name}: with its {scheduler} {num_steps} steps visit timestep {wrong[0]:g} "
            f"({', '.join(f'{timestep:.4g}' for timestep in timesteps[:3])}, ...); a rectified flow descends from at "
            f"most 1000 and stays above 0: give another --num_base_steps, or {PLAIN_BASE}"
        )
    return walk


def _walk(pipe: DiffusionPipeline, num_steps: int, **kwargs) -> list[tuple[float, float | None]]:
    """Return (timestep, model timestep) of each of `num_steps` steps, from a dry run of the pipeline.

    The timestep is 1000 * sigma. The model timestep is what the model is told there, None where that is what
    FixedSigmaScheduler tells it too.
    """
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    unit = 1000 / scheduler.config.num_train_timesteps
    acted, walked = set(), []  # the steps at which the transformer was called; the answer

    def forward(*args, **kwargs):
        acted.add(len(walked))
        return no_prediction(*args, **kwargs)

    def step(model_output, timestep, sample, *args, **kwargs):
        model_timestep, timestep = float(timestep), 1000 * float(scheduler.sigmas[len(walked)])
        same = abs(unit * model_timestep - timestep) < 1  # some round it
        timestep = unit * model_timestep if same else timestep
        timestep = 1000 - timestep if counts_image(scheduler) else timestep
        if len(walked) not in acted:
            name = denoiser_name(pipe.config)
            raise InputError(f"{type(pipe).__name__}: at timestep {timestep:.0f} another model than its {name} acts")
        walked.append((timestep, None if same else model_timestep))
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=sample)

    scheduler.step = step
    try:
        dry_run(pipe, scheduler, forward, num_inference_steps=num_steps, **kwargs)
    except InputError as error:
        if error.__cause__ is None or isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            raise
        # Any other question is asked with a scheduler of ours, which takes what the pipeline gives it.
        raise InputError(f"{error}; it has a {type(scheduler).__name__}, so try {PLAIN_BASE}") from error
    return walked
