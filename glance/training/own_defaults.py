"""What does the pipeline itself say where no flag does: how large are its pictures, and how many frames?

It is asked before any weight is loaded, since the image is cropped to that size and a resumed run must agree. A value
that is taken from the pipeline is said in one line.
"""

import contextlib
import logging

import diffusers
import torch
from diffusers import DiffusionPipeline

from glance import command_line as cli
from glance.ask import latents as ask_latents
from glance.ask import pipeline as ask
from glance.command_line import Settings
from glance.files.instance_data import SOURCES
from glance.files.pipeline_images import pictures_of, read_pipeline_images
from glance.training.weightless import load_without_weights
from glance_utils import InputError


logger = logging.getLogger(__name__)

TRAJECTORIES = 32  # of all captions together; more of them tell a sampler hardly more (docs/findings.md)
PLAIN = "give prompts without pictures, or leave the dial out"
FEW_CALLS = 8  # below it the sampler that is best for one caption is not for others


def own_size(args: Settings, *near: int) -> tuple[int, int]:
    """Return size_of's answer for the base, by its configs alone."""
    path = args.pretrained_model_name_or_path
    return size_of(load_without_weights(path, torch.float32, **cli.load_arguments(args)), args, *near)


def size_of(pipe: DiffusionPipeline, args: Settings, *near: int) -> tuple[int, int]:
    """Return (height, width) in pixels of what the pipeline, whose models need no weights, draws where it is asked for
    no size or, given a height and a width, the size near these that it draws as it is asked for.

    Raise InputError where it must be asked for one, or where there is none near.
    """
    extra = args.pipeline_kwargs | read_pipeline_images(args.pipeline_images)
    call = ask.whole_walk(pipe, ask.call_arguments(pipe, "a picture", None, None, args.guidance_scale, extra))
    if near:
        return drawn_near(pipe, *near, **call)
    try:
        height, width = ask_latents.ask_size(pipe, **call)
    except InputError as error:
        raise InputError(f"{error}; without a size, so give --resolution, or --height and --width") from error
    logger.info(f"Size: {width}x{height}, {type(pipe).__name__}'s own")
    return height, width


def drawn_near(pipe: DiffusionPipeline, height: int, width: int, **call) -> tuple[int, int]:
    """Return the size near this one whose sides are multiples of as few pixels as the pipeline takes, and keeps."""
    for pixels in (8, 16, 32, 64):
        size = tuple(max(round(side / pixels), 1) * pixels for side in (height, width))
        with contextlib.suppress(InputError):
            if ask_latents.ask_size(pipe, **call, height=size[0], width=size[1]) == size:
                logger.info(f"Size: {size[1]}x{size[0]}, with the image's aspect ratio in multiples of {pixels}")
                return size
    raise InputError(
        f"--aspect keep: {type(pipe).__name__} draws no size near {width}x{height} just as it is asked for; give "
        "--height and --width"
    )


def with_one_frame(args: Settings) -> Settings:
    """Return the settings, for a pipeline of video that is to learn from an image with one frame in its call, unless
    --num_frames says how many."""
    kind = _class_of_base(args)
    if kind is None:
        return args
    args = args.replace(pipeline_kwargs=ask.with_frames_named(kind, args.pipeline_kwargs))
    if not any(getattr(args, source) for source in SOURCES):
        return args
    name = ask.frames_argument(kind)
    if name is None or name in args.pipeline_kwargs:
        return args
    logger.info(f"{name}: 1, as an image is learned, and {kind.__name__} draws video")
    return args.replace(pipeline_kwargs=args.pipeline_kwargs | {name: 1})


def frames_learned(args: Settings) -> int:
    """Return how many frames of what is given a loss learns from: as many as the call draws."""
    if args.loss == "trajectory" and not args.flow_weight:
        return 1
    kind = _class_of_base(args)
    return args.pipeline_kwargs.get(kind and ask.frames_argument(kind), 1)


def _class_of_base(args: Settings) -> type[DiffusionPipeline] | None:
    """Return the base's class, None where diffusers has none of its name."""
    index = ask.read_model_index(args.pretrained_model_name_or_path, **cli.load_arguments(args))
    return getattr(diffusers, index["_class_name"], None)


def all_captions(args: Settings, caption: str) -> list[str]:
    """Return the captions of a run: the image's and, without repeating it, those of --prompts_file."""
    prompts = cli.read_prompts(args.prompts_file)
    if args.guidance == "mix" and any(map(pictures_of, prompts)):
        raise InputError(f"--prompts_file {args.prompts_file}: mixed branches go from noise and prompt alone; {PLAIN}")
    first = next((prompt for prompt in prompts if prompt == caption), caption)  # perhaps with pictures of its own
    return [first, *(prompt for prompt in prompts if prompt != caption or prompt is not first and pictures_of(prompt))]


def with_trajectories(args: Settings, captions: list[str]) -> Settings:
    """Return the settings with as many trajectories of each caption as a sampler of --num_model_calls is found on.

    Raise InputError where these are too few captions to tell.
    """
    if args.guidance != "mix":
        return args
    if len(captions) == 1 and args.num_model_calls != "auto" and args.num_model_calls < FEW_CALLS:
        raise InputError(
            f"--num_model_calls {args.num_model_calls}: below {FEW_CALLS} calls what is best for one caption is wrong "
            "for others; give two or more, as --prompts_file FILE"
        )
    return args.replace(num_trajectories=args.num_trajectories or max(2, -(-TRAJECTORIES // len(captions))))
