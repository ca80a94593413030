"""What is written beside the LoRAs? The preview, the model card; and how does all of it get onto the hub?

The card's text may be changed freely; the files' names are known to the hub and to README.
"""

import dataclasses
import json
import logging
import os
import shlex
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import release_memory
from huggingface_hub import ModelCardData, create_repo, upload_folder
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from PIL import Image
from tqdm.auto import tqdm

from glance.ask import latents as ask_latents
from glance.ask import pipeline as ask
from glance.ask.components import denoiser_name
from glance.ask.pipeline import first_line
from glance.files import faults
from glance.files.atomic import replace_text
from glance.files.comfyui import GRAPH, card_section, write_graph
from glance.files.comfyui_export import export_pair
from glance.files.lora import load_lora
from glance.files.recipe import WEIGHT_NAME, Recipe, schedule_of
from glance.files.sampler import NAME, SCHEDULER
from glance.training.draw_command import lora_flags
from glance.training.validation import final_latents
from glance_utils import InputError, denoiser, switchable_adapters


logger = logging.getLogger(__name__)

CARD = "README.md"


def pictures(phases: int) -> list[str]:
    """Return the names of the pictures that a run of one phase or both makes; an earlier run may have left others."""
    return ["instance.png", "glance.png"][:phases]


def draw_preview(prepared, recipes: dict[str, Recipe], output_dir: Path, seed: int, validation) -> Image.Image | None:
    """Return the caption's picture with both LoRA files just written, drawn as infer_glance.py does, None of one
    phase; what there is to validate is drawn and written too.

    The transformer is freed, then the VAE decodes, on the CPU where it does not fit. Raise FloatingPointError where
    latents or pixels are not finite.
    """
    models, answers = prepared.models, prepared.answers
    pipe, device = models.pipe, models.pipe._execution_device
    parts = [denoiser_name(pipe.config), *ask.further_denoisers(pipe)]
    for part in parts[1:]:
        setattr(pipe, part, models.load_transformer(part=part))
    for phase in recipes:
        folder = output_dir / phase if len(recipes) == 2 else output_dir
        load_lora(pipe, folder / WEIGHT_NAME, phase)
    latents = preview_latents(pipe, answers, recipes, seed) if len(recipes) == 2 else None
    drawn = validation.at_the_end(recipes)
    for part in parts:
        setattr(pipe, part, None)
    release_memory()
    validation.write_the_end(drawn, recipes)
    if latents is None:
        return None
    with faults.explained("the preview was not written, the LoRAs are"):
        return ask_latents.decode_on(device, models.vae, latents, answers.layout)


def preview_latents(pipe, answers, recipes: dict[str, Recipe], seed: int) -> torch.Tensor:
    """Return the caption's final latents, (1, ...) float32 on the CPU, with both LoRAs, loaded as their phases."""
    single = answers.single_arguments if schedule_of(recipes).branches else {}
    schedule = dataclasses.replace(schedule_of(recipes), timestep_table=answers.timestep_table, guidance=single)
    hidden = not PartialState().is_local_main_process
    with tqdm(total=len(schedule.timesteps), desc="preview", delay=1, disable=hidden) as progress:
        with switchable_adapters(denoiser(pipe), list(recipes)) as switch:
            return final_latents(
                pipe, schedule, answers.preview_call, seed, lambda phase: switch(phase, 1.0), progress.update
            )


def write_model_card(args, directory: Path, recipes: list[Recipe], caption: str) -> None:
    """Write README.md into the output folder: what was trained, how to use it, the pictures."""
    rows = "\n".join(
        f"| {recipe.phase} | {', '.join(f'{timestep:.4f}' for timestep in recipe.timesteps)} | {how_to_step(recipe)} |"
        for recipe in recipes
    )
    images = " ".join(f"![{name}](./{name})" for name in pictures(len(recipes)))
    settings = recipes[0].as_dict()
    settings = {
        key: settings[key] for key in settings if key not in ("phase", "timesteps", "coefficients", "branches")
    }
    settings = json.dumps(settings, indent=2)
    flags = lora_flags(".", [recipe.phase for recipe in recipes])
    loras = " ".join(f"--{name} {value}" for name, value in flags.items())
    base = args.pretrained_model_name_or_path
    tags = ["text-to-image", "diffusers", "lora", "glance", "flow-matching"]
    data = ModelCardData(library_name="diffusers", base_model=hub_id(base), tags=tags)
    text = f"""---
{data.to_yaml()}
---

# Glance LoRA for {hub_id(base) or Path(base).resolve().name}

Slow- and Fast-LoRA ([Glance](https://arxiv.org/abs/2512.02899)): the first steps run with the slow one, the last with
the fast one, {sum(len(recipe.timesteps) for recipe in recipes)} steps in all.

{images}

Left: the training image, or what the base draws in all its steps, "{caption}".
Right, where both phases were trained: the same caption with both LoRAs.

| phase | timesteps (0..1000) | steps: Euler, shares of this velocity and of the one before, or branches |
|---|---|---|
{rows}

```json
{settings}
```

    python infer_glance.py --pretrained_model_name_or_path {shlex.quote(base)} {loras} --prompt "..."
"""
    if len(recipes) == 2:
        text += "\n" + card_section({recipe.phase: recipe for recipe in recipes})
    replace_text(directory / CARD, text)


def write_for_comfyui(args, directory: Path, recipes: dict[str, Recipe], caption: str) -> None:
    """Write comfyui.json beside the pair and, where --export asks for them, its files; say where there can be none."""
    write_graph(directory, recipes, caption)
    if args.export:
        try:
            export_pair(directory, args.export_dtype)
        except InputError as error:  # the pair is written, and draws elsewhere
            logger.warning(str(error))


def how_to_step(recipe: Recipe) -> str:
    """Return how a LoRA's steps go along the velocities; the weights of mixed branches are in the file alone."""
    if recipe.branches is not None:
        return ", ".join(recipe.branches)
    return ", ".join(f"{a:.3f} {c:+.3f}" for a, c in recipe.coefficients or ()) or "Euler"


def hub_id(base: str) -> str | None:
    """Return the base's name where that is an id of the hub, which takes no other in a card; None of a folder."""
    try:
        validate_repo_id(base)
    except HFValidationError:
        return None
    return None if os.path.exists(base) else base


def create_hub_repo(args) -> str:
    """Return the repository to push to, made before anything is loaded; raise InputError where it cannot be."""
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    try:
        return create_repo(name, exist_ok=True).repo_id
    except Exception as error:  # no login, no network, a name that is not one: each of another kind
        raise InputError(f"--push_to_hub {name}: {first_line(error)}; log in with `hf auth login`") from error


def push_to_hub(output_dir: Path, repo_id: str, phases: list[str]) -> None:
    """Upload what the run has made, and nothing else that lies there; raise InputError where the hub refuses it."""
    loras = [f"{phase}/{WEIGHT_NAME}" for phase in phases] if len(phases) == 2 else [WEIGHT_NAME]
    samplers = [NAME, GRAPH, f"{SCHEDULER}/scheduler_config.json"] if len(phases) == 2 else []
    files = [CARD, *pictures(len(phases)), *loras, *samplers]
    try:
        upload_folder(repo_id=repo_id, folder_path=output_dir, allow_patterns=files)
    except Exception as error:  # as above
        command = shlex.join(["hf", "upload", repo_id, str(output_dir), ".", "--include", *files])
        raise InputError(
            f"--push_to_hub {repo_id}: {first_line(error)}; nothing is lost, all of it is in {output_dir}, and this "
            f"pushes it: {command}"
        ) from error
    logger.info(f"Pushed to {repo_id}")
