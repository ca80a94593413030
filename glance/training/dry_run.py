"""What does --dry_run print? The run's needs by stage, in memory and time, and which settings would fit."""

import functools
import time

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from glance import command_line as cli
from glance.ask.schedule import ask_timestep_table
from glance.command_line import Settings
from glance.encoders import free_memory, kept_away
from glance.files.further_loras import read_additions
from glance.files.instance_data import SOURCES, chosen_size, load_pair
from glance.training import fit, own_defaults
from glance.training.estimate import Choice, Estimate, Step, readable
from glance.training.prepare import DTYPES, ask_call, estimate_run, needs_drawing
from glance.training.search import CURVE, plans_tried
from glance.training.steps import choose_steps, warn_of_shares
from glance.training.trajectories import list_jobs
from glance.training.weightless import estimable, load_without_weights


STAGES = ("encoding", "drawing", "fitting", "training", "preview", "validation", "decoding")
SHARE_OF_RATE = 0.5  # of the rate of large matrix products, that a run reaches


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the floating-point operations a second of a large matrix product, the median of five."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        c = a @ b
        c[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / sorted(seconds[1:])[2]


def parts(settings, needed: Estimate, choice: Choice, captions: list[str]) -> dict[str, tuple[int, Step]]:
    """Return (number of steps, one of them) for each part of the run that calls the transformer.

    "fitting" is what --grid auto and --solver fitted draw to measure their ways against each other, or the trials of
    --num_model_calls, "validation" the base in all and in Glance's steps, once, and Glance each time.
    """
    found, steps = {}, settings.num_inference_steps
    if needed.drawing is not None:
        found["drawing"] = len(list_jobs(settings, captions)) * settings.num_base_steps, needed.drawing
        ways = (3 if settings.grid == "auto" else 1) * (2 if settings.solver == "fitted" else 1)
        checked = settings.loss == "trajectory" and settings.guidance == "keep"
        fitting = (ways * steps if ways > 1 else 0) + (steps if checked else 0)
        if needed.trial is not None:
            found["fitting"] = trial_runs(settings, needed, captions), needed.trial
        elif fitting:
            found["fitting"] = fitting, needed.drawing
    if not needed.training:
        return found
    phases, calls = len(settings.custom_timesteps), 1
    if needed.trial is not None:  # both phases together, through all calls
        phases, calls = 1, calls_of(settings)
    micro_steps = phases * settings.max_train_steps * settings.gradient_accumulation_steps
    found["training"] = micro_steps * calls, needed.training_step(choice)
    if len(settings.custom_timesteps) == 2 and needed.preview:
        found["preview"] = steps, needed.preview
    if settings.validation_prompt:
        every, most = settings.validation_steps, settings.max_train_steps
        times = len(settings.custom_timesteps) * (most // every) if every else 1
        pictures = len(settings.validation_prompt) * settings.num_validation_images
        found["validation"] = pictures * (settings.num_base_steps + (times + 1) * steps), needed.preview
    return found


def trial_runs(settings, needed: Estimate, captions: list[str]) -> int:
    """Return how many runs of a branch find the plan of --num_model_calls, one picture each.

    All trajectories are walked by every plan that is tried, and by the best one three times more: fitted on one half
    of the captions, on the other, and on all. The curve over numbers of calls costs about what drawing does.
    """
    branches = max(round(needed.drawing.flops / needed.trial.flops), 1)  # of the base's own guidance
    most_calls, calls = branches * settings.num_base_steps, calls_of(settings)
    tries = plans_tried(settings, most_calls, calls) + 3
    return (tries * calls + most_calls) * len(captions) * settings.num_trajectories


def calls_of(settings) -> int:
    """Return --num_model_calls; of auto, which is not known before, the most that it may take."""
    return max(CURVE) if settings.num_model_calls == "auto" else settings.num_model_calls


def flops_of(found: dict[str, tuple[int, Step]]) -> int:
    """Return the floating-point operations of all parts."""
    return sum(count * step.flops for count, step in found.values())


def stage_table(needed: Estimate, choice: Choice, found: dict[str, tuple[int, Step]], rate: float) -> list[str]:
    """Return the lines of a table of the run's stages with this choice, at so many operations a second."""
    stages = needed.stages(choice)
    lines = [
        f"the run, {fit.as_flags(choice)}:",
        "",
        "| stage | peak | steps | model calls | FLOPs | minutes |",
        "|---|---|---|---|---|---|",
    ]
    for stage in (stage for stage in STAGES if stage in stages or stage in found):
        count, step = found.get(stage, (0, None))
        peak = readable(stages[stage], "B") if stage in stages else ""
        done = [str(count), str(count * step.calls), *time_cells(count * step.flops, rate)] if step else [""] * 4
        lines.append(f"| {' | '.join([stage, peak, *done])} |")
    calls = str(sum(count * step.calls for count, step in found.values()))
    total = [readable(max(stages.values()), "B"), "", calls, *time_cells(flops_of(found), rate)]
    return [*lines, f"| {' | '.join(['all', *total])} |"]


def time_cells(flops: int, rate: float) -> list[str]:
    """Return the operations, and the minutes that they take at so many a second."""
    return [readable(flops, ""), f"{flops / rate / 60:.3g}"]


def settings_table(needed: Estimate, dtype: str, rate: float) -> list[str]:
    """Return the lines of a table of training by quantization and gradient checkpointing."""
    lines = [
        "| base | gradient checkpointing | its weights | training | training, 8-bit Adam | FLOPs a step | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for quantization, size in needed.base.items():
        for checkpointing, step in needed.training.items():
            if quantization == "fp8" and not checkpointing and True in needed.training:
                continue  # refused, since every layer's full weight would stay
            choices = [Choice(quantization, checkpointing, optimizer) for optimizer in ("adamw", "adamw8bit")]
            cells = (
                dtype if quantization == "none" else quantization,
                "yes" if checkpointing else "no",
                readable(size, "B"),
                *(readable(needed.stages(choice)["training"], "B") for choice in choices),
                readable(step.flops, ""),
                f"{step.flops / rate:.3g}",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def advice(needed: Estimate, choices: list[Choice], memory: int, place: str) -> str:
    """Return one line: the first of the choices that fits into so many bytes, which are those of `place`."""
    choice = fit.first_fit(needed, choices, memory)
    if choice is None:
        least = min(needed.peak(choice) for choice in choices)
        return f"on {place}: nothing fits, since {readable(least, 'B')} are needed at least; choose a smaller size"
    line = f"on {place}: {fit.as_flags(choice)}, peak {readable(needed.peak(choice), 'B')}"
    if away := kept_away(needed.encoders, memory):
        line += f"; {' and '.join(away)} in host memory, layer by layer on the device"
    return line


def ask_needs(args) -> tuple[Settings, Estimate, list[str]]:
    """Return the settings with the numbers of steps that the base has, what the run will need, and its captions, asked
    of the configs and the tokenizers alone; without image or caption, of an image and some caption."""
    path, dtype = args.pretrained_model_name_or_path, DTYPES[args.mixed_precision]
    pipe = load_without_weights(path, dtype, **cli.load_arguments(args))
    read_additions(pipe, args)
    args = own_defaults.with_one_frame(args)
    own_size = functools.partial(own_defaults.size_of, pipe, args)
    if args.instance_prompt or any(getattr(args, source) for source in SOURCES):
        image, caption, size = load_pair(args, own_size)
    else:
        image, caption, size = "any", "a picture", chosen_size(args, own_size)
    captions = own_defaults.all_captions(args, caption)
    args = own_defaults.with_trajectories(args, captions)
    with estimable(pipe):
        call, single_call, layers = ask_call(args, pipe, max(captions, key=len), size)
        settings, _, steps = choose_steps(args, pipe, call)
        warn_of_shares(pipe, steps.phases, ask_timestep_table(pipe, settings.num_base_steps, **call), single_call)
        draws = needs_drawing(args, image)
        return settings, estimate_run(args, pipe, layers, call, single_call, size, draws, (False, True)), captions


def dry_run(args) -> str:
    """Return, as text, what the run will need, and which settings would fit."""
    settings, needed, captions = ask_needs(args)
    dtype, device = DTYPES[args.mixed_precision], PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).device
    free, rate, name = free_memory(device), matmul_rate(device, dtype), str(dtype).removeprefix("torch.")
    memory, checkpoints = args.memory or free, True in needed.training
    place = fit.memory_name(args, device, memory)
    choices = fit.candidates(fit.as_choice(args), checkpoints)
    choice = fit.first_fit(needed, choices, memory) or choices[-1]
    encoders = ", ".join(f"{part} {readable(size, 'B')}" for part, size in needed.encoders.items() if size)
    lines = [
        f"transformer  {needed.parameters / 1e9:.3g} billion parameters",
        f"LoRA         {readable(needed.lora_parameters, '')} parameters, {readable(needed.lora(), 'B')} a file",
        f"encoders     {encoders}; freed before the transformer is loaded",
        f"device       {device.type}: {readable(free, 'B')} free, "
        f"{readable(rate, 'FLOP/s')} in {name} matrix products",
        f"minutes      at {SHARE_OF_RATE:.0%} of that rate",
        "",
        *stage_table(needed, choice, parts(settings, needed, choice, captions), SHARE_OF_RATE * rate),
        "",
        *([*settings_table(needed, name, SHARE_OF_RATE * rate), ""] if needed.training else []),
        advice(needed, fit.candidates(Choice(*[None] * 4), checkpoints), memory, place),
    ]
    return "\n".join(lines)
