"""Time a training step: seconds, model FLOP/s against the device's own matrix products, peak memory.

    python benchmarks/train_step.py --shape small --dtype float32
    python benchmarks/train_step.py --shape flux-dev --gradient_checkpointing
    python benchmarks/train_step.py --pretrained_model_name_or_path demo/model --resolution 96 --dtype float32

The step is that of train_glance_lora.py, with its own adapter, optimizer and velocity: noise, one pass through the
pipeline, loss, backward, clipping, AdamW. The base has random weights (--shape) or those of a pipeline directory.
"""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent.parent))

from glance import start


if __name__ == "__main__":
    start.as_script("what was not written yet is lost")

import statistics

import shapes
import torch
from accelerate import Accelerator

import train_glance_lora as train
from glance import command_line as cli
from glance.adapters import lora_layers
from glance.ask import pipeline as ask
from glance.ask.velocity import PipelineVelocity
from glance.encoders import free_memory
from glance.training import estimate
from glance.training.draws import Draw
from glance.training.log import check_finite
from glance.training.losses import Flow, Objective, step_losses
from glance.training.weightless import Counter
from glance_utils import InputError


SIGMAS = (1.0, 0.97, 0.94, 0.91, 0.88)


def glance_step(args, pipe, call, latents, layers: str | None = None):
    """Return (a function that trains one step, as the loop of train_glance_lora.py does, and returns the loss; the
    model whose velocity it trains)."""
    settings = ["--pretrained_model_name_or_path", "-", "--rank", str(args.rank)]
    settings += ["--compile"] if args.compile else []
    settings = train.parse_args(settings + (["--use_8bit_adam"] if args.use_8bit_adam else []))
    accelerator = Accelerator(cpu=args.device == "cpu", mixed_precision=shapes.MIXED_PRECISION[args.dtype])
    layers = lora_layers(pipe.transformer, layers)
    parameters = train.fresh_adapter(settings, accelerator, pipe.transformer, layers)
    optimizer, lr_scheduler = train.make_optimizer(settings, parameters)
    call = {name: value for name, value in call.items() if name != ask.batch_argument(pipe)}  # the model's own to set
    model = PipelineVelocity(pipe, **call)
    optimizer = accelerator.prepare_optimizer(optimizer)
    objective = Objective(list(SIGMAS), Flow(latents))
    generator = torch.Generator().manual_seed(0)
    done = 0

    def step():
        nonlocal done
        draw = Draw([done % len(SIGMAS)], torch.randn(latents.shape, generator=generator))
        done += 1
        loss, losses = step_losses(model, objective, draw)
        mean_loss = accelerator.gather(losses.detach()).mean().item()
        check_finite(mean_loss, "loss", "slow", done, 1000 * SIGMAS[draw.positions[0]])
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        lr_scheduler.step()
        return mean_loss

    return step, model


def main(argv: list[str] | None = None):
    args = shapes.parse(shapes.parser("Time a training step."), argv)
    estimated = estimated_peak(args)
    if estimated > (free := free_memory(torch.device(args.device))):
        raise InputError(f"it needs {estimated / 2**30:.1f} GiB by the estimate, {free / 2**30:.1f} GiB are free")
    pipe, call, latents = shapes.make_pipeline(args)
    counted = shapes.count_flops(pipe.transformer, lambda: velocity_once(pipe, call, latents))
    step, _ = glance_step(args, pipe, call, latents)
    held = measured_peak(args, pipe.transformer, step) if args.device == "cpu" else None
    times = shapes.in_turns({"step": step}, args)["step"]
    memory = shapes.peak_memory(args.device)
    flops, rate = shapes.training_flops(counted), shapes.matmul_rate(args)
    median = statistics.median(times)
    result = shapes.model_facts(args, pipe, latents) | {
        "use_8bit_adam": args.use_8bit_adam,
        "step_seconds": median,
        "step_seconds_all": [round(value, 4) for value in times],
        "model_tflop": flops / 1e12,
        "model_tflop_per_second": flops / median / 1e12,
        "matmul_tflop_per_second": rate / 1e12,
        "share_of_matmul_rate": flops / median / rate,
        "peak_memory_gib": memory / 2**30,
        "tensors_at_peak_gib": (held or memory) / 2**30,
        "estimated_peak_gib": estimated / 2**30,
    }
    shapes.report(result | shapes.machine(args.device), args.json)


def estimated_peak(args) -> int:
    """Return the bytes that the estimate (glance/training/estimate.py) says this step needs."""
    pipe = shapes.weightless_pipeline(args)
    call = shapes.single_call(args, pipe)
    latents = torch.zeros_like(shapes.loop_latents(pipe, **call))
    model = PipelineVelocity(pipe, **{name: value for name, value in call.items() if name != ask.batch_argument(pipe)})
    objective, draw = Objective(list(SIGMAS), Flow(latents)), Draw([0], latents)
    work = estimate.Work(train=lambda: step_losses(model, objective, draw)[0])
    layers, checkpointing = lora_layers(pipe.transformer), args.gradient_checkpointing
    needed = estimate.estimate(pipe, layers, args.rank, work, checkpointing=[checkpointing])
    optimizer = "adamw8bit" if args.use_8bit_adam else "adamw"
    return needed.stages(estimate.Choice(args.quantization, checkpointing, optimizer))["training"]


def measured_peak(args, transformer, step) -> int:
    """Return the most bytes of tensors alive in two steps, the first of which makes the optimizer's state: on a CPU,
    whose allocator tells nothing."""
    with Counter(transformer) as counter:
        step()
        step()
    return estimate.saved_bytes(transformer) + counter.peak


def velocity_once(pipe, call, latents):
    """Return the velocity (B, ...) of one call through the pipeline."""
    call = {name: value for name, value in call.items() if name != ask.batch_argument(pipe)}
    return PipelineVelocity(pipe, **call)(latents, 1.0)


if __name__ == "__main__":
    cli.run(main)
