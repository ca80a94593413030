"""What do the LoRAs that were just written draw of the caption? The preview, from the files, as infer_glance.py does.

It is drawn by what the run has loaded already, which is freed on the way: after it there is no transformer.
"""

import dataclasses
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import release_memory
from PIL import Image
from tqdm.auto import tqdm

from glance.ask import latents as ask_latents
from glance.ask import pipeline as ask
from glance.ask.components import denoiser_name
from glance.files import faults
from glance.files.lora import load_lora
from glance.files.recipe import WEIGHT_NAME, Recipe, schedule_of
from glance.training.validation import final_latents
from glance_utils import denoiser, switchable_adapters


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
    draws = len(recipes) == 2 and answers.layout
    latents = preview_latents(pipe, answers, recipes, seed) if draws else None
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
