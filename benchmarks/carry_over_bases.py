"""What may become of the demo model that benchmarks/carry_over.py carries samplers over to? Three are trained here.

LoRAs of rank 8 of two styles, one of them trained too hard on too few pictures, and a fine-tune of the whole
transformer on 2,048 recoloured ones; all by flow matching, as demo/train_demo_model.py trains, on its captions.
"""

import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import FluxPipeline, FluxTransformer2DModel
from peft import LoraConfig, get_peft_model_state_dict
from scenes import caption_of, render, split_scenes
from tqdm import tqdm

from glance.adapters import lora_layers
from glance.ask.prompts import remember_prompts
from glance.files.atomic import replace_file


MODEL = Path(__file__).parent.parent / "demo/model"
SHIFTED = "steps of 1024x1024"  # which FLUX.1 takes there; at the demo's sizes they hardly change with the size


def at_dusk(images: torch.Tensor) -> torch.Tensor:
    """Return pictures (N, 3, H, W) in 0..1 in warm light, with a glow from above."""
    glow = torch.linspace(0.15, 0, images.shape[2]).view(-1, 1)
    return 0.75 * images * torch.tensor([1.0, 0.8, 0.6]).view(3, 1, 1) + glow


def at_night(images: torch.Tensor) -> torch.Tensor:
    """Return pictures (N, 3, H, W) in 0..1 in blue light, darker towards the bottom."""
    light = torch.linspace(0.9, 0.25, images.shape[2]).view(-1, 1)
    return images * light * torch.tensor([0.5, 0.65, 1.0]).view(3, 1, 1)


def recoloured(images: torch.Tensor) -> torch.Tensor:
    """Return pictures (N, 3, H, W) with red where green was, green where blue was, blue where red was."""
    return images[:, [1, 2, 0]]


# Style, pictures, rate.
LORAS = {"style LoRA": (at_dusk, 256, 5e-4), "over-trained LoRA": (at_night, 16, 1e-3)}


@torch.no_grad()
def encode(pipe, restyle, count: int, generator) -> tuple[torch.Tensor, tuple]:
    """Return latents (count, tokens, channels) of restyled scenes, and what the encoders say of their captions; one
    more caption, the last, is empty."""
    scenes = split_scenes()[0]
    scenes = scenes[torch.randperm(len(scenes), generator=generator)[:count]]
    images = restyle(render(scenes, generator)).split(64)
    z = torch.cat([pipe.vae.encode(part * 2 - 1).latent_dist.mode() for part in images])
    z = (z - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    captions = [caption_of(scene) for scene in scenes]
    return FluxPipeline._pack_latents(z, *z.shape), pipe.encode_prompt([*captions, ""], None, max_sequence_length=16)


def train(pipe, restyle, count: int, steps: int, rate: float, path: Path) -> None:
    """Train what requires gradients by flow matching on restyled scenes, as demo/train_demo_model.py does; every
    hundredth step is kept at `path`, from where a run that was cut goes on."""
    generator = torch.Generator().manual_seed(0)
    latents, (texts, pooled, text_ids) = encode(pipe, restyle, count, generator)
    trained = [parameter for parameter in pipe.transformer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.01)
    begun = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        begun = state["step"]
        for parameter, value in zip(trained, state["trained"]):
            parameter.data.copy_(value)
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
    ids = FluxPipeline._prepare_latent_image_ids(1, 6, 6, "cpu", torch.float32)
    progress = tqdm(range(begun, steps), desc=path.stem, initial=begun, total=steps)
    for step in progress:
        batch = torch.randint(count, (16,), generator=generator)
        dropped = torch.rand(16, generator=generator) < 0.1
        rows = torch.where(dropped, count, batch)
        noise = torch.randn(latents[batch].shape, generator=generator)
        sigma = torch.sigmoid(torch.randn(16, generator=generator))
        noisy = torch.lerp(latents[batch], noise, sigma.view(-1, 1, 1))
        rest = {"encoder_hidden_states": texts[rows], "pooled_projections": pooled[rows], "txt_ids": text_ids}
        velocity = pipe.transformer(hidden_states=noisy, timestep=sigma, img_ids=ids, return_dict=False, **rest)[0]
        loss = F.mse_loss(velocity, noise - latents[batch])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        if (step + 1) % 100 == 0:
            state = {"step": step + 1, "trained": [parameter.data for parameter in trained]}
            state |= {"optimizer": optimizer.state_dict(), "generator": generator.get_state()}
            replace_file(path, functools.partial(torch.save, state))


def load(change: str, folder: Path, steps: int) -> FluxPipeline:
    """Return the pipeline, changed where the change is none of its call; trained for it unless that is there."""
    pipe = FluxPipeline.from_pretrained(MODEL, dtype=torch.float32)
    if change in LORAS:
        lora = folder / change
        if not lora.exists():
            style, count, rate = LORAS[change]
            pipe.transformer.requires_grad_(False)
            torch.manual_seed(0)
            layers = lora_layers(pipe.transformer)
            pipe.transformer.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=layers))
            train(pipe, style, count, steps, rate, folder / f"{change}.pt")
            FluxPipeline.save_lora_weights(lora, get_peft_model_state_dict(pipe.transformer))
            pipe = FluxPipeline.from_pretrained(MODEL, dtype=torch.float32)
        pipe.load_lora_weights(lora)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    if change == "fine-tune":
        if not (folder / change).exists():
            train(pipe, recoloured, 2048, 3 * steps, 5e-4, folder / f"{change}.pt")
            pipe.transformer.save_pretrained(folder / change)
        pipe.transformer = FluxTransformer2DModel.from_pretrained(folder / change)
    if change == SHIFTED:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, base_shift=1.15, max_shift=1.15)
    pipe.set_progress_bar_config(disable=True)
    remember_prompts(pipe)
    return pipe
