"""Which Slow- and Fast-LoRA is inference asked for, where are they, and do they fit each other and the base?

Nothing is loaded here: the files are found, and what they say of themselves is read and compared. A further condition
on two files belongs in recipe.check_pair, one on the files and the base into check_base.
"""

import dataclasses
import logging
from pathlib import Path

from glance import command_line as cli
from glance.ask.pipeline import read_model_index
from glance.files.further_loras import find_file
from glance.files.recipe import NO_RECIPE, WEIGHT_NAME, Recipe, check_pair, read_recipe, schedule_of
from glance.files.sampler import Sampler
from glance_utils import PHASES, InputError, Schedule


logger = logging.getLogger(__name__)


def find_loras(args) -> dict[str, Path]:
    """Return the two files, as {"slow": path, "fast": path}; from the hub where a source is no path but a hub id.

    `args` are infer_glance.py's settings. Raise InputError where one is not there, or is no .safetensors file.
    """
    if bool(args.lora) == bool(args.slow_lora or args.fast_lora) or bool(args.slow_lora) != bool(args.fast_lora):
        raise InputError(
            "give --lora FOLDER, or both --slow_lora and --fast_lora; or, to draw the base without LoRAs, "
            "--num_inference_steps"
        )
    paths = {}
    for phase in PHASES:
        source, name = args.lora or getattr(args, f"{phase}_lora"), getattr(args, f"{phase}_weight_name")
        name = name or (f"{phase}/{WEIGHT_NAME}" if args.lora else WEIGHT_NAME)
        paths[phase] = find_file(
            source, name, args.cache_dir, f"no such {phase} LoRA file; train it with train_glance_lora.py"
        )
    return paths


def with_base(args: cli.Settings, paths: dict[str, Path], sampler: Sampler | None) -> cli.Settings:
    """Return the settings with the base that the LoRA files or the sampler name, where the command line names none.

    Raise InputError where they name none either, or one that cannot be found.
    """
    if args.pretrained_model_name_or_path:
        return args
    recipes = [recipe for path in paths.values() if (recipe := read_recipe(path, required=False))]
    recipes += [sampler.recipe()] if sampler else []
    if not recipes:
        raise InputError(
            "--pretrained_model_name_or_path is missing, and the LoRA files carry no recipe that names their base; "
            "give a diffusers pipeline, folder or hub id"
        )
    base = recipes[0].base_model
    try:
        read_model_index(base, **cli.load_arguments(args))
    except InputError as error:
        raise InputError(f"the base that the files name: {error}; give --pretrained_model_name_or_path") from None
    logger.info(f"Base: {base}, as the files say")
    return args.replace(pretrained_model_name_or_path=base)


def read_recipes(args, paths: dict[str, Path], sampler: Sampler | None) -> tuple[Recipe, Schedule | None]:
    """Return what both files say, checked against each other and the base: the recipe, and the steps of both.

    A sampler's steps come before theirs, and it says the same where there are no files. Files that were not trained
    here have NO_RECIPE, and no steps (None) unless --flow_custom_timesteps or a sampler gives them; so has the base
    alone. Raise InputError where the files do not go together.
    """
    if sampler is not None:
        check_base(args, sampler.recipe(), "the sampler is")
    if not paths:
        return (NO_RECIPE, None) if sampler is None else (sampler.recipe(), sampler.schedule())
    recipes = {phase: read_recipe(path, required=False) for phase, path in paths.items()}
    silent = [str(paths[phase]) for phase, recipe in recipes.items() if recipe is None]
    if len(silent) == 1:
        raise InputError(
            f"{silent[0]}: carries no Glance recipe, but the other file does; give two that were trained together"
        )
    if silent:
        read_model_index(args.pretrained_model_name_or_path, **cli.load_arguments(args))
        steps = sampler.schedule() if sampler else args.custom_timesteps and Schedule(args.custom_timesteps)
        return sampler.recipe() if sampler else NO_RECIPE, steps
    for phase, timesteps in (args.custom_timesteps or {}).items():
        recipes[phase] = dataclasses.replace(recipes[phase], timesteps=timesteps, coefficients=None, branches=None)
    for phase, timesteps in (sampler.phases if sampler else {}).items():
        recipes[phase] = dataclasses.replace(recipes[phase], timesteps=timesteps, **sampler.of_phase(phase))
    check_pair(recipes, paths)
    check_base(args, recipes["slow"])
    return recipes["slow"], schedule_of(recipes)


def check_base(args, recipe: Recipe, source: str = "the LoRAs are") -> None:
    """Raise InputError where the files are of another base; names count, not the folders they lie in."""
    index = read_model_index(args.pretrained_model_name_or_path, **cli.load_arguments(args))
    if index["_class_name"] != recipe.pipeline:
        raise InputError(f"{source} for a {recipe.pipeline}, the base is a {index['_class_name']}")
    if not is_own_base(args, recipe) and not args.allow_base_mismatch:
        trained, given = Path(recipe.base_model), Path(args.pretrained_model_name_or_path)
        raise InputError(f"{source} of {trained}, not of {given}; --allow_base_mismatch tries nevertheless")


def is_own_base(args, recipe: Recipe) -> bool:
    """Return whether the base has the name of the one that the files are of."""
    trained, given = (Path(path).resolve().name for path in (recipe.base_model, args.pretrained_model_name_or_path))
    return trained.lower() == given.lower()
