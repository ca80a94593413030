"""What does a run know before it trains? What the pipeline answered, once, and what the base drew, where it must.

Three lifetimes: the encoders live in `ask_everything` alone, the transformer from `prepare_pipeline` on, and what they
answered, which is data, as long as the run. Whoever keeps a model beyond its time costs gigabytes.
"""

import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from tqdm.auto import tqdm

from glance import base as load_base
from glance import command_line as cli
from glance.adapters import lora_layers, with_adapters
from glance.ask import latents as ask_latents
from glance.ask import pipeline as ask
from glance.ask import prompts as ask_prompts
from glance.ask.components import denoiser_name
from glance.ask.guidance import ask_single_branch
from glance.ask.mixed import branch_calls, check_branches, count_calls
from glance.ask.prompt_lengths import PromptLengths
from glance.ask.schedule import ask_timestep_table, walks_given_sigmas
from glance.ask.velocity import (
    PipelineVelocity,
    check_instantaneous,
    check_memoryless,
    draws_conditions,
    takes_batches,
    takes_timesteps,
)
from glance.command_line import Settings
from glance.encoders import free_memory, place_encoders
from glance.files.further_loras import read_additions
from glance.files.pipeline_images import call_with, pictures_of, read_pipeline_images
from glance.training import calls_chart, distribution, estimate, losses, out_of_memory, stages, summary
from glance.training.draws import Draw
from glance.training.search import AT_ONCE, LARGEST, Shipped, Trials, ask_shipped, find_sampler, sizes_at_once
from glance.training.steps import Steps, choose_steps, pick_steps, warn_of_shares
from glance.training.trajectories import Teacher, Trajectories, check_can_draw, draw_trajectories, saved_or_drawn
from glance_utils import InputError, denoiser


logger = logging.getLogger(__name__)

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Models:
    """All of a run that owns models."""

    pipe: DiffusionPipeline  # its encoders freed; its transformer without weights until `prepare_pipeline` loads them
    vae: torch.nn.Module | None  # on the CPU, for the preview
    load_transformer: Callable  # returns the transformer or, with `part`, another component of its class


@dataclass(frozen=True)
class Answers:
    """The pipeline's answers from when its encoders were there: data, which holds no model."""

    call: dict  # the arguments of its call, with its guidance
    single_call: dict  # the same, with classifier-free guidance off
    branch_calls: dict[str, dict]  # mixed.branch_calls': either branch of the call, by its name
    train_call: dict  # one of the two: what the LoRAs are trained in
    preview_call: dict  # one of the two: what inference will call
    timesteps: list[float]  # all of the base's own, 0..1000
    timestep_table: list[list[float]] | None  # what its model is told at them (ask_timestep_table)
    shipped: dict[int, Shipped | None]  # search.ask_shipped's, where a number of model calls is asked for
    at_once: dict[str, list[int]]  # how many pictures of a prompt each branch may be asked for, likewise
    layout: ask_latents.LatentLayout | None  # None where pictures are mixed into the final latents (find_layout)
    image_latents: torch.Tensor | None  # (1, ...) float32; None where there is no image
    noise_scale: float  # how much stronger than standard normal its noise is
    layers: list[str]  # names of the linear layers that the LoRAs adapt
    draws_conditions: bool  # whether what pictures say depends on a call's seed
    takes_timesteps: bool  # whether the samples of a batch may have different ones
    takes_batches: bool  # whether one step may have several samples
    walks_sigmas: bool  # whether the stock scheduler draws the steps as they are given (walks_given_sigmas)

    @property
    def single_arguments(self) -> dict:
        """Return the arguments that switch the call's classifier-free guidance off."""
        missing = object()
        return {name: value for name, value in self.single_call.items() if self.call.get(name, missing) != value}


@dataclass(frozen=True)
class Prepared:
    """All that a run trains with."""

    settings: Settings  # the run's, with the numbers of steps that the base has
    models: Models
    answers: Answers
    captions: list[str]
    steps: Steps
    latents: torch.Tensor | None  # (1, ...) float32: the image's, or of what the base drew for one
    trajectories: Trajectories | None = None  # what the base drew
    untrained_error: float | None = None  # the endpoint loss's error before training, where it measured one


def ask_call(args, pipe, caption: str, size: tuple[int, int], warn=logger.warning) -> tuple[dict, dict, list[str]]:
    """Return the call's arguments with and without classifier-free guidance, and the names of the layers to adapt.

    `size` is (height, width) in pixels; `warn` hears of what a prompt loses. Raise InputError where the
    pipeline cannot be trained so.
    """
    extra = args.pipeline_kwargs | read_pipeline_images(args.pipeline_images) | pictures_of(caption)
    call = ask.whole_walk(pipe, ask.call_arguments(pipe, str(caption), *size, args.guidance_scale, extra))
    transformer = denoiser(pipe)
    layers = lora_layers(transformer, args.lora_layers)
    if args.gradient_checkpointing and not transformer._supports_gradient_checkpointing:
        raise InputError(f"--gradient_checkpointing: {type(transformer).__name__} has none, so leave it out")
    PromptLengths(pipe, warn).watch(pipe)
    ask_prompts.remember_prompts(pipe)
    ask.dry_step(pipe, **call)
    check_instantaneous(pipe, **call)
    check_memoryless(pipe, **call)
    return call, call | ask_single_branch(pipe, **call), layers


def trained_call(args, call: dict, single_call: dict) -> dict:
    """Return the arguments that the LoRAs are trained with: guidance counts for the trajectory loss that keeps it."""
    return call if args.loss == "trajectory" and args.guidance == "keep" else single_call


def previewed_call(args, call: dict, single_call: dict) -> dict:
    """Return the arguments that inference will call the pipeline with: without guidance where the LoRAs hold it."""
    return single_call if args.guidance == "fold" else call


def batching(args, pipe, train_call: dict) -> tuple[bool, bool]:
    """Return whether a step's samples may have different timesteps, and whether it may have several samples at once;
    the pipeline is asked only where the flags need to know."""
    mixed = args.timesteps_per_step > 1 and takes_timesteps(pipe, **train_call)
    return mixed, args.train_batch_size * args.timesteps_per_step == 1 or takes_batches(pipe, **train_call)


def find_layout(args, pipe, call: dict, tell=logger.info) -> ask_latents.LatentLayout | None:
    """Return the latents' layout; None where the pipeline does more to the final latents, as mixing a picture into
    them, and only the trajectory loss is trained, which needs none. `tell` hears of that. Raise InputError where one
    is needed."""
    needed = args.loss != "trajectory" or args.flow_weight
    try:
        return ask_latents.ask_layout(pipe, **call)
    except InputError as error:
        if needed:
            raise
        if args.validation_prompt:
            raise InputError(f"--validation_prompt: {error}; leave it out") from error
        tell(f"No picture is drawn of what is learned: {error}")
        return None


def estimate_run(args, pipe, layers: list[str], call: dict, single_call: dict, size, draws: bool, checkpointing):
    """Return what the run needs (estimate.Estimate), asked of a pipeline whose models have no weights.

    `size` is (height, width) in pixels, `draws` whether the base draws before it is trained on, and `checkpointing`
    which micro-steps are measured: without, with, or both. Raise InputError where it cannot be estimated.
    """
    layout = find_layout(args, pipe, call, logger.debug)
    train_call, preview_call = trained_call(args, call, single_call), previewed_call(args, call, single_call)
    mixed, batched = batching(args, pipe, train_call)
    model = PipelineVelocity(pipe, takes_timesteps=mixed, takes_batches=batched)
    latents = torch.zeros(layout.latents_shape if layout else ask_latents.loop_shape(pipe, **call))
    points = latents.expand(1, args.train_batch_size, args.timesteps_per_step, *latents.shape[1:])
    sigmas = [1 - 0.001 * index for index in range(args.timesteps_per_step)]  # other ones, in the reach of one model
    flow = trajectory = None
    if args.loss in ("flow", "endpoint") or args.flow_weight:  # an endpoint's backward keeps one call at a time
        flow = losses.Flow(latents, call=single_call)
    if args.loss == "trajectory":
        trajectory = losses.Trajectory(points, points, [call["prompt"]], train_call)
    objective = losses.Objective(sigmas, flow, trajectory)
    noise = torch.zeros(args.train_batch_size * args.timesteps_per_step, *latents.shape[1:])
    draw = Draw(list(range(len(sigmas))), noise, trajectories=tuple(range(args.train_batch_size)))
    trains = args.max_train_steps > 0
    previews = trains and layout and (len(args.custom_timesteps) == 2 or args.validation_prompt)
    work = estimate.Work(
        train=(lambda: losses.step_losses(model, objective, draw)[0]) if trains else None,
        draw=(lambda: model(latents, 1.0, **call)) if draws else None,
        preview=(lambda: model(latents, 1.0, **preview_call)) if previews else None,
        trial=(lambda: model(latents, 1.0, **single_call)) if args.guidance == "mix" else None,
        at_once=max(size for size in AT_ONCE if size <= max(LARGEST // latents.numel(), 1)) if batched else 1,
        same=preview_call == call,
        accumulates=args.gradient_accumulation_steps > 1,
    )
    vae = estimate.measure_vae(getattr(pipe, "vae", None), layout, size) if layout else (0, 0)
    return estimate.estimate(pipe, layers, args.rank, work, vae, checkpointing, args.lora_dropout)


def needs_drawing(args, frames) -> bool:
    """Return whether the base must draw before the LoRAs are trained; `frames` are what is learned, if anything."""
    return args.loss != "flow" or args.grid == "auto" or args.solver == "fitted" or not frames


def batch_sizes(samples: int, timesteps: int, takes_timesteps: bool, takes_batches: bool) -> list[int]:
    """Return how many pictures the pipeline will be asked for at once in training: `samples` of each of the step's
    timesteps. Equal ones that lie side by side are one run, where a run takes but one."""
    if not takes_batches:
        return [1]
    return [timesteps * samples] if takes_timesteps else [count * samples for count in range(1, timesteps + 1)]


def remember_captions(pipe, captions: list[str], call: dict, train_calls: list[dict], sizes: list[int]) -> None:
    """Let the pipeline encode every caption as it will be asked for: alone to draw it, in batches to train on it."""
    for caption in tqdm(captions, desc="encoding", delay=1, disable=not PartialState().is_local_main_process):
        ask.dry_step(pipe, **call_with(call, caption))
        for train_call, size in itertools.product(train_calls, sizes):
            ask.dry_step(pipe, **call_with(train_call, caption) | {ask.batch_argument(pipe): size})


def prepare_pipeline(
    args, accelerator, base: str, frames: list, captions: list[str], size: tuple[int, int]
) -> Prepared:
    """Ask the pipeline everything, free its encoders, load the transformer, and let it draw where the run needs that.

    `base` is base.identify's, `frames` the PIL images of `size`, (height, width), of what is learned: one, those of a
    video, or none. Peak memory is the larger of encoders and transformer.
    """
    with out_of_memory.in_encoding(args):
        prepared = ask_everything(args, accelerator, frames, captions, size)
    accelerator.free_memory()
    pipe = prepared.models.pipe
    if args.max_train_steps:
        summary.say_adapted(denoiser(pipe), prepared.answers.layers, args.rank)
    stages.enter("loading transformer")
    with out_of_memory.in_training(args, "training", lambda: "loading the transformer"):
        transformer = with_adapters(prepared.models.load_transformer())
    setattr(pipe, denoiser_name(pipe.config), transformer)
    if needs_drawing(args, frames):
        with out_of_memory.in_training(args, "drawing", lambda: "drawing what is learned from the base"):
            prepared = learn_from_base(accelerator, prepared, base)
    if prepared.settings.gradient_checkpointing:
        load_base.enable_gradient_checkpointing(transformer)
    return prepared


def ask_everything(args, accelerator, frames: list, captions: list[str], size: tuple[int, int]) -> Prepared:
    """Ask all that can be asked without the transformer's weights.

    The encoders live in this function alone. What it returns is data and a pipeline without them, so that nothing is
    left that could keep one in memory while the transformer is there.
    """
    path, dtype = args.pretrained_model_name_or_path, DTYPES[args.mixed_precision]
    stages.enter("loading encoders")
    pipe = ask.load_pipeline(path, dtype, **cli.load_arguments(args))
    additions = read_additions(pipe, args)
    place_encoders(pipe, accelerator.device, args.memory or free_memory(accelerator.device))
    stages.enter("encoding")
    call, single_call, layers = ask_call(args, pipe, captions[0], size)
    train_call = trained_call(args, call, single_call)
    settings, timesteps, steps = choose_steps(args, pipe, call)
    timestep_table = ask_timestep_table(pipe, settings.num_base_steps, **call)
    warn_of_shares(pipe, steps.phases, timestep_table, single_call)
    if needs_drawing(args, frames):
        check_can_draw(pipe)
    if args.validation_steps and ask.further_denoisers(pipe):
        raise InputError(
            f"--validation_steps: {type(pipe).__name__} guides with a second model, which training does not load; "
            "leave it out, --validation_prompt is drawn at the end"
        )
    layout = find_layout(args, pipe, call)
    noise_scale = ask_latents.ask_noise_scale(pipe, **call)
    beside = args.pipeline_images or pictures_of(captions[0])
    draws = bool(beside) and draws_conditions(pipe, **train_call)
    mixed, batched = batching(args, pipe, train_call)
    train_calls = [train_call, single_call] if args.flow_weight else [train_call]
    sizes = batch_sizes(args.train_batch_size, args.timesteps_per_step, mixed, batched)
    branches = branch_calls(pipe, call, single_call)
    shipped, at_once = {}, {}
    if args.guidance == "mix":
        shipped = ask_shipped(pipe, args, len(timesteps), call, "negative" in branches, len(captions))
        batched = all(takes_batches(pipe, **branch) for branch in branches.values())
        at_once = sizes_at_once(args, branches, len(captions), layout.latents_shape if batched else None)
        train_calls, sizes = [branches["prompt"]], at_once["prompt"]
        if negative := branches.get("negative"):
            remember_captions(pipe, [negative["prompt"]], negative, [negative], at_once["negative"])
    remember_captions(pipe, captions, call, train_calls, sizes)
    preview_call = previewed_call(args, call, single_call)
    single = branches["prompt"] if args.guidance == "mix" else preview_call
    remember_captions(pipe, args.validation_prompt, call, [single], [1])
    ask_prompts.free_components(pipe, keep=("vae",))
    accelerator.free_memory()  # of which an image takes the VAE much
    learns = args.loss != "trajectory" or args.flow_weight
    latents = encode_frames(pipe, frames, layout, call) if frames and learns else None
    vae = getattr(pipe, "vae", None)
    ask_prompts.free_components(pipe, **train_call)
    if vae is not None:
        vae.cpu()
    answers = Answers(
        call=call,
        single_call=single_call,
        branch_calls=branches,
        train_call=train_call,
        preview_call=preview_call,
        timesteps=timesteps,
        timestep_table=timestep_table,
        shipped=shipped,
        at_once=at_once,
        layout=layout,
        image_latents=latents,
        noise_scale=noise_scale,
        draws_conditions=draws,
        layers=layers,
        takes_timesteps=mixed,
        takes_batches=batched,
        walks_sigmas=walks_given_sigmas(pipe, [*timesteps[:2], timesteps[-1]] if timesteps[2:] else timesteps, **call),
    )
    models = Models(pipe, vae, functools.partial(load_transformer, args, accelerator, additions))
    return Prepared(settings, models, answers, captions, steps, latents)


def encode_frames(pipe, frames: list, layout: ask_latents.LatentLayout, call: dict) -> torch.Tensor:
    """Return the latents (1, ...) float32 of PIL images of the call's size: a picture, or a video's frames."""
    pixels = [VaeImageProcessor(do_resize=False).preprocess(frame) for frame in frames]
    pixels = torch.stack(pixels, dim=2) if len(pixels) > 1 else pixels[0]
    return ask_latents.encode_image(pipe, pixels, layout, **call)


def load_transformer(args, accelerator, additions: dict, part: str | None = None) -> torch.nn.Module:
    """Return the base's transformer with read_additions' on its weights, or another `part` of its class without, as
    this run's flags want it."""
    return distribution.load_transformer(
        accelerator,
        args.pretrained_model_name_or_path,
        DTYPES[args.mixed_precision],
        args.quantization,
        args.enable_group_offload,
        part=part,
        additions=None if part else additions,
        **cli.load_arguments(args),
    )


def learn_from_base(accelerator, prepared: Prepared, base: str) -> Prepared:
    """Let the base draw, and add what is made of it: trajectories, the steps, the image where none is given."""
    settings, answers = prepared.settings, prepared.answers
    teacher = Teacher(prepared.models.pipe, answers.timesteps, answers.timestep_table, answers.call)
    if settings.guidance == "mix":
        model = PipelineVelocity(prepared.models.pipe, answers.timestep_table, takes_batches=answers.takes_batches)
        check_branches(model, answers.call, answers.branch_calls, teacher.sigmas[0])
        trials = Trials(model, answers.branch_calls, teacher.sigmas, answers.at_once)
        draw = functools.partial(find_sampler, settings, teacher, trials, answers.shipped, captions=prepared.captions)
    else:
        draw = functools.partial(draw_trajectories, settings, accelerator, teacher, prepared.captions)
    drawn = saved_or_drawn(settings, teacher, base, prepared.captions, draw)
    latents, steps = prepared.latents, prepared.steps
    if latents is None:
        latents = drawn.picture.to(accelerator.device)
    if drawn.curve:
        calls_chart.say_curve(drawn.curve, len(teacher.timesteps))
        calls = count_calls(drawn.branches)  # that auto has come to
        settings = settings.replace(num_model_calls=calls, num_inference_steps=min(calls, len(teacher.timesteps)))
    if not settings.flow_custom_timesteps:
        picked = drawn.positions, drawn.grid, drawn.coefficients, drawn.branches
        steps = pick_steps(settings.custom_timesteps, answers.timesteps, *picked)
    return dataclasses.replace(prepared, settings=settings, steps=steps, latents=latents, trajectories=drawn)
