"""A device besides the CPU, for machines without one: its tensors refuse to meet those of another, as a GPU's do.

Its memory is the host's and the CPU does its work, so that the numbers can be compared.
"""

import contextlib
import functools
import gc
import json
import sys
from pathlib import Path
from types import SimpleNamespace


sys.path[:0] = [str(Path(__file__).parent.parent)]

import torch  # noqa: E402
from accelerate import PartialState  # noqa: E402
from PIL import Image  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map_only  # noqa: E402
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend  # noqa: E402

import train_glance_lora  # noqa: E402
from glance import base as load_base  # noqa: E402
from glance import command_line as cli  # noqa: E402
from glance import encoders  # noqa: E402
from glance.ask import pipeline as ask  # noqa: E402
from glance.training import prepare  # noqa: E402


NAME = "second"
CPU = torch.device("cpu")


class Tensor(torch.Tensor):
    """A tensor that says it is on the second device; `host` holds its numbers."""

    @staticmethod
    def __new__(cls, host: torch.Tensor, requires_grad: bool = False):
        if host.is_meta:  # accelerate takes a parameter's class for one that it puts there
            return torch.nn.Parameter(host, requires_grad)
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=torch.device(NAME),
            requires_grad=requires_grad,
        )
        tensor.host = host
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    def tolist(self):
        return self.host.tolist()

    def __repr__(self):
        return f"second device: {self.host!r}"


def run(func, args, kwargs):
    """Call an operator on the host, and take its answer for one of the second device where it would be."""
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    own = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    moves = func in (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)
    if own and not moves and any(leaf.ndim for leaf in leaves if not isinstance(leaf, Tensor)):
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, found {NAME} and cpu")
    asked = kwargs.get("device")
    to = torch.device(asked) if asked is not None else torch.device(NAME) if own else CPU
    if func is torch.ops.aten.copy_.default and not isinstance(args[0], Tensor):
        to = CPU
    if asked is not None and to.type == NAME:
        kwargs = kwargs | {"device": CPU}
    hosts = tree_map_only(Tensor, lambda tensor: tensor.host, (args, kwargs))
    output = func(*hosts[0], **hosts[1])
    if to.type != NAME:
        return output
    known = {id(leaf.host): leaf for leaf in own}
    return tree_map_only(torch.Tensor, lambda host: known[id(host)] if id(host) in known else Tensor(host), output)


class Factories(TorchDispatchMode):
    """Makes tensors on the second device, where nothing of it is among the arguments."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        asked = kwargs.get("device")
        if asked is not None and torch.device(asked).type == NAME:
            return run(func, args, kwargs)
        return func(*args, **kwargs)


def tensor(data, *args, device=None, make=torch.tensor, **kwargs) -> torch.Tensor:
    """torch.tensor, which asks no mode."""
    made = make(tree_map_only(Tensor, lambda part: part.host, data), *args, **kwargs)
    return made if device is None else made.to(device)


@functools.cache
def register() -> None:
    _setup_privateuseone_for_python_backend(NAME)


@contextlib.contextmanager
def second_device():
    """Yield the device; outside no tensor can be made on it."""
    register()
    with ask.replaced(torch, "tensor", tensor), Factories():
        yield torch.device(NAME)


def draw(folder: str, device: torch.device, memory: int) -> tuple[list[str], torch.Tensor]:
    """Return which encoders stay in host memory where the device has so much, and a picture drawn there, float32."""
    pipe = ask.load_pipeline(folder)
    pipe.transformer = load_base.load_transformer(folder, torch.float32, CPU).to(device)
    encoders.place_encoders(pipe, device, memory)
    pipe.set_progress_bar_config(disable=True)
    models = ask.freeable_components(pipe)
    away = [name for name, model in models.items() if next(model.parameters()).is_meta]
    call = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "pt"}
    image = pipe("a red ring", generator=torch.Generator().manual_seed(0), **call)[0]
    assert image.device.type == device.type
    return away, image.cpu()


def encode(folder: str, device: torch.device, memory: int) -> torch.Tensor:
    """Return the latents of an image as training learns it, encoded there after the prompts, (1, ...) float32."""
    flags = [f"--pretrained_model_name_or_path={folder}", "--instance_prompt=a red ring", "--resolution=32"]
    args = train_glance_lora.parse_args([*flags, "--gradient_checkpointing"]).replace(memory=memory)
    accelerator = SimpleNamespace(device=device, free_memory=gc.collect)
    image = Image.new("RGB", (32, 32), "red")
    prepared = prepare.ask_everything(args, accelerator, image, ["a red ring"], (32, 32))
    assert prepared.latents.device.type == device.type and prepared.models.vae.device == CPU
    return prepared.latents.cpu()


def compare(folder: str) -> None:
    """Print, as JSON, how far what is drawn and encoded on the second device is from the CPU's, with all encoders on
    it and with none."""
    picture, latents = draw(folder, CPU, 0)[1], encode(folder, CPU, 1)
    for memory in (10**9, 1):
        with second_device() as device:
            away, drawn = draw(folder, device, memory)
            encoded = encode(folder, device, memory)
        errors = {"drawn": (drawn - picture).abs().max().item(), "encoded": (encoded - latents).abs().max().item()}
        print(json.dumps({"away": away} | errors))


if __name__ == "__main__":
    PartialState()
    torch.set_num_threads(1)
    cli.set_up_logging()
    for folder in sys.argv[1:]:
        compare(folder)
