"""Where do a pipeline's encoders answer, so that they fit? On the device or, the largest of them, in host memory.

Prompts are encoded once, so time matters little here, and what is encoded must be the same in both places.
"""

import itertools
import logging

import psutil
import torch
from accelerate import cpu_offload
from diffusers import DiffusionPipeline

from glance.ask.pipeline import controlnets, freeable_components


logger = logging.getLogger(__name__)

KEPT_FREE = 0.1  # of the memory: for what no estimate counts, such as the accelerator's own context


def kept_away(sizes: dict[str, int], memory: int) -> list[str]:
    """Return which encoders stay off a device that has `memory` bytes for them: the largest, where not all of them
    fit with a tenth to spare. The VAE, which is small, is always there.

    `sizes` are their bytes by name, the VAE's among them; what is returned is in ascending order.
    """
    ascending = sorted(sizes, key=lambda name: (name != "vae", sizes[name]))
    totals = itertools.accumulate(sizes[name] for name in ascending)
    return [name for name, total in zip(ascending, totals) if name != "vae" and total > (1 - KEPT_FREE) * memory]


def free_memory(device: torch.device) -> int:
    """Return the bytes that can still be allocated on the device."""
    if device.type == "cuda":
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch holds it
        return torch.cuda.mem_get_info(device)[0] + reusable
    return psutil.virtual_memory().available


def place_encoders(pipe: DiffusionPipeline, device: torch.device, memory: int) -> None:
    """Put every model but the denoisers onto the device, of which `memory` bytes are theirs; encoders that do not fit
    stay in host memory, and their layers visit the device while they compute. The log says which, and why.
    """
    for model in controlnets(pipe).values():
        model.to(device)
    models = freeable_components(pipe)
    sizes = {name: bytes_of(model) for name, model in models.items()}
    away = kept_away(sizes, memory) if device.type != "cpu" else []
    for name, model in models.items():
        offload_layers(model, device) if name in away else model.to(device)
    why = f"as {max(memory, 0) / 1e9:.1f} GB are there for them, a tenth to spare"
    if away:
        kept = " and ".join(f"{name} ({sizes[name] / 1e9:.1f} GB)" for name in away)
        logger.info(f"Encoders: {kept} in host memory, layer by layer on {device}, {why}")
    elif device.type != "cpu":
        logger.info(f"Encoders: all on {device}, {sum(sizes.values()) / 1e9:.1f} GB, {why}")


def offload_layers(model: torch.nn.Module, device: torch.device) -> None:
    """Keep a model's weights in host memory, each layer's on the device while it computes and on no device else.

    What it computes is the same, by any of its methods. It says that it is on the device, as pipelines move its inputs
    to where it says it is.
    """
    cpu_offload(model, device)
    kind = type(model)
    model.__class__ = type(kind.__name__, (kind,), {"device": device, "__module__": kind.__module__})


def bytes_of(model: torch.nn.Module) -> int:
    """Return the bytes of a model's weights and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
