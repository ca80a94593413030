"""Glance's parts, to import or to copy: the schedule, the losses, the ten-step sampler, LoRA files.

Notation (Glance, arXiv 2512.02899, and rectified flow as in diffusers' FlowMatchEulerDiscreteScheduler):

    sigma      noise level in [0, 1];  timestep = 1000 * sigma
    latents    the clean image in the layout in which the pipeline denoises (packed tokens for FLUX)
    noisy      (1 - sigma) * latents + sigma * noise
    velocity   what the model predicts; its target is noise - latents
    Euler      x_next = x + (sigma_next - sigma) * velocity

What only the pipeline knows (its schedule, its latents' layout, its velocity) is asked of it in glance/ask/.
"""

import contextlib
import functools
import importlib
import inspect
import json
import math
import numbers
import os
import re
import sys
import types
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers import __version__ as diffusers_version
from diffusers.loaders import PeftAdapterMixin
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save


__version__ = "0.1.0"
WEIGHT_NAME = "pytorch_lora_weights.safetensors"
PHASES = ("slow", "fast")
MAX_SIDE = 16384  # pixels of a picture
# The published grid, as 1-based positions in the model's own 50 steps.
PUBLISHED_POSITIONS = (1, 3, 5, 7, 9, 11, 21, 31, 41, 50)


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one line and says how to mend it."""


def first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextlib.contextmanager
def replaced(owner, name: str, value):
    """Set an attribute of an object or a class and put things back as they were, its own attribute or none."""
    nothing = object()
    before = vars(owner).get(name, nothing)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is nothing:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


# --------------------------------------------------------------------------------------------------------------------
# The schedule: lists of timesteps (0..1000, descending)


def as_floats(values) -> list[float]:
    """Return one number or a list, array or tensor of numbers as Python's own, which can be compared and stored."""
    values = [values] if isinstance(values, numbers.Number) or getattr(values, "ndim", 1) == 0 else values
    return [float(value) for value in values]


def timesteps_to_sigmas(timesteps: list[float]) -> list[float]:
    return [timestep / 1000 for timestep in as_floats(timesteps)]


def sigmas_to_timesteps(sigmas: list[float]) -> list[float]:
    return [sigma * 1000 for sigma in as_floats(sigmas)]


def check_timesteps(timesteps: list[float], name: str = "timesteps") -> list[float]:
    """Return `timesteps` (0 < t <= 1000, strictly descending) or raise InputError naming the value that is wrong."""
    timesteps = as_floats(timesteps)
    if not timesteps:
        raise InputError(f"{name}: the list is empty; give descending timesteps such as 1000,979.2,957.5")
    for value in timesteps:
        if not math.isfinite(value) or not 0 < value <= 1000:
            raise InputError(f"{name}: {value:g} is out of range; timesteps are above 0 and at most 1000")
    for high, low in zip(timesteps, timesteps[1:]):
        if low >= high:
            raise InputError(f"{name}: {low:g} follows {high:g}; list the timesteps in descending order")
    return timesteps


def parse_timesteps(text: str, name: str = "--flow_custom_timesteps") -> list[list[float]]:
    """Read "1000,979.2,957.5" or "SLOW LIST;FAST LIST" as one or two lists of timesteps (0..1000).

    Values that are all <= 1 are sigmas and are converted. Raises InputError for a list that is empty, mixed, not
    finite, out of range or not descending, also across the two lists.
    """
    try:
        lists = [[float(value) for value in part.replace(",", " ").split()] for part in str(text).split(";")]
    except ValueError as error:
        raise InputError(f"{name}: {error}; give numbers separated by commas") from None
    if len(lists) > 2:
        raise InputError(f"{name}: {len(lists)} lists found; give one, or two as 'SLOW LIST;FAST LIST'")
    values = sum(lists, [])
    if values and all(value <= 1 for value in values):
        lists = [sigmas_to_timesteps(part) for part in lists]
    elif any(0 <= value <= 1 for value in values):
        raise InputError(f"{name}: sigmas (0..1) and timesteps (0..1000) are mixed; use one of the two")
    for part in lists:
        check_timesteps(part, name)
    check_timesteps(sum(lists, []), name)
    return lists


def grid_positions(grid: str, count: int, base_steps: int) -> list[int]:
    """Which `count` of the model's own steps to keep, 0-based: "glance" is the published grid, scaled where it is not
    ten of 50; "even" is every n-th."""
    if grid == "even":
        return [base_steps * index // count for index in range(count)]
    if grid != "glance":
        raise ValueError(f"grid is {grid!r}; the named ones are glance and even")
    places = [index * 9 / max(count - 1, 1) for index in range(count)]
    published = [(position - 1) * (base_steps - 1) / 49 for position in PUBLISHED_POSITIONS]
    return [round(float(position)) for position in np.interp(places, range(10), published)]


def most_positions(grid: str, count: int, base_steps: int) -> int:
    """Return the largest number of steps, `count` at most, for which the named grid keeps distinct ones."""
    counts = range(count, 0, -1)
    return next(fewer for fewer in counts if len(set(grid_positions(grid, fewer, base_steps))) == fewer)


def derive_timesteps(base_timesteps: list[float], positions: list[int] | None = None) -> dict[str, list[float]]:
    """Pick positions from the model's own schedule, by default the published ones; the first half is slow."""
    positions = grid_positions("glance", 10, len(base_timesteps)) if positions is None else positions
    if len(set(positions)) < len(positions):
        raise InputError(
            f"--num_base_steps: {len(base_timesteps)} steps are too few for {len(positions)} distinct ones on this "
            "grid; give more, or fewer --num_inference_steps"
        )
    timesteps, half = as_floats(base_timesteps[position] for position in positions), -(-len(positions) // 2)
    return {"slow": timesteps[:half], "fast": timesteps[half:]}


def timestep_order(num_timesteps: int, count: int, mode: str, generator: torch.Generator) -> torch.Tensor:
    """Which timestep each of `count` training steps uses, int64 (count,).

    "stratified": every round of `num_timesteps` steps visits each once, shuffled. "random": uniform with replacement;
    in half of all 60-step runs it draws one of five timesteps at least twice as often as another.
    """
    if mode == "random":
        return torch.randint(num_timesteps, (count,), generator=generator)
    rounds = [torch.randperm(num_timesteps, generator=generator) for _ in range(-(-count // num_timesteps))]
    return torch.cat(rounds)[:count]


# --------------------------------------------------------------------------------------------------------------------
# The flow-matching loss


def add_noise(latents: torch.Tensor, noise: torch.Tensor, sigma: float) -> torch.Tensor:
    """Point at noise level sigma on the straight path from latents (B, ...) to noise (B, ...), in float32."""
    sigma = sigma if isinstance(sigma, torch.Tensor) else float(sigma)
    return (1 - sigma) * latents.float() + sigma * noise.float()


def flow_matching_loss(velocity: torch.Tensor, latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """mean((velocity - (noise - latents))**2) in float32, the same weight for every sigma."""
    return velocity_loss(velocity, noise.float() - latents.float())


def velocity_loss(velocity: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """mean((velocity - target)**2) in float32."""
    return F.mse_loss(velocity.float(), target.float())


# --------------------------------------------------------------------------------------------------------------------
# The trajectory loss: velocity_loss to the slope with which one step lands where the model's many small ones do


def segment_slopes(points: list[torch.Tensor], sigmas: list[float]) -> list[torch.Tensor]:
    """The velocities whose Euler steps lead from each of the latents, at `sigmas`, to the next; one fewer."""
    return [(end - start) / (low - high) for start, end, high, low in zip(points, points[1:], sigmas, sigmas[1:])]


# --------------------------------------------------------------------------------------------------------------------
# The sampler: exactly the sigmas it is given, whatever the pipeline asks for


def component_class(kind: tuple[str, str]) -> type:
    """The class that a pipeline's config names for a component, as (library, class).

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
    """Which of a pipeline's components denoises: the first by name whose forward takes a timestep, None if none does.

    `config` is the content of a model_index.json, or a pipeline's own `config`, which is the same.
    """
    for name, kind in sorted(config.items()):
        if isinstance(kind, list | tuple) and len(kind) == 2 and all(kind):
            with contextlib.suppress(ImportError, AttributeError):  # as a part of a pipeline's own module
                if {"t", "timestep", "timesteps"} & set(inspect.signature(component_class(kind).forward).parameters):
                    return name
    return None


def denoiser(pipe: DiffusionPipeline) -> torch.nn.Module:
    """The model that predicts the velocity, a transformer in nearly every pipeline."""
    return getattr(pipe, denoiser_name(pipe.config))


def counts_image(scheduler) -> bool:
    """Whether its sigmas are the image's share, 1 - sigma: they ascend, and the model predicts latents - noise."""
    return bool(scheduler.config.get("invert_sigmas"))


class FixedSigmaScheduler(FlowMatchEulerDiscreteScheduler):
    """Euler over a fixed list of sigmas, then 0. Whatever steps, sigmas or mu a pipeline requests are ignored.

    With it requested and used sigmas are equal: a pipeline's own scheduler would shift `sigmas=` once more. Plain
    diffusers does the same with shift=1.0, use_dynamic_shifting=False, shift_terminal=None and `sigmas=`, in
    pipelines that take `sigmas`. It saves and loads as any scheduler does, the whole sampler in its config.
    """

    _compatibles = ["FlowMatchEulerDiscreteScheduler"]
    ignore_for_config = ["before_step", "like"]

    def __init__(
        self,
        sigmas: list[float],
        told: list[float] | None = None,
        before_step=None,
        like=None,
        coefficients: list[list[float]] | None = None,
        invert_sigmas: bool = False,
        num_train_timesteps: int = 1000,
    ):
        """`told` are the timesteps told to the model where they are not 1000 * sigma; `before_step(index)` is called
        before each step's model calls; `like` is a scheduler that may count the image's share instead of the noise's,
        or timesteps to another number than 1000, which the last two arguments say as well; with `coefficients` [a, c]
        for each step, it goes along a * velocity + c * the previous step's velocity.

        Raises InputError where `told` or `coefficients` are not one for each sigma.
        """
        if like is not None:
            invert_sigmas = counts_image(like)
            num_train_timesteps = like.config.get("num_train_timesteps", num_train_timesteps)
        super().__init__(num_train_timesteps=num_train_timesteps, invert_sigmas=invert_sigmas)
        lists = {"sigmas": as_floats(sigmas), "told": told, "coefficients": coefficients}
        lists = {name: value if value is None else np.asarray(value, float).tolist() for name, value in lists.items()}
        for name, value in lists.items():
            if value is not None and len(value) != (count := len(lists["sigmas"])):
                raise InputError(f"{name}: {len(value)} of them for {count} sigmas; give one for each step")
        self.register_to_config(**lists)  # beside what the parent has registered
        self.init_noise_sigma = 1.0
        self.before_step = before_step
        self.next_index, self.velocities = 0, {}

    def _begin_at(self, index: int) -> None:
        """Note which step is the next to be executed, as soon as it is known."""
        self.next_index = index
        if self.before_step is not None:
            self.before_step(index)

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None):
        super().set_timesteps(sigmas=self.config.sigmas, device=device)
        if self.config.told is not None:
            self.timesteps = torch.tensor(self.config.told, dtype=torch.float32, device=device)
        self.velocities = {}  # by step, the newest two
        self._begin_at(0)

    def set_begin_index(self, begin_index: int = 0):
        """Called by pipelines that leave the first steps out: those that begin with a picture."""
        super().set_begin_index(begin_index)
        self._begin_at(begin_index)

    def index_for_timestep(self, timestep, schedule_timesteps=None) -> int:
        """The first of the steps whose timestep is nearest: some are told alike, and some pipelines round them."""
        return int((self.timesteps.float() - torch.as_tensor(timestep).to(self.timesteps)).abs().argmin())

    def scale_noise(self, sample, timestep, noise=None):
        if self.begin_index is None and self.step_index is None:  # the picture that the pipeline will begin with
            self._begin_at(self.index_for_timestep(timestep.flatten()[0]))
        return super().scale_noise(sample, timestep, noise)

    def step(self, model_output, timestep, sample, *args, **kwargs):
        if self.step_index is None:
            self._init_step_index(timestep)
            if self.before_step is not None and self.step_index != self.next_index:
                raise InputError(
                    f"the pipeline begins with step {self.step_index} of {len(self.config.sigmas)} and did not say so "
                    "before it called its model; call pipe.scheduler.set_begin_index"
                )
        index = self.step_index
        timestep = self.timesteps[index]  # some pipelines round it to an integer
        if self.config.coefficients is not None:
            (own, share), velocity = self.config.coefficients[index], model_output.float()
            before = self.velocities.get(index - 1)
            if before is None:  # the first step that is executed: Euler's, unless it is the schedule's first as well
                own, before = 1.0 if share else own, 0.0
            model_output = (own * velocity + share * before).to(model_output.dtype)
            self.velocities = {step: self.velocities[step] for step in {index - 1} & set(self.velocities)}
            self.velocities[index] = velocity
        result = super().step(model_output, timestep, sample, *args, **kwargs)
        if self.before_step is not None:
            self.before_step(self.step_index)
        return result

    def scale_model_input(self, sample, timestep=None):
        return sample


def adapted_layers(model: torch.nn.Module) -> list[BaseTunerLayer]:
    return [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]


def activate_adapter(transformer, name: str | None, scale: float = 1.0, beside: dict | None = None) -> None:
    """Make this LoRA the only active one, at `scale` times its strength, or none where the name is None.

    `beside` says, by layer, which others stay active as they are.
    """
    for layer in adapted_layers(transformer):
        names = [*(beside or {}).get(layer, ()), *([] if name is None else [name])]
        layer.enable_adapters(bool(names))
        if names:
            layer.set_adapter(names)
        if name is not None:
            layer.set_scale(name, scale)


@contextlib.contextmanager
def adapters_kept(transformer):
    """Put every layer's adapters back as they were: which are active, how strong, whether disabled, which train."""
    found = []
    for layer in adapted_layers(transformer):
        trains = {name: parameter.requires_grad for name, parameter in layer.named_parameters()}
        found.append((layer, list(layer.active_adapters), layer.disable_adapters, dict(strengths(layer)), trains))
    try:
        yield
    finally:
        for layer, active, disabled, scaling, trains in found:
            layer.set_adapter(active)
            layer.enable_adapters(not disabled)
            strengths(layer).update({name: value for name, value in scaling.items() if name in strengths(layer)})
            for name, parameter in layer.named_parameters():
                parameter.requires_grad_(trains.get(name, parameter.requires_grad))


def strengths(layer: BaseTunerLayer) -> dict[str, float]:
    """By adapter, what its contribution to this layer is multiplied with: alpha / rank times the user's scale."""
    return getattr(layer, "scaling", {})


def check_adapters(transformer, names: list[str]) -> None:
    """InputError where the model lacks one of these adapters, or an adapter is fused, so that others cannot act."""
    layers = adapted_layers(transformer)
    loaded = sorted({name for layer in layers for name in strengths(layer)})
    for name in names:
        if name not in loaded:
            raise InputError(
                f"no adapter {name!r} is loaded into {type(transformer).__name__}, it has "
                f"{', '.join(loaded) or 'none'}; load one under this name, or draw without: FixedSigmaScheduler"
            )
    if fused := sorted({name for layer in layers for name in layer.merged_adapters}):
        raise InputError(f"the adapter {', '.join(fused)} is fused, so that no other can act; call pipe.unfuse_lora()")


@contextlib.contextmanager
def fused_adapters(transformer):
    """A function like `activate_adapter` that adds the LoRA to the base's own weights: it costs nothing a step then.

    Each is added to a copy of the base's weights, never to what another left: afterwards the base is as it was, to
    the bit. It takes the memory of the adapted layers once more. Adapters that are active act beside it.
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
    def activate(transformer, name: str | None, scale: float = 1.0) -> None:
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


@contextlib.contextmanager
def glance_inference(
    pipe: DiffusionPipeline,
    phases: dict[str, list[float]],
    scales: dict[str, float] | None = None,
    told=lambda sigmas: None,
    fuse: bool = False,
    coefficients: list[list[float]] | None = None,
):
    """Run `pipe(...)` inside: one loop over all timesteps, one adapter a phase, exact hand-off between them.

        with glance_inference(pipe, {"slow": [...], "fast": [...]}) as kwargs:
            image = pipe(prompt, **kwargs).images[0]

    The adapters are already loaded under the names of `phases`; `scales` are their strengths, 1 by default;
    `told(sigmas)` are the timesteps told to the model, 1000 * sigma by default; `fuse` adds
    each LoRA to the base's weights; `coefficients` are a fitted solver's (FixedSigmaScheduler). A pipeline that leaves
    steps out, as those that begin with a picture do, begins in the phase of its first step. Other adapters that are
    active stay so. Afterwards the scheduler and all adapters are as they were found.

    Raises InputError for names that are not loaded, and for timesteps that check_timesteps refuses.
    """
    model, scheduler, scales = denoiser(pipe), pipe.scheduler, scales or {}
    if unknown := set(scales) - set(phases):
        raise InputError(f"scales: {', '.join(sorted(unknown))} is no phase; the phases are {', '.join(phases)}")
    check_adapters(model, list(phases))
    timesteps = check_timesteps([timestep for part in phases.values() for timestep in as_floats(part)])
    names = [name for name, part in phases.items() for _ in as_floats(part)]
    beside = {
        layer: [] if layer.disable_adapters else [name for name in layer.active_adapters if name not in phases]
        for layer in adapted_layers(model)
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(adapters_kept(model))
        activate_adapter(model, None, beside=beside)
        activate = functools.partial(activate_adapter, beside=beside)
        activate, active = stack.enter_context(fused_adapters(model)) if fuse else activate, None

        def switch(index: int) -> None:
            nonlocal active
            name = names[index] if index < len(names) else active
            if name != active or index == 0:
                activate(model, name, scales.get(name, 1.0))
            active = name

        sigmas = timesteps_to_sigmas(timesteps)
        fixed = FixedSigmaScheduler(sigmas, told(sigmas), switch, scheduler, coefficients)
        stack.enter_context(replaced(pipe, "scheduler", fixed))
        yield {"num_inference_steps": len(timesteps)}


# --------------------------------------------------------------------------------------------------------------------
# LoRA files: diffusers' format, alpha folded in, the recipe in the header


# All of attention, and what the official recipe adds: modulation and the output of MLPs.
DEFAULT_LAYERS = re.compile(
    r"\w*att(n|ention)\w*\.(.+\.)?\w+|to_[qkv]|to_out|proj_out|(img|txt)_mod\.1|norm(1|1_context)?\.linear"
)
FEED_FORWARD = re.compile(r"(ff\w*|feed_forward\w*|\w*mlp)\..+")


def lora_layers(transformer, names: str | None = None) -> list[str]:
    """Full names of the linear layers in the transformer's blocks to adapt: by default DEFAULT_LAYERS, or those that
    end in one of the comma-separated `names`. InputError lists candidates where nothing matches."""
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
    """Whether a LoRA adapts this layer by default; the output of an MLP is the layer that makes it narrow again."""
    in_block = name.split(".", 1)[1]
    if re.search(rf"(^|\.){FEED_FORWARD.pattern}$", in_block):
        return module.in_features > module.out_features
    return bool(re.search(rf"(^|\.)({DEFAULT_LAYERS.pattern})$", in_block))


def with_adapters(transformer):
    """The transformer itself, with diffusers' LoRA methods mixed in where its class lacks them."""
    if not isinstance(transformer, PeftAdapterMixin):
        kind = type(transformer)
        transformer.__class__ = type(kind.__name__, (kind, PeftAdapterMixin), {"__module__": kind.__module__})
    return transformer


def compute_as_saved(transformer) -> None:
    """Let the LoRAs compute in their input's dtype and with alpha / rank in lora_B, as the saved file will.

    Training then sees, to the last bit, what inference in that dtype sees. peft computes in the dtype of the LoRA's
    weights, which are float32 while training: slower, and every input is kept once more in float32 for backward.
    """
    for layer in transformer.modules():
        if isinstance(layer, LoraLayer):
            layer.forward = types.MethodType(_forward_as_saved, layer)


def _forward_as_saved(layer: LoraLayer, x: torch.Tensor) -> torch.Tensor:
    result = layer.base_layer(x)
    for name in [] if layer.disable_adapters else layer.active_adapters:
        if name in layer.lora_A:
            lora_B = layer.lora_B[name].weight * layer.scaling[name]
            low_rank = F.linear(x, layer.lora_A[name].weight.to(x.dtype))
            result = result + F.linear(low_rank, lora_B.to(x.dtype))
    return result


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


def shown(value) -> str:
    """What a file says, for an error message: on one line, without control characters, not too long."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def is_number(value, most: float = math.inf) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) <= most


def read_lora(pipe: DiffusionPipeline, path: Path) -> dict[str, torch.Tensor]:
    """Return a LoRA file's tensors, checked: LAYER.lora_A.weight (rank, in), LAYER.lora_B.weight (out, rank), and if
    it has them LAYER.lora_B.bias and LAYER.lora_magnitude_vector (out). LAYER is a name in the pipeline's denoiser.

    The names may be those of diffusers, with its prefix or without, of peft, or of whatever other trainer diffusers'
    own converter for this pipeline reads. Strengths other than 1, from .alpha tensors or peft's settings, are folded
    into lora_B in float32. Raises InputError for any file that is not just a LoRA of this model.
    """
    names = LayerNames(pipe)
    tensors, config = _read_file(path, names)
    scaled, alphas = _fold_strength(path, tensors, config, names)
    try:
        lora = _in_our_names(path, scaled, names)
    except InputError:  # by diffusers' converter, which takes alphas too; or it is as it was said first
        if (lora := _converted(pipe, path, scaled, alphas, names)) is None:
            raise
    _check_lora(path, lora, names)
    for key, part in (("use_dora", "lora_magnitude_vector"), ("lora_bias", "lora_B.bias")):
        if config.get(key) and not any(name.endswith(part) for name in lora):
            raise InputError(f"{path}: its settings say {key}, but it holds no {part}; get an intact file")
    return lora


class LayerNames:
    """A denoiser's layers as files name them: by its own names, with underscores for points, and wrapped."""

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
        """The model's own name of the layer that a file names so; None where it has none."""
        while name not in self.names:
            wrapper = self.wrapper(name)
            if wrapper is None:
                return None
            name = name.removeprefix(wrapper)
        return self.names[name]

    def wrapper(self, name: str) -> str | None:
        return next((wrapper for wrapper in self.wrappers if name.startswith(wrapper)), None)


def _read_file(path: Path, names: LayerNames) -> tuple[dict[str, torch.Tensor], dict]:
    """The tensors, and peft's settings: those in the header, or in the file that peft writes beside its own."""
    try:
        with safe_open(path, framework="pt") as file:
            header, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
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
    where, text = "lora_adapter_metadata", header.get("lora_adapter_metadata", "{}")
    beside = Path(path).with_name("adapter_config.json")
    if text == "{}" and any(name.startswith("base_model.model.") for name in tensors):
        with contextlib.suppress(OSError):  # where it is missing, other loaders take alpha = rank as well
            where, text = beside.name, beside.read_text(encoding="utf-8", errors="replace")
    try:
        config = {key.removeprefix(f"{names.component}."): value for key, value in json.loads(text).items()}
    except (AttributeError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: its {where} is not a JSON object ({error})") from None
    if where == beside.name:
        for key in ("auto_mapping", "task_type", "revision"):  # of the class and the task that it was trained in
            config.pop(key, None)
    check_config(f"{path}: its {where}", config)
    return tensors, config


def check_config(where: str, config: dict) -> None:
    """Raise InputError where peft's settings of a file say more than names, ranks and strengths."""
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
                f"{where} has {shown(key)} {shown(value)}; a LoRA needs r, lora_alpha and target_modules alone"
            )


def _is_strength(key: str, value) -> bool:
    return is_number(value, 65536) and value > 0 and (key != "r" or type(value) is int)


def _of_layer(patterns: dict, layer: str, usual):
    """The value of the first pattern, the end of a layer's name or with ^ the whole, that fits this one."""
    for pattern, value in patterns.items():
        name = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if layer == name or pattern[0] != "^" and layer.endswith(f".{name}"):
            return value
    return usual


def _fold_strength(path: Path, tensors: dict, config: dict, names: LayerNames) -> tuple[dict, dict]:
    """(tensors without .alpha, lora_B multiplied with the strength that the file tells; of each .alpha the rank)."""
    scaled, alphas, ranks, scales = {}, {}, {}, {}
    for name, tensor in tensors.items():
        found = TENSOR.fullmatch(name)
        if found and PARTS[found["part"]] == "lora_A" and tensor.ndim > 1 and len(tensor):
            ranks[found["layer"]] = len(tensor)
    for layer, rank in ranks.items():
        own, alpha = names.find(layer) or layer, tensors.get(f"{layer}.alpha")
        told = _of_layer(config.get("rank_pattern", {}), own, config.get("r", rank))
        if told != rank:
            raise InputError(f"{path}: {layer} has rank {rank}, but its settings say {told}; get an intact file")
        strength = _of_layer(config.get("alpha_pattern", {}), own, config.get("lora_alpha", rank))
        scales[layer] = strength / (math.sqrt(rank) if config.get("use_rslora") else rank)
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
        found = TENSOR.fullmatch(name)
        if name.endswith(".alpha"):
            layer = name.removesuffix(".alpha")
            if layer not in ranks:
                raise InputError(f"{path}: it holds {shown(name)} without a LoRA of this layer; get an intact file")
            alphas[name] = torch.tensor(float(ranks[layer]))
        elif found and PARTS[found["part"]] == "lora_B" and scales.get(found["layer"], 1) != 1:
            scaled[name] = tensor.float() * scales[found["layer"]]
        else:
            scaled[name] = tensor
    return scaled, alphas


def _in_our_names(path: Path, tensors: dict, names: LayerNames) -> dict[str, torch.Tensor]:
    """The tensors by the model's own names; InputError for what is no part of a LoRA, or of a layer it lacks."""
    lora = {}
    for name, tensor in tensors.items():
        found = TENSOR.fullmatch(name)
        part = found and (PARTS[found["part"]], found["kind"] or "weight")
        if part not in WHOLE or (found["kind"] is None and part[0] != "lora_magnitude_vector"):
            raise InputError(
                f"{path}: {shown(name)} of shape {tuple(tensor.shape)} is no part of a LoRA; get an intact file"
            )
        layer = names.find(found["layer"])
        if layer is None:
            writer = names.wrappers.get(names.wrapper(name), "diffusers'")
            hint = f" (the name is {writer}; save it with diffusers' names)" if writer != "diffusers'" else ""
            kind = type(names.model).__name__
            raise InputError(f"{path}: it adapts {shown(found['layer'])}, which {kind} here does not have{hint}")
        if not isinstance(module := names.layers[layer], torch.nn.Linear):
            kind = type(module).__name__
            raise InputError(f"{path}: it adapts {shown(layer)}, a {kind}; only linear layers' LoRAs are read")
        key = f"{layer}.{part[0]}" + (f".{part[1]}" if part[0] != "lora_magnitude_vector" else "")
        if key in lora:
            raise InputError(f"{path}: it holds {key} twice, once as {shown(name)}; get an intact file")
        lora[key] = tensor
    return lora


def _converted(pipe, path: Path, tensors: dict, alphas: dict, names: LayerNames) -> dict[str, torch.Tensor] | None:
    """What diffusers' converter for this pipeline makes of a file with other names; None if it does not read it all.

    It may leave out what it does not know. So it first converts tensors that hold their own number: all must arrive.
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
    ranks, further = {}, {}
    for name, tensor in lora.items():
        layer, part = re.fullmatch(r"(.+)\.(lora_.+)", name).groups()
        shape, module = tuple(tensor.shape), names.layers[layer]
        if len(shape) != (2 if part in ("lora_A.weight", "lora_B.weight") else 1) or 0 in shape:
            raise InputError(f"{path}: {name} of shape {shape} is no part of a LoRA; get an intact file")
        is_down = part == "lora_A.weight"
        found, needed = (shape[1], module.in_features) if is_down else (shape[0], module.out_features)
        if found != needed:
            raise InputError(f"{path}: {name} is for width {found}, but this base has {needed}")
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
        for part, those in further.items():
            if layer not in those:
                raise InputError(f"{path}: {layer} has no {part}, as others have; get an intact file")


def load_lora(pipe: DiffusionPipeline, path: str | Path, adapter: str) -> None:
    """Load a LoRA file of any form that read_lora reads into the denoiser, under this name, active.

    Raises InputError where the file does not fit, or not just its layers hold just its values afterwards.
    """
    model = with_adapters(denoiser(pipe))
    if adapter in getattr(model, "peft_config", {}):
        raise InputError(f"an adapter {adapter!r} is loaded already; unload it first, or choose another name")
    lora, own_place = read_lora(pipe, Path(path)), BaseTunerLayer._get_base_layer_device_and_dtype

    def place(layer, base_layer):
        """peft puts an adapter into its layer's dtype, but 8 bits are for storing the base alone."""
        device, dtype = own_place(layer, base_layer)
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
    """Raise InputError where the model's adapter of this name is not just these tensors: some loaders leave some out.

    `lora` has the names that read_lora and peft.get_peft_model_state_dict give.
    """
    found = get_peft_model_state_dict(model, adapter_name=adapter)
    for name in sorted(found.keys() ^ lora.keys()):
        what = "was left out" if name in lora else "is not in the file"
        raise InputError(f"loading the LoRA {adapter!r}: {name} {what}; is this peft's or diffusers' tested version?")
    for name, value in lora.items():
        loaded = found[name].detach()
        if loaded.is_meta:  # offloaded: its values are with the hooks
            continue
        if not loaded.isfinite().all():
            raise InputError(f"loading the LoRA {adapter!r}: {name} holds values too large for {loaded.dtype}")
        if not torch.equal(loaded.cpu(), value.to("cpu", loaded.dtype)):
            raise InputError(f"loading the LoRA {adapter!r}: {name} did not become what the file holds")


def replace_file(path: Path, write) -> None:
    """Call write(temporary path), then rename it to `path`: a file is either the old one or the whole new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        os.umask(umask := os.umask(0))
        temporary.chmod(0o666 & ~umask)  # safetensors makes its files readable by their owner alone
        with temporary.open("r+b") as file:  # Windows flushes none that is open to read alone
            os.fsync(file.fileno())  # the name must not be there before the content, should the machine go down
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # it was renamed, or its folder has gone
            temporary.unlink()


def save_lora(transformer, adapter: str, directory: str | Path, recipe: dict, prefix: str = "transformer") -> Path:
    """Write one adapter as `directory`/pytorch_lora_weights.safetensors and return the path.

    `prefix` is the transformer's name in its pipeline, with which diffusers' keys begin.
    alpha / rank is folded into lora_B, so the file has alpha = rank: every loader, whether it reads alpha or not,
    applies the strength that was trained. The recipe goes into the header under "glance".
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
        "glance": json.dumps(recipe, default=lambda value: value.tolist() if hasattr(value, "tolist") else str(value)),
    }
    Path(directory).mkdir(parents=True, exist_ok=True)
    path = Path(directory) / WEIGHT_NAME
    replace_file(path, lambda temporary: temporary.write_bytes(_ordered(save(state, metadata=header))))
    return path


def _ordered(content: bytes) -> bytes:
    """A safetensors file with its header's keys in order; safetensors writes metadata in a random one, and the same
    run should give the same file."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[end:]
