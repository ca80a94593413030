"""What does a LoRA file say of itself? The recipe in its header: data from anyone, checked before any of it is used.

A new field is one line of Recipe, with its check and with the default that files of earlier versions mean.
"""

import json
import math
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path

from safetensors import SafetensorError, safe_open

from glance.ask.mixed import CALLED, TERMS
from glance.shared_flags import MAX_SIDE
from glance_utils import PHASES, InputError, Schedule, check_timesteps


WEIGHT_NAME = "pytorch_lora_weights.safetensors"
LEFT_OUT = (
    "base_loras",
    "pipeline_images",
    "branches",
    "run",
    "asked",
)  # of a file where they are None: none, all, not known
HEADER_LIMIT = 16 * 2**20  # bytes; that of a LoRA on every layer of the largest models has less than one megabyte


def shown(value) -> str:
    """Return a value for an error message: on one line, without control characters, not too long."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def is_number(value, most: float = math.inf) -> bool:
    """Return whether it is a finite number, an int or a float, of at most this size."""
    return type(value) in (int, float) and math.isfinite(value) and abs(value) <= most


def count(most: int):
    """Return a check for a whole number from 1 to `most`."""
    return lambda value: type(value) is int and 0 < value <= most


def is_text(value) -> bool:
    """Return whether it is a text of 1 to 1,000 printable characters."""
    return isinstance(value, str) and 0 < len(value) <= 1000 and value.isprintable()


def are_timesteps(value) -> bool:
    """Return whether it is a list of numbers; raise InputError, a ValueError, where those are no timesteps."""
    return (
        isinstance(value, list) and len(value) <= 1000 and all(map(is_number, value)) and bool(check_timesteps(value))
    )


def are_coefficients(value) -> bool:
    """Return whether it is None or, for each step, a fitted solver's [a, c], of which [1, 0] is Euler's, or the
    weights of mixed branches."""
    if value is None:
        return True
    lists = isinstance(value, list) and len(value) <= 1000 and all(isinstance(part, list) for part in value)
    sizes = lists and {len(part) for part in value}
    return sizes in ({2}, {TERMS}) and all(is_number(number, 100) for part in value for number in part)


def are_branches(value) -> bool:
    """Return whether it is None or, for each step, which of the branches it calls."""
    fits = isinstance(value, list) and len(value) <= 1000 and all(isinstance(part, str) for part in value)
    return value is None or (fits and set(value) <= set(CALLED))


def check_steps(steps: int, coefficients: list[list[float]] | None, branches: list[str] | None) -> None:
    """Raise ValueError where lists for each step have not so many entries, or branches no weights of theirs.

    A single phase may call the negative prompt's branch alone, all steps together may not (check_called).
    """
    for name, entries in (("coefficients", coefficients), ("branches", branches)):
        if entries is not None and len(entries) != steps:
            raise ValueError(f"{name} for {len(entries)} of {steps} timesteps")
    mixed = coefficients is not None and len(coefficients[0]) == TERMS
    if mixed != (branches is not None):
        raise ValueError("branches and their weights do not go together")


def check_called(branches: list[str] | None) -> None:
    """Raise ValueError where the branches of all steps leave the prompt out."""
    if branches is not None and set(branches) == {"negative"}:
        raise ValueError("branches never call the prompt's")


def are_base_loras(value) -> bool:
    """Return whether it is None or, for each LoRA that is part of the base, its file, scale and digest."""
    kinds = {"file": is_text, "scale": is_number, "digest": is_text}
    return value is None or (
        isinstance(value, list)
        and 0 < len(value) <= 100
        and all(isinstance(lora, dict) and set(lora) == set(kinds) for lora in value)
        and all(fits(lora[name]) for lora in value for name, fits in kinds.items())
    )


def are_names(value) -> bool:
    """Return whether it is None or a list of names."""
    return value is None or isinstance(value, list) and 0 < len(value) <= 100 and all(map(is_text, value))


def is_guidance_scale(value) -> bool:
    """Return whether it is None or a number from -1,000 to 1,000."""
    return value is None or is_number(value, 1000)


def checked(fits, **default):
    """Return a dataclass field whose value in a file must be one that `fits`."""
    return field(metadata={"fits": fits}, **default)


def read_fields(kind: type, entries: dict) -> dict:
    """Return the values of a dataclass of `checked` fields; raise KeyError for one that is missing, ValueError for one
    that is wrong."""
    values = {}
    for part in fields(kind):
        value = entries[part.name] if part.default is MISSING else entries.get(part.name, part.default)
        if not part.metadata["fits"](value):
            raise ValueError(f"{part.name} {shown(value)}")
        values[part.name] = value
    return values


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A LoRA file's account of itself: what infer_glance.py must do as training did, and where the LoRA comes from.

    A field with a default is one that files of earlier versions lack, and what they mean by it. As JSON a recipe has
    the fields in this order.
    """

    phase: str = checked(lambda value: value in PHASES)
    timesteps: list[float] = checked(are_timesteps)  # 0..1000, descending
    base_model: str = checked(is_text)  # folder or hub id, as it was given
    base_loras: list[dict] | None = checked(are_base_loras, default=None)  # that were added to its weights
    pipeline: str = checked(is_text)  # name of its class
    height: int = checked(count(MAX_SIDE))  # pixels
    width: int = checked(count(MAX_SIDE))
    guidance_scale: float | None = checked(is_guidance_scale)  # None: the pipeline's own, or it takes none
    pipeline_kwargs: dict = checked(lambda value: isinstance(value, dict))  # further arguments of its call
    pipeline_images: list[str] | None = checked(are_names, default=None)  # arguments of its call that are pictures
    num_base_steps: int = checked(count(65536))  # of the schedule that the timesteps are picked from
    grid: str | None = checked(lambda value: value is None or is_text(value), default=None)
    coefficients: list[list[float]] | None = checked(are_coefficients, default=None)  # of the fitted solver
    branches: list[str] | None = checked(are_branches, default=None)  # that each step calls, where they are mixed
    guidance: str = checked(lambda value: value in ("keep", "fold", "mix"), default="keep")
    loss: str = checked(is_text)
    max_train_steps: int = checked(count(10**6))
    rank: int = checked(count(65536))
    version: str = checked(is_text)  # of Glance
    run: str | None = checked(lambda value: value is None or is_text(value), default=None)  # digest of all settings
    asked: str | None = checked(lambda value: value is None or is_text(value), default=None)  # of those asked for

    def as_dict(self) -> dict:
        """Return the fields as a file has them."""
        entries = {part.name: getattr(self, part.name) for part in fields(self)}
        return {name: value for name, value in entries.items() if name not in LEFT_OUT or value is not None}

    def to_json(self) -> str:
        """Return the recipe as the text that a file's header holds."""
        return json.dumps(
            self.as_dict(), default=lambda value: value.tolist() if hasattr(value, "tolist") else str(value)
        )

    @classmethod
    def from_json(cls, text: str) -> "Recipe":
        """Return the recipe, every field checked. Raise KeyError for one that is missing; TypeError, ValueError,
        OverflowError or RecursionError for one that is wrong."""
        values = read_fields(cls, json.loads(text))
        values["timesteps"] = [float(timestep) for timestep in values["timesteps"]]
        check_steps(len(values["timesteps"]), values["coefficients"], values["branches"])
        return cls(**values)


def as_in_recipe(name: str, **default):
    """Return a dataclass field whose value in a file must be one that fits Recipe's field of this name."""
    return checked(Recipe.__dataclass_fields__[name].metadata["fits"], **default)


# Stands for the recipe of files from other trainers, which have none: all is left to the flags and the pipeline.
NO_RECIPE = Recipe(
    phase="",
    timesteps=[],
    base_model="",
    pipeline="",
    height=None,
    width=None,
    guidance_scale=None,
    pipeline_kwargs={},
    num_base_steps=50,
    loss="",
    max_train_steps=0,
    rank=0,
    version="",
)


def read_header(path: str | Path) -> dict[str, str]:
    """Return the metadata of a safetensors file; raise InputError where it is none."""
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
        if size > HEADER_LIMIT:
            raise ValueError(f"its header would have {size} bytes")
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error}); get an intact one") from None


def read_recipe(path: str | Path, required: bool = True) -> Recipe | None:
    """Return the recipe stored with a LoRA file, checked; raise InputError for an entry that is missing or wrong.

    A file that was not written here has none: raise InputError too, or return None if it is not `required`.
    """
    header = read_header(path)
    if "glance" not in header:
        if not required:
            return None
        raise InputError(f"{path}: carries no Glance recipe; train it with train_glance_lora.py")
    try:
        return Recipe.from_json(header["glance"])
    except KeyError as error:
        raise InputError(f"{path}: its recipe has no {error}; train it again or get an intact file") from None
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InputError(
            f"{path}: its recipe cannot be read ({error}); train it again or get an intact file"
        ) from None


def check_pair(recipes: dict[str, Recipe], paths: dict[str, Path]) -> None:
    """Raise InputError where two LoRA files, by phase, do not belong together."""
    slow, fast = recipes["slow"], recipes["fast"]
    for phase, recipe in recipes.items():
        if recipe.phase != phase:
            raise InputError(
                f"{paths[phase]}: given as the {phase} LoRA, but it was trained as the {recipe.phase} one"
            )
    if slow.timesteps[-1] <= fast.timesteps[0]:
        raise InputError(
            f"the pair does not chain: slow ends at timestep {slow.timesteps[-1]:g}, fast begins at "
            f"{fast.timesteps[0]:g}; slow must end above where fast begins, so train both on one schedule"
        )
    same = ("base_model", "base_loras", "pipeline", "height", "width", "num_base_steps")
    for key in (*same, "guidance_scale", "pipeline_kwargs", "pipeline_images", "guidance"):
        if getattr(slow, key) != getattr(fast, key):
            raise InputError(
                f"the pair does not match: slow has {key} {getattr(slow, key)}, fast has {getattr(fast, key)}"
            )
    if bool(slow.coefficients) != bool(fast.coefficients):
        raise InputError("the pair does not match: one was trained for the fitted solver, the other for Euler's")
    if bool(slow.branches) != bool(fast.branches):
        raise InputError("the pair does not match: one was trained for mixed branches, the other was not")
    try:
        check_called(slow.branches and slow.branches + fast.branches)
    except ValueError as error:
        raise InputError(f"the pair does not match: its {error}; train it again or get intact files") from None


def schedule_of(recipes: dict[str, Recipe]) -> Schedule:
    """Return a pair's Schedule as far as files hold it: the timesteps by phase, and the solver's coefficients.

    The model's timesteps, and how guidance is switched off, are asked of the pipeline.
    """
    fitted, branches = (
        [getattr(recipe, name) for recipe in recipes.values()] for name in ("coefficients", "branches")
    )
    phases = {phase: recipe.timesteps for phase, recipe in recipes.items()}
    coefficients, branches = (sum(parts, []) if all(parts) else None for parts in (fitted, branches))
    return Schedule(phases, coefficients=coefficients, branches=branches)
