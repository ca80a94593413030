"""What does a run say when memory runs out? One line: where, how much, which flag to try next, what is left.

A flag that saves memory is added to `next_in_training` or `next_in_inference`, at its place in the order of what it
costs. A run that ends so has exit code 1, as one that diverged: its input may be right for another machine.
"""

import contextlib
import functools
import re
from collections.abc import Callable

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

from glance.ask.pipeline import is_out_of_memory
from glance.encoders import free_memory
from glance.files.checkpoints import NOT_COMPARED, find_checkpoints
from glance.training import distribution
from glance.training.estimate import Estimate


ALLOCATED = re.compile(r"tried to allocate ([\d.]+ ?(?:[KMGT]i?B|bytes))", re.IGNORECASE)  # torch's words


class OutOfMemory(MemoryError):
    """Memory ran out; the message is one line that says where, and what to try."""

    def __init__(self, where: str, hint: str, stage: str | None = None):
        super().__init__(f"{where}; {hint}")
        self.where, self.hint, self.stage = where, hint, stage  # the last as Estimate.stages names it


@contextlib.contextmanager
def explained(place: Callable[[], str], hint: Callable[[], str], stage: str | None = None):
    """Turn a lack of memory inside into OutOfMemory, unless one inside has done so; `stage` is the estimate's word.

    place() and hint() are asked only then: where it was, and what to do.
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
        raise OutOfMemory(f"out of memory while {place()}{more}", hint(), stage) from error


# --------------------------------------------------------------------------------------------------------------------
# Training


def in_encoding(args):
    """Return the context of the encoding of prompts and image, which no flag for the transformer makes smaller."""
    hint = "--mixed_precision bf16" if args.mixed_precision == "no" else "a smaller --resolution"
    return explained(lambda: "encoding the prompts and the image", lambda: f"try {hint}", "encoding")


def in_training(args, stage: str, place: Callable[[], str], checkpointing: bool | None = None):
    """Return the context of a stage of training, in the estimate's word and in a reader's; `checkpointing` says, while
    LoRAs are trained, whether gradients are checkpointed, or could not be."""
    return explained(place, functools.partial(training_hint, args, checkpointing), stage)


@contextlib.contextmanager
def compared(needs: Callable[[], Estimate], args, device: torch.device):
    """Add to an OutOfMemory inside what its stage needs by the estimate, and what there is.

    needs() is asked only then. Where memory is short it may fail as well: then the line stays as it is.
    """
    try:
        yield
    except OutOfMemory as error:
        there = usable_memory(device)
        try:
            needed = needs().stages(args)[error.stage]
        except Exception:
            raise error from error.__cause__
        estimated = f"by the estimate {needed / 1e9:.3g} GB are needed, of {there / 1e9:.3g}"
        raise OutOfMemory(f"{error.where}; {estimated}", error.hint) from error


def usable_memory(device: torch.device) -> int:
    """Return the bytes on the device that this process has or could have."""
    own = torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
    return free_memory(device) + own


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
    return explained(lambda: "drawing the preview", lambda: hint, "preview")


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
