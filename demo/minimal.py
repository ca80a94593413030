"""Glance on one page, for the demo model alone: the method without the tool.

    python -m demo.minimal

The base draws its caption once in all of its 50 steps; the ten steps are picked whose chords follow that best. Two
LoRAs, slow for the first five and fast for the last, learn by the flow loss (one image, the published steps) and by
the trajectory loss (what the base drew), as train_glance_lora.py trains them for any pipeline, and draw in ten steps.
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from PIL import Image

from glance_utils import add_noise, derive_timesteps, glance_inference, segment_slopes, timestep_order, velocity_loss


OUTPUT, GUIDANCE, RANK, SEED = Path("output/minimal"), 3.0, 8, 0
STEPS, LEARNING_RATE = 60, {"flow": 3e-4, "trajectory": 1e-5}
# Of each block its attention, its modulation and the layer in which its MLP ends.
LAYERS = r".*blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|\w+_proj|to_add_out)|proj_out|norm\w*\.linear|ff\w*\.net\.2)"

pipe = FluxPipeline.from_pretrained("demo/model")
for model in (pipe.vae, pipe.text_encoder, pipe.text_encoder_2, pipe.transformer):
    model.requires_grad_(False)
caption = Path("demo/glance.txt").read_text().strip()
call = {"height": 96, "width": 96, "max_sequence_length": 16, "true_cfg_scale": GUIDANCE, "negative_prompt": ""}
prompts = {text: pipe.encode_prompt(text, None, max_sequence_length=16) for text in (caption, "")}


def velocity(latents, sigma, text):
    """What the model predicts at latents (1, 36, 32) and noise level sigma, for one prompt."""
    embeds, pooled, text_ids = prompts[text]
    ids = {"txt_ids": text_ids, "img_ids": pipe._prepare_latent_image_ids(1, 6, 6, "cpu", torch.float32)}
    inputs = {"encoder_hidden_states": embeds, "pooled_projections": pooled, "timestep": torch.tensor([sigma])} | ids
    return pipe.transformer(latents, **inputs, return_dict=False)[0]


def guided_velocity(latents, sigma):
    prompt, empty = velocity(latents, sigma, caption), velocity(latents, sigma, "")
    return empty + GUIDANCE * (prompt - empty)


# 1. The model's own steps, shifted for this number of tokens, and the trajectory that it walks in them.
pipe.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 50, 50), mu=calculate_shift(36, 256, 4096, 0.5, 1.15))
timesteps, sigmas = pipe.scheduler.timesteps.tolist(), pipe.scheduler.sigmas.tolist()
points = [pipe.prepare_latents(1, 8, 96, 96, torch.float32, "cpu", torch.Generator().manual_seed(SEED + 1))[0]]
for sigma, sigma_next in zip(sigmas, sigmas[1:]):
    points.append(points[-1] + (sigma_next - sigma) * guided_velocity(points[-1], sigma))

# 2. A chord misses the velocities v under it by its length * sum(dsigma * |v - slope|**2). best[end]: the least that
#    the chords from noise to `end` miss in all, and the steps at which they start.
path, grid = torch.cat(points).flatten(1).double(), torch.tensor(sigmas, dtype=torch.float64)
energy = torch.cat([torch.zeros(1), (path.diff(dim=0).square().mean(1) / -grid.diff()).cumsum(0)])
missed = (grid[:, None] - grid) * (energy - energy[:, None]) - (path - path[:, None]).square().mean(-1)
best = {0: (0.0, [])}
for _ in range(10):
    ways = [[(best[i][0] + missed[i, end].item(), [*best[i][1], i]) for i in best if i < end] for end in range(51)]
    best = {end: min(found) for end, found in enumerate(ways) if found}
positions = best[50][1]

# 3. What the losses learn: the image's latents, in the pipeline's layout, and the slopes of the trajectory's chords.
pixels = torch.from_numpy(np.array(Image.open("demo/glance.png"))).permute(2, 0, 1)[None] / 127.5 - 1
z = pipe.vae.encode(pixels).latent_dist.mode() - pipe.vae.config.shift_factor
image = pipe._pack_latents(z / (1 / pipe.vae.config.scaling_factor), 1, 8, 12, 12)  # decoded by this in reverse
slopes = segment_slopes([points[i] for i in [*positions, 50]], [sigmas[i] for i in [*positions, 50]])
for phase in ("slow", "fast"):
    pipe.transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LAYERS), phase)
for loss in ("flow", "trajectory"):
    schedule = derive_timesteps(timesteps, positions if loss == "trajectory" else None)
    for number, (phase, steps) in enumerate(schedule.items()):
        torch.manual_seed(SEED)
        for layer in pipe.transformer.modules():
            if isinstance(layer, LoraLayer):
                layer.reset_lora_parameters(phase, "gaussian")
        pipe.transformer.set_adapter(phase)
        parameters = [weight for weight in pipe.transformer.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE[loss], weight_decay=1e-2)
        generator = torch.Generator().manual_seed(SEED + number)
        for index in timestep_order(5, STEPS, "stratified", generator).tolist():
            sigma, start = steps[index] / 1000, 5 * number + index
            if loss == "flow":
                noise = torch.randn(image.shape, generator=generator)
                prediction, target = velocity(add_noise(image, noise, sigma), sigma, caption), noise - image
            else:
                prediction, target = guided_velocity(points[positions[start]], sigma), slopes[start]
            velocity_loss(prediction, target).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        pipe.save_lora_weights(OUTPUT / loss / phase, get_peft_model_state_dict(pipe.transformer, adapter_name=phase))
    # 4. Ten steps, slow handing over to fast after the fifth.
    with glance_inference(pipe, schedule) as steps:
        images = pipe(caption, generator=torch.Generator().manual_seed(SEED), **call, **steps).images
    images[0].save(OUTPUT / f"{loss}.png")
