"""Which classes are a pipeline's components, and which of them denoises, as its config says before any is loaded?

A config comes with the weights: what it names is looked up here alone, and never imported from anywhere else.
"""

import contextlib
import importlib
import sys

from glance_utils import denoises


def component_class(kind: tuple[str, str]) -> type:
    """Return the class that a pipeline's config names for a component, as (library, class).

    The config comes with the weights and importing runs code, so only diffusers, transformers and what this process
    has imported itself are looked in (diffusers' own rule).
    """
    if not isinstance(kind, list | tuple) or [type(part) for part in kind] != [str, str]:
        raise ImportError(f"{str(kind)[:100]!r} names no class as [library, name]")
    library, name = kind
    if library in ("diffusers", "transformers"):
        return getattr(importlib.import_module(library), name)
    if library not in sys.modules:
        raise ImportError(f"{library}.{name} is code from outside diffusers and transformers, which is never imported")
    return getattr(sys.modules[library], name)


def denoiser_name(config: dict) -> str | None:
    """Return which of a pipeline's components denoises: the first by name whose class denoises, or None.

    `config` is the content of a model_index.json, or a pipeline's own `config`, which is the same.
    """
    for name, kind in sorted(config.items()):
        if isinstance(kind, list | tuple) and len(kind) == 2 and all(kind):
            with contextlib.suppress(ImportError, AttributeError):  # as a part of a pipeline's own module
                if denoises(component_class(kind)):
                    return name
    return None
