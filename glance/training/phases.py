"""Which phases does a run train, into which folders, and from where does each begin?

A new entry of the recipe is filled in by make_recipe; how runs are compared is checkpoints' business.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from glance import base as load_base
from glance import command_line as cli
from glance.ask import pipeline as ask
from glance.command_line import Settings
from glance.files.checkpoints import (
    check_flags,
    check_lora,
    check_replaced,
    digest,
    find_resume,
    load_checkpoint,
    run_settings,
)
from glance.files.further_loras import find_base_loras, with_base_loras
from glance.files.pipeline_images import digest_of, pictures_of, read_pipeline_images
from glance.files.recipe import Recipe
from glance.files.sampler import Sampler, write_sampler
from glance.training import distribution
from glance.training.prepare import Prepared
from glance_utils import __version__, denoiser


@dataclass(frozen=True)
class Source:
    """The base, image and captions of a run, by their content: a resumed run can be told from another one."""

    base: str  # base.identify's, with the LoRAs that are part of it
    learned: str  # SHA-256 of the pixels of all pictures and the captions
    checkpoint: dict | None  # that --resume_from_checkpoint names, or the newest
    asked: dict[str, str]  # a digest of what each phase is asked for


@dataclass(frozen=True)
class Phase:
    """One LoRA to train."""

    recipe: Recipe
    folder: Path  # where its file is written
    asked: str  # Source's
    compared: dict  # the settings that its checkpoints have in common with a run that goes on from them
    earlier: list[str]  # the phases of this run before it
    steps_before: int  # that those were trained
    finished: bool  # an earlier run has written it
    checkpoint: dict | None  # to go on from


def folders(args: Settings) -> dict[str, Path]:
    """Return where each phase's LoRA is written: a folder of its own where both are trained."""
    output_dir, phases = Path(args.output_dir), args.custom_timesteps
    return {phase: output_dir / phase if len(phases) == 2 else output_dir for phase in phases}


def find_source(args: Settings, num_processes: int, frames: list[Image.Image], captions: list[str], size) -> Source:
    """Return what the run learns from; `frames` are the image's, one or more, or none; `size` is (height, width) in
    pixels.

    Raise InputError where the checkpoint to resume, or a LoRA that would be written over, is another run's, as far as
    flags say before the base is loaded.
    """
    content = [b"".join(frame.tobytes() for frame in frames), *(text.encode() for text in captions)]
    pictures = [read_pipeline_images(args.pipeline_images), *map(pictures_of, captions)]
    if any(pictures):
        content.append(json.dumps(pictures, default=digest_of, sort_keys=True).encode())
    learned = hashlib.sha256(b"\0".join(content)).hexdigest()
    base = load_base.identify(args.pretrained_model_name_or_path, **cli.load_arguments(args))
    base = with_base_loras(base, find_base_loras(args))
    checkpoint = load_checkpoint(args.resume_from_checkpoint, args.output_dir)
    settings = run_settings(args, None, base, learned, num_processes)
    if checkpoint is not None:
        check_flags(checkpoint["settings"], settings)
    asked = {
        phase: digest(settings | {"phase": phase, "timesteps": timesteps, "size": size})
        for phase, timesteps in args.custom_timesteps.items()
    }
    if not args.overwrite_output_dir and args.resume_from_checkpoint != "latest":  # which find_resume checks
        check_replaced(folders(args), asked)
    return Source(base, learned, checkpoint, asked)


def make_recipe(args, prepared: Prepared, phase: str, size: tuple[int, int]) -> Recipe:
    """Return what infer_glance.py needs to know of a LoRA, stored in the header of its file."""
    pipe, steps = prepared.models.pipe, prepared.steps
    guidance_scale, parameter = args.guidance_scale, ask.accepted_arguments(pipe).get("guidance_scale")
    if guidance_scale is None and parameter is not None:
        guidance_scale = parameter.default
    return Recipe(
        phase=phase,
        timesteps=steps.phases[phase],
        base_model=args.pretrained_model_name_or_path,
        base_loras=find_base_loras(args) or None,
        pipeline=type(pipe).__name__,
        height=size[0],
        width=size[1],
        guidance_scale=guidance_scale,
        pipeline_kwargs=args.pipeline_kwargs,
        pipeline_images=sorted(args.pipeline_images.keys() | pictures_of(prepared.captions[0])) or None,
        num_base_steps=args.num_base_steps,
        grid=steps.grid,
        coefficients=steps.coefficients_of(phase),
        branches=steps.branches_of(phase),
        guidance=args.guidance,
        loss=args.loss,
        max_train_steps=args.max_train_steps,
        rank=args.rank,
        version=__version__,
    )


def make_sampler(args, prepared: Prepared, size: tuple[int, int]) -> Sampler:
    """Return how both phases are drawn, whether LoRAs are trained for it or not."""
    steps, found = prepared.steps, prepared.trajectories
    recipe = make_recipe(args, prepared, next(iter(steps.phases)), size).as_dict()
    known = {part.name: recipe[part.name] for part in dataclasses.fields(Sampler) if part.name in recipe}
    searched = found is not None and (args.grid == "auto" or args.solver == "fitted")
    own = {"phases": steps.whole, "coefficients": steps.coefficients, "branches": steps.branches}
    own |= {"captions": len(prepared.captions) if searched else 0, "error": found.error if searched else None}
    return Sampler(**known | own)


def write_sampler_of(args, prepared: Prepared, size: tuple[int, int], folder: Path) -> Sampler:
    """Write the run's sampler.json and scheduler, and return what is in them."""
    sampler = make_sampler(args, prepared, size)
    schedule = dataclasses.replace(sampler.schedule(), timestep_table=prepared.answers.timestep_table)
    scheduler = None if schedule.branches else schedule.scheduler(prepared.models.pipe.scheduler)
    write_sampler(folder, sampler, scheduler)
    return sampler


def plan_phases(
    args: Settings, num_processes: int, prepared: Prepared, source: Source, size: tuple[int, int]
) -> list[Phase]:
    """Return the phases in the order in which they are trained; `size` is (height, width) in pixels.

    Raise InputError where the checkpoint, or what lies in the output folder, is of another run, or where the processes
    find different ones.
    """
    phases = prepared.steps.phases
    recipes = {phase: make_recipe(args, prepared, phase, size) for phase in phases}
    compared = {
        phase: run_settings(args, recipe, source.base, source.learned, num_processes)
        for phase, recipe in recipes.items()
    }
    finished, checkpoints = find_resume(args, compared, recipes, folders(args), source.checkpoint)
    if args.resume_from_checkpoint:
        steps = {phase: checkpoint["step"] for phase, checkpoint in checkpoints.items()}
        distribution.check_same(sorted(finished), steps)
    for checkpoint in checkpoints.values() if args.loss != "endpoint" else ():  # which has two, and checks them
        check_lora(checkpoint["lora"], denoiser(prepared.models.pipe), prepared.answers.layers, args.rank)
    return [
        Phase(
            recipes[phase],
            folders(args)[phase],
            source.asked[phase],
            compared[phase],
            list(phases)[:number],
            number * args.max_train_steps,
            phase in finished,
            checkpoints.get(phase),
        )
        for number, phase in enumerate(phases)
    ]
