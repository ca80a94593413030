"""Make the demo model: a complete small FLUX pipeline, trained from nothing on procedural scenes.

    python demo/train_demo_model.py --output_dir demo/model   # VAE, judge, then text encoders and transformer
    python demo/evaluate.py --model demo/model               # the judge's numbers

Stages, each kept in --work_dir and skipped or resumed when it is there; see demo/README.md
for how long they take. For long runs on a CPU set MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_ and
MALLOC_TOP_PAD_ to 4294967296: glibc otherwise gives every large buffer back to the system.
"""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent.parent))

from glance import start


if __name__ == "__main__":
    start.as_script("what was not written yet is lost")

import argparse
import copy
import logging
import math
import os
import re

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from judge import JUDGE_FILE, Judge
from safetensors.torch import save_file
from scenes import POSITIONS, RESOLUTION, all_scenes, caption_of, render, split_scenes
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel


logger = logging.getLogger(__name__)

TEXT_TOKENS = 16  # the longest caption has 13 words; pass max_sequence_length=16 to the pipeline
WIDTH = 128  # of both text encoders


def parse_args():
    parser = argparse.ArgumentParser(description="Train the demo model from nothing.")
    parser.add_argument("--output_dir", default="demo/model")
    parser.add_argument("--work_dir", default="output/demo-model", help="checkpoints of the three stages")
    parser.add_argument("--vae_steps", type=int, default=4500)
    parser.add_argument("--decoder_steps", type=int, default=3500)
    parser.add_argument("--judge_steps", type=int, default=1500)
    parser.add_argument("--max_train_steps", type=int, default=4000)
    parser.add_argument("--train_batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def draw(scenes: torch.Tensor, count: int, generator: torch.Generator):
    """Return scenes (count, 5), drawn with replacement, and their pictures (count, 3, H, W) in 0..1."""
    chosen = scenes[torch.randint(len(scenes), (count,), generator=generator)]
    return chosen, render(chosen, generator)


def cosine(optimizer, steps: int, warmup: int = 200):
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * min(step / steps, 1))) + 1e-3),
    )


def train_vae(args, scenes, path: Path) -> AutoencoderKL:
    """Train an 8x autoencoder without quant convolutions, as FLUX has; scaling and shift are its own latents'."""
    if path.exists():
        return AutoencoderKL.from_pretrained(path)
    channels = (16, 32, 64, 64)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=4,
        sample_size=RESOLUTION,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, weight_decay=0, betas=(0.9, 0.99))
    schedule = cosine(optimizer, args.vae_steps)
    progress = tqdm(range(args.vae_steps), desc="VAE")
    for step in progress:
        _, images = draw(scenes, 8, generator)
        images = images * 2 - 1
        # Crops are four times cheaper; whole pictures at the end settle the group norms.
        if step < 0.9 * args.vae_steps:
            top, left = torch.randint(RESOLUTION // 2, (2,), generator=generator).tolist()
            images = images[:, :, top : top + RESOLUTION // 2, left : left + RESOLUTION // 2]
        posterior = vae.encode(images.to(memory_format=torch.channels_last)).latent_dist
        difference = vae.decode(posterior.sample(generator)).sample - images
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        loss = difference.abs().mean() + difference.square().mean() + 3e-4 * kl
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        progress.set_postfix(l1=f"{difference.abs().mean().item():.4f}", kl=f"{kl.item():.2f}")
    with torch.no_grad():
        latents = vae.encode(draw(scenes, 512, generator)[1] * 2 - 1).latent_dist.mode()
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
    vae.save_pretrained(path)
    return vae


def tune_decoder(args, vae, scenes, path: Path) -> AutoencoderKL:
    """Sharpen the decoder for the encoder as it is, on crops around the objects; the latents stay what they are."""
    if path.exists():
        return AutoencoderKL.from_pretrained(path)
    vae.encoder.requires_grad_(False)
    torch.manual_seed(args.seed + 7)
    generator = torch.Generator().manual_seed(args.seed + 7)
    centers = (torch.tensor(list(POSITIONS.values())) + 1) * RESOLUTION / 2
    optimizer = torch.optim.AdamW(vae.decoder.parameters(), lr=8e-4, weight_decay=0, betas=(0.9, 0.99))
    schedule = cosine(optimizer, args.decoder_steps, warmup=100)
    progress = tqdm(range(args.decoder_steps), desc="decoder")
    half = RESOLUTION // 2
    for step in progress:
        chosen, images = draw(scenes, 8, generator)
        images = images * 2 - 1
        if step < 0.85 * args.decoder_steps:
            corners = centers[chosen[:, 3]] - half / 2 + torch.randint(-12, 13, (8, 2), generator=generator)
            corners = corners.clamp(0, half).long() // 8 * 8
            images = torch.stack(
                [image[:, y : y + half, x : x + half] for image, (x, y) in zip(images, corners.tolist())]
            )
        with torch.no_grad():
            latents = vae.encode(images.to(memory_format=torch.channels_last)).latent_dist.sample(generator)
            latents = latents + 0.05 * torch.randn(latents.shape, generator=generator)
        difference = vae.decode(latents).sample - images
        (difference.abs().mean() + difference.square().mean()).backward()
        torch.nn.utils.clip_grad_norm_(vae.decoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        progress.set_postfix(l1=f"{difference.abs().mean().item():.4f}")
    vae.to(torch.bfloat16).save_pretrained(path)  # the transformer learns the latents of the VAE that is shipped
    return vae.float()


def train_judge(args, path: Path) -> Judge:
    """Train a classifier on clean, blurred and noisy renders, so that it judges the scene and not the sharpness."""
    torch.manual_seed(args.seed)
    judge = Judge()
    generator = torch.Generator().manual_seed(args.seed + 1)
    scenes = all_scenes()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = cosine(optimizer, args.judge_steps)
    progress = tqdm(range(args.judge_steps), desc="judge")
    for step in progress:
        chosen, images = draw(scenes, 64, generator)
        if step % 2:
            images = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="bilinear")
        images = images + 0.05 * torch.rand(1, generator=generator) * torch.randn(images.shape, generator=generator)
        loss = sum(F.cross_entropy(logits, label) for logits, label in zip(judge(images), chosen.T))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.4f}")
    chosen, images = draw(scenes, 2048, generator)
    right = judge.eval().right(images, chosen).all(1).float().mean().item()
    logger.info(f"judge: all attributes right on {right:.4f} of 2048 fresh renders")
    save_file({name: value.half().contiguous() for name, value in judge.state_dict().items()}, path)
    return judge


def make_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token a word of the scenes' language; other words become <unk>."""
    words = sorted({word for scene in all_scenes() for word in re.findall(r"\w+", caption_of(scene))})
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<unk>", "<s>", "</s>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=max_length,
    )


def make_pipeline(vae: AutoencoderKL) -> FluxPipeline:
    """Return FLUX.1's architecture and scheduler configuration at a small size, with fresh weights."""
    tokenizer, tokenizer_2 = make_tokenizer(TEXT_TOKENS), make_tokenizer(512)
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=TEXT_TOKENS,
            projection_dim=WIDTH,
            pad_token_id=0,
            bos_token_id=2,
            eos_token_id=3,  # CLIP pools at the end token, but at the highest id where that is 2
        )
    )
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=WIDTH,
            d_kv=32,
            d_ff=2 * WIDTH,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
        )
    )
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * vae.config.latent_channels,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096
    )
    return FluxPipeline(
        scheduler=scheduler,
        vae=vae,
        text_encoder=clip,
        tokenizer=tokenizer,
        text_encoder_2=t5,
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    )


def encode_scenes(vae, scenes, count, generator):
    """Return scenes (count, 5) and their latents (count, tokens, channels) float32, packed as FLUX denoises them."""
    latents, chosen = [], []
    for _ in tqdm(range(count // 64), desc="latents"):
        drawn, images = draw(scenes, 64, generator)
        with torch.no_grad():
            posterior = vae.encode((images * 2 - 1).to(memory_format=torch.channels_last)).latent_dist
        z = (posterior.mode() - vae.config.shift_factor) * vae.config.scaling_factor
        latents.append(FluxPipeline._pack_latents(z, *z.shape))
        chosen.append(drawn)
    return torch.cat(chosen), torch.cat(latents)


def train_transformer(args, vae, scenes, work_dir: Path) -> FluxPipeline:
    """Train by flow matching from noise, both text encoders along; a tenth of the captions is empty, for guidance."""
    torch.manual_seed(args.seed)
    pipe = make_pipeline(vae)
    generator = torch.Generator().manual_seed(args.seed + 2)
    cache = work_dir / "latents.pt"
    if not cache.exists():
        torch.save(encode_scenes(vae, scenes, 12288, generator), cache)
    chosen, latents = torch.load(cache, weights_only=True)
    captions = [caption_of(scene) for scene in all_scenes()] + [""]
    tokens = pipe.tokenizer(captions, padding="max_length", max_length=TEXT_TOKENS, return_tensors="pt").input_ids
    strides = torch.tensor([6 * 6 * 9 * 5, 6 * 9 * 5, 9 * 5, 5, 1])
    rows = (chosen * strides).sum(1)

    trained = torch.nn.ModuleDict(
        {"transformer": pipe.transformer, "clip": pipe.text_encoder, "t5": pipe.text_encoder_2}
    )
    average = copy.deepcopy(trained).requires_grad_(False)
    side = RESOLUTION // 16
    image_ids = FluxPipeline._prepare_latent_image_ids(1, side, side, "cpu", torch.float32)
    text_ids = torch.zeros(TEXT_TOKENS, 3)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = cosine(optimizer, args.max_train_steps)
    checkpoint, start = work_dir / "transformer.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        trained.load_state_dict(state["trained"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        generator.set_state(state["generator"])
        start = state["step"]

    progress = tqdm(range(start, args.max_train_steps), desc="transformer", initial=start, total=args.max_train_steps)
    running = None
    for step in progress:
        batch = torch.randint(len(latents), (args.train_batch_size,), generator=generator)
        dropped = torch.rand(len(batch), generator=generator) < 0.1
        ids = tokens[torch.where(dropped, len(captions) - 1, rows[batch])]
        x0 = latents[batch]
        noise = torch.randn(x0.shape, generator=generator)
        sigma = torch.sigmoid(torch.randn(len(batch), generator=generator))  # logit-normal, as SD3 and FLUX
        noisy = (1 - sigma.view(-1, 1, 1)) * x0 + sigma.view(-1, 1, 1) * noise
        velocity = pipe.transformer(
            hidden_states=noisy,
            timestep=sigma,
            pooled_projections=pipe.text_encoder(ids).pooler_output,
            encoder_hidden_states=pipe.text_encoder_2(ids).last_hidden_state,
            img_ids=image_ids,
            txt_ids=text_ids,
            return_dict=False,
        )[0]
        loss = F.mse_loss(velocity, noise - x0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        decay = min(0.9995, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.parameters()), list(trained.parameters()), 1 - decay)
        running = loss.item() if running is None else 0.99 * running + 0.01 * loss.item()
        progress.set_postfix(loss=f"{running:.4f}")
        if (step + 1) % 500 == 0 or step + 1 == args.max_train_steps:
            state = {"trained": trained.state_dict(), "average": average.state_dict(), "step": step + 1}
            state |= {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
            torch.save(state | {"generator": generator.get_state()}, checkpoint.with_suffix(".tmp"))
            os.replace(checkpoint.with_suffix(".tmp"), checkpoint)
            logger.info(f"step {step + 1}: loss {running:.4f}")
    trained.load_state_dict(average.state_dict())
    return pipe


def main():
    args = parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    work_dir = Path(args.work_dir)
    work_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    scenes, _ = split_scenes()
    vae = train_vae(args, scenes, work_dir / "vae")
    vae = tune_decoder(args, vae, scenes, work_dir / "vae-tuned").eval().requires_grad_(False)
    if not JUDGE_FILE.exists():
        train_judge(args, JUDGE_FILE)
    pipe = train_transformer(args, vae, scenes, work_dir)
    # bfloat16 on disk, for size; but transformers loads the text encoders in the dtype in which they are stored.
    for part in (pipe.transformer, pipe.vae):
        part.to(torch.bfloat16)
    pipe.save_pretrained(args.output_dir)
    logger.info(f"demo model written to {args.output_dir}")


if __name__ == "__main__":
    main()
