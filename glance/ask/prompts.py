"""How are prompts, and pictures beside them, encoded once, in the pipeline's own way, so that encoders can be freed?

What counts as the same is _key's business; what an encoder answers is kept and copied, never changed.
"""

import contextlib
import copy
import dataclasses
import hashlib
import inspect
import weakref
from collections.abc import Mapping

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch.utils._pytree import tree_map_only

from glance.ask.pipeline import Answer, Probe, dry_run, freeable_components, replaced
from glance_utils import InputError


def remember_prompts(pipe: DiffusionPipeline) -> None:
    """Let the pipeline encode each prompt once, without gradients, and hand a copy of the result back ever after.

    Every method of the pipeline that uses an encoder, to encode a prompt or to rewrite it, remembers what it answered,
    and so does the VAE's encode, for pictures beside the prompt. What it answers is a distribution: a pipeline draws
    from it with its call's generator or, where it hands on none, the same numbers each time. All of them can then be
    freed; RuntimeError is then raised for what was not seen before.
    """
    for name in _encoding_methods(pipe):
        setattr(pipe, name, _remembered(pipe, getattr(pipe, name)))
    vae = getattr(pipe, "vae", None)
    if hasattr(vae, "encode"):
        vae.encode = _drawing_alike(_remembered(pipe, vae.encode))


@contextlib.contextmanager
def prompts_remembered(pipe: DiffusionPipeline):
    """Let the pipeline encode each prompt once inside, as remember_prompts does; afterwards nothing is kept."""
    with contextlib.ExitStack() as stack:
        for name in _encoding_methods(pipe):
            stack.enter_context(replaced(pipe, name, _remembered(pipe, getattr(pipe, name))))
        yield


def _encoding_methods(pipe: DiffusionPipeline) -> list[str]:
    """Return the names of the pipeline's methods that use an encoder, those of its parent classes first."""
    encoders, names = set(freeable_components(pipe)) - {"vae"}, []
    for kind in reversed(type(pipe).__mro__):
        if issubclass(kind, DiffusionPipeline) and kind is not DiffusionPipeline:
            for name, method in vars(kind).items():
                method = inspect.unwrap(method) if inspect.isfunction(method) else None
                if method and not name.startswith("__") and encoders & set(method.__code__.co_names):
                    names.append(name)
    return names


def _remembered(pipe: DiffusionPipeline, method):
    """Return the method with a memory: equal arguments, but for device and generator, are answered only once."""
    answers = {}
    signature = inspect.signature(method)
    # A method is perhaps a model's, which must not outlive its freeing; a base class's is remembered already.
    look_up = weakref.WeakMethod(method) if inspect.ismethod(method) else lambda: method
    further = next((name for name, kind in signature.parameters.items() if kind.kind is kind.VAR_KEYWORD), None)

    def remembered(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        named = bound.arguments | bound.arguments.get(further, {})
        key = _key({name: value for name, value in named.items() if name not in ("device", "generator", further)})
        if key not in answers:
            try:
                with torch.no_grad():
                    answer = look_up()(*args, **kwargs)
                # Its tensors are cloned, without the storage that they may be a small part of. Then all of it is
                # copied: part of the answer may be an argument.
                cloned = tree_map_only(torch.Tensor, lambda tensor: tensor.detach().clone(), answer)
                answers[key] = copy.deepcopy(cloned)
            except (TypeError, AttributeError) as error:
                if any(isinstance(part, _Freed) for part in pipe.components.values()):
                    raise NotEncodedError("it was not encoded before the encoders were freed") from error
                raise
        return copy.deepcopy(answers[key])  # some pipelines write into what they got

    return remembered


def _drawing_alike(encode):
    """Return a VAE's encode whose answers draw the same each time where they are asked without a generator."""

    def encoded(*args, **kwargs):
        answer = encode(*args, **kwargs)
        if isinstance(answer, Mapping) and "latent_dist" in answer:
            sample = answer.latent_dist.sample
            answer.latent_dist.sample = lambda generator=None: sample(generator or torch.Generator().manual_seed(0))
        return answer

    return encoded


def _key(value):
    """Return something small and hashable that is equal for equal arguments alone: a digest of pixels and embeddings.

    What has no value of its own, such as a model, counts as itself and is not kept alive.
    """
    kind = type(value)
    if isinstance(value, torch.Tensor):
        content = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        return kind, value.dtype, value.shape, hashlib.sha256(content).digest()
    if isinstance(value, np.ndarray):
        content = _key(value.tolist()) if value.dtype.hasobject else hashlib.sha256(value.tobytes()).digest()
        return kind, value.dtype.str, value.shape, content
    if isinstance(value, Image.Image):
        content = hashlib.sha256(value.tobytes()).digest()
        return Image.Image, value.mode, value.size, content, _key(value.getpalette()), _key(value.info)
    if isinstance(value, Mapping):
        return kind, frozenset((_key(name), _key(part)) for name, part in value.items())
    if isinstance(value, list | tuple):
        return kind, *map(_key, value)
    if isinstance(value, set | frozenset):
        return kind, frozenset(map(_key, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return kind, *(_key(getattr(value, field.name)) for field in dataclasses.fields(value))
    if kind.__eq__ is object.__eq__:
        with contextlib.suppress(TypeError):  # None and others, of which there is but one
            return weakref.ref(value)
    if kind.__hash__ is None:
        return kind, _key(vars(value) if hasattr(value, "__dict__") else list(value))
    numbers = float | complex | np.generic
    return kind, repr(value) if isinstance(value, numbers) else value  # a NaN equals not even itself


class NotEncodedError(RuntimeError):
    """An error where a pipeline encodes what it did not before its encoders were freed."""


class FreedError(AttributeError, InputError):
    """An error where a pipeline needs a freed model; an AttributeError too, since pipelines ask what a model has."""


class _Freed:
    """A stand-in for a model that was freed: pipelines still ask whether it is there, its class and dtype, and what it
    says of itself besides weights, such as its compression or its latents' mean. What it has encoded it still
    answers."""

    def __init__(self, model: torch.nn.Module):
        self.kind, self.dtype, self.device = type(model), model.dtype, model.device
        self.config = getattr(model, "config", None)
        plain = {name: value for name, value in vars(model).items() if isinstance(value, int | float | list | tuple)}
        vars(self).update({name: value for name, value in plain.items() if not name.startswith("_")})
        vars(self).update(model.named_buffers(recurse=False))
        for name in {"encode"} & set(vars(model)):
            setattr(self, name, getattr(model, name))
        for name, part in model.named_children():
            if isinstance(part, torch.nn.BatchNorm2d):  # the statistics by which some scale their latents
                setattr(self, name, part)

    @property
    def __class__(self):
        return self.kind  # for isinstance

    def modules(self):
        return iter(())  # none is left

    def __getattr__(self, name):
        raise FreedError(f"{name} of a model that was freed, because an image and a prompt are encoded but once")


def free_components(pipe: DiffusionPipeline, keep: tuple[str, ...] = (), **kwargs) -> None:
    """Free every model but the denoisers and those named; what is freed must have encoded all that it will be asked.

    With the call's arguments given, raise InputError where the pipeline needs one of them in its loop after all, or
    for another noise than it was called with.
    """
    for name, component in freeable_components(pipe).items():
        if name not in keep:
            setattr(pipe, name, _Freed(component))

    def on_step(index, model_output, sample):
        raise Answer

    if kwargs:
        try:
            dry_run(pipe, Probe([1.0], on_step), **kwargs | {"generator": torch.Generator().manual_seed(1)})
        except Answer:
            pass
        except NotEncodedError as error:
            raise InputError(
                f"{type(pipe).__name__}: what it encodes depends on the noise of its call, so its encoders cannot be "
                "freed, and it cannot be trained"
            ) from error
