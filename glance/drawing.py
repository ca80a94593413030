"""How does inference draw one picture, and what does --compare draw beside it? Each is timed and its calls counted.

A further column of --compare is one more entry in `columns_of`. What is drawn must be what it is without --compare.
"""

import contextlib
import functools
import logging
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from PIL import Image

from glance.adapters import fused_adapters
from glance.ask import latents as ask_latents
from glance.ask import mixed
from glance.ask import pipeline as ask
from glance.ask.sampler import relative_error
from glance.files import faults, pictures
from glance.training.inference_steps import base_inference
from glance_utils import Schedule, activate_adapter, denoiser, glance_inference, switchable_adapters


logger = logging.getLogger(__name__)


class Drawn(NamedTuple):
    """A picture or a video, what it cost and what it was decoded from."""

    label: str
    frames: list[Image.Image]  # a picture is one
    seconds: float
    calls: int  # of the model
    latents: torch.Tensor  # the final ones, (1, ...) float32 on the CPU

    @property
    def image(self) -> Image.Image:
        """Return the picture, or the first frame."""
        return self.frames[0]


class Written(NamedTuple):
    """What is told of a picture that was drawn and written."""

    number: int
    strip: list[Image.Image] | None  # of the comparison, a frame for each of its videos'
    seconds: float
    calls: int
    is_first: bool  # that its process drew
    errors: dict[str, float]  # errors_of's, of the comparison


class Column(NamedTuple):
    """What is to be drawn: `drawing` is the context of a function draw(**kwargs) -> (output, final latents)."""

    label: str
    hint: str  # against numbers that are not finite
    drawing: AbstractContextManager


class Counter:
    """A counter of the samples that pass the model: guidance by a doubled batch is two model calls."""

    def __init__(self, pipe):
        self.calls = 0
        for model in (denoiser(pipe), *ask.further_denoisers(pipe).values()):
            model.register_forward_hook(self.count, with_kwargs=True)

    def count(self, module, args, kwargs, output):
        if not isinstance(output, ask.NoPrediction):
            self.calls += len(ask.model_input(args, kwargs))


def timed(pipe, counter, draw) -> tuple[list[Image.Image], float, int, torch.Tensor]:
    """Draw one picture by draw(**kwargs); return its frames, its seconds, its model calls and its final latents.

    Raise InputError where the pipeline refuses, FloatingPointError where the latents or the pixels are not finite.
    """
    counter.calls = 0
    start = time.perf_counter()
    with ask.refusals(pipe), ask_latents.finite_pictures(pipe):
        output, latents = draw(output_type="pil", return_dict=False)
        frames = ask.first_frames(output)
    return frames, time.perf_counter() - start, counter.calls, latents.to("cpu", torch.float32)


def check_size(pipe, call: dict, image: Image.Image) -> None:
    """Warn where the pipeline draws in another size than was asked."""
    width, height = (call.get(side, size) for side, size in zip(("width", "height"), image.size))
    if (width, height) != image.size:
        logger.warning(f"{width}x{height} was asked, {type(pipe).__name__} draws {image.width}x{image.height}")


def draw_job(
    args, pipe, counter, schedule: Schedule, base_steps: list[int], call: dict, seed: int, hidden: bool = True
) -> list[Drawn]:
    """Return the schedule's picture of a call after those that --compare draws beside it, in the order of columns.

    Each has the pipeline's own bar of steps, unless that is `hidden`.
    """
    columns = columns_of(args, pipe, schedule, base_steps, call, seed)
    return [draw_column(pipe, counter, column, hidden) for column in columns]


def draw_column(pipe, counter, column: Column, hidden: bool = True) -> Drawn:
    """Return the picture of one column; raise FloatingPointError, which ends in its hint, where it is not finite."""
    pipe.set_progress_bar_config(desc=column.label, disable=hidden)
    with faults.explained(column.label, column.hint), column.drawing as draw:
        return Drawn(column.label, *timed(pipe, counter, draw))


def columns_of(args, pipe, schedule: Schedule, base_steps: list[int], call: dict, seed: int) -> Iterator[Column]:
    """Yield the base in each of `base_steps` and, to compare LoRAs, the schedule without them; then the schedule."""
    steps, advice = len(schedule.timesteps), what_to_try(args)
    for count in base_steps:
        yield Column(f"base, {count} steps", advice, as_shipped(pipe, count, call, seed))
    alone = args.replace(without_loras=True, fuse_lora=False)
    if args.compare and not args.without_loras:
        # What the LoRAs have learned of guidance, the base does by itself.
        guided = ", guided" if schedule.guidance and schedule.branches is None else ""
        label = f"without LoRAs{guided}, {steps} steps"
        yield Column(label, advice, on_schedule(alone, pipe, schedule, call, seed))
    label, hint = f"Glance, {steps} steps", f"{advice}, or a lower --lora_scale"
    if args.without_loras:
        named = "sampler" if args.sampler else f"{args.grid} grid, {args.solver}"
        label, hint = f"{named}, {steps} steps", advice
    yield Column(label, hint, on_schedule(args, pipe, schedule, call, seed))


@contextlib.contextmanager
def as_shipped(pipe, count: int, call: dict, seed: int):
    """Yield Column's draw, which draws in so many steps of the pipeline's own schedule."""
    yield functools.partial(_by_its_loop, pipe, call | {"num_inference_steps": count}, seed)


@contextlib.contextmanager
def on_schedule(args, pipe, schedule: Schedule, call: dict, seed: int):
    """Yield Column's draw, which draws on the schedule: with the LoRAs or without, by the pipeline's own loop or by
    mixed branches."""
    with contextlib.ExitStack() as stack:
        activate = stack.enter_context(fused_adapters(denoiser(pipe))) if args.fuse_lora else activate_adapter
        if schedule.branches is not None:
            before_step = stack.enter_context(phase_switch(args, pipe, schedule, activate))
            yield functools.partial(_by_branches, pipe, schedule, call, seed, before_step)
            return
        if args.without_loras:
            kwargs = stack.enter_context(base_inference(pipe, schedule))
        else:
            kwargs = stack.enter_context(glance_inference(pipe, schedule, args.lora_scale, activate))
        yield functools.partial(_by_its_loop, pipe, stack.enter_context(ask.plain_call(pipe, call | kwargs)), seed)


def _by_its_loop(pipe, call: dict, seed: int, **kwargs) -> tuple:
    """Return what the pipeline returns, and its final latents (1, ...)."""
    with ask_latents.final_latents(pipe) as ends:
        output = pipe(**call, **kwargs, generator=torch.Generator().manual_seed(seed))
    return output, ends[-1]


def _by_branches(pipe, schedule: Schedule, call: dict, seed: int, before_step, **kwargs) -> tuple:
    """Return what mixed.draw returns, and the final latents (1, ...)."""
    ends = []
    return mixed.draw(pipe, schedule, call, seed, before_step, ends.append, **kwargs), ends[-1]


@contextlib.contextmanager
def phase_switch(args, pipe, schedule: Schedule, activate):
    """Yield before_step(index), which lets the LoRA of that step's phase act, or does nothing without LoRAs."""
    if args.without_loras:
        yield lambda index: None
        return
    names = schedule.phase_of_steps
    with switchable_adapters(denoiser(pipe), list(schedule.phases), activate) as switch:
        yield lambda index: switch(names[index], args.lora_scale.get(names[index], 1.0))


def what_to_try(args) -> str:
    """Return advice against numbers that are not finite: another dtype than this run's."""
    others = " or ".join(f"--dtype {name}" for name in ("bfloat16", "float32") if name != args.dtype)
    advice = others if args.dtype != "float32" else "other weights of the base, as these may hold some"
    quantized = f" and --quantization {args.quantization}" if args.quantization != "none" else ""
    return f"it was drawn in --dtype {args.dtype}{quantized}; try {advice}"


def errors_of(row: list[Drawn]) -> dict[str, float]:
    """Return the relative error of each picture's final latents to the first one's, by label, but for the first's."""
    return {drawn.label: relative_error(drawn.latents, row[0].latents) for drawn in row[1:]}


def draw_strip(row: list[Drawn], prompt: str, first: bool) -> list[Image.Image]:
    """Return a row of the comparison, of videos one for each of their frames; that of the `first` of several pictures
    says that its seconds are the longest: memory is laid out then, and with --compile compiled."""
    seconds = "first {:.2f} s" if first else "{:.2f} s"
    details = [f"{seconds.format(drawn.seconds)}, {drawn.calls} model calls" for drawn in row]
    errors = ["", *(f"\nerror {error:.4f} to the full run" for error in errors_of(row).values())]
    labels, notes = [drawn.label for drawn in row], list(map("".join, zip(details, errors)))
    videos = (drawn.frames for drawn in row)
    return [pictures.draw_row(list(zip(labels, images, notes)), prompt) for images in zip(*videos)]
