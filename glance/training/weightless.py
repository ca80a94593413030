"""How does a pipeline run without weights, so that what a run will allocate and multiply can be counted?

Its models are called for real, forward and backward, on tensors that have a shape and no content (torch's
FakeTensorMode). What a model would have allocated and multiplied is counted where torch dispatches it.
"""

import contextlib
import weakref

import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from glance.ask import latents as ask_latents
from glance.ask import pipeline as ask
from glance.ask.components import component_class, denoiser_name
from glance.ask.pipeline import first_line
from glance_utils import InputError


CPU = torch.device("cpu")
MODE = FakeTensorMode(allow_non_fake_inputs=True)  # one for all: tensors of two modes do not meet
# What a tensor without content raises where its numbers are asked for.
UNKNOWN = (UnsupportedFakeTensorException, DataDependentOutputException, DynamicOutputShapeException)


@contextlib.contextmanager
def estimable(pipe):
    """Turn what is raised inside where numbers are asked for that are not there into an InputError."""
    try:
        yield
    except (InputError, *UNKNOWN) as error:
        cause = error if isinstance(error, UNKNOWN) else error.__cause__
        if isinstance(cause, UNKNOWN):
            raise InputError(
                f"{type(pipe).__name__} decides by numbers, so without weights its needs cannot be estimated "
                f"({first_line(cause)})"
            ) from error
        raise


def _attention_flops(query, key, value, *args, out_val=None, **kwargs) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward_flops(grad, query, key, value, *args, out_val=None, **kwargs) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


# torch counts products, convolutions and the attention kernels of GPUs.
FLOPS = flop_registry | {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


class Counter(TorchDispatchMode):
    """A count of what is done inside: the bytes of the storages alive, `now` and `peak` at their most, and `flops`.

    Of the modules given neither parameters nor buffers count: those are weights, counted elsewhere.
    """

    def __init__(self, *modules: torch.nn.Module):
        super().__init__()
        self.sizes = {}  # of the storages alive
        self.now = self.peak = self.flops = 0
        for module in modules:
            for tensor in (*module.parameters(), *module.buffers()):
                self.sizes[tensor.untyped_storage()._cdata] = 0  # views share them

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        count = FLOPS.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=output)
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


def weightless(module: torch.nn.Module) -> None:
    """Give a module on the meta device parameters that say they are on the CPU and hold nothing."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_meta and not isinstance(tensor, FakeTensor):
                    fake = FakeTensor(MODE, tensor.detach(), CPU)
                    is_parameter = tensors is part._parameters
                    tensors[name] = torch.nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake


def empty(shape, dtype: torch.dtype) -> FakeTensor:
    """Return a tensor of this shape that says it is on the CPU and holds nothing."""
    return FakeTensor(MODE, torch.empty(shape, dtype=dtype, device="meta"), CPU)


def without_content(values):
    """Return nested arguments whose floating-point tensors have no content.

    Masks and ids keep theirs, since models decide by them. All of them are on the CPU, as the weights say they are.
    """

    def convert(tensor):
        if isinstance(tensor, FakeTensor) or not tensor.is_floating_point():
            return tensor.cpu()
        return FakeTensor(MODE, tensor.detach().to("meta"), CPU)

    return tree_map_only(torch.Tensor, convert, values)


def load_without_weights(
    path: str, dtype: torch.dtype, components: dict | None = None, pipeline_class: str | None = None, **load_arguments
):
    """Return the pipeline at `path`: configs, tokenizers and scheduler as they are, and models without weights.

    `components` and `pipeline_class` are ask.load_pipeline's, `load_arguments` from_pretrained's, revision and
    variant. Raise InputError where it is no diffusers pipeline.
    """
    models = dict(components or {})
    config = ask.read_model_index(path, **load_arguments)
    for part, named in config.items():
        kind = model_class(named)
        if kind is not None and part != denoiser_name(config):
            with ask.loading(f"{path}/{part}"), init_empty_weights():
                if issubclass(kind, ModelMixin):
                    models[part] = kind.from_config(kind.load_config(path, subfolder=part, **load_arguments))
                else:
                    models[part] = kind(kind.config_class.from_pretrained(path, subfolder=part, **load_arguments))
            answer_zeros(models[part].to(torch.float32 if part == "vae" else dtype))
    return ask.load_pipeline(path, dtype, models, pipeline_class=pipeline_class, **load_arguments)


def model_class(named) -> type | None:
    """Return the class behind an entry of model_index.json, ["library", "class name"], if it is a model's."""
    try:
        kind = component_class(named)
    except (TypeError, ValueError, ImportError, AttributeError):
        return None  # another kind of entry, or a class of the pipeline's own module
    return kind if isinstance(kind, type) and issubclass(kind, torch.nn.Module) else None


def answer_zeros(module: torch.nn.Module) -> None:
    """Let a text encoder that has no weights answer zeros of the right shape."""
    weightless(module)
    encode = module.forward

    def zeros(output):
        return tree_map_only(FakeTensor, lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype), output)

    def forward(*args, **kwargs):
        return zeros(encode(*without_content(args), **without_content(kwargs)))

    def answer(*args, **kwargs):
        output = to_latents(*without_content(args), **without_content(kwargs))
        for part in output.values():
            if not isinstance(part, torch.Tensor):  # a distribution
                vars(part).update(zeros(vars(part)))
        return type(output)(**zeros(dict(output)))

    if to_latents := getattr(module, "encode", None):  # a VAE's: pictures beside the prompt pass it
        module.encode = answer
    module.forward = forward
    module.to = lambda *args, **kwargs: module  # as some pipelines ask of their VAE while they are built


def decoding_bytes(pipe, dtype: torch.dtype, **call) -> int:
    """Return what a VAE of this dtype takes beside its weights to decode a picture of this call; 0 where there is
    none, or where it decides by numbers."""
    vae = getattr(pipe, "vae", None)
    if vae is None:
        return 0
    counter, original = Counter(vae), vae.decode

    def decode(*args, **kwargs):
        with counter:
            return original(*args, **kwargs)

    with contextlib.suppress(InputError), ask.replaced(vae, "decode", decode):
        ask_latents.ask_size(pipe, **call)
    return counter.peak * dtype.itemsize // vae.dtype.itemsize
