"""What does a run say when memory runs out? One line: where, how much, which flag to try next, what is left.

A flag that saves memory is added to `next_in_training` or `next_in_inference`, at its place in the order of what it
costs. A run that ends so has exit code 1, as one that diverged: its input may be right for another machine.
"""

import contextlib
import functools
import re
from collections.abc import Callable

from accelerate import PartialState
from accelerate.utils import DistributedType

from glance.ask.pipeline import is_out_of_memory
from glance.files.checkpoints import NOT_COMPARED, find_checkpoints
from glance.training import distribution


ALLOCATED = re.compile(r"tried to allocate ([\d.]+ ?(?:[KMGT]i?B|bytes))", re.IGNORECASE)  # torch's words


class OutOfMemory(MemoryError):
    """Memory ran out; the message is one line that says where, and what to try."""


@contextlib.contextmanager
def explained(stage: Callable[[], str], hint: Callable[[], str]):
    """Turn a lack of memory inside into OutOfMemory, unless a stage inside has done so.

    stage() and hint() are asked only then: where it was, and what to do.
    """
    try:
        yield
    except OutOfMemory:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        asked = ALLOCATED.search(str(error))
        more = f", {asked[1]} more were asked for" if asked else ""
        raise OutOfMemory(f"out of memory while {stage()}{more}; {hint()}") from error


# --------------------------------------------------------------------------------------------------------------------
# Training


def in_encoding(args):
    """Return the context of the encoding of prompts and image, which no flag for the transformer makes smaller."""
    hint = "--mixed_precision bf16" if args.mixed_precision == "no" else "a smaller --resolution"
    return explained(lambda: "encoding the prompts and the image", lambda: f"try {hint}")


def in_training(args, stage: str | Callable[[], str], checkpointing: bool | None = None):
    """Return the context of a stage of training; `checkpointing` says, while LoRAs are trained, whether gradients
    are checkpointed, or could not be."""
    named = stage if callable(stage) else lambda: stage
    return explained(named, functools.partial(training_hint, args, checkpointing))


def next_in_training(args, checkpointing: bool | None) -> str | None:
    """Return the flag to try next, of those that this run could take; None where all are on."""
    state = PartialState()
    trains, full = checkpointing is not None, args.quantization == "none"
    full_adam = args.optimizer == "adamw" and state.distributed_type != DistributedType.DEEPSPEED
    quantizes = not distribution.is_sharded()
    offloads = state.num_processes == 1 and state.device.type != "cpu" and not args.enable_group_offload
    choices = {
        "--gradient_checkpointing": trains and not checkpointing,
        "--use_8bit_adam": trains and full_adam,
        "--quantization int8": quantizes and full and not args.enable_group_offload,
        "--quantization nf4": quantizes and args.quantization in ("int8", "fp8"),
        "--enable_group_offload": offloads and full,
        f"--enable_group_offload without --quantization {args.quantization}": offloads and not full,
    }
    return next((flag for flag, serves in choices.items() if serves), None)


def training_hint(args, checkpointing: bool | None) -> str:
    """Return what to try next, and how the newest checkpoint goes on."""
    flag = next_in_training(args, checkpointing)
    hint = f"try {flag}" if flag else "try a smaller --resolution or --rank"
    checkpoints = find_checkpoints(args.output_dir) if checkpointing is not None else []
    if not checkpoints:
        return hint
    newest = "latest" if args.parallel_phases else checkpoints[-1][1]
    if flag and set(re.findall(r"--(\w+)", flag)) <= NOT_COMPARED:
        return f"{hint}, and go on with --resume_from_checkpoint {newest}"
    return f"{hint}, from the start: {checkpoints[-1][1]} goes on with this run's flags alone"


def in_preview():
    """Return the context of the preview, after which nothing but the model card would come."""

    hint = "the LoRAs are written; infer_glance.py draws with them, in less memory with --enable_model_cpu_offload"
    return explained(lambda: "drawing the preview", lambda: hint)


# --------------------------------------------------------------------------------------------------------------------
# Inference


def in_inference(args, stage: str):
    """Return the context of a stage of inference."""
    return explained(lambda: stage, functools.partial(inference_hint, args))


def next_in_inference(args, accelerated: bool) -> str | None:
    """Return the flag to try next; None where all are on. `accelerated`: there is a device to move weights off."""
    group, model, sequential = (
        getattr(args, f"enable_{kind}_offload") for kind in ("group", "model_cpu", "sequential_cpu")
    )
    full, fixed = args.quantization == "none", args.fuse_lora and not args.compile
    choices = {
        "without --fuse_lora": fixed,
        "--quantization int8": full and not group,
        "--quantization nf4": args.quantization in ("int8", "fp8") and not sequential,
        "--enable_model_cpu_offload": accelerated and not (group or model or sequential),
        "--enable_group_offload without --enable_model_cpu_offload": accelerated and model and full,
        f"--enable_group_offload without --enable_model_cpu_offload and --quantization {args.quantization}": (
            accelerated and model and not full
        ),
        "--enable_vae_tiling": not args.enable_vae_tiling,
    }
    return next((flag for flag, serves in choices.items() if serves), None)


def inference_hint(args) -> str:
    """Return what to try next, and what is left."""
    flag = next_in_inference(args, PartialState().device.type != "cpu")
    return f"try {flag or 'a smaller --height and --width'}; what was drawn before is written"
