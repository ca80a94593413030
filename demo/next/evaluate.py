"""What the judge says of the base, and what few steps lose.

    python demo/next/evaluate.py --model output/demo-next/model --num_captions 64 --sheet sheet.png

Held-out captions, one picture each, the same noise in every row, the pipeline's own schedule and scheduler; `error` is
the distance of the final latents to those of 50 steps, over their norm. Two model calls a step, for guidance.
"""

import argparse
import json
import random
import time
from pathlib import Path

import diffusers
import torch
from diffusers import FluxPipeline
from judge import ASPECTS, JUDGE_FILE, load_judge
from words import RESOLUTION, caption_of, draw, sheet, split_scenes


@torch.no_grad()
def latents_of(pipe, scenes, steps: int, guidance: float, bfloat16: bool) -> torch.Tensor:
    """One picture a scene, as packed latents; picture i has the seed i."""
    out = []
    for start in range(0, len(scenes), 32):
        captions = [caption_of(scene) for scene in scenes[start : start + 32]]
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            result = pipe(
                captions,
                negative_prompt=[""] * len(captions),
                true_cfg_scale=guidance,
                num_inference_steps=steps,
                height=RESOLUTION,
                width=RESOLUTION,
                max_sequence_length=16,
                generator=[torch.Generator().manual_seed(start + i) for i in range(len(captions))],
                output_type="latent",
            )
        out.append(result.images.float())
    return torch.cat(out)


@torch.no_grad()
def pictures_of(pipe, latents: torch.Tensor) -> torch.Tensor:
    """Packed latents -> float32 (B, 3, H, W) in 0..1."""
    z = FluxPipeline._unpack_latents(latents, RESOLUTION, RESOLUTION, pipe.vae_scale_factor)
    z = z / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    return torch.cat([(pipe.vae.decode(part).sample / 2 + 0.5).clamp(0, 1) for part in z.split(16)])


def main():
    parser = argparse.ArgumentParser(description="The judge's numbers for the base at 50 and at few steps.")
    parser.add_argument("--model", default="output/demo-next/model")
    parser.add_argument("--num_captions", type=int, default=64)
    parser.add_argument("--guidance", type=float, default=4.5, help="true_cfg_scale; 1 is none")
    parser.add_argument("--steps", default="50,25,10,5", help="the first is what the others are compared with")
    parser.add_argument("--sheet", help="a .png: a column for each number of steps; the first captions")
    parser.add_argument("--rows", type=int, default=16, help="of the sheet")
    parser.add_argument("--float32", action="store_true", help="no bfloat16 products")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", help="also write the numbers as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    diffusers.logging.set_verbosity_error()
    judge = load_judge() if JUDGE_FILE.exists() else None
    scenes = split_scenes()[1][: args.num_captions]
    pipe = FluxPipeline.from_pretrained(args.model, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    results, columns, full = [], [], None

    def row(name: str, calls: int, images, error, start: float) -> None:
        values = {"name": name, "calls": calls, "error": error}
        if judge:
            right = judge.right(images, scenes)
            values |= {"all_right": right.all(1).float().mean().item()}
            values |= dict(zip(ASPECTS, right.float().mean(0).tolist()))
        results.append(values)
        numbers = " | ".join(f"{value:.3f}" for key, value in values.items() if key not in ("name", "calls"))
        print(f"| {name} | {calls} | {numbers} | {time.perf_counter() - start:.0f} s |", flush=True)

    print(f"| {len(scenes)} captions, guidance {args.guidance} | calls | error | all right | {' | '.join(ASPECTS)} |")
    if judge:
        row("real renders", 0, draw_each(scenes), 0.0, time.perf_counter())
    for steps in map(int, args.steps.split(",")):
        start = time.perf_counter()
        latents = latents_of(pipe, scenes, steps, args.guidance, not args.float32)
        full = latents if full is None else full
        images = pictures_of(pipe, latents)
        error = ((latents - full).norm() / full.norm()).item()
        row(f"{steps} steps", steps * (2 if args.guidance > 1 else 1), images, error, start)
        columns.append(images[: args.rows])
    if args.sheet:  # a row of the sheet: each caption in all columns
        sheet(torch.stack(columns, 1).flatten(0, 1), 2 * len(columns)).save(args.sheet)
    if args.output:
        Path(args.output).write_text(json.dumps(results, indent=2) + "\n")


def draw_each(scenes) -> torch.Tensor:
    rng = random.Random(0)
    return torch.cat([draw([scene], 1, rng)[1] for scene in scenes])


if __name__ == "__main__":
    main()
