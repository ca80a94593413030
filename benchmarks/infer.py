"""Time inference: ten base steps and Glance's ten, in turns, with model FLOP/s and peak memory.

    python benchmarks/infer.py --shape small --dtype float32
    python benchmarks/infer.py --shape flux-dev
    python benchmarks/infer.py --pretrained_model_name_or_path demo/model --resolution 96 --dtype float32

Both are calls of the pipeline from noise to final latents, without text encoders and VAE; guidance is off.
Glance's has two LoRAs with random weights, in --dtype, and the hand-off between them, beside the weights and fused.
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
from peft import LoraConfig
from train_step import velocity_once

from glance import base as load_base
from glance import command_line as cli
from glance.adapters import fused_adapters, lora_layers
from glance.ask.schedule import ask_timesteps
from glance_utils import PHASES, activate_adapter, derive_timesteps, glance_inference


def add_loras(transformer, rank: int) -> None:
    """Add both adapters with small random weights, none active."""
    lora = {"r": rank, "lora_alpha": rank, "target_modules": lora_layers(transformer)}
    for phase in PHASES:
        transformer.add_adapter(LoraConfig(**lora, init_lora_weights=False), phase)
    for name, parameter in transformer.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(transformer.dtype) / 10
    activate_adapter(transformer, None)


def main(argv: list[str] | None = None):
    args = shapes.parse(shapes.parser("Time ten base steps and Glance's ten."), argv)
    pipe, call, latents = shapes.make_pipeline(args)
    schedule = derive_timesteps(ask_timesteps(pipe, 50, **call))
    count = sum(map(len, schedule.values()))
    counted = shapes.count_flops(pipe.transformer, lambda: velocity_once(pipe, call, latents))
    add_loras(pipe.transformer, args.rank)
    if args.compile:
        load_base.compile_blocks(pipe.transformer)
    pipe.set_progress_bar_config(disable=True)

    def draw(**kwargs):
        return pipe(**call, **kwargs, output_type="latent", generator=torch.Generator().manual_seed(0))

    def draw_glance(fuse: bool):
        fused = fused_adapters(pipe.transformer) if fuse else contextlib.nullcontext(activate_adapter)
        with fused as activate, glance_inference(pipe, schedule, activate=activate) as kwargs:
            draw(**kwargs)

    ways = {"base": lambda: draw(num_inference_steps=count), "glance": lambda: draw_glance(False)}
    if args.quantization == "none":
        ways["fused"] = lambda: draw_glance(True)
    times = shapes.in_turns(ways, args)
    memory, rate = shapes.peak_memory(args.device), shapes.matmul_rate(args)
    median, flops = statistics.median(times["base"]), count * (counted.linear + counted.attention)
    result = shapes.model_facts(args, pipe, latents) | {
        "steps": count,
        **{f"{way}_seconds": statistics.median(times[way]) for way in ways},
        **{f"{way}_to_base": shapes.ratio(times[way], times["base"]) for way in ways if way != "base"},
        "model_tflop": flops / 1e12,
        "model_tflop_per_second": flops / median / 1e12,
        "matmul_tflop_per_second": rate / 1e12,
        "share_of_matmul_rate": flops / median / rate,
        "peak_memory_gib": memory / 2**30,
    }
    shapes.report(result | shapes.machine(args.device), args.json)


if __name__ == "__main__":
    cli.run(main)
