"""What will a training step need, before any weight is loaded? Parameters, memory, floating-point operations.

The transformer runs for real, forward and backward, on tensors that have a shape and no content (torch's
FakeTensorMode), called by the pipeline as in training. What it would have allocated and multiplied is counted.
"""

import time
import weakref
from dataclasses import dataclass

import psutil
import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from peft import LoraConfig
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from glance.adapters import compute_as_saved, with_adapters
from glance.ask import pipeline as ask
from glance.ask.components import component_class, denoiser_name
from glance.ask.pipeline import first_line
from glance.base import enable_gradient_checkpointing
from glance.shared_flags import QUANTIZATIONS
from glance_utils import InputError, denoiser


@dataclass
class Step:
    """One training step, forward and backward, of the frozen base with one LoRA."""

    activations: int  # bytes at the peak, beyond the weights; the gradients of the LoRA among them
    flops: int


@dataclass
class Estimate:
    """A run's needs; all sizes in bytes."""

    parameters: int  # the transformer's
    lora_parameters: int
    base: dict[str, int]  # the transformer's weights, by quantization
    dequantized: int  # the largest weight as it is unpacked, twice: to compute with it and to transpose it
    encoders: int  # every other model's weights
    steps: dict[bool, Step]  # by gradient checkpointing

    def lora(self) -> int:
        """Return the size of the LoRA, which is float32."""
        return 4 * self.lora_parameters

    def peak(self, quantization: str, gradient_checkpointing: bool, bytes_of_adam: float = 8) -> float:
        """Return the larger of the two stages: the encoders answer and are freed, then the transformer trains.

        `bytes_of_adam` is the optimizer's state for each parameter.
        """
        training = self.base[quantization] + self.lora() + bytes_of_adam * self.lora_parameters
        training += self.steps[gradient_checkpointing].activations
        training += 0 if quantization == "none" else self.dequantized
        return max(self.encoders, training)


class PeakMemory(TorchDispatchMode):
    """A count of the bytes of the storages alive: `now`, and `peak` at their most."""

    def __init__(self, module: torch.nn.Module):
        super().__init__()
        self.sizes = {}  # of the storages alive
        self.now = self.peak = 0
        for tensor in (*module.parameters(), *module.buffers()):
            self.sizes[tensor.untyped_storage()._cdata] = 0  # weights are counted elsewhere; views share them

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in tree_iter(output):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return output

    def _count(self, storage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.sizes:
            self.sizes[key] = size
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, key)

    def _free(self, key) -> None:
        self.now -= self.sizes.pop(key)


def _attention_flops(query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward_flops(grad, query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


# What a tensor without content raises where its numbers are asked for.
UNKNOWN = (UnsupportedFakeTensorException, DataDependentOutputException, DynamicOutputShapeException)
# torch counts the attention kernels of GPUs only.
ATTENTION_FLOPS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


def weightless(module: torch.nn.Module, mode: FakeTensorMode) -> None:
    """Give a module on the meta device parameters that say they are on the CPU and hold nothing."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_meta:
                    fake = FakeTensor(mode, tensor.detach(), torch.device("cpu"))
                    is_parameter = tensors is part._parameters
                    tensors[name] = torch.nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake


def without_content(mode: FakeTensorMode):
    """Return a function that takes the content out of the floating-point tensors of nested arguments.

    Masks and ids keep theirs, since models decide by them. All of them are on the CPU, as the weights say they are.
    """

    def convert(tensor):
        if isinstance(tensor, FakeTensor) or not tensor.is_floating_point():
            return tensor.cpu()
        return FakeTensor(mode, tensor.detach().to("meta"), torch.device("cpu"))

    return lambda values: tree_map_only(torch.Tensor, convert, values)


def load_without_weights(path: str, dtype: torch.dtype, **load_arguments):
    """Return the pipeline at `path`: configs, tokenizers and scheduler as they are, and models without weights.

    `load_arguments` are from_pretrained's, revision and variant. Raise InputError where it is no diffusers pipeline.
    """
    mode, models = FakeTensorMode(allow_non_fake_inputs=True), {}
    config = ask.read_model_index(path, **load_arguments)
    for part, named in config.items():
        kind = model_class(named)
        if kind is not None and part != denoiser_name(config):
            with ask.loading(f"{path}/{part}"), init_empty_weights():
                if issubclass(kind, ModelMixin):
                    models[part] = kind.from_config(kind.load_config(path, subfolder=part, **load_arguments))
                else:
                    models[part] = kind(kind.config_class.from_pretrained(path, subfolder=part, **load_arguments))
            encode_without_weights(models[part].to(torch.float32 if part == "vae" else dtype), mode)
    return ask.load_pipeline(path, dtype, models, **load_arguments)


def model_class(named) -> type | None:
    """Return the class behind an entry of model_index.json, ["library", "class name"], if it is a model's."""
    try:
        kind = component_class(named)
    except (TypeError, ValueError, ImportError, AttributeError):
        return None  # another kind of entry, or a class of the pipeline's own module
    return kind if isinstance(kind, type) and issubclass(kind, torch.nn.Module) else None


def encode_without_weights(module: torch.nn.Module, mode: FakeTensorMode) -> None:
    """Let a text encoder that has no weights answer zeros of the right shape."""
    weightless(module, mode)
    encode, convert = module.forward, without_content(mode)

    def forward(*args, **kwargs):
        output = encode(*convert(args), **convert(kwargs))
        return tree_map_only(FakeTensor, lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype), output)

    module.forward = forward
    module.to = lambda *args, **kwargs: module  # as some pipelines ask of their VAE while they are built


def run_step(pipe, mode: FakeTensorMode, counter, call: dict) -> None:
    """Run one step of the pipeline, forward and backward, inside `counter`; its transformer is `weightless`.

    Raise InputError where the pipeline never calls its transformer.
    """
    transformer, convert = denoiser(pipe), without_content(mode)
    predict = transformer.forward

    def forward(*args, **kwargs):
        with torch.enable_grad(), counter:
            output = predict(*convert(args), **convert(kwargs))
            sum(tensor.float().sum() for tensor in tree_iter(output) if isinstance(tensor, torch.Tensor)).backward()
        transformer.zero_grad()
        raise ask.Answer

    try:
        ask.dry_step(pipe, forward, **call)
    except ask.Answer:
        return
    raise InputError(f"{type(pipe).__name__}: asked for a step's memory, but it never called its transformer")


def measure_step(pipe, mode: FakeTensorMode, gradient_checkpointing: bool, call: dict, repeats: int) -> Step:
    """Return what `repeats` steps of the pipeline with `call`, then one backward pass, take."""
    if gradient_checkpointing:
        enable_gradient_checkpointing(denoiser(pipe))
    memory = PeakMemory(denoiser(pipe))
    run_step(pipe, mode, memory, call)
    operations = FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS)  # not both: it keeps tensors alive
    run_step(pipe, mode, operations, call)
    return Step(repeats * memory.peak, repeats * operations.get_total_flops())


def base_bytes(transformer: torch.nn.Module, quantization: str) -> int:
    """Return the bytes of the weights as base.load_transformer leaves them."""
    if quantization == "fp8":
        with init_empty_weights():
            transformer = type(transformer).from_config(transformer.config).to(transformer.dtype)
        transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=transformer.dtype)
    total = sum(tensor.numel() * tensor.element_size() for tensor in transformer.state_dict().values())
    for module in transformer.modules():
        if isinstance(module, torch.nn.Linear) and quantization in ("nf4", "int8"):
            count, rows = module.weight.numel(), module.out_features
            # Two weights to a byte and a float32 for each 64; or one to a byte and a float32 for each row.
            total += (count // 2 + 4 * -(-count // 64)) if quantization == "nf4" else (count + 4 * rows)
            total -= count * module.weight.element_size()
    return total


def estimate(
    pipe, layers: list[str], rank: int, call: dict, checkpointing=(False, True), repeats: int = 1, dropout: float = 0.0
) -> Estimate:
    """Return what a training step needs that is the pipeline's step with `call`, so many times, and then backward.

    The transformer is on the meta device, and of no other use afterwards. Raise InputError where it decides by
    numbers that are not there.
    """
    transformer, mode = denoiser(pipe), FakeTensorMode(allow_non_fake_inputs=True)
    with_adapters(transformer).requires_grad_(False)
    base = {quantization: base_bytes(transformer, quantization) for quantization in QUANTIZATIONS}
    parameters = sum(parameter.numel() for parameter in transformer.parameters())
    largest = max(layer.weight.numel() for layer in transformer.modules() if isinstance(layer, torch.nn.Linear))
    lora = LoraConfig(r=rank, lora_dropout=dropout, target_modules=layers, init_lora_weights=False)
    transformer.add_adapter(lora, "estimate")
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    compute_as_saved(transformer)
    weightless(transformer, mode)
    if not transformer._supports_gradient_checkpointing:
        checkpointing = [choice for choice in checkpointing if not choice]
    try:
        steps = {choice: measure_step(pipe, mode, choice, call, repeats) for choice in checkpointing}
    except InputError as error:
        if isinstance(error.__cause__, UNKNOWN):
            raise InputError(
                f"{type(transformer).__name__} decides by numbers, so a step without weights cannot be estimated "
                f"({first_line(error.__cause__)})"
            ) from error
        raise
    encoders = sum(
        tensor.numel() * tensor.element_size()
        for model in ask.freeable_components(pipe).values()
        for tensor in (*model.parameters(), *model.buffers())
    )
    dequantized = 2 * largest * transformer.dtype.itemsize
    return Estimate(parameters, sum(map(torch.numel, trained)), base, dequantized, encoders, steps)


# --------------------------------------------------------------------------------------------------------------------
# The device


def free_memory(device: torch.device) -> int:
    """Return the bytes that can still be allocated on the device."""
    if device.type == "cuda":
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch holds it
        return torch.cuda.mem_get_info(device)[0] + reusable
    return psutil.virtual_memory().available


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the floating-point operations a second of a large matrix product, the median of five."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        c = a @ b
        c[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / sorted(seconds[1:])[2]


def readable(amount: float, unit: str) -> str:
    """Return the amount in three digits with a prefix: 1234567890 B is 1.23 GB."""
    for prefix in ("", "k", "M", "G", "T"):
        if amount < 999.5 or prefix == "T":
            return f"{amount:.3g} {prefix}{unit}"
        amount /= 1000


def report(needed: Estimate, device: torch.device, dtype: torch.dtype) -> str:
    """Return what --dry_run prints: the sizes, and a table by quantization and gradient checkpointing."""
    name, rate = str(dtype).removeprefix("torch."), matmul_rate(device, dtype)
    lines = [
        f"transformer  {needed.parameters / 1e9:.3g} billion parameters",
        f"LoRA         {readable(needed.lora_parameters, '')} parameters, {readable(needed.lora(), 'B')} a file",
        f"encoders     {readable(needed.encoders, 'B')}, freed before the transformer is loaded",
        f"device       {device.type}: {readable(free_memory(device), 'B')} free, "
        f"{readable(rate, 'FLOP/s')} in {name} matrix products",
        "",
        "| base | gradient checkpointing | its weights | peak | peak, 8-bit Adam | FLOPs a step | seconds, at least |",
        "|---|---|---|---|---|---|---|",
    ]
    for quantization, size in needed.base.items():
        for checkpointing, step in needed.steps.items():
            if quantization == "fp8" and not checkpointing and True in needed.steps:
                continue  # refused, since every layer's full weight would stay
            cells = (
                name if quantization == "none" else quantization,
                "yes" if checkpointing else "no",
                readable(size, "B"),
                readable(needed.peak(quantization, checkpointing), "B"),
                readable(needed.peak(quantization, checkpointing, 2), "B"),
                readable(step.flops, ""),
                f"{step.flops / rate:.3g}",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
