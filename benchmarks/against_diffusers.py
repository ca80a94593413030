"""Time a FLUX training step of train_glance_lora.py against a bare transformer and against diffusers' own example.

    python benchmarks/against_diffusers.py --shape small --dtype float32
    python benchmarks/against_diffusers.py --shape small --dtype bfloat16 --same_layers
    python benchmarks/against_diffusers.py --shape flux-dev --gradient_checkpointing --steps 20

All run in this process in turns, on two transformers with equal weights; ratios are medians over the rounds.

- `pipeline` and `bare`: velocity, loss and backward through PipelineVelocity, and the same from a call of
  the transformer written by hand.
- `dry`: what the pipeline does around the transformer, which is bypassed.
- `glance`: the whole step of train_glance_lora.py (train_step.py).
- `example` and `example_cached`: the whole step of examples/dreambooth/train_dreambooth_lora_flux.py, its loop written
  anew from reading it. Reproduced: the image through the VAE in the base's dtype, sampling its posterior
  (`example_cached`, which is --cache_latents: sampling only), scale and shift, image ids, noise, a uniformly
  drawn timestep of the 1,000, sigmas, packing, guidance, the transformer under autocast of --dtype as
  Accelerator.prepare wraps it, its output to float32, unpacking, loss weighting, backward, clipping, AdamW, learning
  rate schedule, the loss read for the progress bar. Left out: the data loader (the image is in memory),
  trackers, checkpoints, and the text encoders, which that script calls in every step.
"""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent.parent))

from glance import start


if __name__ == "__main__":
    start.as_script("what was not written yet is lost")

import contextlib
import statistics

import shapes
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.optimization import get_scheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from peft import LoraConfig
from train_step import glance_step

from glance import command_line as cli
from glance.ask import pipeline as ask
from glance.training.draws import Draw
from glance.training.losses import Flow, Objective, step_losses
from glance_utils import InputError, add_noise, flow_matching_loss


# The layers that the example adapts by default.
EXAMPLE_LAYERS = "attn.to_k,attn.to_q,attn.to_v,attn.to_out.0,attn.add_k_proj,attn.add_q_proj,attn.add_v_proj,"
EXAMPLE_LAYERS += "attn.to_add_out,ff.net.0.proj,ff.net.2,ff_context.net.0.proj,ff_context.net.2"


def flux_vae(args) -> AutoencoderKL:
    """Return the directory's VAE, or one of FLUX's shape with random weights, frozen, on --device."""
    if args.shape:
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=0.3611,
            shift_factor=0.1159,
        )
    else:
        vae = AutoencoderKL.from_pretrained(args.pretrained_model_name_or_path, subfolder="vae")
    return vae.requires_grad_(False).to(args.device, shapes.DTYPES[args.dtype])


def transformer_inputs(pipe, call) -> dict:
    """Return the transformer's arguments that come from the prompt's encoding."""
    batch = call["num_images_per_prompt"]
    prompt, pooled, ids = pipe.encode_prompt(
        prompt=call["prompt"],
        prompt_2=None,
        prompt_embeds=None,
        pooled_prompt_embeds=None,
        device=pipe.transformer.device,
        num_images_per_prompt=batch,
        max_sequence_length=512,
        lora_scale=None,
    )
    return {"encoder_hidden_states": prompt, "pooled_projections": pooled, "txt_ids": ids, "return_dict": False}


def bare_step(args, pipe, call, latents):
    """Return a function of (noise, sigma): loss and gradients from a transformer call by hand, as in FluxPipeline."""
    dtype, device = pipe.transformer.dtype, latents.device
    inputs = transformer_inputs(pipe, call)
    side = args.resolution // pipe.vae_scale_factor // 2
    inputs["img_ids"] = FluxPipeline._prepare_latent_image_ids(len(latents), side, side, device, dtype)
    if pipe.transformer.config.guidance_embeds:
        inputs["guidance"] = torch.full([len(latents)], 3.5, device=device)

    def step(noise, sigma):
        pipe.transformer.zero_grad()
        timestep = torch.full([len(latents)], 1000 * sigma, device=device, dtype=dtype)
        noisy = add_noise(latents, noise, sigma).to(dtype)
        velocity = pipe.transformer(hidden_states=noisy, timestep=timestep / 1000, **inputs)[0]
        loss = flow_matching_loss(velocity, latents, noise)
        loss.backward()
        return loss.detach()

    return step


def pipeline_step(model, latents):
    """Return a function that does the same through the pipeline, as training does."""

    def step(noise, sigma):
        model.zero_grad()
        loss, _ = step_losses(model, Objective([sigma], Flow(latents)), Draw([0], noise))
        loss.backward()
        return loss.detach()

    return step


def add_example_adapter(transformer, rank: int) -> None:
    """Add a LoRA on the layers that the example adapts, initialised as it is there."""
    lora = {"r": rank, "lora_alpha": rank, "target_modules": EXAMPLE_LAYERS.split(",")}
    transformer.add_adapter(LoraConfig(**lora, init_lora_weights="gaussian"))


def example_step(args, pipe, call, vae, cache_latents: bool):
    """Return a function that does what one step of diffusers' example does, and returns the loss."""
    transformer = pipe.transformer
    dtype, device = shapes.DTYPES[args.dtype], args.device
    parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-4, eps=1e-8)
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision=shapes.MIXED_PRECISION[args.dtype])
    optimizer, lr_scheduler = accelerator.prepare(optimizer, get_scheduler("constant", optimizer))
    autocast = torch.autocast(torch.device(device).type, dtype) if args.dtype != "float32" else None
    pixels = torch.rand(args.batch_size, 3, args.resolution, args.resolution, device=device) * 2 - 1
    inputs = transformer_inputs(pipe, call)
    schedule = FlowMatchEulerDiscreteScheduler()
    scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
    with torch.no_grad():
        cached = vae.encode(pixels.to(dtype)).latent_dist if cache_latents else None

    def step():
        posterior = cached if cache_latents else vae.encode(pixels.to(dtype)).latent_dist
        latents = ((posterior.sample() - vae.config.shift_factor) * vae.config.scaling_factor).to(dtype)
        batch, channels, height, width = latents.shape
        ids = FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, device, dtype)
        noise = torch.randn_like(latents)
        drawn = compute_density_for_timestep_sampling("none", batch, 0.0, 1.0, 1.29)
        timesteps = schedule.timesteps[(drawn * 1000).long()].to(device)
        all_sigmas, all_timesteps = schedule.sigmas.to(device, dtype), schedule.timesteps.to(device)
        sigmas = all_sigmas[[(all_timesteps == timestep).nonzero().item() for timestep in timesteps]]
        sigmas = sigmas.flatten().view(-1, 1, 1, 1)
        noisy = FluxPipeline._pack_latents((1 - sigmas) * latents + sigmas * noise, batch, channels, height, width)
        guidance = None
        if transformer.config.guidance_embeds:
            guidance = torch.tensor([3.5], device=device).expand(batch)
        with autocast or contextlib.nullcontext():
            velocity = transformer(
                hidden_states=noisy, timestep=timesteps / 1000, guidance=guidance, img_ids=ids, **inputs
            )[0]
        velocity = FluxPipeline._unpack_latents(
            velocity.float(), height * scale_factor, width * scale_factor, scale_factor
        )
        weighting = compute_loss_weighting_for_sd3("none", sigmas)
        error = weighting.float() * (velocity.float() - (noise - latents).float()) ** 2
        loss = error.reshape(batch, -1).mean(1).mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        return loss.detach().item()

    return step


def dry_step(model, latents):
    """Return a function that runs the pipeline around a transformer that computes nothing."""

    def step():
        with ask.replaced(model.transformer, "forward", lambda hidden_states, **inputs: (hidden_states,)):
            model(latents, 0.9)

    return step


def main(argv: list[str] | None = None):
    parser = shapes.parser("Time a FLUX training step against a bare transformer and against diffusers' example.")
    parser.add_argument("--same_layers", action="store_true", help="both adapt the layers that the example adapts")
    parser.add_argument("--pipeline_only", action="store_true", help="leave the whole steps out")
    args = shapes.parse(parser, argv)
    pipe, call, latents = shapes.make_pipeline(args)
    if not isinstance(pipe, FluxPipeline):
        raise InputError(f"{type(pipe).__name__}: the example is for FLUX; give a FLUX pipeline or shape")
    step, model = glance_step(args, pipe, call, latents, EXAMPLE_LAYERS if args.same_layers else None)
    noise, sigma = torch.randn_like(latents), 0.9
    pipeline, bare = pipeline_step(model, latents), bare_step(args, pipe, call, latents)
    losses = [float(function(noise, sigma)) for function in (pipeline, bare)]
    if losses[0] != losses[1]:
        raise AssertionError(f"pipeline and bare do not do the same work: losses {losses}")
    functions = {"pipeline": lambda: pipeline(noise, sigma), "bare": lambda: bare(noise, sigma)}
    functions["dry"] = dry_step(model, latents)
    if not args.pipeline_only:
        functions["glance"] = step
        example_pipe, vae = shapes.make_pipeline(args)[0], flux_vae(args)
        add_example_adapter(example_pipe.transformer, args.rank)
        for name, cache_latents in {"example": False, "example_cached": True}.items():
            functions[name] = example_step(args, example_pipe, call, vae, cache_latents)
    times = shapes.in_turns(functions, args)
    result = shapes.model_facts(args, pipe, latents) | {
        "same_layers": args.same_layers,
        **{f"{name}_seconds": statistics.median(values) for name, values in times.items()},
        "pipeline_to_bare": shapes.ratio(times["pipeline"], times["bare"]),
        "dry_to_bare": shapes.ratio(times["dry"], times["bare"]),
    }
    if not args.pipeline_only:
        result["glance_to_example"] = shapes.ratio(times["glance"], times["example"])
        result["glance_to_example_cached"] = shapes.ratio(times["glance"], times["example_cached"])
    shapes.report(result | shapes.machine(args.device), args.json)


if __name__ == "__main__":
    cli.run(main)
