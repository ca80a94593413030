"""The recipe in a LoRA file: all that it says is data, checked here before any of it is used."""

import json
import math
from pathlib import Path

from safetensors import SafetensorError, safe_open

from glance_utils import MAX_SIDE, PHASES, InputError, check_timesteps


WEIGHT_NAME = "pytorch_lora_weights.safetensors"
HEADER_LIMIT = 16 * 2**20  # bytes; that of a LoRA on every layer of the largest models has less than one megabyte


def shown(value) -> str:
    """What a file says, for an error message: on one line, without control characters, not too long."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def is_number(value, most: float = math.inf) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) <= most


def count(most: int):
    return lambda value: type(value) is int and 0 < value <= most


def is_text(value) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 1000 and value.isprintable()


def are_timesteps(value) -> bool:
    return (
        isinstance(value, list) and len(value) <= 1000 and all(map(is_number, value)) and bool(check_timesteps(value))
    )


def are_coefficients(value) -> bool:
    """Of a fitted solver, [a, c] for each step; near [1, 0], which is Euler's."""
    return value is None or (
        isinstance(value, list)
        and len(value) <= 1000
        and all(
            isinstance(pair, list) and len(pair) == 2 and all(is_number(part, 100) for part in pair) for pair in value
        )
    )


RECIPE = {
    "phase": lambda value: value in PHASES,
    "timesteps": are_timesteps,
    "base_model": is_text,
    "pipeline": is_text,
    "height": count(MAX_SIDE),
    "width": count(MAX_SIDE),
    "guidance_scale": lambda value: value is None or is_number(value, 1000),
    "pipeline_kwargs": lambda value: isinstance(value, dict),
    "num_base_steps": count(65536),
    "loss": is_text,
    "max_train_steps": count(10**6),
    "rank": count(65536),
    "version": is_text,
}
# What files of earlier versions do not say, and what they mean by it.
OPTIONAL = {
    "guidance": (lambda value: value in ("keep", "fold"), "keep"),
    "coefficients": (are_coefficients, None),
}


def read_header(path: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file; InputError where it is none."""
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
        if size > HEADER_LIMIT:
            raise ValueError(f"its header would have {size} bytes")
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error}); get an intact one") from None


def read_recipe(path: str | Path, required: bool = True) -> dict | None:
    """The recipe stored with a LoRA file, every entry checked; InputError names what is missing or wrong.

    A file that was not written here has none: an InputError too, or None if not `required`.
    """
    header = read_header(path)
    if "glance" not in header:
        if not required:
            return None
        raise InputError(f"{path}: carries no Glance recipe; train it with train_glance_lora.py")
    try:
        recipe = json.loads(header["glance"])
        for key, fits in RECIPE.items():
            if not fits(recipe[key]):
                raise ValueError(f"{key} {shown(recipe[key])}")
        for key, (fits, usual) in OPTIONAL.items():
            if not fits(recipe.setdefault(key, usual)):
                raise ValueError(f"{key} {shown(recipe[key])}")
        if recipe["coefficients"] and len(recipe["coefficients"]) != len(recipe["timesteps"]):
            raise ValueError(f"coefficients for {len(recipe['coefficients'])} of {len(recipe['timesteps'])} timesteps")
    except KeyError as error:
        raise InputError(f"{path}: its recipe has no {error}; train it again or get an intact file") from None
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InputError(
            f"{path}: its recipe cannot be read ({error}); train it again or get an intact file"
        ) from None
    recipe["timesteps"] = [float(timestep) for timestep in recipe["timesteps"]]
    return recipe
