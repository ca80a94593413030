"""What does a run say of itself? At once what it was asked for, then what the base makes of it, at the end what it
took and what lies where.

Nothing is imported here but the standard library, so that the first lines come before the libraries. Captions do not
belong in what a run prints.
"""

import json
import logging
import os
import platform
import re
from pathlib import Path

from glance import command_line as cli
from glance.command_line import Settings
from glance.shared_flags import DTYPES


logger = logging.getLogger(__name__)

WHAT = {
    "instance.png": "what was trained on",
    "glance.png": "the caption, drawn with both LoRAs",
    "validation": "the validation prompts: the base's full run, its few steps, Glance",
    "sampler.json": "the steps and how to step, without weights",
    "scheduler": "the same for any diffusers pipeline, FixedSigmaScheduler.from_pretrained",
    "comfyui.json": "a graph for ComfyUI, stock nodes alone",
    "comfyui": "the LoRAs for its folder",
    "calls.csv": "errors over numbers of model calls",
    "calls.png": "what they look like",
    "loss.csv": "all losses",
    "loss.png": "what they look like",
    "trajectories.safetensors": "what the base drew, for the next run",
    "README.md": "the model card",
}


def begin(args: Settings) -> None:
    """Say what the run was asked for, then, when torch is there, on which device: within two seconds."""
    if not cli.is_first_process():
        return
    cli.show_own_logs()
    kind = base_class(args.pretrained_model_name_or_path, args.revision)
    grid = f"{'timesteps as given' if args.flow_custom_timesteps else f'{args.grid} grid'}, {args.solver} solver"
    if args.guidance == "mix":
        grid = f"{args.num_model_calls} model calls"
    scale = "" if args.guidance_scale is None else f" {args.guidance_scale:g}"
    logger.info("***** Glance *****")
    logger.info(f"  Base = {args.pretrained_model_name_or_path}{f', {kind}' if kind else ''}")
    logger.info(f"  Loss = {args.loss}, {grid}, guidance{scale}: {args.guidance}")
    learning = f"{args.optimizer or 'optimizer as it fits'}, learning rate {args.learning_rate:g}"
    if args.max_train_steps:
        logger.info(f"  LoRA = rank {args.rank}, {args.max_train_steps} steps of {learning}")
    logger.info(f"  Output = {args.output_dir}")
    dtype = DTYPES.get(args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION"), "float32")
    logger.info(f"  Device = {device_name()}; {dtype}, quantization {args.quantization or 'as it fits'}")
    logger.info("Starting")  # the libraries are imported, then the image is read


def base_class(base: str, revision: str | None) -> str | None:
    """Return the class of the pipeline, where its model_index.json is on this machine."""
    path = Path(base, "model_index.json")
    try:
        if not path.exists():
            from huggingface_hub import try_to_load_from_cache

            path = try_to_load_from_cache(base, path.name, revision=revision)
        name = json.loads(Path(path).read_text(encoding="utf-8"))["_class_name"]
        return name if name.isidentifier() else None
    except Exception:  # not downloaded, or not what it should be, which the run itself will say
        return None


def device_name() -> str:
    """Return the device that accelerate will take, and its name."""
    import torch

    device = torch.accelerator.current_accelerator(check_available=True)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    among = f", the first of {processes} processes" if processes > 1 else ""
    if device is None or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on"):
        return f"cpu, {processor()}, {torch.get_num_threads()} threads{among}"
    index = int(os.environ.get("LOCAL_RANK", 0))
    name = torch.cuda.get_device_name(index) if device.type == "cuda" else platform.processor()
    return f"{device.type}, {name}{among}"


def processor() -> str:
    """Return the name of the processor, as far as the system tells."""
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def say_adapted(transformer, layers: list[str], rank: int) -> None:
    """Say how many layers each LoRA adapts, and how many parameters it trains."""
    sizes = [transformer.get_submodule(layer) for layer in layers]
    count = sum(rank * (layer.in_features + layer.out_features) for layer in sizes)
    logger.info(f"  Adapted = {len(layers)} layers, {count:,} trainable parameters in each LoRA")


def say_steps(steps, base_timesteps: list[float]) -> None:
    """Say which of the base's steps were taken, counted from 1, by what grid, and for which solver."""
    solver = "fitted" if steps.coefficients else "euler"
    if steps.grid is None:
        logger.info(f"  Sampler = timesteps as given, {solver} solver")
        return
    phases = {
        phase: [str(base_timesteps.index(timestep) + 1) for timestep in timesteps]
        for phase, timesteps in steps.phases.items()
    }
    kind, meaning = f"{steps.grid} grid, {solver} solver", ""
    if steps.branches is not None:
        kind, meaning = "mixed branches", " (P: the prompt's branch, N: the negative prompt's, B: both)"
        called = {phase: [branches[0].upper() for branches in steps.branches_of(phase)] for phase in phases}
        phases = {phase: list(map("".join, zip(called[phase], phases[phase]))) for phase in phases}
    places = " | ".join(map(" ".join, phases.values()))
    logger.info(f"  Sampler = {kind}, positions {places} of {len(base_timesteps)}{meaning}")


def say_error(sampler) -> None:
    """Say how far a sampler.json's sampler ends from the full run, and what that was measured on."""
    measured = "another trajectory"
    if sampler.branches is not None:
        others = "captions" if sampler.captions > 1 else "noises"
        measured = f"{others} on which it was not fitted"
    logger.info(f"  Error = {sampler.error:.4f} to {sampler.num_base_steps} steps, on {measured}")


def say_training(args, processes: int, prepared, size: tuple[int, int]) -> None:
    """Say what is about to be trained; `size` is (height, width) in pixels."""
    batch = args.train_batch_size * processes * args.gradient_accumulation_steps
    logger.info("***** Running training *****")
    logger.info(f"  Phases = {', '.join(prepared.steps.phases)}, {args.max_train_steps} steps each")
    logger.info(f"  Image = {size[1]}x{size[0]}, latents {tuple(prepared.latents.shape)}")
    say_steps(prepared.steps, prepared.answers.timesteps)
    logger.info(f"  Total batch size = {batch}")


def say_done(report: list[str], output_dir: Path, phases: list[str]) -> None:
    """Say what each stage took, as `report` has it, and what lies where."""
    from glance.files.recipe import WEIGHT_NAME

    folders = [f"{phase}/" for phase in phases] if len(phases) == 2 else [""]
    logger.info("***** Done *****")
    for line in report:
        logger.info(f"  {line}")
    names = {f"{folder}{WEIGHT_NAME}": f"the {phase} LoRA" for phase, folder in zip(phases, folders)}
    logger.info(f"  In {output_dir}:")
    written = {name: what for name, what in (names | WHAT).items() if (output_dir / name).exists()}
    for name, what in written.items():
        logger.info(f"    {name:{max(map(len, written))}}  {what}")
