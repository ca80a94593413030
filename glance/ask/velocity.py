"""What is a pipeline's velocity at (noisy, sigma)? One step of its own `__call__`, with gradients.

Training through the pipeline sees exactly what inference will see. Here, too, are the conditions for asking so: that a
step remembers nothing, is told no end, and takes several samples or timesteps or does not.
"""

import contextlib
import itertools
import json

import torch
from diffusers import DiffusionPipeline
from torch.utils._pytree import tree_leaves

from glance.ask.pipeline import (
    Answer,
    Probe,
    accepted_arguments,
    batch_argument,
    dry_run,
    model_input,
    no_prediction,
    refusals,
    run_pipeline,
)
from glance_utils import (
    FixedSigmaScheduler,
    InputError,
    as_floats,
    counts_image,
    denoiser,
    model_timesteps,
    timesteps_to_sigmas,
)


def ask_velocity_shares(pipe: DiffusionPipeline, timesteps: list[float], timestep_table, **kwargs) -> list[float]:
    """Return, for each timestep (0..1000), how much of the velocity (noisy - image) / sigma the pipeline takes.

    It is 1.0 where the model predicts the velocity itself. Where it predicts the image, some pipelines divide by more
    than sigma near 0: less than 1.0.
    """
    shares = []
    for sigma in timesteps_to_sigmas(timesteps):
        velocities = []

        def on_step(index, model_output, sample, velocities=velocities):
            velocities.append(model_output)
            return torch.ones_like(sample)

        probe = Probe([sigma, sigma], on_step, model_timesteps(timestep_table, [sigma, sigma]), pipe.scheduler)
        dry_run(pipe, probe, **kwargs)
        shares.append(sigma * velocities[1].float().mean().item() or 1.0)  # the prediction is all zeros
    return shares


def takes_timesteps(pipe: DiffusionPipeline, **kwargs) -> bool:
    """Return whether one step of this pipeline can have another timestep for each sample of its batch.

    Most hand the timestep on, expanded to the batch; some compute with it as with a number. What the transformer is
    told in a dry step with two timesteps must be what it is told with each of them.
    """

    def inputs_at(*timesteps) -> list[torch.Tensor]:
        """Return every tensor that the transformer gets in a dry step; the noise is the same each time."""
        tensors = []

        def forward(*args, **inputs):
            tensors.extend(value for value in tree_leaves((args, inputs)) if isinstance(value, torch.Tensor))
            return no_prediction(*args, **inputs)

        probe = Probe([1.0], lambda index, model_output, sample: sample, [list(timesteps)], pipe.scheduler)
        dry_run(pipe, probe, forward, **kwargs | {batch_argument(pipe): len(timesteps)})
        return tensors

    try:
        both = inputs_at(750.0, 250.0)
        high = inputs_at(750.0, 750.0)
        low = inputs_at(250.0, 250.0)
    except InputError:  # it wanted a number
        return False
    changed = [not torch.equal(at_high, at_low) for at_high, at_low in zip(high, low)]
    return any(changed) and all(
        torch.equal(mixed, torch.cat([at_high[:1], at_low[1:]]) if differs else at_high)
        for mixed, at_high, at_low, differs in zip(both, high, low, changed)
    )


def takes_batches(pipe: DiffusionPipeline, **kwargs) -> bool:
    """Return whether one step of this pipeline can denoise several pictures of a prompt.

    With guidance the model's batch is, for one picture, two samples, and some pipelines then hand it two timesteps or
    sizes for any number of pictures. What has a row for each sample of one picture must have twice as many for two.
    """

    def called_with(count: int) -> tuple[int, list[torch.Size]]:
        """Return the model's batch size for `count` pictures, and the shapes of all tensors that it gets."""
        calls = []

        def forward(*args, **inputs):
            leaves = tree_leaves((args, inputs))
            shapes = [value.shape for value in leaves if isinstance(value, torch.Tensor) and value.ndim]
            calls.append((len(model_input(args, inputs)), shapes))
            return no_prediction(*args, **inputs)

        probe = Probe([1.0], lambda index, model_output, sample: sample, None, pipe.scheduler)
        dry_run(pipe, probe, forward, **kwargs | {batch_argument(pipe): count})
        return calls[0]

    (batch, shapes), (double_batch, double_shapes) = called_with(1), called_with(2)
    # A single row serves any batch; lists have a part for each sample.
    if batch == 1 or len(shapes) != len(double_shapes):
        return True
    return all(double[0] == double_batch for shape, double in zip(shapes, double_shapes) if shape[0] == batch)


def draws_conditions(pipe: DiffusionPipeline, **kwargs) -> bool:
    """Return whether what the transformer gets beside the latents depends on the call's seed: latents that the VAE's
    distribution is asked for, or noise in a region that a picture fills. A trajectory's points then have a seed.

    Raise InputError where it is another in each step, or in each call, whatever the seed.
    """

    def inputs_with(seed: int) -> list[list[torch.Tensor]]:
        """Return every tensor that the transformer gets in two dry steps at one sigma that begin with zeros."""
        steps = []

        def forward(*args, **inputs):
            steps.append([value for value in tree_leaves((args, inputs)) if isinstance(value, torch.Tensor)])
            return no_prediction(*args, **inputs)

        probe = Probe([0.5] * 3, lambda index, model_output, sample: torch.zeros_like(sample), None, pipe.scheduler)
        dry_run(pipe, probe, forward, **kwargs | {"generator": torch.Generator().manual_seed(seed)})
        calls = len(steps) // 3
        return [sum(steps[calls * step : calls * (step + 1)], []) for step in (1, 2)]

    def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
        return len(one) == len(other) and all(map(torch.equal, one, other))

    first, then = inputs_with(0)
    for name, other in (("step", then), ("call", inputs_with(0)[0])):
        if not equal(first, other):
            raise InputError(
                f"{type(pipe).__name__}: of the same pictures and seed its model gets other numbers in each {name}, "
                "and training asks each step by itself; see whether --pipeline_kwargs can switch that noise off"
            )
    return not equal(first, inputs_with(1)[0])


def check_memoryless(pipe: DiffusionPipeline, **kwargs) -> None:
    """Raise InputError where a step leaves something to the next, as keys and values that the first step computes for
    all: training asks every step by itself.

    Of two steps at the same sigma, with the same sample, the second must call its model in the same mode. Where it
    does not, the error names the pipeline's own switch with which it would, if there is one.
    """
    if (mode := _changing_mode(pipe, **kwargs)) is None:
        return
    parameters = accepted_arguments(pipe).items()
    switches = [{name: not parameter.default} for name, parameter in parameters if type(parameter.default) is bool]
    hint = "none of its arguments changes that, so use another pipeline class for this base"
    for switch in switches:
        with contextlib.suppress(InputError):  # a value that it does not take
            if _changing_mode(pipe, **kwargs | switch) is None:
                hint = f"give --pipeline_kwargs '{json.dumps(switch)}'"
                break
    name, first, then = mode
    raise InputError(
        f"{type(pipe).__name__}: its model's {name} is {first!r} in the first step and {then!r} after it, and "
        f"training asks each step by itself; {hint}"
    )


def _changing_mode(pipe: DiffusionPipeline, **kwargs) -> tuple[str, object, object] | None:
    """Return (name, value, next value) of a word or a switch that the model is called with and that is another in the
    next step at the same sigma; None where there is none."""
    steps = [{}, {}]

    def forward(*args, **inputs):
        steps[min(probe.calls, 1)].update(
            {name: value for name, value in inputs.items() if value is None or isinstance(value, str | bool)}
        )
        return no_prediction(*args, **inputs)

    probe = Probe([1.0, 1.0], lambda index, model_output, sample: sample, None, pipe.scheduler)
    dry_run(pipe, probe, forward, **kwargs)
    first, second = steps
    changed = [(name, first[name], second[name]) for name in first if name in second and first[name] != second[name]]
    return changed[0] if changed else None


def check_instantaneous(pipe: DiffusionPipeline, **kwargs) -> None:
    """Raise InputError where the transformer is told where a step ends.

    It then predicts an average over the step, as MeanFlow does, and not the velocity at a point, which the
    flow-matching loss trains. Raise FloatingPointError where it is told NaN, as by an encoder in half precision.
    """
    inputs_by_end = []

    def forward(*args, **inputs):
        inputs_by_end[-1].append({name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)})
        return no_prediction(*args, **inputs)

    for end in (0.5, 0.25):
        inputs_by_end.append([])
        probe = Probe([1.0, end], lambda index, model_output, sample: sample)
        dry_run(pipe, probe, forward, **kwargs)
    for name, value in inputs_by_end[0][0].items():
        if value.isnan().any():  # not infinite: masks are
            raise FloatingPointError(
                f"{name}, which {type(pipe).__name__} makes of the prompt, holds NaN; try --mixed_precision bf16 or "
                "no; the encoders' weights may hold such numbers too"
            )
        if not torch.equal(value, inputs_by_end[1][0][name]):
            raise InputError(
                f"{type(pipe).__name__}: its model is told, as {name}, where a step ends; Glance needs a velocity"
            )


class PipelineVelocity(torch.nn.Module):
    """A pipeline as a function velocity(noisy, sigma): one step of its own `__call__`, with gradients.

    A pipeline takes no (noisy, sigma): its loop begins with noise of its own, in a layout that only the loop knows,
    and `latents=` may have another. So it runs with a Probe for a scheduler that has two steps, both at `sigma`:

    1. The pipeline prepares its call as ever and enters its loop with latents that nobody needs.
    2. First step: the transformer is bypassed, no_prediction answers zeros. `scheduler.step` ignores them and returns
       `noisy`, which has so entered the loop in the loop's own layout.
    3. Second step: the pipeline calls the transformer with `noisy` at `sigma`, with gradients, and makes of its output
       what inference makes of it: unpacked, un-negated, guided. What it hands to `scheduler.step` is the velocity.
    4. That `scheduler.step` raises Answer, which carries the velocity out of the call.

    An exception, as nothing else ends a pipeline's call in its loop: after it come steps that would cost time and
    memory or need the VAE, which was freed. A BaseException, as pipelines may catch Exception. The graph to the LoRAs
    is intact, since it hangs on the tensor alone.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        timestep_table=None,
        takes_timesteps: bool = False,
        takes_batches: bool = True,
        **kwargs,
    ):
        """Take ask_timestep_table's answer and those of the two functions of the arguments' names.

        `kwargs` are arguments of the pipeline's call.
        """
        super().__init__()
        self.pipe = pipe
        self.timestep_table = timestep_table
        self.takes_timesteps = takes_timesteps
        self.takes_batches = takes_batches
        self.transformer = denoiser(pipe)
        self.kwargs = kwargs

    def forward(self, noisy: torch.Tensor, sigmas, seeds: list[int] | None = None, **kwargs) -> torch.Tensor:
        """Return the velocity (B, ...), in the pipeline's dtype, at `noisy` (B, ...) float32 and `sigmas` in (0, 1].

        `sigmas` is a number, or a list, array or tensor of 1 or B numbers; ValueError is raised for another length.
        `kwargs` are further arguments of the pipeline's call, which win over those given before. Different sigmas are
        one run where the pipeline takes them so, and one for each where it does not; so are samples of one sigma.
        `seeds` are those of the B calls that `noisy` comes from, where draws_conditions says that they matter.
        """
        sigmas = as_floats(sigmas)
        sigmas = sigmas * len(noisy) if len(sigmas) == 1 else sigmas
        if len(sigmas) != len(noisy):
            raise ValueError(f"{len(sigmas)} sigmas for a batch of {len(noisy)}; give one, or one for each")
        runs = [sigmas] if self.takes_timesteps else [list(run) for _, run in itertools.groupby(sigmas)]
        runs = runs if self.takes_batches and not seeds else [[sigma] for sigma in sigmas]
        calls = [self.kwargs | kwargs] * len(runs)
        if seeds:
            calls = [call | {"generator": torch.Generator().manual_seed(seed)} for call, seed in zip(calls, seeds)]
        parts = noisy.split([len(run) for run in runs])
        return torch.cat([self._velocity(part, run, **call) for part, run, call in zip(parts, runs, calls)])

    def _timesteps(self, sigmas: list[float]) -> list[float]:
        """Return what the model is told at `sigmas`, in the scheduler's own arithmetic."""
        schedule = FixedSigmaScheduler(sigmas, model_timesteps(self.timestep_table, sigmas), like=self.pipe.scheduler)
        schedule.set_timesteps()
        return schedule.timesteps.tolist()

    def _velocity(self, noisy: torch.Tensor, sigmas: list[float], **kwargs) -> torch.Tensor:
        """Return the velocity (B, ...) of one run of the pipeline; `kwargs` are its call's arguments but the batch."""
        velocity, is_called = None, False
        timesteps = self._timesteps(sigmas)
        timestep = timesteps[0] if len(set(sigmas)) == 1 else timesteps

        def on_step(index, model_output, sample):
            if index == 0:
                return noisy.to(sample)
            raise Answer(model_output)  # what some pipelines do to the final latents needs the VAE, which was freed

        probe = Probe([sigmas[0]] * 2, on_step, [timestep, timestep], self.pipe.scheduler)
        predict = self.transformer.forward

        def forward(*args, **inputs):
            nonlocal is_called
            is_called = probe.calls > 0
            return (predict if is_called else no_prediction)(*args, **inputs)

        batch = {batch_argument(self.pipe): len(noisy)}
        try:
            with refusals(self.pipe):
                run_pipeline(self.pipe, probe, forward, **kwargs | batch)
        except Answer as answer:
            velocity = answer.args[0]
        if not is_called:
            raise InputError(
                f"{type(self.pipe).__name__}: at sigma {sigmas[0]:g} another model than its transformer acts"
            )
        if velocity is None or velocity.shape != noisy.shape:
            answer = "nothing" if velocity is None else tuple(velocity.shape)
            raise InputError(f"{type(self.pipe).__name__}: asked the velocity of {tuple(noisy.shape)}, got {answer}")
        return -velocity if counts_image(self.pipe.scheduler) else velocity
