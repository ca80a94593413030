"""Which of a denoiser's layers does a LoRA adapt, and how does it compute, in training and when it is fused?

The layers of a new architecture belong in the two expressions below; no model is named here.
"""

import contextlib
import re
import types

import torch
import torch.nn.functional as F
from diffusers.loaders import PeftAdapterMixin
from peft import LoraConfig
from peft.tuners.lora import LoraLayer

from glance_utils import InputError, activate_adapter, adapted_layers, strengths


# All of attention, and what the official recipe adds: modulation and the output of MLPs.
DEFAULT_LAYERS = re.compile(
    r"\w*att(n|ention)\w*\.(.+\.)?\w+|to_[qkv]|to_out|proj_out|(img|txt)_mod\.1|norm(1|1_context)?\.linear"
)
FEED_FORWARD = re.compile(r"(ff\w*|feed_forward\w*|\w*mlp)\..+")


def lora_layers(transformer, names: str | None = None) -> list[str]:
    """Return the full names of the linear layers in the transformer's blocks that a LoRA adapts.

    These are DEFAULT_LAYERS, or those that end in one of the comma-separated `names`. Raise InputError, which lists
    the candidates, where nothing matches.
    """
    linear = {
        name: module
        for name, module in transformer.named_modules()
        if isinstance(module, torch.nn.Linear) and re.search(r"\.\d+\.", name)
    }
    if names is None:
        chosen = [name for name, module in linear.items() if _is_default(name, module)]
        if not chosen:  # it names its layers in its own way: all of its attention
            kinds = {name: type(module).__name__ for name, module in transformer.named_modules()}
            chosen = [name for name in linear if "Attention" in kinds[name.rpartition(".")[0]]]
    else:
        endings = tuple("." + name.strip() for name in names.split(",") if name.strip())
        chosen = [name for name in linear if f".{name}".endswith(endings)]
    if not chosen:
        kinds = sorted({re.sub(r"^.*\.\d+\.(?=[^\d])", "", name) for name in linear})
        raise InputError(f"--lora_layers {names or 'by default'}: nothing matches; candidates are {', '.join(kinds)}")
    return chosen


def _is_default(name: str, module: torch.nn.Linear) -> bool:
    """Return whether a LoRA adapts this layer by default; an MLP's output layer is the one that narrows it again."""
    in_block = name.split(".", 1)[1]
    if re.search(rf"(^|\.){FEED_FORWARD.pattern}$", in_block):
        return module.in_features > module.out_features
    return bool(re.search(rf"(^|\.)({DEFAULT_LAYERS.pattern})$", in_block))


def with_adapters(transformer):
    """Return the transformer itself, with diffusers' LoRA methods mixed in where its class lacks them."""
    if not isinstance(transformer, PeftAdapterMixin):
        kind = type(transformer)
        transformer.__class__ = type(kind.__name__, (kind, PeftAdapterMixin), {"__module__": kind.__module__})
    return transformer


def fresh_lora(transformer, name: str, layers: list[str], device: torch.device, seed: int, **shape) -> None:
    """Give the transformer a float32 LoRA of this name on these layers, as at the beginning of its training.

    `shape` are peft.LoraConfig's r, lora_alpha and lora_dropout. One that is there begins anew, so that nothing is
    compiled twice. `seed` makes it the same on every process.
    """
    if name not in getattr(transformer, "peft_config", {}):
        transformer.add_adapter(LoraConfig(**shape, target_modules=layers), name)
        for parameter in transformer.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(device, torch.float32)
        compute_as_saved(transformer)
    torch.manual_seed(seed)
    for layer in transformer.modules():
        if isinstance(layer, LoraLayer):
            layer.reset_lora_parameters(name, "gaussian")


def compute_as_saved(transformer) -> None:
    """Let the LoRAs compute in their input's dtype and with alpha / rank in lora_B, as the saved file will.

    Training then sees, to the last bit, what inference in that dtype sees. peft computes in the dtype of the LoRA's
    weights, which are float32 while training: slower, and every input is kept once more in float32 for backward.
    """
    for layer in transformer.modules():
        if isinstance(layer, LoraLayer):
            layer.forward = types.MethodType(_forward_as_saved, layer)


def _forward_as_saved(layer: LoraLayer, x: torch.Tensor) -> torch.Tensor:
    """Return the layer's output (..., out) for x (..., in), the active LoRAs added in x's dtype."""
    result = layer.base_layer(x)
    for name in [] if layer.disable_adapters else layer.active_adapters:
        if name in layer.lora_A:
            lora_B = layer.lora_B[name].weight * layer.scaling[name]
            share = getattr(layer.lora_dropout[name], "p", 0.0)
            kept = F.dropout(x, share, training=torch.is_grad_enabled())  # never in a picture
            low_rank = F.linear(kept, layer.lora_A[name].weight.to(x.dtype))
            result = result + F.linear(low_rank, lora_B.to(x.dtype))
    return result


def let_act(transformer, scales: dict[str, float]) -> None:
    """Let these adapters act, each at so many times its strength, and no other."""
    beside = {}
    for layer in adapted_layers(transformer):
        beside[layer] = [name for name in scales if name in strengths(layer)]
        for name in beside[layer]:
            layer.set_scale(name, scales[name])
    activate_adapter(transformer, None, others=beside)


@contextlib.contextmanager
def fused_adapters(transformer):
    """Yield a function like `activate_adapter` that adds the LoRA to the base's own weights: then it costs no time.

    Each is added to a copy of the base's weights, never to what another left: afterwards the base is as it was, to
    the bit. It takes the memory of the adapted layers once more. Adapters that are active act beside it. Raise
    InputError for adapters that cannot be added to the weights.
    """
    layers = adapted_layers(transformer)
    for layer in layers:
        if not isinstance(layer, LoraLayer) or layer.lora_magnitude_vector or any(layer.lora_bias.values()):
            raise InputError(
                "these adapters have magnitudes (DoRA), biases or another form than LoRA's, which cannot be added to "
                "the weights; leave --fuse_lora and --compile out"
            )
    weights = [layer.get_base_layer().weight for layer in layers]
    copies = [weight.detach().clone() for weight in weights]

    @torch.no_grad()
    def activate(transformer, name: str | None, scale: float = 1.0, others: dict | None = None) -> None:
        for layer, weight, copy in zip(layers, weights, copies):
            if name in layer.lora_A:
                layer.set_scale(name, scale)
                down, up = (part[name].weight.to(weight) for part in (layer.lora_A, layer.lora_B))
                torch.addmm(copy.to(weight), up, down, alpha=layer.scaling[name], out=weight)
            else:
                weight.copy_(copy)

    try:
        yield activate
    finally:
        activate(transformer, None)
