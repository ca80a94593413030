"""The judge: reads a word picture back, letter by letter, and says whether its letters are clean.

    python demo/next/judge.py --max_minutes 10     # trains it on the base's pictures, and goes on where it stopped

The word is read without a vocabulary (connectionist temporal classification over the picture's columns), so a picture
is never read as the word that it was meant to be. A picture is right when word, ink, ground and pattern are right and
the letters are clean: blurred, half-mixed, torn and smeared words are what `clean` learns to reject.
"""

import argparse
import logging
import math
import os
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from words import GROUNDS, INKS, LETTERS, PATTERNS, RESOLUTION, WORDS, draw, split_scenes


logger = logging.getLogger(__name__)

JUDGE_FILE = Path(__file__).parent / "judge.safetensors"
HEADS = {"ink": tuple(INKS), "ground": tuple(GROUNDS), "pattern": PATTERNS}
ASPECTS = ("word", "clean", *HEADS)


class Judge(nn.Module):
    """Images (B, 3, 128, 128) in 0..1 -> letters (columns, B, 27), and logits of ink, ground, pattern and clean."""

    def __init__(self):
        super().__init__()

        def block(a, b, kernel, stride=1, dilation=1):
            padding = dilation * (kernel // 2)
            convolution = nn.Conv2d(a, b, kernel, stride, padding, dilation, bias=False)
            return nn.Sequential(convolution, nn.BatchNorm2d(b), nn.SiLU())

        self.trunk = nn.Sequential(
            block(3, 24, 5, 2),
            block(24, 48, 5, 2),
            block(48, 64, 3, (2, 1)),
            block(64, 96, 3),
            block(96, 96, 3, 1, 2),
            block(96, 96, 3, 1, 2),
        )
        self.row = nn.Conv2d(96, 1, 1)
        self.columns = nn.Sequential(nn.Conv1d(96, 96, 5, padding=2), nn.SiLU(), nn.Conv1d(96, 27, 1))
        self.heads = nn.ModuleDict({name: nn.Linear(192, len(values)) for name, values in HEADS.items()})
        self.clean = nn.Linear(192, 1)

    def forward(self, images: torch.Tensor):
        x = self.trunk((images * 2 - 1).contiguous(memory_format=torch.channels_last))
        lines = (x * self.row(x).softmax(2)).sum(2)  # each column looks at the row where the word runs
        letters = self.columns(lines).permute(2, 0, 1).float().log_softmax(2)
        pooled = torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)
        heads = {name: head(pooled).float() for name, head in self.heads.items()}
        return letters, heads, self.clean(pooled).float().squeeze(1)

    @torch.no_grad()
    def read(self, images: torch.Tensor) -> list[tuple[str, str, str, str, bool]]:
        """(word, ink, ground, pattern, clean) of every picture (B, 3, 128, 128) in 0..1."""
        letters, heads, clean = self(images)
        answers = []
        for i, path in enumerate(letters.argmax(2).T.tolist()):
            word = "".join(LETTERS[b - 1] for a, b in zip([0, *path], path) if b and a != b)
            answers.append((word, *(HEADS[name][heads[name][i].argmax()] for name in HEADS), clean[i].item() > 0))
        return answers

    def right(self, images: torch.Tensor, scenes: list[tuple]) -> torch.Tensor:
        """Which of ASPECTS are right, bool (B, 5)."""
        rows = [
            (word == scene[0], clean, *(a == b for a, b in zip(rest, scene[1:])))
            for (word, *rest, clean), scene in zip(self.read(images), scenes)
        ]
        return torch.tensor(rows)


def load_judge(path: Path = JUDGE_FILE) -> Judge:
    judge = Judge()
    judge.load_state_dict({name: value.float() for name, value in load_file(path).items()}, strict=False)
    return judge.eval()


def blur(images: torch.Tensor, sigma: float) -> torch.Tensor:
    radius = math.ceil(2.5 * sigma)
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).view(1, 1, -1).expand(3, 1, -1)
    images = F.conv2d(F.pad(images, (radius, radius, 0, 0), mode="replicate"), kernel[..., None, :], groups=3)
    return F.conv2d(F.pad(images, (0, 0, radius, radius), mode="replicate"), kernel[..., None], groups=3)


def warp(images: torch.Tensor, strength: float, generator: torch.Generator) -> torch.Tensor:
    """Bend pictures by a smooth random field of about `strength` pixels."""
    field = torch.randn(len(images), 2, 11, 11, generator=generator) * strength * 2 / RESOLUTION
    field = F.interpolate(field, RESOLUTION, mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    line = torch.linspace(-1, 1, RESOLUTION)
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)
    return F.grid_sample(images, grid + field, padding_mode="reflection", align_corners=True)


def spoil(images: torch.Tensor, others: torch.Tensor, kind: int, generator: torch.Generator) -> torch.Tensor:
    """Pictures whose letters are not clean; `others` are the same pictures with another word in each."""

    def uniform(low, high):
        return low + (high - low) * torch.rand(1, generator=generator).item()

    if kind == 0:
        return blur(images, uniform(2.5, 5))
    if kind == 1:
        part = uniform(0.35, 0.65)
        return (1 - part) * images + part * others
    if kind == 2:
        return warp(images, uniform(4.5, 8), generator)
    # A smooth mask swaps parts of two words: torn letters, ends in mid-air.
    mask = torch.randn(len(images), 1, 9, 9, generator=generator)
    mask = (F.interpolate(mask, RESOLUTION, mode="bicubic", align_corners=True) * 6).sigmoid()
    return mask * images + (1 - mask) * others


def with_word(scene, rng: random.Random) -> tuple:
    return (rng.choice(WORDS), *scene[1:])


def main():
    parser = argparse.ArgumentParser(description="Train the judge, or go on training it.")
    parser.add_argument("--work_dir", default="output/demo-next", help="where train_base.py keeps pictures and VAE")
    parser.add_argument("--max_minutes", type=float, default=10.0)
    parser.add_argument("--max_train_steps", type=int, default=2500)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    work_dir = Path(args.work_dir)
    checkpoint = work_dir / "judge.pt"
    batches = make_batches(work_dir)
    judge = Judge().to(args.device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=args.learning_rate, weight_decay=0.02)
    start = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=args.device)
        judge.load_state_dict(state["judge"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    begin, running, step = time.monotonic(), None, start
    while step < args.max_train_steps and time.monotonic() - begin < 60 * args.max_minutes:
        progress = max(step / args.max_train_steps, (time.monotonic() - begin) / (60 * args.max_minutes))
        optimizer.param_groups[0]["lr"] = args.learning_rate * min((step + 1) / 50, 1, 0.01 + 1.5 * (1 - progress))
        images, scenes, clean = batches(step)
        with torch.autocast(args.device, torch.bfloat16):
            letters, heads, cleanness = judge(images.to(args.device))
        letters, cleanness = letters.cpu(), cleanness.cpu()
        heads = {name: logits.cpu() for name, logits in heads.items()}
        texts = [torch.tensor([LETTERS.index(letter) + 1 for letter in scene[0]]) for scene in scenes]
        lengths = torch.tensor([len(text) for text in texts])
        columns = torch.full((len(images),), len(letters))
        reading = F.ctc_loss(letters, torch.cat(texts), columns, lengths, reduction="none") / lengths
        loss = (reading * clean).sum() / clean.sum()  # a spoiled word is not to be read
        for name, values in HEADS.items():
            index = 1 + list(HEADS).index(name)
            loss = loss + 0.3 * F.cross_entropy(heads[name], torch.tensor([values.index(s[index]) for s in scenes]))
        loss = loss + 0.5 * F.binary_cross_entropy_with_logits(cleanness, clean)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(judge.parameters(), 2.0)
        optimizer.step()
        optimizer.zero_grad()
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        step += 1
        if step % 50 == 0:
            logger.info(f"step {step}: loss {running:.4f}, {(time.monotonic() - begin) / (step - start):.2f} s a step")
    state = {"judge": judge.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    torch.save(state, checkpoint.with_suffix(".tmp"))
    os.replace(checkpoint.with_suffix(".tmp"), checkpoint)
    save_file({name: value.half().cpu().contiguous() for name, value in judge.state_dict().items()}, JUDGE_FILE)
    measure(judge.cpu().eval())


def make_batches(work_dir: Path):
    """A function step -> (images in 0..1, scenes, clean): half as drawn or through the VAE, half spoiled."""
    from diffusers import AutoencoderKL
    from train_base import images_of, make_pictures

    scenes, pictures = make_pictures(argparse.Namespace(num_pictures=24576, seed=0), work_dir)
    path = work_dir / "judge_pairs.pt"
    if not path.exists():
        # Pairs that differ in nothing but the word, for mixing and tearing.
        vae = AutoencoderKL.from_pretrained(work_dir / "vae", torch_dtype=torch.float32)
        rng, pairs, restored = random.Random(5), [], []
        for _ in range(1024):
            scene, seed = rng.choice(scenes), rng.random()
            both = [(scene, seed), (with_word(scene, rng), seed)]
            pairs.append(torch.cat([draw([scene], 1, random.Random(seed))[1] for scene, seed in both]))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            for first in range(0, 3072, 32):
                images = images_of(pictures[first : first + 32])
                images = vae.decode(vae.encode(images).latent_dist.mode()).sample.float()
                restored.append(((images.clamp(-1, 1) + 1) * 127.5).round().byte())
        torch.save(((torch.stack(pairs) * 255).round().byte(), torch.cat(restored)), path)
    pairs, restored = torch.load(path, weights_only=True)

    def batch(step: int, size: int = 16):
        generator = torch.Generator().manual_seed(step)
        rows = torch.randint(len(pictures), (2 * size,), generator=generator).tolist()
        plain = images_of(pictures[rows]) / 2 + 0.5
        again = torch.randint(len(restored), (size,), generator=generator)
        plain = torch.cat([plain, restored[again].float() / 255])
        chosen = [scenes[row] for row in rows] + [scenes[row] for row in again.tolist()]
        if step % 2:
            plain[: size // 2] = blur(plain[: size // 2], 0.3 + 0.6 * torch.rand(1, generator=generator).item())
            plain[size // 2 : size] = warp(plain[size // 2 : size], 0.7, generator)
        two = pairs[torch.randint(len(pairs), (size,), generator=generator)].float() / 255
        spoiled = [spoil(two[i::4, 0], two[i::4, 1], i, generator) for i in range(4)]
        unused = [scenes[0]] * size
        images = torch.cat([plain, *spoiled])
        images = images + 0.03 * torch.rand(1, generator=generator) * torch.randn(images.shape, generator=generator)
        clean = torch.cat([torch.ones(len(plain)), torch.zeros(size)])
        return images, [*chosen, *unused], clean

    return batch


@torch.no_grad()
def measure(judge: Judge, count: int = 512) -> None:
    """What it says of fresh renders of scenes it never saw, and how many spoiled ones it lets pass as clean."""
    rng = random.Random(77)
    scenes, images = draw(split_scenes()[1], count, rng)
    right = judge.right(images, scenes)
    numbers = ", ".join(f"{name} {value:.3f}" for name, value in zip(ASPECTS, right.float().mean(0).tolist()))
    logger.info(f"{count} fresh renders: all right {right.all(1).float().mean():.3f} ({numbers})")
    others = draw([with_word(scene, rng) for scene in scenes[:128]], 128, rng)[1]
    generator = torch.Generator().manual_seed(77)
    for kind, name in enumerate(("blurred", "half-mixed", "bent", "torn")):
        spoiled = spoil(images[:128], others, kind, generator)
        passed = judge.right(spoiled, scenes[:128]).all(1).float().mean()
        logger.info(f"of 128 {name} ones, right: {passed:.3f}")


if __name__ == "__main__":
    main()
