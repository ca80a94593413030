"""How does a pair become files for ComfyUI's folder of LoRAs? Names that do not collide, headers that its tools read.

    python -m glance.files.comfyui_export output/glance --export_dtype bfloat16

writes what train_glance_lora.py --export comfyui does, of a pair that is there. The recipe stays in the header, so
that infer_glance.py and comfyui/glance_nodes.py read these files too.
"""

import argparse
import functools
import logging
import re
from datetime import UTC, datetime
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from glance import command_line as cli
from glance.files.atomic import replace_file
from glance.files.comfyui import FOLDER, ONE_MATRIX_TEXT, file_names, write_graph
from glance.files.comfyui_facts import FAMILIES, ONE_MATRIX, RENAMES
from glance.files.lora import in_order
from glance.files.recipe import WEIGHT_NAME, Recipe, check_pair, read_header, read_recipe
from glance_utils import PHASES, InputError


logger = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16")


def renamed(name: str, pipeline: str) -> str:
    """Return the name that ComfyUI has for a tensor of a LoRA of this pipeline; raise InputError where it has none."""
    if pipeline in ONE_MATRIX:
        raise InputError(f"--export comfyui: {ONE_MATRIX_TEXT.format(pipeline)}; draw with infer_glance.py")
    for pattern, replacement in RENAMES.get(pipeline, ()):
        name = re.sub(pattern, replacement, name)
    return name


def header_of(path: Path, recipe: Recipe) -> dict[str, str]:
    """Return the header of a file's export: its own, and what ComfyUI's and kohya's tools look for."""
    header = read_header(path)
    if recipe.pipeline in RENAMES:  # it speaks of diffusers' names
        header = {name: value for name, value in header.items() if name != "lora_adapter_metadata"}
    written = datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="seconds")
    architecture = FAMILIES.get(recipe.pipeline, {}).get("architecture", recipe.pipeline)
    return header | {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "https://github.com/huggingface/diffusers",
        "modelspec.title": f"{Path(recipe.base_model).name} Glance {recipe.phase}",
        "modelspec.resolution": f"{recipe.width}x{recipe.height}",
        "modelspec.date": written,
        "ss_network_dim": str(recipe.rank),
        "ss_network_alpha": str(recipe.rank),  # alpha / rank is folded into the weights
        "ss_network_module": "networks.lora",
    }


def export_pair(folder: Path, dtype: str = "float32") -> list[Path]:
    """Write folder/comfyui/<base>-glance-<N>calls-slow.safetensors and -fast, and return their paths.

    Raise InputError where the folder's files are no pair, or ComfyUI has no names for their layers.
    """
    paths = {phase: folder / phase / WEIGHT_NAME for phase in PHASES}
    recipes = {phase: read_recipe(path) for phase, path in paths.items()}
    check_pair(recipes, paths)
    exports = {}
    for phase, path in paths.items():
        pipeline, kind = recipes[phase].pipeline, getattr(torch, dtype)
        exports[phase] = {renamed(name, pipeline): value.to(kind) for name, value in load_file(path).items()}
    (folder / FOLDER).mkdir(exist_ok=True)
    written = []
    for phase, name in file_names(recipes).items():
        content = in_order(save(exports[phase], metadata=header_of(paths[phase], recipes[phase])))
        replace_file(folder / FOLDER / name, functools.partial(Path.write_bytes, data=content))
        written.append(folder / FOLDER / name)
    return written


def write_for_comfyui(args, folder: Path, recipes: dict[str, Recipe], caption: str) -> list[str]:
    """Write comfyui.json beside the pair and, where --export asks for them, its files, whose names in the folder are
    returned; say where there can be none."""
    write_graph(folder, recipes, caption)
    if not args.export:
        return []
    try:
        return [path.relative_to(folder).as_posix() for path in export_pair(folder, args.export_dtype)]
    except InputError as error:  # the pair is written, and draws elsewhere
        logger.warning(str(error))
        return []


def main(argv: list[str] | None = None) -> None:
    """Export the pair in a folder, and print what was written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="the output folder of a run of both phases")
    parser.add_argument("--export_dtype", choices=DTYPES, default=DTYPES[0])
    args = parser.parse_args(argv)
    print(*export_pair(Path(args.folder), args.export_dtype), sep="\n")


if __name__ == "__main__":
    cli.run(main)
