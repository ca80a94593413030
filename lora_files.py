"""LoRA files from anyone: all that a file says is data, checked here before any of it is used."""

import json
import math
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from safetensors import SafetensorError, safe_open

from glance_utils import MAX_SIDE, PHASES, InputError, check_timesteps, denoiser, denoiser_name


HEADER_LIMIT = 16 * 2**20  # bytes; that of a LoRA on every layer of the largest models has less than one megabyte
# What a file may say of its LoRAs in peft's words: names, ranks and strengths. Others make peft import modules.
CONFIG_KEYS = {"r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "lora_dropout", "bias"}
CONFIG_KEYS |= {"use_rslora", "use_dora", "lora_bias", "inference_mode", "base_model_name_or_path", "peft_version"}


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


def check_config(path: Path, text: str, prefix: str) -> None:
    """Raise InputError where peft's settings in the header say more than names, ranks and strengths."""
    try:
        config = {key.removeprefix(f"{prefix}."): value for key, value in json.loads(text).items()}
    except (AttributeError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: its lora_adapter_metadata is not a JSON object ({error})") from None
    default = LoraConfig().to_dict()
    for key, value in config.items():
        fits = value == default.get(key) or key in CONFIG_KEYS or (key, value) == ("init_lora_weights", "gaussian")
        if key in ("r", "lora_alpha"):
            fits = is_number(value, 65536) and value > 0 and (key != "r" or type(value) is int)
        if not fits:
            raise InputError(
                f"{path}: its lora_adapter_metadata has {shown(key)} {shown(value)}; a LoRA needs r, lora_alpha and "
                "target_modules alone"
            )


def check_fits(pipe: DiffusionPipeline, path: Path) -> None:
    """Raise InputError where a LoRA file has layers that the transformer lacks, other shapes, or no numbers."""
    prefix, transformer = denoiser_name(pipe.config), denoiser(pipe)
    layers, ranks = dict(transformer.named_modules()), {}
    with safe_open(path, framework="pt") as file:
        check_config(path, (file.metadata() or {}).get("lora_adapter_metadata", "{}"), prefix)
        for name in file.keys():
            if name.endswith(".alpha"):
                raise InputError(
                    f"{path}: it holds {shown(name)}, which diffusers ignores for some models; fold it into lora_B"
                )
            layer, _, kind = name.removeprefix(f"{prefix}.").partition(".lora_")
            module = layers.get(layer)
            module = getattr(module, "base_layer", module)
            if not isinstance(module, torch.nn.Linear):
                raise InputError(
                    f"{path}: it adapts {shown(layer)}, which {type(transformer).__name__} here does not have"
                )
            tensor = file.get_tensor(name)
            check_tensor(f"{path}: {layer}.lora_{shown(kind)[1:-1]}", tensor, kind, module)
            if kind.endswith(".weight"):
                ranks.setdefault(layer, {})[kind[0]] = tensor.shape[0 if kind[0] == "A" else 1]
    if not ranks:
        raise InputError(f"{path}: it holds no LoRA; get an intact file")
    for layer, rank in ranks.items():
        if rank.get("A") != rank.get("B"):
            raise InputError(
                f"{path}: {layer} has rank {rank.get('A')} in lora_A and {rank.get('B')} in lora_B; get an intact file"
            )


def check_tensor(name: str, tensor: torch.Tensor, kind: str, module: torch.nn.Linear) -> None:
    """Raise InputError where one tensor of a LoRA does not fit its layer."""
    shape, dimensions = tuple(tensor.shape), 2 if kind in ("A.weight", "B.weight") else 1
    if kind.split(".")[0] not in ("A", "B", "magnitude_vector") or len(shape) != dimensions or 0 in shape:
        raise InputError(f"{name} of shape {shape} is no part of a LoRA; get an intact file")
    found, needed = (shape[1], module.in_features) if kind == "A.weight" else (shape[0], module.out_features)
    if found != needed:
        raise InputError(f"{name} is for width {found}, but this base has {needed}")
    if not tensor.is_floating_point() or not tensor.float().isfinite().all():
        raise InputError(f"{name} holds values that are not finite numbers; train it again or get an intact file")
