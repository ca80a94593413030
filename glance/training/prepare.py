"""What a run knows before it trains: what the pipeline said, asked once, and its transformer loaded to fit."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.utils import parse_flag_from_env
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor

from glance import base as load_base
from glance import command_line as cli
from glance.adapters import lora_layers, with_adapters
from glance.ask import latents as ask_latents
from glance.ask import pipeline as ask
from glance.ask import prompts as ask_prompts
from glance.ask.guidance import ask_single_branch
from glance.ask.prompt_lengths import PromptLengths
from glance.ask.schedule import ask_timestep_table, ask_timesteps, has_own_steps
from glance.ask.velocity import (
    ask_velocity_shares,
    check_instantaneous,
    check_memoryless,
    takes_batches,
    takes_timesteps,
)
from glance.command_line import Settings
from glance.files.instance_data import SOURCES, chosen_size, load_pair
from glance.training import distribution, estimate
from glance.training.trajectories import Teacher, Trajectories, draw_trajectories
from glance_utils import InputError, denoiser, denoiser_name, derive_timesteps, grid_positions, most_positions


logger = get_logger(__name__)

BASE_STEPS, STEPS = 50, 10  # unless flags or the base say otherwise
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Asked:
    """What the pipeline said, and the pipeline: its encoders freed, its transformer without weights until
    `prepare_pipeline` has loaded them."""

    pipe: DiffusionPipeline
    settings: Settings  # the run's, with the numbers of steps that the base has
    load_transformer: Callable  # loads it, or another `part` of its class
    teacher: Teacher | None  # where the base must draw before the LoRAs are trained
    call: dict  # the call's arguments at inference, without guidance where it is folded in
    single_call: dict  # the same, with classifier-free guidance off
    train_call: dict  # one of the two: what the LoRAs are trained in
    captions: list[str]
    schedule: dict[str, list[float]]  # timesteps by phase
    first_step: dict[str, int]  # of each phase among those of both
    grid: str | None  # which of the model's own steps those are; None where they were given
    timestep_table: list[list[float]] | None  # ask_timestep_table's
    latents: torch.Tensor | None  # (1, ...) float32, of the image or of what the base drew for one
    noise_scale: float
    layers: list[str]  # names of those that the LoRAs adapt
    takes_timesteps: bool  # whether a batch may hold several
    takes_batches: bool  # whether a step may have several samples
    checkpointing: bool  # of gradients
    layout: ask_latents.LatentLayout
    vae: torch.nn.Module | None  # on the CPU, for the preview
    taught: Trajectories | None = None  # what the base drew


def warn_of_schedule(pipe, schedule, derived, timestep_table, train_call) -> None:
    """Warn of timesteps that are far from the model's own, and of those at which it gives less than the velocity."""
    for phase, timesteps in schedule.items():
        far = max(abs(a - b) for a, b in zip(timesteps, derived[phase]))
        if len(timesteps) == len(derived[phase]) and far > 10:
            own = ",".join(f"{timestep:.4f}" for timestep in derived[phase])
            logger.warning(
                f"--flow_custom_timesteps: {phase} is up to {far:.0f} timesteps off this model's own: {own}"
            )
        for timestep, share in zip(timesteps, ask_velocity_shares(pipe, timesteps, timestep_table, **train_call)):
            if share < 0.99:
                logger.warning(
                    f"{phase}: at timestep {timestep:.1f} this pipeline takes only {share:.2f} of the velocity to the "
                    "image that its model predicts; give --flow_custom_timesteps that end above"
                )


def ask_call(args, pipe, caption, size) -> tuple[dict, dict, list[str]]:
    """The call's arguments with and without classifier-free guidance, and the layers to adapt; or InputError."""
    call = ask.call_arguments(pipe, caption, *size, args.guidance_scale, args.pipeline_kwargs)
    transformer = denoiser(pipe)
    layers = lora_layers(transformer, args.lora_layers)
    if args.gradient_checkpointing and not transformer._supports_gradient_checkpointing:
        raise InputError(f"--gradient_checkpointing: {type(transformer).__name__} has none, so leave it out")
    PromptLengths(pipe, logger.warning).watch(pipe)
    ask_prompts.remember_prompts(pipe)
    ask.dry_step(pipe, **call)
    check_instantaneous(pipe, **call)
    check_memoryless(pipe, **call)
    return call, call | ask_single_branch(pipe, **call), layers


def trained_call(args, call: dict, single_call: dict) -> dict:
    """The flow loss trains the conditional branch, the trajectory loss what --guidance says."""
    return call if args.loss == "trajectory" and args.guidance == "keep" else single_call


def estimate_step(args, pipe, layers: list[str], train_call: dict, checkpointing=(False, True)) -> estimate.Estimate:
    """Return what a micro-step needs, all of its samples together or, where the pipeline takes them so, one by one."""
    samples = args.train_batch_size * args.timesteps_per_step
    together = samples if samples == 1 or takes_batches(pipe, **train_call) else 1
    call = train_call | {ask.batch_argument(pipe): together}
    return estimate.estimate(pipe, layers, args.rank, call, checkpointing, samples // together)


def choose_steps(args, pipe, grid: str, walked: int, own: bool) -> tuple[int, int]:
    """How many steps the base has, which walked so many when it was asked, and how many of them Glance keeps.

    `own`: a base that ships its own few steps walks those whatever is asked; they are its schedule. InputError where
    that is not what the flags say, or where it has too few for them.
    """
    this, count = f"this {type(pipe).__name__} has its own {walked} steps", args.num_inference_steps
    if args.num_base_steps not in (None, walked):
        raise InputError(f"--num_base_steps {args.num_base_steps}: {this}, whatever is asked; leave it out")
    few = most_positions(grid, min(STEPS, max(2, -(-walked // 2))), walked)
    count = count or (few if own or args.flow_custom_timesteps else STEPS)
    most = most_positions(grid, count, walked)
    if most < count:
        which = f"{this}, which" if own else f"--num_base_steps: {walked} steps"
        few = f"{few}{f', at most {most}' if most > few else ''}" if own else f"{most} at most"
        what = f"{'' if own else 'more, or '}--num_inference_steps {few}"
        raise InputError(f"{which} are too few for {count} distinct ones on the {grid} grid; give {what}")
    if count == 1 and "fast" in args.custom_timesteps:
        raise InputError(f"{this}, which leave the fast phase none; give --phase slow")
    if own:
        logger.info(f"{this[0].upper()}{this[1:]}, whatever is asked; {count} of them are kept")
    return walked, count


def ask_schedule(args, pipe, call: dict, single_call: dict) -> tuple:
    """Return the settings with the numbers of steps that this base has, all of its timesteps, what the model is told
    at sigmas, the grid's timesteps by phase, and those to train."""
    asked = args.num_base_steps or BASE_STEPS
    base_timesteps, own = ask_timesteps(pipe, asked, **call), has_own_steps(pipe, asked, **call)
    grid = "even" if args.grid == "auto" else args.grid  # auto needs the weights
    num_base_steps, count = choose_steps(args, pipe, grid, len(base_timesteps), own)
    args = args.replace(num_base_steps=num_base_steps, num_inference_steps=count)
    positions = grid_positions(grid, count, len(base_timesteps))
    derived = derive_timesteps(base_timesteps, positions)
    timestep_table = ask_timestep_table(pipe, num_base_steps, **call)
    schedule = {phase: custom or derived[phase] for phase, custom in args.custom_timesteps.items()}
    warn_of_schedule(pipe, schedule, derived, timestep_table, single_call)
    return args, base_timesteps, timestep_table, derived, schedule


def needs_teacher(args, image) -> bool:
    """Whether the base must draw before the LoRAs are trained."""
    return args.loss == "trajectory" or args.grid == "auto" or args.solver == "fitted" or image is None


def batch_sizes(samples: int, timesteps: int, takes_timesteps: bool, takes_batches: bool) -> list[int]:
    """Return how many pictures the pipeline will be asked for at once in training: `samples` of each of the step's
    timesteps. Equal ones that lie side by side are one run, where a run takes but one."""
    if not takes_batches:
        return [1]
    return [timesteps * samples] if takes_timesteps else [count * samples for count in range(1, timesteps + 1)]


def remember_captions(pipe, captions: list[str], call: dict, train_calls: list[dict], sizes: list[int]) -> None:
    """Let the pipeline encode every caption as it will be asked for: alone to draw it, in batches to train on it."""
    for caption in captions:
        ask.dry_step(pipe, **call | {"prompt": caption})
        for train_call, size in itertools.product(train_calls, sizes):
            ask.dry_step(pipe, **train_call | {ask.batch_argument(pipe): size, "prompt": caption})


def prepare_pipeline(args, accelerator, image, captions, size) -> Asked:
    """Ask the pipeline everything, free its encoders, load the transformer; peak memory is the larger of the two."""
    asked = ask_everything(args, accelerator, image, captions, size)
    accelerator.free_memory()
    transformer = with_adapters(asked.load_transformer())
    setattr(asked.pipe, denoiser_name(asked.pipe.config), transformer)
    if asked.teacher is not None:
        asked = learn_from_base(asked.settings, accelerator, asked)
    if asked.checkpointing:
        load_base.enable_gradient_checkpointing(transformer)
    return asked


def ask_everything(args, accelerator, image, captions, size) -> Asked:
    """Ask all that can be asked without the transformer's weights.

    The encoders live in this function alone. What it returns is data and a pipeline without them, so that nothing is
    left that could keep one in memory while the transformer is there.
    """
    dtype, where = DTYPES[args.mixed_precision], cli.load_arguments(args)
    pipe = ask.load_pipeline(args.pretrained_model_name_or_path, dtype, **where)
    for component in ask.freeable_components(pipe).values():
        component.to(accelerator.device)
    call, single_call, layers = ask_call(args, pipe, captions[0], size)
    train_call = trained_call(args, call, single_call)
    args, base_timesteps, timestep_table, derived, schedule = ask_schedule(args, pipe, call, single_call)
    teacher = Teacher(pipe, base_timesteps, timestep_table, call) if needs_teacher(args, image) else None
    layout = ask_latents.ask_layout(pipe, **call)
    latents = None
    if image is not None:
        pixels = VaeImageProcessor(do_resize=False).preprocess(image)
        latents = ask_latents.encode_image(pipe, pixels, layout, **call)
    noise_scale = ask_latents.ask_noise_scale(pipe, **call)
    several_timesteps = args.timesteps_per_step > 1 and takes_timesteps(pipe, **train_call)
    samples, timesteps = args.train_batch_size, args.timesteps_per_step
    several_samples = samples * timesteps == 1 or takes_batches(pipe, **train_call)
    train_calls = [train_call, single_call] if args.flow_weight else [train_call]
    sizes = batch_sizes(samples, timesteps, several_timesteps, several_samples)
    remember_captions(pipe, captions, call, train_calls, sizes)
    checkpointing = choose_checkpointing(args, accelerator, pipe, layers, train_call)
    vae = getattr(pipe, "vae", None)
    ask_prompts.free_components(pipe, **train_call)
    return Asked(
        pipe=pipe,
        settings=args,
        load_transformer=functools.partial(load_transformer, args, accelerator),
        teacher=teacher,
        call=single_call if args.guidance == "fold" else call,
        single_call=single_call,
        train_call=train_call,
        captions=captions,
        schedule=schedule,
        first_step={"slow": 0, "fast": len(derived["slow"])},
        grid=None if args.flow_custom_timesteps else args.grid,
        timestep_table=timestep_table,
        latents=latents,
        noise_scale=noise_scale,
        layers=layers,
        takes_timesteps=several_timesteps,
        takes_batches=several_samples,
        checkpointing=checkpointing,
        layout=layout,
        vae=vae and vae.cpu(),
    )


def load_transformer(args, accelerator, part: str | None = None) -> torch.nn.Module:
    """The base's transformer, or another `part` of its class, as this run's flags want it."""
    path, dtype = args.pretrained_model_name_or_path, DTYPES[args.mixed_precision]
    how = (path, dtype, accelerator.device, args.quantization, args.enable_group_offload)
    return distribution.load_transformer(accelerator, *how, part=part, **cli.load_arguments(args))


def learn_from_base(args, accelerator, asked: Asked) -> Asked:
    """Let the base draw, and add what is made of it: the grid, trajectories, the image where none is given."""
    taught = draw_trajectories(args, accelerator, asked.teacher, asked.captions)
    found = {"taught": taught}
    if asked.latents is None:
        found["latents"] = taught.picture.to(accelerator.device)
    if not args.flow_custom_timesteps:
        derived = derive_timesteps(asked.teacher.timesteps, taught.positions)
        found["schedule"] = {phase: derived[phase] for phase in asked.schedule}
        found["first_step"], found["grid"] = {"slow": 0, "fast": len(derived["slow"])}, taught.grid
    return dataclasses.replace(asked, **found)


def choose_checkpointing(args, accelerator, pipe, layers, train_call) -> bool:
    """Gradient checkpointing as asked; else where a step does not fit without it, by the estimate.

    Where weights are unpacked or moved for every layer, the graph would keep them all: there it is always on.
    """
    if args.gradient_checkpointing is not None or not denoiser(pipe)._supports_gradient_checkpointing:
        return bool(args.gradient_checkpointing)
    if args.enable_group_offload or args.quantization == "fp8":
        return True
    try:
        needed = estimate_step(args, pipe, layers, train_call, [False])
    except InputError as error:
        logger.info(f"Gradient checkpointing is on, to be safe: {error}")
        return True
    peak = needed.peak(args.quantization, False, bytes_of_adam(args))
    free = estimate.free_memory(accelerator.device) + needed.encoders  # those are there now, and freed first
    on = accelerator.gather(torch.tensor([peak > 0.9 * free], device=accelerator.device)).any().item()
    if on:
        logger.info(f"Gradient checkpointing is on: a step without needs {peak / 1e9:.1f} GB of {free / 1e9:.1f} free")
    return on


def bytes_of_adam(args) -> int:
    """Bytes of the optimizer's state for each parameter."""
    return 2 if args.use_8bit_adam else 8


def dry_run(args) -> str:
    """What the run will need, asked of the configs and the tokenizers alone."""
    dtype, device = DTYPES[args.mixed_precision], PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).device
    caption, size = "a picture", chosen_size(args)
    if args.instance_prompt or any(getattr(args, source) for source in SOURCES):
        _, caption, size = load_pair(args)
    pipe = estimate.load_without_weights(args.pretrained_model_name_or_path, dtype, **cli.load_arguments(args))
    call, single_call, layers = ask_call(args, pipe, caption, size)
    ask_schedule(args, pipe, call, single_call)
    train_call = trained_call(args, call, single_call)
    found = estimate_step(args, pipe, layers, train_call)
    return estimate.report(found, device, dtype)
