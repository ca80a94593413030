"""How is a LoRA file written, and loaded so that nothing of it is lost? diffusers' format, the recipe in its header.

A file that was written before must stay readable; how other trainers write theirs is lora_forms' business.
"""

import json
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers import __version__ as diffusers_version
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save

from glance.adapters import with_adapters
from glance.ask.pipeline import replaced
from glance.files.atomic import replace_file
from glance.files.lora_forms import read_lora
from glance.files.recipe import WEIGHT_NAME, Recipe
from glance_utils import InputError, adapted_layers, denoiser, strengths


def load_lora(pipe: DiffusionPipeline, path: str | Path, adapter: str) -> None:
    """Load a LoRA file of any form that read_lora reads into the denoiser, under this name, active.

    Raise InputError where the file does not fit, or where the layers do not hold exactly its values afterwards.
    """
    model = with_adapters(denoiser(pipe))
    if adapter in getattr(model, "peft_config", {}):
        raise InputError(f"an adapter {adapter!r} is loaded already; unload it first, or choose another name")
    lora = read_lora(pipe, Path(path))
    peft_place = BaseTunerLayer._get_base_layer_device_and_dtype

    def place(layer, base_layer):
        """Return an adapter's device and dtype: its layer's, as in peft, but 8 bits only ever store the base."""
        device, dtype = peft_place(layer, base_layer)
        return device, model.dtype if dtype == torch.float8_e4m3fn else dtype

    with replaced(BaseTunerLayer, "_get_base_layer_device_and_dtype", place):
        # peft initialises a DoRA's magnitudes from the weights, which are nowhere yet with low_cpu_mem_usage.
        on_meta = not any(name.endswith("lora_magnitude_vector") for name in lora)
        model.load_lora_adapter(
            dict(lora), prefix=None, adapter_name=adapter, _pipeline=pipe, low_cpu_mem_usage=on_meta
        )
    try:
        check_loaded(model, adapter, lora)
        for layer in adapted_layers(model):
            if (strength := strengths(layer).get(adapter, 1)) != 1:
                raise InputError(f"{path}: diffusers {diffusers_version} loads it at {strength:g} times its strength")
    except InputError:
        model.delete_adapters(adapter)
        raise


def check_loaded(model: torch.nn.Module, adapter: str, lora: dict[str, torch.Tensor]) -> None:
    """Raise InputError where the model's adapter of this name is not exactly these tensors: loaders leave some out.

    `lora` has the names that read_lora and peft.get_peft_model_state_dict give.
    """
    state = get_peft_model_state_dict(model, adapter_name=adapter)
    for name in sorted(state.keys() ^ lora.keys()):
        what = "was left out" if name in lora else "is not in the file"
        raise InputError(f"loading the LoRA {adapter!r}: {name} {what}; is this peft's or diffusers' tested version?")
    for name, value in lora.items():
        loaded = state[name].detach()
        if loaded.is_meta:  # offloaded: its values are with the hooks
            continue
        if not loaded.isfinite().all():
            raise InputError(f"loading the LoRA {adapter!r}: {name} holds values too large for {loaded.dtype}")
        if not torch.equal(loaded.cpu(), value.to("cpu", loaded.dtype)):
            raise InputError(f"loading the LoRA {adapter!r}: {name} did not become what the file holds")


def save_lora(transformer, adapter: str, directory: str | Path, recipe: Recipe, prefix: str = "transformer") -> Path:
    """Write one adapter as `directory`/pytorch_lora_weights.safetensors, float32, and return the path.

    `prefix` is the transformer's name in its pipeline, with which diffusers' keys begin. alpha / rank is
    folded into lora_B, so the file has alpha = rank: every loader, whether it reads alpha or not, applies the strength
    that was trained. The recipe goes into the header under "glance". Raise OSError where it cannot be written.
    """
    config = transformer.peft_config[adapter]
    state = {}
    for name, value in get_peft_model_state_dict(transformer, adapter_name=adapter).items():
        scale = config.lora_alpha / config.r if "lora_B" in name else 1.0
        state[f"{prefix}.{name}"] = (value.detach().float() * scale).cpu().contiguous()
    modules = sorted({name.removeprefix(f"{prefix}.").split(".lora_")[0] for name in state})
    adapter_metadata = {"r": config.r, "lora_alpha": config.r, "target_modules": modules, "bias": "none"}
    header = {
        "format": "pt",
        "lora_adapter_metadata": json.dumps({f"{prefix}.{key}": value for key, value in adapter_metadata.items()}),
        "glance": recipe.to_json(),
    }
    Path(directory).mkdir(parents=True, exist_ok=True)
    path = Path(directory) / WEIGHT_NAME
    replace_file(path, lambda temporary: temporary.write_bytes(in_order(save(state, metadata=header))))
    return path


def in_order(content: bytes) -> bytes:
    """Return a safetensors file with its header's keys in order.

    safetensors writes metadata in a random order, and the same run should give the same file.
    """
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[end:]
