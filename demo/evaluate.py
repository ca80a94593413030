"""How often are all five attributes of a held-out scene right, by the judge?

    python demo/evaluate.py                          # real renders, and the demo model at 50 and 10 steps
    python demo/evaluate.py --lora output/demo       # and Glance, and the base on Glance's own timesteps

256 captions that training never saw, one picture each, the same noise in every row, guidance as in configs/demo.yaml.
"""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent.parent))

from glance import start


if __name__ == "__main__":
    start.as_script("what was not written yet is lost")

import argparse
import json
import time

import torch
from diffusers import FluxPipeline
from judge import load_judge
from scenes import ATTRIBUTES, RESOLUTION, caption_of, render, split_scenes

from glance import command_line as cli
from glance.files.recipe import WEIGHT_NAME, read_recipe
from glance_utils import PHASES, glance_inference


def draw(pipe, scenes, guidance: float, **kwargs) -> torch.Tensor:
    """Return one picture a scene, float32 (N, 3, H, W) in 0..1; picture i has the seed i."""
    pictures = []
    for first in range(0, len(scenes), 32):
        captions = [caption_of(scene) for scene in scenes[first : first + 32]]
        pictures.append(
            pipe(
                captions,
                negative_prompt=[""] * len(captions),
                true_cfg_scale=guidance,
                height=RESOLUTION,
                width=RESOLUTION,
                max_sequence_length=16,
                generator=[torch.Generator().manual_seed(first + i) for i in range(len(captions))],
                output_type="pt",
                **kwargs,
            ).images.float()
        )
    return torch.cat(pictures)


def main():
    parser = argparse.ArgumentParser(description="The judge's numbers for the demo model and a Glance pair.")
    parser.add_argument("--model", default="demo/model")
    parser.add_argument("--lora", help="folder with slow/ and fast/")
    parser.add_argument("--num_captions", type=int, default=256)
    parser.add_argument("--guidance", type=float, default=3.0, help="true_cfg_scale; 1 is none")
    parser.add_argument("--output", help="also write the numbers as JSON")
    args = parser.parse_args()
    cli.set_up_logging()
    judge = load_judge()
    scenes = split_scenes()[1][: args.num_captions]
    pipe = FluxPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    calls = 2 if args.guidance > 1 else 1
    results = {}

    def row(name: str, model_calls: int, pictures) -> None:
        start_time = time.perf_counter()
        right = judge.right(pictures(), scenes)
        results[name] = {"model_calls": model_calls, "all_right": right.all(1).float().mean().item()}
        results[name] |= dict(zip(ATTRIBUTES, right.float().mean(0).tolist()))
        numbers = " | ".join(f"{results[name][key]:.3f}" for key in ("all_right", *ATTRIBUTES))
        print(f"| {name} | {model_calls} | {numbers} | {time.perf_counter() - start_time:.0f} s |", flush=True)

    print(f"| {args.num_captions} captions | model calls | all right | {' | '.join(ATTRIBUTES)} | time |")
    print("|---" * (4 + len(ATTRIBUTES)) + "|")
    row("real renders", 0, lambda: render(scenes, torch.Generator().manual_seed(0)))
    row("base, 50 steps", 50 * calls, lambda: draw(pipe, scenes, args.guidance, num_inference_steps=50))
    row("base, 10 steps", 10 * calls, lambda: draw(pipe, scenes, args.guidance, num_inference_steps=10))
    if args.lora:
        schedule = {}
        for phase in PHASES:
            path = Path(args.lora) / phase / WEIGHT_NAME
            schedule[phase] = read_recipe(path).timesteps
            pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name=phase)

        def ten_steps(strength: float):
            with glance_inference(pipe, schedule) as kwargs:
                kwargs["joint_attention_kwargs"] = {"scale": strength}
                return draw(pipe, scenes, args.guidance, **kwargs)

        row("base, Glance's 10 timesteps", 10 * calls, lambda: ten_steps(0.0))
        row("Glance, 10 steps", 10 * calls, lambda: ten_steps(1.0))
    if args.output:
        Path(args.output).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
