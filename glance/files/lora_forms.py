"""Which tensors does a LoRA file hold, under the model's own names, in whatever form a trainer wrote it?

Every tensor is checked: a file is data from anyone. A further trainer's names belong in the tables on top.
"""

import contextlib
import json
import math
import re
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open

from glance.ask.components import denoiser_name
from glance.files.recipe import is_number, shown
from glance_utils import InputError, denoiser


# How trainers name the tensors of a layer's LoRA: peft and diffusers, kohya, older diffusers; peft's adapter between.
TENSOR = re.compile(
    r"(?P<layer>.+?)\.(?:lora|lora_linear_layer)[._](?P<part>A|B|down|up|magnitude_vector)"
    r"(?:\.(?!weight$|bias$)[^.]+)?(?:\.(?P<kind>weight|bias))?"
)
PARTS = {"A": "lora_A", "down": "lora_A", "B": "lora_B", "up": "lora_B", "magnitude_vector": "lora_magnitude_vector"}
WHOLE = {("lora_A", "weight"), ("lora_B", "weight"), ("lora_B", "bias"), ("lora_magnitude_vector", "weight")}
# What stands before a layer's name, and who writes it so.
WRAPPERS = {
    "base_model.model.": "peft's",
    "model.diffusion_model.": "ComfyUI's",
    "diffusion_model.": "ComfyUI's",
    "lora_unet_": "kohya's",
    "lora_transformer_": "kohya's",
    "lycoris_": "LyCORIS'",
}
TEXT_ENCODER = re.compile(
    r"(base_model\.model\.)?(lora_te|te\d?[._]|text_encoder|text_model|conditioner|cond_stage_model)"
)
# Adapters that are no LoRAs, by how their tensors' names end.
OTHER_FORMS = {
    r"\.lokr_\w+$": "LyCORIS' LoKr",
    r"\.hada_\w+$": "LyCORIS' LoHa",
    r"\.lora_mid\.weight$": "LyCORIS' LoCon",
    r"\.oft_\w+(\.weight)?$": "OFT",
    r"\.dora_scale$": "kohya's and LyCORIS' DoRA",
    r"\.diff(_b)?$": "differences of whole weights",
}
# What a file may say of its LoRAs in peft's words: names, ranks and strengths. Others make them mean something else.
CONFIG_KEYS = {"r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "lora_dropout", "bias"}
CONFIG_KEYS |= {"use_rslora", "use_dora", "lora_bias", "inference_mode", "base_model_name_or_path", "peft_version"}


def read_lora(pipe: DiffusionPipeline, path: Path) -> dict[str, torch.Tensor]:
    """Return a LoRA file's tensors, checked: LAYER.lora_A.weight (rank, in), LAYER.lora_B.weight (out, rank), and if
    it has them LAYER.lora_B.bias and LAYER.lora_magnitude_vector (out). LAYER is a name in the pipeline's denoiser.

    The names may be those of diffusers, with its prefix or without, of peft, or of whatever other trainer diffusers'
    own converter for this pipeline reads. Strengths other than 1, from .alpha tensors or peft's settings, are folded
    into lora_B in float32. Raise InputError for any file that is not just a LoRA of this model.
    """
    names = LayerNames(pipe)
    tensors, config = _read_file(path, names)
    scaled, alphas = _fold_strength(path, tensors, config, names)
    try:
        lora = _in_our_names(path, scaled, names)
    except InputError:  # perhaps diffusers' converter reads it, which takes alphas too; if not, the first error stands
        if (lora := _converted(pipe, path, scaled, alphas, names)) is None:
            raise
    _check_lora(path, lora, names)
    for key, part in (("use_dora", "lora_magnitude_vector"), ("lora_bias", "lora_B.bias")):
        if config.get(key) and not any(name.endswith(part) for name in lora):
            raise InputError(f"{path}: its settings say {key}, but it holds no {part}; get an intact file")
    return lora


class LayerNames:
    """A denoiser's layers by the names that files use: its own, with underscores for points, and wrapped."""

    def __init__(self, pipe: DiffusionPipeline):
        self.model, self.component = denoiser(pipe), denoiser_name(pipe.config)
        self.layers = {
            name: module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
            for name, module in self.model.named_modules()
            if not re.search(r"\.(base_layer|lora_)", name)
        }
        self.names = {name.replace(".", "_"): name for name in self.layers} | {name: name for name in self.layers}
        self.wrappers = {f"{self.component}.": "diffusers'"} | WRAPPERS

    def find(self, name: str) -> str | None:
        """Return the model's own name of the layer that a file calls `name`; None where it has no such layer."""
        while name not in self.names:
            wrapper = self.wrapper(name)
            if wrapper is None:
                return None
            name = name.removeprefix(wrapper)
        return self.names[name]

    def wrapper(self, name: str) -> str | None:
        """Return the wrapper that the name begins with, such as "diffusion_model."."""
        return next((wrapper for wrapper in self.wrappers if name.startswith(wrapper)), None)


def _read_file(path: Path, names: LayerNames) -> tuple[dict[str, torch.Tensor], dict]:
    """Return the file's tensors, and peft's settings from its header or from the file that peft writes beside its own.

    Raise InputError where it cannot be read, or holds other than the finite tensors of LoRAs of the denoiser.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error}); get an intact one") from None
    for name, tensor in tensors.items():
        for ending, form in OTHER_FORMS.items():
            if re.search(ending, name):
                raise InputError(f"{path}: it holds {form} ({shown(name)}), which is not read; get a LoRA")
        if TEXT_ENCODER.match(name) and names.find(name.split(".lora")[0]) is None:
            raise InputError(
                f"{path}: it adapts a text encoder too ({shown(name)}), and Glance the {names.component} alone; get a "
                "file without those tensors"
            )
        is_float = tensor.is_floating_point() or name.endswith(".alpha")  # which may be a whole number
        if not is_float or not tensor.float().isfinite().all():
            raise InputError(f"{path}: {shown(name)} holds values that are not finite numbers; get an intact file")
    source, text = "lora_adapter_metadata", header.get("lora_adapter_metadata", "{}")
    beside = Path(path).with_name("adapter_config.json")
    if text == "{}" and any(name.startswith("base_model.model.") for name in tensors):
        with contextlib.suppress(OSError):  # where it is missing, other loaders take alpha = rank as well
            source, text = beside.name, beside.read_text(encoding="utf-8", errors="replace")
    try:
        config = {key.removeprefix(f"{names.component}."): value for key, value in json.loads(text).items()}
    except (AttributeError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: its {source} is not a JSON object ({error})") from None
    if source == beside.name:
        for key in ("auto_mapping", "task_type", "revision"):  # of the class and the task that it was trained in
            config.pop(key, None)
    check_config(f"{path}: its {source}", config)
    return tensors, config


def check_config(source: str, config: dict) -> None:
    """Raise InputError, with their `source`, where peft's settings say more than names, ranks and strengths."""
    default = LoraConfig().to_dict()
    for key, value in config.items():
        fits = value == default.get(key) or key in CONFIG_KEYS or (key, value) == ("init_lora_weights", "gaussian")
        if key in ("r", "lora_alpha"):
            fits = _is_strength(key, value)
        if key in ("rank_pattern", "alpha_pattern"):  # peft would take them for regular expressions
            fits = isinstance(value, dict) and all(
                re.fullmatch(r"\^?[\w.\\]+\$?", name) and _is_strength("r" if key[0] == "r" else key, part)
                for name, part in value.items()
            )
        if not fits:
            raise InputError(
                f"{source} has {shown(key)} {shown(value)}; a LoRA needs r, lora_alpha and target_modules alone"
            )


def _is_strength(key: str, value) -> bool:
    """Return whether a setting's value can be a rank ("r") or an alpha: above 0, at most 65536."""
    return is_number(value, 65536) and value > 0 and (key != "r" or type(value) is int)


def _of_layer(patterns: dict, layer: str, usual):
    """Return the value of the first pattern that fits the layer's name, its end or with ^ all of it; else `usual`."""
    for pattern, value in patterns.items():
        name = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if layer == name or pattern[0] != "^" and layer.endswith(f".{name}"):
            return value
    return usual


def _fold_strength(path: Path, tensors: dict, config: dict, names: LayerNames) -> tuple[dict, dict]:
    """Return the tensors without .alpha, lora_B times the file's strength, and by name for each .alpha its rank.

    Raise InputError where the file contradicts itself on a rank or a strength.
    """
    scaled, alphas = {}, {}
    ranks, scales = {}, {}  # by layer, as the file names it
    for name, tensor in tensors.items():
        match = TENSOR.fullmatch(name)
        if match and PARTS[match["part"]] == "lora_A" and tensor.ndim > 1 and len(tensor):
            ranks[match["layer"]] = len(tensor)
    for layer, rank in ranks.items():
        model_name = names.find(layer) or layer
        alpha = tensors.get(f"{layer}.alpha")
        config_rank = _of_layer(config.get("rank_pattern", {}), model_name, config.get("r", rank))
        if config_rank != rank:
            raise InputError(
                f"{path}: {layer} has rank {rank}, but its settings say {config_rank}; get an intact file"
            )
        config_alpha = _of_layer(config.get("alpha_pattern", {}), model_name, config.get("lora_alpha", rank))
        scales[layer] = config_alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        if alpha is not None:
            if alpha.numel() != 1 or alpha.item() <= 0:
                raise InputError(f"{path}: {layer}.alpha is no number above 0; get an intact file")
            if "lora_alpha" in config and not math.isclose(alpha.item() / rank, scales[layer], rel_tol=1e-3):
                raise InputError(
                    f"{path}: {layer} has the strength {alpha.item() / rank:g} by its .alpha and {scales[layer]:g} by "
                    "its settings; get an intact file"
                )
            scales[layer] = alpha.item() / rank
    for name, tensor in tensors.items():
        match = TENSOR.fullmatch(name)
        if name.endswith(".alpha"):
            layer = name.removesuffix(".alpha")
            if layer not in ranks:
                raise InputError(f"{path}: it holds {shown(name)} without a LoRA of this layer; get an intact file")
            alphas[name] = torch.tensor(float(ranks[layer]))
        elif match and PARTS[match["part"]] == "lora_B" and scales.get(match["layer"], 1) != 1:
            scaled[name] = tensor.float() * scales[match["layer"]]
        else:
            scaled[name] = tensor
    return scaled, alphas


def _in_our_names(path: Path, tensors: dict, names: LayerNames) -> dict[str, torch.Tensor]:
    """Return the tensors by the model's own names.

    Raise InputError for one that is no part of a LoRA, or of a layer that the model lacks.
    """
    lora = {}
    for name, tensor in tensors.items():
        match = TENSOR.fullmatch(name)
        part = match and (PARTS[match["part"]], match["kind"] or "weight")
        if part not in WHOLE or (match["kind"] is None and part[0] != "lora_magnitude_vector"):
            raise InputError(
                f"{path}: {shown(name)} of shape {tuple(tensor.shape)} is no part of a LoRA; get an intact file"
            )
        layer = names.find(match["layer"])
        if layer is None:
            writer = names.wrappers.get(names.wrapper(name), "diffusers'")
            hint = f" (the name is {writer}; save it with diffusers' names)" if writer != "diffusers'" else ""
            kind = type(names.model).__name__
            raise InputError(f"{path}: it adapts {shown(match['layer'])}, which {kind} here does not have{hint}")
        if not isinstance(module := names.layers[layer], torch.nn.Linear):
            kind = type(module).__name__
            raise InputError(f"{path}: it adapts {shown(layer)}, a {kind}; only linear layers' LoRAs are read")
        key = f"{layer}.{part[0]}" + (f".{part[1]}" if part[0] != "lora_magnitude_vector" else "")
        if key in lora:
            raise InputError(f"{path}: it holds {key} twice, once as {shown(name)}; get an intact file")
        lora[key] = tensor
    return lora


def _converted(pipe, path: Path, tensors: dict, alphas: dict, names: LayerNames) -> dict[str, torch.Tensor] | None:
    """Return a file with other names as diffusers' converter for this pipeline reads it; None if it does not read all.

    A converter may leave out what it does not know. So it first converts tensors that hold their own number: all must
    arrive.
    """
    convert = getattr(type(pipe), "lora_state_dict", None)
    try:
        marked = {name: torch.full(tensor.shape, index + 1.0) for index, (name, tensor) in enumerate(tensors.items())}
        arrived = set()
        for tensor in convert(marked | alphas).values():
            ends = {tensor.min().item(), tensor.max().item()}
            arrived |= ends if len(ends) == 1 else set(tensor.unique().tolist())  # several were put together
        if not set(range(1, len(tensors) + 1)) <= arrived:
            return None
        converted = {name: tensor for name, tensor in convert(tensors | alphas).items() if ".alpha" not in name}
        return _in_our_names(path, converted, names)
    except Exception:  # of any kind, for a file in a form for which it was not written; or there is no converter
        return None


def _check_lora(path: Path, lora: dict[str, torch.Tensor], names: LayerNames) -> None:
    """Raise InputError where a LoRA's tensors do not fit their layers or each other."""
    if not lora:
        raise InputError(f"{path}: it holds no LoRA; get an intact file")
    ranks, further = {}, {}  # by layer and "A" or "B"; by other part the layers that have it
    for name, tensor in lora.items():
        layer, part = re.fullmatch(r"(.+)\.(lora_.+)", name).groups()
        shape, module = tuple(tensor.shape), names.layers[layer]
        if len(shape) != (2 if part in ("lora_A.weight", "lora_B.weight") else 1) or 0 in shape:
            raise InputError(f"{path}: {name} of shape {shape} is no part of a LoRA; get an intact file")
        is_down = part == "lora_A.weight"
        width, needed = (shape[1], module.in_features) if is_down else (shape[0], module.out_features)
        if width != needed:
            raise InputError(f"{path}: {name} is for width {width}, but this base has {needed}")
        if len(shape) == 2:
            ranks.setdefault(layer, {})[part[5]] = shape[0 if is_down else 1]
        else:
            further.setdefault(part, set()).add(layer)
    for layer in {layer: None for name in lora for layer in [name.split(".lora_")[0]]}:
        rank = ranks.get(layer, {})
        if rank.get("A") != rank.get("B") or not rank:
            raise InputError(
                f"{path}: {layer} has rank {rank.get('A')} in lora_A and {rank.get('B')} in lora_B; get an intact file"
            )
        for part, layers_with_it in further.items():
            if layer not in layers_with_it:
                raise InputError(f"{path}: {layer} has no {part}, as others have; get an intact file")
