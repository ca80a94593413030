"""Which LoRAs are there beside the pair? Styles, which act in every step, and those that are part of the base.

--style_lora's are adapters that inference switches on. --base_lora's are added to the base's weights while these are
loaded, before anything is drawn or trained: they are known by their content, and a recipe names them.
"""

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download

from glance.ask import hub
from glance.ask.pipeline import first_line
from glance.files.lora_forms import read_lora
from glance.files.recipe import WEIGHT_NAME, Recipe
from glance_utils import InputError


def find_file(source: str, name: str, cache_dir: str | None, missing: str) -> Path:
    """Return the .safetensors file that `source` is, or that has this name in the folder or in the repository of the
    hub that it is; raise InputError, which says what is `missing`, where there is none."""
    path = Path(source)
    if not name.endswith(".safetensors") or os.path.isfile(path) and path.suffix != ".safetensors":
        raise InputError(f"{source} {name}: only .safetensors files are read, as others can run code; give one")
    path = file_of(source, name, cache_dir)
    if not os.path.isfile(path):
        raise InputError(f"{path}: {missing}")
    return path


def file_of(source: str, name: str, cache_dir: str | None) -> Path:
    """Return `source`, or what has this name in the folder or in the repository of the hub that it is; the file may
    not be there but in a repository, for which InputError is raised where it is not."""
    path = Path(source)
    if os.path.isdir(path):
        return path / name
    if os.path.exists(path) or not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        return path
    try:
        return Path(hf_hub_download(source, name, cache_dir=cache_dir))
    except Exception as error:  # not there, no login, no network: each of another kind
        reason = hub.refusal(error, source) or f"neither a folder nor on the hub ({first_line(error)})"
        raise InputError(f"{source}: {reason}") from error


def find_styles(args) -> dict[str, Path]:
    """Return --style_lora's files by the name of the adapter that each becomes; as find_file does."""
    missing = "no such style LoRA file; give one of the base"
    files = [find_file(source, WEIGHT_NAME, args.cache_dir, missing) for source, _ in args.style_lora]
    return {f"style-{number}": file for number, file in enumerate(files)}


def find_base_loras(args) -> list[dict]:
    """Return --base_lora's files as a recipe has them: `file`, its `scale` and `digest`, a part of its SHA-256.

    Raise InputError where one is not there, or is no .safetensors file.
    """
    found = []
    for source, scale in args.base_lora:
        file = find_file(source, WEIGHT_NAME, args.cache_dir, "no such LoRA file of the base")
        with open(file, "rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()[:16]
        found.append({"file": source, "scale": scale, "digest": digest})
    return found


def with_base_loras(base: str, loras: Iterable[dict]) -> str:
    """Return base.identify's answer for the base with these added to it, in the order in which they are."""
    return " + ".join([base, *(f"{lora['scale']:g} {lora['digest']}" for lora in loras)])


def as_trained(args, recipe: Recipe) -> list[tuple[str, float]]:
    """Return what --base_lora is for a pair or sampler: as its recipe says, or the same files from elsewhere.

    Raise InputError where they are not those that are a part of the recipe's base.
    """
    trained = recipe.base_loras or []
    if args.base_lora and not trained:
        raise InputError("--base_lora: the files are of the base without; --style_lora adds one to it")
    given = args.base_lora or [(lora["file"], lora["scale"]) for lora in trained]
    try:
        found = find_base_loras(args.replace(base_lora=given))
    except InputError as error:
        if args.base_lora:
            raise
        raise InputError(f"a LoRA that is part of the base: {error}; say where it is by --base_lora") from None
    for number, lora in enumerate(trained):
        if number == len(found) or any(found[number][key] != lora[key] for key in ("digest", "scale")):
            other = f"{given[number][0]}:{given[number][1]:g}" if number < len(found) else "nothing"
            raise InputError(
                f"--base_lora: {lora['file']}:{lora['scale']:g} ({lora['digest']}) was part of the base, {other} is "
                "not the same; give that file"
            )
    if len(found) > len(trained):
        raise InputError(
            f"--base_lora: {given[len(trained)][0]} was not part of the base; --style_lora adds one to it"
        )
    return given


def read_additions(pipe, args) -> dict[str, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Return what --base_lora adds to the denoiser's weights: by layer the (out, rank) and (rank, in) of each LoRA.

    The pipeline's denoiser needs no weights for it. Raise InputError where a file does not fit, or is more than a
    LoRA, which cannot be added.
    """
    added = {}
    for source, scale in args.base_lora:
        path = find_file(source, WEIGHT_NAME, args.cache_dir, "no such LoRA file of the base")
        lora = read_lora(pipe, path)
        for name, down in lora.items():
            layer, part = name.split(".lora_")[0], name.split(".lora_")[1]
            if part not in ("A.weight", "B.weight"):
                raise InputError(
                    f"{path}: {name} is more than a LoRA (of DoRA, or a bias), which cannot be added to the base; add "
                    "it with the trainer that made it, and give the folder that comes of it as the base"
                )
            if part == "A.weight":
                added.setdefault(layer, []).append((scale * lora[f"{layer}.lora_B.weight"].float(), down.float()))
    return added
