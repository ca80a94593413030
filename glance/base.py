"""How is the frozen base loaded so that it fits? Quantized while it is read, offloaded by groups, onto its device.

Ways to load it, and corrections of what the libraries do to a frozen model, may be added; nothing here trains.
"""

import contextlib
import functools
import hashlib
from pathlib import Path

import torch
from bitsandbytes.autograd._functions import MatMul8bitFp, MatMul8bitLt
from bitsandbytes.nn import Linear8bitLt
from diffusers import AutoModel, BitsAndBytesConfig
from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer
from huggingface_hub import try_to_load_from_cache
from torch.utils.checkpoint import checkpoint

from glance.ask.pipeline import find_denoiser, loading, read_model_index, replaced
from glance_utils import InputError


def identify(path: str, revision: str | None = None, cache_dir: str | None = None, **load_kwargs) -> str:
    """Return what tells the base at `path` from every other one: "NAME at COMMIT" of a hub id, "files DIGEST" of a
    folder.

    A folder is known by what its components' files hold, wherever it lies and however it was copied: all of a file up
    to 4 MB, of a larger one 1,024 parts of 4 kB, evenly spaced, which leave no large tensor out. Raise InputError
    where there is no pipeline.
    """
    components = read_model_index(path, revision=revision, cache_dir=cache_dir, **load_kwargs)
    folder = Path(path)
    if not folder.is_dir():
        cached = try_to_load_from_cache(path, "model_index.json", cache_dir, revision)  # it was just read
        return f"{path} at {Path(cached).parent.name if isinstance(cached, str) else revision}"
    parts = [folder / name for name, value in sorted(components.items()) if isinstance(value, list | tuple)]
    files = [file for part in parts for file in sorted(part.rglob("[!.]*")) if file.is_file()]
    digest = hashlib.sha256()
    with loading(path):
        for file in [folder / "model_index.json", *files]:
            size = file.stat().st_size
            digest.update(f"{file.relative_to(folder).as_posix()}\0{size}\0".encode())
            with open(file, "rb") as content:
                for start in range(0, size, max(size // 1024, 4096)):
                    content.seek(start)
                    digest.update(content.read(4096))
    return f"files {digest.hexdigest()[:16]}"


def quantization_config(quantization: str, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """Return the config for bitsandbytes' 4-bit NormalFloat, computing in `dtype`, or LLM.int8(); None for others."""
    if quantization == "nf4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return None


@contextlib.contextmanager
def bitsandbytes_on_any_device(device: torch.device):
    """Let diffusers load bitsandbytes' layers onto a CPU inside; its check for a GPU is from before they could."""
    with contextlib.ExitStack() as stack:
        if device.type == "cpu":
            for quantizer in (BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer):
                stack.enter_context(replaced(quantizer, "validate_environment", lambda *args, **kwargs: None))
        yield


def with_additions(weight: torch.Tensor, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Return the weight (out, in) with the products of all pairs, (out, rank) and (rank, in), rounded once."""
    total = weight.float()
    for up, down in pairs:
        total = total + up.to(total) @ down.to(total)
    return total.to(weight.dtype)


@contextlib.contextmanager
def added_before_quantizing(additions: dict):
    """Let bitsandbytes' layers, which are made as the weights are read, be made of weights with their additions; these
    are taken out of the dict."""

    def adding(create):
        @functools.wraps(create)
        def created(quantizer, model, value, name, *args, **kwargs):
            if pairs := additions.pop(name.removesuffix(".weight"), None):
                value = with_additions(value, pairs)
            return create(quantizer, model, value, name, *args, **kwargs)

        return created

    with contextlib.ExitStack() as stack:
        for quantizer in (BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer) if additions else ():
            create = quantizer.create_quantized_param
            stack.enter_context(replaced(quantizer, "create_quantized_param", adding(create)))
        yield


def load_transformer(
    path: str,
    dtype: torch.dtype,
    device: torch.device,
    quantization: str = "none",
    group_offload: bool = False,
    part: str | None = None,
    additions: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] | None = None,
    **load_kwargs,
) -> torch.nn.Module:
    """Load the denoiser of the pipeline at `path`, or another `part` of its class, frozen, by shards onto `device`.

    The products of `additions`, by layer the (out, rank) and (rank, in) of each LoRA that is part of the base, are
    added to the weights in float32 before anything is made of these.

    nf4 and int8 are bitsandbytes' layers, made as the shards are read; fp8 keeps the linear layers' weights in
    float8_e4m3 and computes in `dtype` (diffusers' layerwise casting). With `group_offload` the weights stay in host
    memory and visit the device a layer at a time, the next one on its way while this one computes. Raise InputError
    where it cannot be loaded, or where the two are asked for together.
    """
    check_combination(quantization, group_offload)
    target = torch.device("cpu") if group_offload or quantization == "fp8" else device
    name, kind = find_denoiser(path, **load_kwargs)
    additions = dict(additions or {})
    with loading(path), bitsandbytes_on_any_device(target), added_before_quantizing(additions):
        transformer = kind.from_pretrained(
            path,
            subfolder=part or name,
            dtype=dtype,
            quantization_config=quantization_config(quantization, dtype),
            device_map={"": target},
            use_safetensors=True,
            **load_kwargs,
        )
    for layer, pairs in additions.items():  # that are not quantized
        weight = transformer.get_submodule(layer).weight
        weight.data = with_additions(weight.data, pairs)
    transformer.requires_grad_(False)
    if quantization == "nf4":
        # In eval mode bitsandbytes repacks weights on a CPU for a kernel without backward. No layer has dropout.
        for layer in transformer.modules():
            if type(layer).__name__ == "Linear4bit":
                layer.train()
    if quantization == "int8":
        forget_frozen_inputs()
        move_statistics_along()
    if quantization == "fp8":
        rest_in_fp8(transformer, dtype)
        transformer.to(device)
    if group_offload:
        transformer.enable_group_offload(**group_offload_arguments(device))
        keep_for_backward(transformer)
    return transformer


def load_controlnet(path: str, dtype: torch.dtype) -> torch.nn.Module:
    """Return the ControlNet at `path`, a folder or hub id, by the class that its config names; raise InputError where
    there is none."""
    with loading(path):
        model = AutoModel.from_pretrained(path, dtype=dtype, use_safetensors=True)
        if "ControlNet" not in type(model).__name__:
            raise InputError(f"--controlnet {path}: it is a {type(model).__name__}; give a ControlNet of the base")
        return model


def rest_in_fp8(transformer: torch.nn.Module, dtype: torch.dtype) -> None:
    """Keep the linear layers' weights in 8 bits while they do not compute, which they do in `dtype`.

    A convolution's weight would be in 8 bits again by the backward pass, for which autograd saves it as it is.
    """
    convolutions = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    transformer.enable_layerwise_casting(torch.float8_e4m3fn, dtype, skip_modules_classes=convolutions)


@functools.cache
def forget_frozen_inputs() -> None:
    """Let bitsandbytes' 8-bit layers drop their input, which a frozen weight's backward does not need.

    They keep it where gradient checkpointing cannot see it.
    """
    for kind in (MatMul8bitLt, MatMul8bitFp):

        def forward(ctx, *args, original=kind.forward, kind=kind):
            output = original(ctx, *args)
            if not ctx.needs_input_grad[1]:
                ctx.A = None
                ctx.tensors = (None, None, None)
            return output

        kind.forward = staticmethod(forward)


@functools.cache
def move_statistics_along() -> None:
    """Let bitsandbytes' 8-bit layers move with the model that they are in, as model offload moves it.

    The weight and its scales are also attributes, which Module.to does not know: they would stay on one device while
    the weight goes to another, and no memory would be freed.
    """
    apply = Linear8bitLt._apply

    def moved(layer, *args, **kwargs):
        apply(layer, *args, **kwargs)
        for owner in (layer.weight, layer.state):
            if owner.CB is not None and not layer.weight.is_meta:
                owner.CB, owner.SCB = layer.weight.data, owner.SCB.to(layer.weight.device)
        return layer

    Linear8bitLt._apply = moved


def group_offload_arguments(device: torch.device) -> dict:
    """Return diffusers' arguments for offload layer by layer, the next one copied while this one computes.

    A layer's memory is not given to another before the device is done with it, backward pass included.
    """
    streams = device.type == "cuda"
    arguments = {"onload_device": device, "offload_device": torch.device("cpu"), "offload_type": "leaf_level"}
    return arguments | {"use_stream": streams, "record_stream": streams}


def keep_for_backward(transformer: torch.nn.Module) -> None:
    """Let a group-offloaded model's norms, tables and convolutions stay on the device, from now on.

    Autograd saves a weight that does not train as it is, not as a copy, and by the backward pass diffusers would have
    moved it away. A linear layer's is saved as its transpose, which keeps what was on the device.
    """
    for module in transformer.modules():
        hook = module._diffusers_hook.get_hook("group_offloading") if hasattr(module, "_diffusers_hook") else None
        group = None if hook is None else hook.group
        if group is None or any(isinstance(layer, torch.nn.Linear | torch.nn.Embedding) for layer in group.modules):
            continue
        group.onload_()
        if group.stream is not None:
            group.stream.synchronize()
        group.onload_ = group.offload_ = lambda: None


def enable_gradient_checkpointing(transformer: torch.nn.Module) -> None:
    """Keep each block's input alone and compute the block again for its gradients.

    This is diffusers' default but for keyword arguments, which some of its models give and the default does not take.
    """

    def checkpointed(block, *args, **kwargs):
        return checkpoint(block.__call__, *args, use_reentrant=False, **kwargs)

    transformer.enable_gradient_checkpointing(checkpointed)


def compile_blocks(transformer: torch.nn.Module) -> None:
    """Compile the blocks that repeat, once for all of them; raise InputError where the model does not name them."""
    try:
        transformer.compile_repeated_blocks()
    except ValueError as error:
        raise InputError(f"--compile: {type(transformer).__name__} cannot be compiled by blocks ({error})") from error


def check_combination(quantization: str, group_offload: bool) -> None:
    """Raise InputError where quantization and group offload are asked for together."""
    if group_offload and quantization != "none":
        raise InputError(
            f"--enable_group_offload moves full weights; it does not go with --quantization {quantization}: "
            "leave one of the two out"
        )
