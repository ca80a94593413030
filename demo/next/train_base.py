"""Make the demo's next base: a complete small FLUX pipeline, trained from nothing on procedural words.

    python demo/next/checkpoints.py unpack demo/next/checkpoint output/demo-next   # to go on from what is committed
    python demo/next/train_base.py --max_minutes 60        # the stages that are not there yet, then the transformer
    python demo/next/train_base.py --max_minutes 60        # and an hour more: it goes on where it stopped
    python demo/next/train_base.py --export output/demo-next/model   # the averaged weights as a stock FluxPipeline
    python demo/next/judge.py                              # trains the judge on the same pictures
    python demo/next/evaluate.py --model output/demo-next/model      # 50, 25, 10 and 5 guided steps
    python demo/next/checkpoints.py pack demo/next/checkpoint output/demo-next

Stages, each kept in --work_dir and skipped or resumed when it is there: pictures, VAE, latents, text encoders on
spelling, transformer with the text encoders. One thread and bfloat16 autocast with float32 weights are meant for a CPU
with bfloat16 instructions (`--dtype float32` without them). For long runs set MALLOC_MMAP_THRESHOLD_ and
MALLOC_TRIM_THRESHOLD_ to 4294967296: glibc otherwise gives every large buffer back to the system.
"""

import argparse
import copy
import json
import logging
import math
import os
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel
from words import GROUNDS, INKS, LETTERS, MAX_LETTERS, PATTERNS, RESOLUTION, caption_of, draw, split_scenes


logger = logging.getLogger(__name__)

TEXT_TOKENS = 16  # the longest caption has 14; pass max_sequence_length=16 to the pipeline
TEXT_WIDTH = 128  # of both text encoders


def parse_args():
    parser = argparse.ArgumentParser(description="Train the demo's next base from nothing.")
    parser.add_argument("--work_dir", default="output/demo-next", help="pictures, latents and checkpoints")
    parser.add_argument("--run", default="base", help="name of the transformer's run in work_dir")
    parser.add_argument("--export", help="only write the run's averaged weights as a pipeline into this folder")
    parser.add_argument("--stop_after", choices=("pictures", "vae", "latents", "text"), help="end after this stage")
    parser.add_argument("--num_pictures", type=int, default=24576, help="fewer use the first of those already drawn")
    parser.add_argument("--vae_steps", type=int, default=4500)
    parser.add_argument("--vae_learning_rate", type=float, default=1e-3)
    parser.add_argument("--vae_init", help="a VAE of the same architecture to start from, for example demo/model/vae")
    parser.add_argument("--text_steps", type=int, default=1500)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--num_layers", type=int, default=1)
    parser.add_argument("--num_single_layers", type=int, default=6)
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="AdamW's; Muon's is ten times as large")
    parser.add_argument("--train_batch_size", type=int, default=32)
    parser.add_argument("--max_train_steps", type=int, default=40000, help="the rate falls to 0 over the last fifth")
    parser.add_argument("--stop_at_step", type=int, help="end earlier, with the rate still constant")
    parser.add_argument("--max_minutes", type=float, default=60.0, help="of this call's transformer training")
    parser.add_argument("--checkpoint_minutes", type=float, default=5.0)
    parser.add_argument("--ema_decay", type=float, default=0.999)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the products")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def autocast(args):
    return torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16")


def attend_in_float32() -> None:
    """On a CPU the attention kernel for bfloat16 takes three times as long as the one for float32, backward."""
    attention = F.scaled_dot_product_attention

    def attend(query, key, value, *args, **kwargs):
        with torch.autocast("cpu", enabled=False):
            return attention(query.float(), key.float(), value.float(), *args, **kwargs).to(query.dtype)

    F.scaled_dot_product_attention = attend


def cosine(optimizer, steps: int, warmup: int = 100):
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * min(step / steps, 1))) + 1e-3),
    )


def make_pictures(args, work_dir: Path):
    """Training pictures, drawn once: (scenes, uint8 memory map (N, H, W, 3))."""
    path, scenes_path = work_dir / "pictures.npy", work_dir / "scenes.json"
    if not scenes_path.exists():
        rng = random.Random(args.seed)
        scenes = []
        shape = (args.num_pictures, RESOLUTION, RESOLUTION, 3)
        pictures = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
        for start in tqdm(range(0, args.num_pictures, 64), desc="pictures"):
            chosen, images = draw(split_scenes()[0], 64, rng)
            pictures[start : start + 64] = (images.permute(0, 2, 3, 1) * 255).round().byte().numpy()
            scenes += chosen
        pictures.flush()
        scenes_path.write_text(json.dumps(scenes))
    scenes = [tuple(scene) for scene in json.loads(scenes_path.read_text())]
    count = args.num_pictures
    return scenes[:count], np.load(path, mmap_mode="r")[:count]


def images_of(pictures: np.ndarray) -> torch.Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in -1..1, channels last."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_vae(args, pictures, path: Path) -> AutoencoderKL:
    """An 8x autoencoder without quant convolutions, as FLUX has; scaling and shift are measured on its own latents."""
    if path.exists():
        return AutoencoderKL.from_pretrained(path, torch_dtype=torch.float32)
    torch.manual_seed(args.seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=4,
        sample_size=RESOLUTION,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    if args.vae_init:
        vae.load_state_dict(AutoencoderKL.from_pretrained(args.vae_init, torch_dtype=torch.float32).state_dict())
    vae.to(args.device, memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.vae_learning_rate, weight_decay=0, betas=(0.9, 0.99))
    schedule = cosine(optimizer, args.vae_steps)
    half, running = RESOLUTION // 2, 0.5
    for step in range(args.vae_steps):
        # Crops are four times cheaper; whole pictures at the end settle the group norms.
        whole = step >= 0.9 * args.vae_steps
        rows = torch.randint(len(pictures), (3 if whole else 8,), generator=generator).tolist()
        images = images_of(pictures[rows]).to(args.device)
        if not whole:
            top, left = torch.randint(half + 1, (2,), generator=generator).tolist()
            images = images[:, :, top : top + half, left : left + half]
        with autocast(args):
            posterior = vae.encode(images).latent_dist
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            noise = torch.randn(mean.shape, generator=generator).to(args.device)
            reconstruction = vae.decode(mean + (0.5 * logvar).exp() * noise).sample
        difference = reconstruction.float() - images
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        (difference.abs().mean() + difference.square().mean() + 3e-4 * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        running += 0.02 * (difference.abs().mean().item() - running)
        if (step + 1) % 50 == 0:
            logger.info(f"VAE step {step + 1}: L1 {running:.4f}, KL {kl.item():.2f}")
    with torch.no_grad():
        latents = vae.cpu().encode(images_of(pictures[:128])).latent_dist.mode()
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
    # The transformer learns the latents of the VAE as it is stored, in bfloat16.
    vae.to(torch.bfloat16).save_pretrained(path)
    return vae.float()


@torch.no_grad()
def encode_pictures(args, vae, pictures, path: Path) -> torch.Tensor:
    """All pictures as packed latents, the layout in which FLUX denoises: float16 (N, tokens, channels)."""
    if path.exists():
        return torch.load(path, weights_only=True)
    vae.to(args.device)
    latents = []
    for start in tqdm(range(0, len(pictures), 64), desc="latents"):
        with autocast(args):
            z = vae.encode(images_of(pictures[start : start + 64]).to(args.device)).latent_dist.mode().float().cpu()
        z = (z - vae.config.shift_factor) * vae.config.scaling_factor
        latents.append(FluxPipeline._pack_latents(z, *z.shape).half())
    vae.cpu()
    torch.save(torch.cat(latents), path)
    return torch.cat(latents)


def make_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """One token a word of the captions' language, and one a letter inside quotes; other words become <unk>."""
    words = ["the", "word", "in", "on", *INKS, *GROUNDS, *PATTERNS]
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<unk>", "<s>", "</s>", '"', *LETTERS, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Split(Regex("[A-Z]"), "isolated")]
    )
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


def make_text_encoders(vocab_size: int) -> tuple[CLIPTextModel, T5EncoderModel]:
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=TEXT_TOKENS,
            projection_dim=TEXT_WIDTH,
            pad_token_id=0,
            bos_token_id=2,
            eos_token_id=3,  # CLIP pools at the end token, but at the highest id where that is 2
        )
    )
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=vocab_size,
            d_model=TEXT_WIDTH,
            d_kv=32,
            d_ff=2 * TEXT_WIDTH,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
        )
    )
    return clip, t5


def pretrain_text(args, path: Path) -> tuple[CLIPTextModel, T5EncoderModel]:
    """Teach the text encoders to spell before they meet a picture, as real ones come trained.

    T5's state at every token tells the token, its place and the word's length; CLIP's pooled state tells everything.
    """
    tokenizer = make_tokenizer(TEXT_TOKENS)
    torch.manual_seed(args.seed + 1)
    clip, t5 = make_text_encoders(len(tokenizer))
    if path.exists():
        state = torch.load(path, weights_only=True)
        clip.load_state_dict(state["clip"])
        t5.load_state_dict(state["t5"])
        return clip, t5
    rng = random.Random(args.seed + 1)
    sizes = {"token": len(tokenizer), "place": TEXT_TOKENS, "end": TEXT_TOKENS}
    token_heads = torch.nn.ModuleDict({name: torch.nn.Linear(TEXT_WIDTH, size) for name, size in sizes.items()})
    pooled_head = torch.nn.Linear(TEXT_WIDTH, TEXT_TOKENS * len(tokenizer))
    trained = torch.nn.ModuleList([clip, t5, token_heads, pooled_head])
    optimizer = torch.optim.AdamW(trained.parameters(), lr=2e-3, weight_decay=0.01, betas=(0.9, 0.99))
    schedule = cosine(optimizer, args.text_steps)
    kinds = list(INKS), list(GROUNDS), PATTERNS
    for step in range(args.text_steps):
        captions = []
        for _ in range(128):  # random letters, so that any word can be spelled
            word = "".join(rng.choice(LETTERS) for _ in range(rng.randint(2, MAX_LETTERS)))
            captions.append(caption_of((word, *(rng.choice(kind) for kind in kinds))))
        ids = tokenize(tokenizer, captions)
        states, pooled = t5(ids).last_hidden_state, clip(ids).pooler_output
        ends = (ids == 3).float().argmax(1, keepdim=True).expand_as(ids)
        labels = {"token": ids, "place": torch.arange(TEXT_TOKENS).expand_as(ids), "end": ends}
        real = ids != 0
        loss = sum(F.cross_entropy(token_heads[name](states)[real], label[real]) for name, label in labels.items())
        everything = pooled_head(pooled).view(len(ids), TEXT_TOKENS, -1)
        loss = loss + F.cross_entropy(everything.flatten(0, 1), ids.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if (step + 1) % 250 == 0:
            logger.info(f"text step {step + 1}: loss {loss.item():.4f}")
    torch.save({"clip": clip.state_dict(), "t5": t5.state_dict()}, path)
    return clip, t5


def tokenize(tokenizer, captions: list[str]) -> torch.Tensor:
    return tokenizer(captions, padding="max_length", max_length=TEXT_TOKENS, return_tensors="pt").input_ids


def make_pipeline(args, vae, clip, t5) -> FluxPipeline:
    """FLUX.1's architecture and scheduler configuration at a small size, with fresh weights in the transformer."""
    torch.manual_seed(args.seed + 2)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * vae.config.latent_channels,
        num_layers=args.num_layers,
        num_single_layers=args.num_single_layers,
        attention_head_dim=48,
        num_attention_heads=args.width // 48,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(8, 20, 20),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096
    )
    return FluxPipeline(
        scheduler=scheduler,
        vae=vae,
        text_encoder=clip,
        tokenizer=make_tokenizer(TEXT_TOKENS),
        text_encoder_2=t5,
        tokenizer_2=make_tokenizer(512),
        transformer=transformer,
    )


def make_optimizers(args, trained) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the transformer's blocks, AdamW for everything else."""
    inner, rest = [], []
    for name, parameter in trained.named_parameters():
        matrix = parameter.ndim == 2 and "blocks" in name and "transformer." in name and args.optimizer == "muon"
        (inner if matrix else rest).append(parameter)
    optimizers = [torch.optim.AdamW(rest, lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)]
    if inner:
        optimizers.append(torch.optim.Muon(inner, lr=10 * args.learning_rate, weight_decay=0.01))
    return optimizers


def rate(step: int, steps: int, warmup: int = 100) -> float:
    """Warm-up, constant, linearly to 0 over the last fifth: a run can be lengthened until the fall begins."""
    return min((step + 1) / warmup, 1.0, max(0.0, (steps - step) / (0.2 * steps)))


def train_transformer(args, pipe, scenes, latents, path: Path) -> None:
    """Flow matching from noise, both text encoders trained along; a tenth of the captions is empty, for guidance."""
    tokens = torch.cat([tokenize(pipe.tokenizer, [caption_of(scene) for scene in scenes])])
    empty = tokenize(pipe.tokenizer, [""])
    trained = trained_parts(pipe).to(args.device)
    average = copy.deepcopy(trained).requires_grad_(False)
    optimizers = make_optimizers(args, trained)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    generator, start, running = torch.Generator().manual_seed(args.seed + 3), 0, 0.0
    if path.exists():
        state = torch.load(path, weights_only=True, map_location="cpu")
        trained.load_state_dict(state["trained"])
        average.load_state_dict(state["average"])
        for optimizer, values in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(values)
        generator.set_state(state["generator"])
        start, running = state["step"], state["running"]

    def save(step: int) -> None:
        state = {"trained": trained.state_dict(), "average": average.state_dict(), "step": step, "running": running}
        state |= {"optimizers": [optimizer.state_dict() for optimizer in optimizers]}
        torch.save(state | {"generator": generator.get_state()}, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    side = RESOLUTION // 16
    image_ids = FluxPipeline._prepare_latent_image_ids(1, side, side, args.device, torch.float32)
    text_ids = torch.zeros(TEXT_TOKENS, 3, device=args.device)
    count = sum(parameter.numel() for parameter in trained.parameters()) / 1e6
    logger.info(f"***** Running training ***** {count:.2f} M parameters, from step {start}")
    begin = saved = time.monotonic()
    for step in range(start, args.max_train_steps):
        if time.monotonic() - begin > 60 * args.max_minutes or step == args.stop_at_step:
            break
        factor = rate(step, args.max_train_steps)
        for optimizer, value in zip(optimizers, rates):
            optimizer.param_groups[0]["lr"] = value * factor
        batch = torch.randint(len(latents), (args.train_batch_size,), generator=generator)
        dropped = torch.rand(len(batch), generator=generator) < 0.1
        ids = torch.where(dropped[:, None], empty, tokens[batch])
        x0 = latents[batch].float()
        noise = torch.randn(x0.shape, generator=generator)
        sigma = torch.sigmoid(torch.randn(len(batch), generator=generator))  # logit-normal, as SD3 and FLUX
        ids, x0, noise, sigma = (value.to(args.device) for value in (ids, x0, noise, sigma))
        noisy = (1 - sigma.view(-1, 1, 1)) * x0 + sigma.view(-1, 1, 1) * noise
        with autocast(args):
            velocity = pipe.transformer(
                hidden_states=noisy,
                timestep=sigma,
                pooled_projections=pipe.text_encoder(ids).pooler_output,
                encoder_hidden_states=pipe.text_encoder_2(ids).last_hidden_state,
                img_ids=image_ids,
                txt_ids=text_ids,
                return_dict=False,
            )[0]
        loss = F.mse_loss(velocity.float(), noise - x0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        decay = min(args.ema_decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.parameters()), list(trained.parameters()), 1 - decay)
        running = loss.item() if step == 0 else running + max(0.01, 1 / (step + 1)) * (loss.item() - running)
        if (step + 1) % 50 == 0:
            seconds = (time.monotonic() - begin) / (step + 1 - start)
            logger.info(f"step {step + 1}: loss {running:.4f}, {seconds:.2f} s a step")
        if time.monotonic() - saved > 60 * args.checkpoint_minutes:
            saved = time.monotonic()
            save(step + 1)
    else:
        step = args.max_train_steps
    save(step)
    logger.info(f"stopped at step {step}: loss {running:.4f}")


def trained_parts(pipe) -> torch.nn.ModuleDict:
    return torch.nn.ModuleDict({"transformer": pipe.transformer, "clip": pipe.text_encoder, "t5": pipe.text_encoder_2})


def export(pipe, path: Path, folder: str) -> None:
    """The averaged weights as a pipeline directory; transformer and VAE in bfloat16, for size."""
    state = torch.load(path, weights_only=True, map_location="cpu")
    trained_parts(pipe).load_state_dict(state["average"])
    for part in (pipe.transformer, pipe.vae):
        part.to(torch.bfloat16)
    pipe.save_pretrained(folder)
    logger.info(f"step {state['step']} written to {folder}")


def main():
    args = parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(args.threads)
    if args.device == "cpu":
        attend_in_float32()
    work_dir = Path(args.work_dir)
    work_dir.mkdir(parents=True, exist_ok=True)
    checkpoint = work_dir / f"{args.run}.pt"
    stages = ("pictures", "vae", "latents", "text")
    stop = stages.index(args.stop_after) if args.stop_after else len(stages)
    if args.export:
        vae = AutoencoderKL.from_pretrained(work_dir / "vae", torch_dtype=torch.float32)
        text_encoders = make_text_encoders(len(make_tokenizer(TEXT_TOKENS)))
        export(make_pipeline(args, vae, *text_encoders), checkpoint, args.export)
        return
    scenes, pictures = make_pictures(args, work_dir)
    if stop == 0:
        return
    vae = train_vae(args, pictures, work_dir / "vae").eval().requires_grad_(False)
    if stop == 1:
        return
    latents = encode_pictures(args, vae, pictures, work_dir / "latents.pt")
    if stop == 2:
        return
    clip, t5 = pretrain_text(args, work_dir / "text.pt")
    if stop == 3:
        return
    train_transformer(args, make_pipeline(args, vae, clip, t5), scenes, latents, checkpoint)


if __name__ == "__main__":
    main()
