"""Ten-step inference with a Slow- and a Fast-LoRA: one pipeline, one loop over all ten sigmas, an exact hand-off.

    python infer_glance.py --lora output/glance --dtype bfloat16 --prompt "a red fox in the snow" --output out.png
    python infer_glance.py --lora output/demo --prompts_file demo/prompts.txt --compare --output comparison.png
    python infer_glance.py --pretrained_model_name_or_path my/fine-tune --allow_base_mismatch --lora output/glance ...
    python infer_glance.py --pretrained_model_name_or_path demo/model --num_inference_steps 8 --grid even ...

The base, the schedule, the size and the guidance are read from the LoRA files where no flag says another. Image i of a
prompt has the seed --seed + i. With more than one image, out.png becomes out-000.png, out-001.png, ... `accelerate
launch infer_glance.py` splits the images over its processes. --compare draws the base at full steps, the base at
as many model calls, Glance's steps without LoRAs and Glance beside each other, with the error to the first under each;
until the picture is whole its rows are out-row-000.png, ... A picture that is not finite (NaN) is not written; the
others are, and the exit code is 1. The last command needs no LoRAs: the base alone walks so many of its own steps.
"""

from glance import inference_flags, start


if __name__ == "__main__":
    settings = start.as_script("what was not saved yet is lost", inference_flags.parse)

import functools
import logging
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from glance import base as load_base
from glance import command_line as cli
from glance.adapters import let_act
from glance.ask import pipeline as ask
from glance.ask.prompt_lengths import PromptLengths
from glance.ask.prompts import remember_prompts
from glance.drawing import Counter, Written, check_size, draw_job, draw_strip, errors_of, what_to_try
from glance.encoders import free_memory, place_encoders
from glance.files import faults, pictures
from glance.files.further_loras import as_trained, file_of, find_styles, read_additions
from glance.files.lora import load_lora
from glance.files.lora_forms import read_lora
from glance.files.pair import find_loras, read_recipes, with_base
from glance.files.pipeline_images import check_given, pictures_of, read_pipeline_images
from glance.files.recipe import Recipe
from glance.files.sampler import NAME, read_sampler
from glance.training import distribution, launcher, out_of_memory
from glance.training.inference_steps import compared_steps, schedule_of_base, schedule_of_loras
from glance.training.weightless import UNKNOWN, decoding_bytes, load_without_weights
from glance_utils import (
    PHASES,
    InputError,
    Schedule,
    denoiser,
    parse_timesteps,
)


logger = logging.getLogger(__name__)

DTYPES = {name: getattr(torch, name) for name in inference_flags.DTYPES}


def parse_args(argv: list[str] | None = None) -> cli.Settings:
    """Return the run's settings; raise ArgumentError or InputError where the command line has mistakes."""
    return complete(inference_flags.parse(argv))


def complete(args: cli.Settings) -> cli.Settings:
    """Return inference_flags.parse's settings with the launcher's dtype and, by phase, --flow_custom_timesteps.

    It takes libraries to know these. Raise InputError where they cannot be followed.
    """
    load_base.check_combination(args.quantization, args.enable_group_offload)
    custom = None
    if args.flow_custom_timesteps is not None:
        lists = parse_timesteps(args.flow_custom_timesteps)
        if len(lists) != 2:
            raise InputError("--flow_custom_timesteps holds one list; inference takes two: 'SLOW LIST;FAST LIST'")
        custom = dict(zip(PHASES, lists))
    return args.replace(dtype=launcher.agreed_dtype(args.dtype), custom_timesteps=custom)


def read_files(args) -> tuple[cli.Settings, dict[str, Path], Recipe, Schedule | None]:
    """Return the settings with the base that the files name, the LoRA files by phase, and read_recipes' two."""
    sampler = read_sampler(file_of(args.sampler, NAME, args.cache_dir)) if args.sampler else None
    paths = {} if args.without_loras else find_loras(args)
    args = with_base(args, paths, sampler)
    recipe, schedule = read_recipes(args, paths, sampler)
    return args.replace(base_lora=as_trained(args, recipe)), paths, recipe, schedule


def size_of(args, recipe: Recipe) -> tuple[int | None, int | None]:
    """Return (height, width) in pixels, None where neither says it; warn where another size was trained."""
    height, width = args.height or recipe.height, args.width or recipe.width
    if recipe.height and (height, width) != (recipe.height, recipe.width):
        trained = f"{recipe.width}x{recipe.height}"
        logger.warning(f"{width}x{height} was asked, {trained} was trained: the schedule is that of {trained}")
    return height, width


def call_arguments(args, recipe: Recipe, pipe: DiffusionPipeline, prompt: str, extra: dict) -> dict:
    """Return the pipeline's call arguments: as the flags say, else as trained; `extra` are further_arguments."""
    guidance = recipe.guidance_scale if args.guidance_scale is None else args.guidance_scale
    height, width = args.height or recipe.height, args.width or recipe.width
    return ask.call_arguments(pipe, str(prompt), height, width, guidance, extra | pictures_of(prompt))


def begin(args) -> PartialState:
    """Return accelerate's state; raise InputError where it or the flags ask for a device that is not there."""
    with launcher.begun():
        state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    if args.enable_sequential_cpu_offload and state.device.type == "cpu":
        raise InputError("--enable_sequential_cpu_offload needs an accelerator; there is none, so leave it out")
    return state


def offloads(args) -> bool:
    """Return whether a flag says which weights are on the accelerator when."""
    return args.enable_model_cpu_offload or args.enable_group_offload or args.enable_sequential_cpu_offload


def check_early(args, paths: dict[str, Path], call_of, device: torch.device) -> int:
    """Raise InputError, before any weight is read, where files of the base are missing, the pipeline refuses the call
    or a LoRA does not fit: asked of the pipeline with models that have no weights.

    Return the bytes that its VAE will take at work, 0 where it does not count: on a CPU, or offloaded. Where the
    pipeline cannot be built or called so at all, only the real one can tell.
    """
    base, load_arguments = args.pretrained_model_name_or_path, cli.load_arguments(args)
    try:
        components = {"controlnet": None} if args.controlnet else {}  # with which only the real pipeline can be called
        pipe = load_without_weights(base, DTYPES[args.dtype], components, args.pipeline_class, **load_arguments)
    except InputError as error:
        if isinstance(error.__cause__, OSError):
            raise
        return 0
    check_parts(args, pipe, paths)
    call = call_of(pipe)
    try:
        ask.dry_step(pipe, **call)
    except InputError as error:
        if isinstance(error.__cause__, UNKNOWN):
            return 0
        try:
            ask.dry_step(pipe, prompt=call["prompt"])
        except InputError:  # not even the prompt alone: it is for want of weights
            return 0
        raise
    if device.type == "cpu" or offloads(args):
        return 0
    if args.enable_vae_tiling:
        pipe.vae.enable_tiling()
    return decoding_bytes(pipe, DTYPES[args.dtype], **call)


def check_parts(args, pipe: DiffusionPipeline, paths: dict[str, Path]) -> dict:
    """Return read_additions'; raise InputError where a LoRA does not fit, or there is nothing to tile. No weights are
    needed for it."""
    if args.enable_vae_tiling and not hasattr(getattr(pipe, "vae", None), "enable_tiling"):
        raise InputError(f"--enable_vae_tiling: {type(pipe).__name__} has no VAE that can be tiled; leave it out")
    for path in paths.values():
        read_lora(pipe, path)
    return read_additions(pipe, args)


def load_pipeline(args, paths: dict[str, Path], device: torch.device, decoding: int = 0) -> DiffusionPipeline:
    """Load the base with all adapters, of which those of --style_lora act, and its encoders where they fit beside the
    transformer and the `decoding` bytes that the VAE takes at work."""
    base, dtype = args.pretrained_model_name_or_path, DTYPES[args.dtype]
    load_arguments = cli.load_arguments(args)
    place = torch.device("cpu") if offloads(args) else device
    components = {"controlnet": load_base.load_controlnet(args.controlnet, dtype)} if args.controlnet else {}
    how = {"vae_dtype": dtype, "pipeline_class": args.pipeline_class}
    pipe = ask.load_pipeline(base, dtype, components, **how, **load_arguments)
    additions = check_parts(args, pipe, paths)
    name, _ = ask.find_denoiser(base, **load_arguments)
    further = ask.further_denoisers(pipe)
    options = {"additions": additions} | load_arguments
    setattr(pipe, name, load_base.load_transformer(base, dtype, place, args.quantization, **options))
    for part in further:
        setattr(pipe, part, load_base.load_transformer(base, dtype, place, part=part, **load_arguments))
    for name, path in paths.items():
        load_lora(pipe, path, name)
    styles = [name for name in paths if name.startswith("style-")]
    let_act(denoiser(pipe), {name: scale for name, (_, scale) in zip(styles, args.style_lora)})
    if args.enable_vae_tiling:
        pipe.vae.enable_tiling()
    if args.enable_sequential_cpu_offload:
        pipe.enable_sequential_cpu_offload(device=device)
    elif args.enable_model_cpu_offload:
        pipe.enable_model_cpu_offload(device=device)
    elif args.enable_group_offload:
        pipe.enable_group_offload(**load_base.group_offload_arguments(device))
    else:
        place_encoders(pipe, device, free_memory(device) - decoding)
    if args.compile:
        load_base.compile_blocks(denoiser(pipe))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def further_arguments(args, recipe: Recipe, schedule: Schedule | None) -> dict:
    """Return the call's arguments beside prompt, size and guidance: the recipe's, the flags', and pictures.

    Raise InputError where a picture is not there, or where mixed branches are to be drawn with one.
    """
    check_given(recipe.pipeline_images, args.pipeline_images, args.prompts)
    kept, images = recipe.pipeline_kwargs, read_pipeline_images(args.pipeline_images)
    if args.pipeline_class:
        accepted = ask.arguments_of(ask.class_named(args.pipeline_class))
        kept = {name: value for name, value in kept.items() if name in accepted}
        for name in recipe.pipeline_kwargs.keys() - kept.keys():
            logger.warning(
                f"{args.pipeline_class} takes no {name}, which was {recipe.pipeline_kwargs[name]!r} in training"
            )
    beside = images or any(map(pictures_of, args.prompts))
    if (args.pipeline_class or beside) and schedule is not None and schedule.branches is not None:
        raise InputError(
            "--pipeline_class and --pipeline_images: these files' steps call mixed branches, which go from noise and "
            "prompt alone; give a pair or a sampler without them"
        )
    return kept | args.pipeline_kwargs | images


def fps_of(args, pipe) -> float:
    """Return how many frames a second a video is written with: --fps, or what the pipeline's call says, else 16."""
    said = ask.accepted_arguments(pipe).get("frame_rate")
    return args.fps or args.pipeline_kwargs.get("frame_rate") or (said and said.default) or 16


def draw_all(
    args, state, pipe, schedule: Schedule, base_steps: list[int], calls: list[dict], jobs: list, files: list[Path]
) -> tuple[list[Written], list[str]]:
    """Draw this process's share of the jobs, each written as soon as it is drawn.

    Return what was written and what was not finite, in words. A single picture has the pipeline's own bar of steps,
    several have one of pictures.
    """
    counter = Counter(pipe)
    drawn, failed = [], []
    hidden, single = not state.is_local_main_process, len(jobs) == 1
    with state.split_between_processes(list(range(len(jobs)))) as numbers:
        for number in tqdm(numbers, desc="images", disable=hidden or single):
            first = number == numbers[0]
            try:
                with out_of_memory.in_inference(args, f"drawing {files[number].name}"):
                    job = calls[number], jobs[number][1]
                    row = draw_job(args, pipe, counter, schedule, base_steps, *job, hidden or not single)
            except FloatingPointError as error:
                failed.append(f"{files[number].name} was not written: {error}")
                logger.warning(failed[-1])
                continue
            _, frames, seconds, count, _ = row[-1]
            if not drawn:
                check_size(pipe, calls[number], frames[0])
                if len(frames) > 1 and not pictures.plays(Path(args.output)):
                    logger.warning(f"--output {args.output}: 1 of {len(frames)} frames; end it in .mp4 or .webp")
            strip = draw_strip(row, jobs[number][0], first and not single) if args.compare else None
            pictures.save_frames(strip or frames, files[number], fps_of(args, pipe))
            drawn.append(Written(number, strip, seconds, count, first, errors_of(row)))
    return drawn, failed


def report(drawn: list[Written]) -> str:
    """Return the seconds and model calls of what draw_all drew, the first picture apart where others followed it, and
    the mean error of each column of a comparison."""
    count = drawn[0].calls
    errors = [f"{label} {sum(one.errors[label] for one in drawn) / len(drawn):.4f}" for label in drawn[0].errors]
    ending = f"; error to the full run: {'; '.join(errors)}" if errors else ""
    first = next((one.seconds for one in drawn if one.is_first), None)
    later = [one.seconds for one in drawn if not one.is_first]
    if first is None or not later:
        return f"{drawn[0].seconds:.2f} s and {count} model calls each{ending}"
    mean = sum(later) / len(later)
    return f"{count} model calls each; first picture {first:.2f} s, then {mean:.2f} s each{ending}"


def main(argv: list[str] | None = None, settings: cli.Settings | None = None):
    """Draw as the command line says; `settings` are what inference_flags.parse made of it, if it was asked before."""
    args = complete(settings or inference_flags.parse(argv))
    cli.set_up_logging()
    args, paths, recipe, schedule = read_files(args)
    height, width = size_of(args, recipe)
    extra = further_arguments(args, recipe, schedule)
    jobs = [(prompt, args.seed + image) for prompt in args.prompts for image in range(args.num_images)]

    output = Path(args.output)
    size = (width, height) if width and height else None
    files = pictures.files_of(output, len(jobs), args.compare)
    to_write = files
    if args.compare:
        to_write = [*files, output]
        size = pictures.comparison_size(size, 3 if args.without_loras else 4, len(jobs), details=2) if size else None
    pictures.check_output(output, to_write, size)
    state = begin(args)

    def call_of(pipe, prompt=jobs[0][0]) -> dict:
        return call_arguments(args, recipe, pipe, prompt, extra)

    loras = paths | find_styles(args)
    decoding = check_early(args, loras, call_of, state.device)
    with out_of_memory.in_inference(args, "loading the base"):
        pipe = load_pipeline(args, loras, state.device, decoding)
    PromptLengths(pipe, logger.warning).watch(pipe)
    calls = [call_of(pipe, prompt) for prompt, _ in jobs]
    ask.dry_step(pipe, **calls[0])
    whole, base_steps = ask.whole_walk(pipe, calls[0]), recipe.num_base_steps
    if args.without_loras and args.sampler is None:
        with out_of_memory.in_inference(args, "choosing a sampler"):
            args, schedule = schedule_of_base(args, pipe, whole, what_to_try(args))
        base_steps = args.num_base_steps
    else:
        if schedule and schedule.branches:
            remember_prompts(pipe)  # which is called for each step
        schedule = schedule_of_loras(args, pipe, recipe, schedule, whole)
    base_steps = compared_steps(args, pipe, schedule, base_steps, whole)
    with faults.signals_handled(functools.partial(faults.leave, hint="what was drawn before is written")):
        drawn, failed = draw_all(args, state, pipe, schedule, base_steps, calls, jobs, files)
        drawn, failed = (sum(distribution.gather_on_host(part), []) for part in (drawn, failed))
        drawn.sort(key=lambda picture: picture.number)
        if state.is_main_process and args.compare and drawn:
            frames = [pictures.stack_rows(rows) for rows in zip(*(picture.strip for picture in drawn))]
            pictures.save_frames(frames, output, fps_of(args, pipe))
            for picture in drawn:
                files[picture.number].unlink(missing_ok=True)
    distribution.leave()
    if state.is_main_process and failed:
        raise FloatingPointError(failed[0] + (f" ({len(failed)} of {len(jobs)} were not)" if failed[1:] else ""))
    if state.is_main_process:
        written = output.with_stem(f"{output.stem}-*") if len(jobs) > 1 and not args.compare else output
        print(f"{written}: {len(jobs)} x {len(schedule.timesteps)} steps, {report(drawn)}")


if __name__ == "__main__":
    cli.run(functools.partial(main, settings=settings))
