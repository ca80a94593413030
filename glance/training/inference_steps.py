"""Which steps does inference walk? Those of the LoRA files or, where none is given, a few of the base's own.

Asked of the pipeline, before anything is drawn; where steps come from elsewhere, they become a Schedule here.
"""

import contextlib
import dataclasses
import itertools
import logging

from diffusers import DiffusionPipeline

from glance.ask import latents as ask_latents
from glance.ask import sampler as grids
from glance.ask.guidance import ask_single_branch, count_model_calls
from glance.ask.mixed import branch_calls, count_calls
from glance.ask.pipeline import accepted_arguments, replaced
from glance.ask.schedule import ask_timestep_table, ask_timesteps, has_own_steps
from glance.command_line import Settings
from glance.files import faults
from glance.files.pair import is_own_base
from glance.files.recipe import Recipe
from glance.training.steps import choose_steps
from glance.training.trajectories import Teacher, choose_sampler
from glance_utils import InputError, Schedule, derive_timesteps, grid_positions


logger = logging.getLogger(__name__)


def published_timesteps(pipe: DiffusionPipeline, base_timesteps: list[float]) -> dict[str, list[float]]:
    """Return the published ten of the base's own timesteps (0..1000), by phase, for files that do not say theirs.

    Raise InputError where the base has too few.
    """
    if grids.most_positions("glance", 10, len(base_timesteps)) < 10:
        raise InputError(
            f"the LoRA files carry no recipe, and this {type(pipe).__name__} has its own {len(base_timesteps)} steps, "
            "too few for the published ten; give those that were trained as --flow_custom_timesteps 'SLOW LIST;FAST "
            f"LIST', of {', '.join(f'{timestep:.4f}' for timestep in base_timesteps)}"
        )
    return derive_timesteps(base_timesteps)


def schedule_of_loras(args, pipe, recipe: Recipe, schedule: Schedule | None, call: dict) -> Schedule:
    """Return the steps of the files, completed by the pipeline where these hold nothing.

    Raise InputError where --guidance is not how these steps go, or their branches are not there.
    """
    base_steps = recipe.num_base_steps
    if schedule is None:
        schedule = Schedule(published_timesteps(pipe, ask_timesteps(pipe, base_steps, **call)))
    mixed = schedule.branches is not None
    if args.guidance and (args.guidance == "mix") != mixed:
        held = "whose steps call mixed branches" if mixed else "whose steps know no branches"
        raise InputError(f"--guidance {args.guidance}: these are files {held}; leave it out")
    table = ask_timestep_table(pipe, base_steps, **call)
    single = mixed or (args.guidance or recipe.guidance) == "fold"
    guidance = ask_single_branch(pipe, **call) if single else {}
    check_guidance(pipe, recipe, schedule, call, guidance)
    if recipe.pipeline and schedule.coefficients and not is_own_base(args, recipe):
        logger.warning(
            f"the solver was found on {recipe.base_model}: on another base one that is found there may be nearer; "
            "--compare tells how far off it is, train_glance_lora.py --max_train_steps 0 finds another"
        )
    return dataclasses.replace(schedule, timestep_table=table, guidance=guidance)


def check_guidance(pipe, recipe: Recipe, schedule: Schedule, call: dict, off: dict) -> None:
    """Warn of a strength of guidance that changes nothing, as the files hold another; raise InputError where the steps
    call the negative prompt's branch and the call's guidance is off.

    `off` are the arguments that switch the pipeline's own guidance off.
    """
    kept = {"guidance_scale": recipe.guidance_scale, **recipe.pipeline_kwargs}
    held, given = (
        {name: values.get(name) for name in ("guidance_scale", "true_cfg_scale")} for values in (kept, call)
    )
    for name, values in itertools.product(held, (held, given)):
        if values[name] is None and name in (arguments := accepted_arguments(pipe)):
            values[name] = arguments[name].default
    others = [name for name in held if given[name] != held[name]]
    called = schedule.branches or ["prompt"]
    if set(called) != {"prompt"} and "negative" not in branch_calls(pipe, call, call | off):
        said = ", ".join(f"{name} {given[name]}, not {held[name]}" for name in others) or "this call"
        raise InputError(f"{said}: without guidance there is no negative prompt's branch, which these steps call")
    if schedule.branches or recipe.guidance == "fold":
        holder, again = "LoRAs", "train again"
        if schedule.branches:
            holder = "branches' weights"
            again = f"find others with --num_model_calls {count_calls(called)} --max_train_steps 0"
        for name in off.keys() & set(others):
            logger.warning(
                f"{name} {given[name]} has no effect on these files: their {holder} hold {held[name]}; for "
                f"{given[name]}, {again}, --{name} {given[name]}"
            )


def schedule_of_base(args: Settings, pipe, call: dict, hint: str) -> tuple[Settings, Schedule]:
    """Return steps of the base's own, to be walked without LoRAs by base_inference, and the settings with the numbers
    of steps, the grid and the solver that were taken.

    For --grid auto and --solver fitted the base draws its first prompt in all its steps, as before training; another
    noise, and the last of several prompts, measures. Raise InputError where the base has too few steps for the flags,
    FloatingPointError, which ends in the hint, where what it draws is not finite.
    """
    args = args.replace(grid=args.grid or "glance", solver=args.solver or "euler", custom_timesteps={"slow": None})
    settings, timesteps, _ = choose_steps(args, pipe, call)
    table, coefficients = ask_timestep_table(pipe, settings.num_base_steps, **call), None
    if settings.grid == "auto" or settings.solver == "fitted":
        jobs = [(args.prompts[0], args.seed + 1), (args.prompts[-1], args.seed + 2)]  # the picture has --seed itself
        points, exact = (grids.walk(pipe, timesteps, table, seed, **call | {"prompt": text}) for text, seed in jobs)
        with faults.explained("base, in all its steps", hint):
            ask_latents.check_finite(points[-1], "its final latents")
        teacher = Teacher(pipe, timesteps, table, call)
        grid, positions, coefficients, _ = choose_sampler(settings, teacher, points, jobs[1], exact[-1])
        settings = settings.replace(grid=grid, solver="fitted" if coefficients else "euler")
    else:
        positions = grid_positions(settings.grid, settings.num_inference_steps, len(timesteps))
    return settings, Schedule({"base": [timesteps[position] for position in positions]}, table, coefficients)


@contextlib.contextmanager
def base_inference(pipe: DiffusionPipeline, schedule: Schedule):
    """Let pipe(...) inside walk the schedule without LoRAs; yield arguments for it, as glance_inference does."""
    with replaced(pipe, "scheduler", schedule.scheduler(pipe.scheduler)):
        yield {"num_inference_steps": len(schedule.timesteps)}


def compared_steps(args, pipe, schedule: Schedule, base_steps: int, call: dict) -> list[int]:
    """Return how many steps the base draws in, in each of --compare's columns of its own; [] without it.

    In the first it walks all of its steps, in the second, of its own schedule, as many as cost about as many model
    calls as the schedule that is compared.
    """
    if not args.compare:
        return []
    walked = len(ask_timesteps(pipe, base_steps, **call))
    steps = count_calls(schedule.branches) if schedule.branches else len(schedule.timesteps)
    calls = steps * count_model_calls(pipe, **call | schedule.guidance)
    few = max(1, calls // count_model_calls(pipe, **call))
    # A base that ships its own steps cannot be asked for fewer of them.
    if has_own_steps(pipe, few, **call):
        return [walked]
    try:
        return [walked, len(ask_timesteps(pipe, few, **call))]
    except InputError as error:
        logger.warning(f"--compare leaves out the base at as many model calls: {error}")
        return [walked]
