"""What is written beside the LoRAs: a picture, the model card; and the upload of it all to the hub."""

import glob
import json
import logging
from pathlib import Path

import torch
from accelerate.utils import release_memory
from huggingface_hub import create_repo, upload_folder
from PIL import Image

import ask_latents
import ask_pipeline as ask
import faults
import glance_utils as glance
from glance_utils import InputError, first_line


logger = logging.getLogger(__name__)


def draw_preview(asked, recipes: dict[str, dict], output_dir: Path, seed: int) -> Image.Image:
    """The caption in ten steps, with the LoRA files just written; the VAE follows when the transformer has gone.
    FloatingPointError where the latents or the pixels are not finite."""
    pipe, device = asked.pipe, asked.pipe._execution_device
    parts = [glance.denoiser_name(pipe.config), *ask.further_denoisers(pipe)]
    for part in parts[1:]:
        setattr(pipe, part, asked.load_transformer(part=part))
    schedule = {phase: recipe["timesteps"] for phase, recipe in recipes.items()}
    for phase in schedule:
        glance.load_lora(pipe, output_dir / phase / glance.WEIGHT_NAME, phase)
    fitted = asked.taught and asked.taught.coefficients
    inference = glance.glance_inference(pipe, schedule, told=asked.told, coefficients=fitted)
    with inference as kwargs, ask.plain_call(pipe, asked.call) as call:
        generator = torch.Generator().manual_seed(seed)
        with torch.compiler.set_stance("force_eager"):  # one picture is not worth compiling for
            latents = ask_latents.loop_points(pipe, **call, **kwargs, generator=generator)[-1]
    for part in parts:
        setattr(pipe, part, None)
    release_memory()
    with faults.explained("the preview was not written, the LoRAs are"):
        return ask_latents.decode(asked.vae and asked.vae.to(device), latents, asked.layout)


def save_picture(image: Image.Image, path: Path) -> None:
    glance.replace_file(path, lambda temporary: image.save(temporary, format="PNG"))


def write_model_card(args, directory: Path, recipes: list[dict], caption: str) -> None:
    """README.md in the output folder: what was trained, how to use it, the pictures."""
    rows = "\n".join(
        f"| {recipe['phase']} | {', '.join(f'{timestep:.4f}' for timestep in recipe['timesteps'])} | "
        f"{', '.join(f'{own:.3f} {before:+.3f}' for own, before in recipe['coefficients'] or ()) or 'Euler'} |"
        for recipe in recipes
    )
    pictures = [f"![{name}](./{name})" for name in ("instance.png", "glance.png") if (directory / name).exists()]
    settings = {key: recipes[0][key] for key in recipes[0] if key not in ("phase", "timesteps", "coefficients")}
    settings, phase = json.dumps(settings, indent=2), recipes[0]["phase"]
    other = "fast" if phase == "slow" else "slow"
    loras = "--lora ." if len(recipes) == 2 else f"--{phase}_lora . --{other}_lora FOLDER"
    text = f"""---
library_name: diffusers
base_model: {args.pretrained_model_name_or_path}
tags: [text-to-image, diffusers, lora, glance, flow-matching]
---

# Glance LoRA for {args.pretrained_model_name_or_path}

Slow- and Fast-LoRA ([Glance](https://arxiv.org/abs/2512.02899)): the first steps run with the slow one, the last with
the fast one, {sum(len(recipe["timesteps"]) for recipe in recipes)} steps in all.

{" ".join(pictures)}

Left: the training image, or what the base draws in all its steps, "{caption}".
Right, where both phases were trained: the same caption with both LoRAs.

| phase | timesteps (0..1000) | steps: Euler, or the shares of this velocity and of the one before |
|---|---|---|
{rows}

```json
{settings}
```

    python infer_glance.py --pretrained_model_name_or_path {args.pretrained_model_name_or_path} {loras} --prompt "..."
"""
    glance.replace_file(directory / "README.md", lambda temporary: temporary.write_text(text, encoding="utf-8"))


def create_hub_repo(args) -> str:
    """The repository to push to, made before training; InputError where it cannot be."""
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    try:
        return create_repo(name, exist_ok=True).repo_id
    except Exception as error:  # no login, no network, a name that is not one: each of another kind
        raise InputError(f"--push_to_hub {name}: {first_line(error)}; log in with `hf auth login`") from error


def push_to_hub(args, output_dir: Path, repo_id: str) -> None:
    upload_folder(
        repo_id=repo_id,
        folder_path=output_dir,
        ignore_patterns=["*checkpoint-*", f"*{faults.TRAJECTORIES}", f"*{glob.escape(args.logging_dir)}/*"],
    )
    logger.info(f"Pushed to {repo_id}")
