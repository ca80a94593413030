"""A diffusers pipeline encodes its prompts once, in its own way, and its encoders are then freed."""

import contextlib
import inspect

import torch
from diffusers import DiffusionPipeline

from ask_pipeline import Answer, Probe, dry_run, freeable_components


def remember_prompts(pipe: DiffusionPipeline) -> None:
    """Let the pipeline encode each prompt once, without gradients, and hand the result back ever after.

    Every method of the pipeline that uses a text encoder, to encode a prompt or to rewrite it, remembers what it
    answered. The text encoders can then be freed; a prompt that was never seen before raises RuntimeError.
    """
    encoders = set(freeable_components(pipe)) - {"vae"}
    for kind in reversed(type(pipe).__mro__):
        if issubclass(kind, DiffusionPipeline) and kind is not DiffusionPipeline:
            for name, method in vars(kind).items():
                method = inspect.unwrap(method) if inspect.isfunction(method) else None
                if method and not name.startswith("__") and encoders & set(method.__code__.co_names):
                    setattr(pipe, name, _remembered(pipe, getattr(pipe, name)))


def _remembered(pipe: DiffusionPipeline, method):
    known = {}

    def remembered(*args, **kwargs):
        arguments = inspect.signature(method).bind(*args, **kwargs).arguments
        if any(isinstance(value, torch.Tensor) for value in arguments.values()):
            return method(*args, **kwargs)
        key = repr(sorted((name, value) for name, value in arguments.items() if name not in ("device", "generator")))
        if key not in known:
            try:
                with torch.no_grad():
                    known[key] = method(*args, **kwargs)
            except (TypeError, AttributeError) as error:
                if any(isinstance(part, _Freed) for part in pipe.components.values()):
                    raise RuntimeError("this prompt was not encoded before the text encoders were freed") from error
                raise
        return known[key]

    return remembered


class _Freed:
    """Stands where a model was that has been freed: pipelines still ask whether it is there, and its dtype."""

    def __init__(self, model: torch.nn.Module):
        self.dtype, self.device, self.config = model.dtype, model.device, getattr(model, "config", None)

    def __getattr__(self, name):
        raise AttributeError(f"{name} of a model that was freed, because an image and a prompt are encoded but once")


def free_components(pipe: DiffusionPipeline, **kwargs) -> None:
    """Drop every model but the transformer: what they had to say is known. With the call's arguments given, an
    InputError where the pipeline needs one of them in its loop after all."""
    for name, component in freeable_components(pipe).items():
        setattr(pipe, name, _Freed(component))

    def on_step(index, model_output, sample):
        raise Answer

    if kwargs:
        with contextlib.suppress(Answer):
            dry_run(pipe, Probe([1.0], on_step), **kwargs)
