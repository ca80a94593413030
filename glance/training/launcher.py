"""What was `accelerate launch` told? It is the default of our own flags, or refused where it would change nothing.

It reaches a script through the environment, whether it comes from the launcher's flags or from `accelerate config`.
The launcher also says "no" where nobody said anything, so there a script's own flag decides alone. A setting of the
launcher that nothing here does belongs in REFUSED.
"""

import contextlib
import os

import torch
from accelerate.utils import parse_flag_from_env

from glance.ask.pipeline import first_line
from glance.command_line import Settings
from glance.shared_flags import DTYPES
from glance.training.flags import BATCHES
from glance_utils import InputError


SILENT = ("", "no", "none", "auto")
# Each would silently not be done, or be done to something that is not there: what to give instead.
REFUSED = {
    "ACCELERATE_DYNAMO_BACKEND": "leave --dynamo_backend out; --compile compiles the model's blocks",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM has no diffusers models; launch with --use_fsdp --fsdp_version 2",
    "PARALLELISM_CONFIG_TP_SIZE": "there is no tensor parallelism here; shard the base by FSDP alone",
    "PARALLELISM_CONFIG_CP_SIZE": "there is no context parallelism here; shard the base by FSDP alone",
    "PARALLELISM_CONFIG_SP_SIZE": "there is no sequence parallelism here; shard the base by FSDP alone",
    "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "the base is sharded among all processes; leave it out",
    "ACCELERATE_DOWNCAST_BF16": "it is for TPUs, on which nothing here runs; leave --downcast_bf16 out",
    "XLA_DOWNCAST_BF16": "it is for TPUs, on which nothing here runs; leave --downcast_bf16 out",
}


def launched_value(variable: str) -> str | None:
    """Return what the launcher put into this variable, None where that says nothing."""
    text = os.environ.get(variable, "").strip().lower()
    return None if text in SILENT else text


def launched_number(variable: str, kind: type) -> int | float | None:
    """Return the same as a number; raise InputError where it is none above 0."""
    if (text := launched_value(variable)) is None:
        return None
    try:
        if (value := kind(text)) > 0:
            return value
    except ValueError:
        pass
    raise InputError(f"accelerate was launched with {variable}={text!r}; it takes a number above 0")


def launched_precision() -> str | None:
    """Return the launcher's mixed precision, "fp16" or "bf16", None for "no"; raise InputError for any other."""
    text = launched_value("ACCELERATE_MIXED_PRECISION")
    if text == "fp8":
        raise InputError(
            "accelerate was launched with --mixed_precision fp8, in which it trains a whole model; launch with bf16, "
            "and give the script --quantization fp8 for a frozen base in fp8"
        )
    if text not in (None, *DTYPES):
        raise InputError(f"accelerate was launched with mixed precision {text!r}; it takes no, fp16 or bf16")
    return text


def agreed(flag: str, given, launched, default):
    """Return the flag's given value, else the launcher's, else the default; raise InputError where the two differ."""
    if given is not None and launched is not None and given != launched:
        raise InputError(
            f"--{flag} is {given}, but accelerate was launched with {launched}; give one of them, or the same"
        )
    return next((value for value in (given, launched) if value is not None), default)


def check() -> None:
    """Raise InputError where the launcher asks for what neither script does."""
    for variable, instead in REFUSED.items():
        value = launched_value(variable)
        if value not in (None, "false", "0", "1" if variable.endswith("_SIZE") else None):
            raise InputError(f"accelerate was launched with {variable}={value}: {instead}")
    check_devices()


def check_devices() -> None:
    """Raise InputError where more processes were launched on this machine than it has accelerators.

    Without any, accelerate would let each of them train alone; with too few, torch says "invalid device ordinal".
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or int(os.environ.get("LOCAL_RANK", 0)) + 1)
    devices = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    on_cpu = launched_value("ACCELERATE_USE_CPU") not in (None, "false", "0")
    on_cpu = on_cpu or os.environ.get("ACCELERATE_TORCH_DEVICE") == "cpu"  # accelerate's own word for it
    if not on_cpu and local > max(devices, 1):
        accelerators = "1 accelerator" if devices == 1 else f"{devices} accelerators"
        raise InputError(
            f"{local} processes were launched on a machine of {accelerators}; launch with --num_processes "
            f"{max(devices, 1)}, or with ACCELERATE_USE_CPU=1 in the environment for all of them on the CPU"
        )


def with_defaults(args: Settings) -> Settings:
    """Return the settings with the launcher's values for flags not given; raise InputError where the two differ."""
    check()
    checkpointing = (
        parse_flag_from_env("ACCELERATE_USE_FSDP") and launched_value("FSDP_ACTIVATION_CHECKPOINTING") == "true"
    )
    launched = {
        "mixed_precision": (launched_precision(), "no"),
        "gradient_accumulation_steps": (
            launched_number("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", int),
            BATCHES.get(args.loss, 1),
        ),
        "max_grad_norm": (launched_number("ACCELERATE_GRADIENT_CLIPPING", float), 1.0),
        "gradient_checkpointing": (checkpointing or None, None),
    }
    return args.replace(**{flag: agreed(flag, getattr(args, flag), *values) for flag, values in launched.items()})


def agreed_dtype(given: str | None) -> str:
    """Return the dtype that infer_glance.py computes in: float32 where nobody says another."""
    check()
    return agreed("dtype", given, DTYPES.get(launched_precision()), "float32")


@contextlib.contextmanager
def begun():
    """Let accelerate begin inside; raise InputError where it cannot do what it was launched with."""
    try:
        yield
    except (ImportError, ValueError, RuntimeError) as error:  # no DeepSpeed, no such dtype, a port in use
        reason = first_line(error)
        raise InputError(f"accelerate cannot begin as it was launched ({reason}); launch it otherwise") from error
