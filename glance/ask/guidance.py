"""How is a pipeline's classifier-free guidance switched off? Dry steps count its model calls and their batches.

A further way to switch it off is one more entry in ask_single_branch's list; nothing else here knows any pipeline.
"""

import torch
from diffusers import DiffusionPipeline

from glance.ask.pipeline import Probe, accepted_arguments, dry_run, no_prediction
from glance_utils import InputError


def ask_single_branch(pipe: DiffusionPipeline, **kwargs) -> dict:
    """Return call arguments that switch classifier-free guidance off; {} where there is none, or an embedded scale.

    Raise InputError where none of the known ways does it. The flow loss trains the conditional branch alone.
    Two model calls in a step, or a doubled batch, are classifier-free guidance, unless the velocity depends on one
    sample of them: 1 * conditional + 0 * unconditional.
    """
    tried = []
    accepted = {*accepted_arguments(pipe), "guiders"}  # the last is run_pipeline's own
    for off in (
        {},
        {"guidance_scale": 1.0},
        {"guidance_scale": 0.0},
        {"true_cfg_scale": 1.0},
        {"negative_prompt": None},
        {"guiders": False},
    ):
        if not set(off) <= accepted:
            continue
        try:
            batches, velocity = _made_up_step(pipe, None, **kwargs | off)
        except InputError:
            if not off:
                raise
            continue  # a value that it does not take
        samples = sum(batches) if batches != [1] else 0
        changes = [_made_up_step(pipe, index, **kwargs | off)[1] - velocity for index in range(samples)]
        if batches == [1] or sum(bool(change.abs().max() > 0.1) for change in changes) == 1:
            return off
        tried.append(f"{off or 'as it is'}: {len(batches)} calls of batch {batches}")
    raise InputError(f"{type(pipe).__name__}: guidance cannot be switched off ({'; '.join(tried)})")


def count_model_calls(pipe: DiffusionPipeline, **kwargs) -> int:
    """Return how many samples pass the model in a step of the pipeline, by whichever way it guides."""
    return sum(_made_up_step(pipe, None, **kwargs)[0])


def _made_up_step(pipe: DiffusionPipeline, changed: int | None, **kwargs) -> tuple[list[int], torch.Tensor]:
    """Return the batch size of each model call in a dry step, and the step's velocity (1, ...) in float32.

    The model's predictions are made up: the same noise for each sample at every call of this function, and 1 more for
    the sample of index `changed`.
    """
    batches, velocities = [], []

    def forward(*args, **inputs):
        output = no_prediction(*args, **inputs)
        for index, sample in enumerate(output.sample, sum(batches)):
            sample.copy_(torch.randn(sample.shape, generator=torch.Generator().manual_seed(index)))
            sample += index == changed
        batches.append(len(output.sample))
        return output

    def on_step(index, model_output, sample):
        velocities.append(model_output.float())
        return sample

    dry_run(pipe, Probe([1.0], on_step), forward, forward, **kwargs)
    if not velocities:
        raise InputError(f"{type(pipe).__name__}: asked for one step, but it never called scheduler.step")
    return batches, velocities[0]
