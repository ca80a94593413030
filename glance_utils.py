"""Glance in one file, to import or to copy: lists of timesteps, the losses, the sampler, the hand-off of two LoRAs.

It needs torch, diffusers and peft. With glance/ask/, which asks a pipeline what only that knows, it trains any.
Notation (Glance, arXiv 2512.02899, and rectified flow as in diffusers' FlowMatchEulerDiscreteScheduler):
    sigma      noise level in [0, 1];  timestep = 1000 * sigma
    latents    the clean image in the layout in which the pipeline denoises (packed tokens for FLUX)
    noisy      (1 - sigma) * latents + sigma * noise
    velocity   what the model predicts; its target is noise - latents
    Euler      x_next = x + (sigma_next - sigma) * velocity
"""

import contextlib
import dataclasses
import inspect
import math
import numbers

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from peft.tuners.tuners_utils import BaseTunerLayer


__version__ = "0.1.0"
PHASES = ("slow", "fast")
PUBLISHED_POSITIONS = (1, 3, 5, 7, 9, 11, 21, 31, 41, 50)  # the published grid, 1-based, of the model's own 50 steps
TIMESTEP_NAMES = {"t", "timestep", "timesteps"}  # what denoisers call that argument


class InputError(ValueError):
    """An error in what the user gave; its message is one line and says how to mend it."""


# --------------------------------------------------------------------------------------------------------------------
# The schedule: lists of timesteps (0..1000, descending)


def as_floats(values) -> list[float]:
    """Return one number or a list, array or tensor of numbers as Python's own, which can be compared and stored."""
    values = [values] if isinstance(values, numbers.Number) or getattr(values, "ndim", 1) == 0 else values
    return [float(value) for value in values]


def timesteps_to_sigmas(timesteps: list[float]) -> list[float]:
    """Return timesteps (0..1000) as sigmas (0..1)."""
    return [timestep / 1000 for timestep in as_floats(timesteps)]


def sigmas_to_timesteps(sigmas: list[float]) -> list[float]:
    """Return sigmas (0..1) as timesteps (0..1000)."""
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

    Values that are all <= 1 are sigmas. Raise InputError unless they descend, also across the two.
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
    for part in (*lists, sum(lists, [])):
        check_timesteps(part, name)
    return lists


def grid_positions(grid: str, count: int, base_steps: int) -> list[int]:
    """Return `count` of the model's own steps, 0-based: "glance", the published, scaled, or "even", every n-th."""
    if grid == "even":
        return [base_steps * index // count for index in range(count)]
    if grid != "glance":
        raise ValueError(f"grid is {grid!r}; the named ones are glance and even")
    places = [index * 9 / max(count - 1, 1) for index in range(count)]
    published = [(position - 1) * (base_steps - 1) / 49 for position in PUBLISHED_POSITIONS]
    return [round(float(position)) for position in np.interp(places, range(10), published)]


def derive_timesteps(base_timesteps: list[float], positions: list[int] | None = None) -> dict[str, list[float]]:
    """Pick positions from the model's own schedule, by default the published ones; the first half is slow."""
    positions = grid_positions("glance", 10, len(base_timesteps)) if positions is None else positions
    if len(set(positions)) < len(positions):
        raise InputError(
            f"--num_base_steps: {len(base_timesteps)} steps are too few for {len(positions)} distinct ones on this "
            "grid; give more, or fewer --num_inference_steps"
        )
    timesteps = as_floats(base_timesteps[position] for position in positions)
    half = math.ceil(len(positions) / 2)
    return {"slow": timesteps[:half], "fast": timesteps[half:]}


def timestep_order(num_timesteps: int, count: int, mode: str, generator: torch.Generator) -> torch.Tensor:
    """Return which timestep each of `count` training steps uses, int64 (count,).

    "stratified": every round of `num_timesteps` steps visits each once, shuffled. "random": uniform with replacement.
    """
    if mode == "random":
        return torch.randint(num_timesteps, (count,), generator=generator)
    rounds = [torch.randperm(num_timesteps, generator=generator) for _ in range(-(-count // num_timesteps))]
    return torch.cat(rounds)[:count]


# --------------------------------------------------------------------------------------------------------------------
# The losses: flow matching's, and the trajectory's, which is velocity_loss to the slope of segment_slopes


def add_noise(latents: torch.Tensor, noise: torch.Tensor, sigma: float) -> torch.Tensor:
    """Return the point at noise level sigma on the straight path from latents (B, ...) to noise (B, ...), float32."""
    sigma = sigma if isinstance(sigma, torch.Tensor) else float(sigma)
    return (1 - sigma) * latents.float() + sigma * noise.float()


def flow_matching_loss(velocity: torch.Tensor, latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Return mean((velocity - (noise - latents))**2) in float32, the same weight for every sigma."""
    return velocity_loss(velocity, noise.float() - latents.float())


def velocity_loss(velocity: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return mean((velocity - target)**2) in float32."""
    return F.mse_loss(velocity.float(), target.float())


def segment_slopes(points: list[torch.Tensor], sigmas: list[float]) -> list[torch.Tensor]:
    """Return the velocities whose Euler steps lead from each of the latents, at `sigmas`, to the next; one fewer."""
    return [(end - start) / (low - high) for start, end, high, low in zip(points, points[1:], sigmas, sigmas[1:])]


# --------------------------------------------------------------------------------------------------------------------
# The sampler: exactly the sigmas it is given, whatever the pipeline asks for


def denoises(kind: type) -> bool:
    """Return whether a class of models predicts the velocity: it takes a timestep, and is no ControlNet."""
    return "ControlNet" not in kind.__name__ and bool(TIMESTEP_NAMES & {*inspect.signature(kind.forward).parameters})


def denoiser(pipe: DiffusionPipeline) -> torch.nn.Module:
    """Return the model that predicts the velocity: the first by name whose class denoises."""
    for _, model in sorted(pipe.components.items()):
        kind = type(getattr(model, "_orig_mod", model))  # a compiled one's own forward takes anything
        if issubclass(kind, torch.nn.Module) and denoises(kind):
            return model
    raise InputError(f"{type(pipe).__name__} has no model that takes a timestep; Glance needs one")


def counts_image(scheduler) -> bool:
    """Return whether its sigmas are the image's share, 1 - sigma: they ascend, the model predicts latents - noise."""
    return bool(scheduler.config.get("invert_sigmas"))


class FixedSigmaScheduler(FlowMatchEulerDiscreteScheduler):
    """An Euler scheduler over a fixed list of sigmas, then 0; whatever steps, sigmas or mu a pipeline asks for.

    A pipeline's own scheduler would shift `sigmas=` again. It saves and loads as any scheduler does, by its config.
    """

    _compatibles = ["FlowMatchEulerDiscreteScheduler"]
    ignore_for_config = ["before_step", "like"]

    def __init__(
        self,
        sigmas: list[float],
        model_timesteps: list[float] | None = None,
        before_step=None,
        like=None,
        coefficients: list[list[float]] | None = None,
        invert_sigmas: bool = False,
        num_train_timesteps: int = 1000,
    ):
        """Walk `sigmas` (0..1, descending), one step each; raise InputError where a list has not one entry for each.

        `model_timesteps` are what the model is told where that is not 1000 * sigma. `before_step(index)` is called
        before a step's model calls. `like` is a scheduler from which to take the last two arguments. With
        `coefficients`, [a, c] for each step, a step goes along a * velocity + c * the previous velocity.
        """
        if like is not None:
            invert_sigmas = counts_image(like)
            num_train_timesteps = like.config.get("num_train_timesteps", num_train_timesteps)
        super().__init__(num_train_timesteps=num_train_timesteps, invert_sigmas=invert_sigmas)
        sigmas = as_floats(sigmas)
        lists = {"model_timesteps": model_timesteps, "coefficients": coefficients}
        lists = {name: value if value is None else np.asarray(value, float).tolist() for name, value in lists.items()}
        for name, value in lists.items():
            if value is not None and len(value) != len(sigmas):
                raise InputError(f"{name}: {len(value)} of them for {len(sigmas)} sigmas; give one for each step")
        self.register_to_config(sigmas=sigmas, **lists)  # beside what the parent has registered
        self.before_step, self.next_index, self.init_noise_sigma = before_step, 0, 1.0
        self.velocities = {}  # by step, the newest two

    def _begin_at(self, index: int) -> None:
        """Note which step is the next to be executed, as soon as it is known."""
        self.next_index = index
        if self.before_step is not None:
            self.before_step(index)

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None):
        super().set_timesteps(sigmas=self.config.sigmas, device=device)
        if self.config.model_timesteps is not None:
            self.timesteps = torch.tensor(self.config.model_timesteps, dtype=torch.float32, device=device)
        self.velocities = {}
        self._begin_at(0)

    def set_begin_index(self, begin_index: int = 0):
        """Leave the first steps out, as pipelines do that begin with a picture."""
        super().set_begin_index(begin_index)
        self._begin_at(begin_index)

    def index_for_timestep(self, timestep, schedule_timesteps=None) -> int:
        """Return the first of the steps whose timestep is nearest: some are alike, and some pipelines round them."""
        return int((self.timesteps.float() - torch.as_tensor(timestep).to(self.timesteps)).abs().argmin())

    def scale_noise(self, sample, timestep, noise=None):
        if not timestep.numel():
            raise InputError(f"strength leaves none of {len(self.config.sigmas)} steps; give a larger one")
        if self.begin_index is None and self.step_index is None:  # the picture that the pipeline will begin with
            self._begin_at(self.index_for_timestep(timestep.flatten()[0]))
        return super().scale_noise(sample, timestep, noise)

    def step(self, model_output, timestep, sample, *args, **kwargs):
        if self.step_index is None:
            self._init_step_index(timestep)
            if self.before_step is not None and self.step_index != self.next_index:
                begun = f"the pipeline begins with step {self.step_index} of {len(self.timesteps)} and did not say so"
                raise InputError(f"{begun} before it called its model; call pipe.scheduler.set_begin_index")
        index, timestep = self.step_index, self.timesteps[self.step_index]  # some pipelines round it to an integer
        if self.config.coefficients is not None:
            (a, c), velocity = self.config.coefficients[index], model_output.float()
            previous = self.velocities.get(index - 1)
            if previous is None:  # the first step that is executed: Euler's, unless it is the schedule's first as well
                a, previous = 1.0 if c else a, 0.0
            model_output = (a * velocity + c * previous).to(model_output.dtype)
            self.velocities = {index: velocity} | {i: v for i, v in self.velocities.items() if i == index - 1}
        result = super().step(model_output, timestep, sample, *args, **kwargs)
        self._begin_at(self.step_index)
        return result

    def scale_model_input(self, sample, timestep=None):
        return sample


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The plan of a few steps, as plain data, which dataclasses.asdict makes JSON of and Schedule(**...) reads.

    `phases` has the timesteps (0..1000, descending over all) under the name of the adapter that acts in them.
    `timestep_table`, [timestep, what the model is told there] ascending, is None where the two are alike;
    `coefficients` are a fitted solver's; `guidance` are arguments of the call that switch classifier-free guidance
    off. `branches` are what each step calls where these are mixed (glance/ask/mixed.py), by coefficients of their own.
    """

    phases: dict[str, list[float]]
    timestep_table: list[list[float]] | None = None
    coefficients: list[list[float]] | None = None
    guidance: dict = dataclasses.field(default_factory=dict)
    branches: list[str] | None = None

    @property
    def timesteps(self) -> list[float]:
        """Return the timesteps of all phases; raise InputError unless they descend from at most 1000 to above 0."""
        return check_timesteps([timestep for part in self.phases.values() for timestep in as_floats(part)])

    @property
    def phase_of_steps(self) -> list[str]:
        """Return the name of each step's phase."""
        return [phase for phase, part in self.phases.items() for _ in as_floats(part)]

    def scheduler(self, like=None, before_step=None) -> FixedSigmaScheduler:
        """Return the FixedSigmaScheduler that walks these steps; `like` is the pipeline's own."""
        if self.branches is not None:
            raise InputError("no scheduler walks mixed branches; draw with infer_glance.py")
        sigmas = timesteps_to_sigmas(self.timesteps)
        told = model_timesteps(self.timestep_table, sigmas)
        return FixedSigmaScheduler(sigmas, told, before_step, like, self.coefficients)


def model_timesteps(timestep_table: list[list[float]] | None, sigmas: list[float]) -> list[float] | None:
    """Return what the model is told at `sigmas`, read off a Schedule's table; None where that is 1000 * sigma."""
    if timestep_table is None:
        return None
    timesteps, values = zip(*timestep_table)
    return np.interp(sigmas_to_timesteps(sigmas), timesteps, values).tolist()


def adapted_layers(model: torch.nn.Module) -> list[BaseTunerLayer]:
    """Return the model's layers that have an adapter, active or not."""
    return [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]


def strengths(layer: BaseTunerLayer) -> dict[str, float]:
    """Return by adapter the factor of what it adds to this layer: alpha / rank times the user's scale."""
    return getattr(layer, "scaling", {})


def activate_adapter(transformer, name: str | None, scale: float = 1.0, others: dict | None = None) -> None:
    """Make this LoRA, or none, the only active one at `scale` times its strength, but for `others` of each layer."""
    for layer in adapted_layers(transformer):
        names = [*(others or {}).get(layer, ()), *([] if name is None else [name])]
        layer.enable_adapters(bool(names))
        if names:
            layer.set_adapter(names)
        if name is not None:
            layer.set_scale(name, scale)


def check_adapters(transformer, names: list[str]) -> None:
    """Raise InputError where the model lacks one of these adapters, or one is fused, so that no other can act."""
    layers = adapted_layers(transformer)
    loaded = sorted({name for layer in layers for name in strengths(layer)})
    if missing := [name for name in names if name not in loaded]:
        raise InputError(
            f"no adapter {missing[0]!r} is loaded into {type(transformer).__name__}, it has "
            f"{', '.join(loaded) or 'none'}; load one under this name, or draw without: FixedSigmaScheduler"
        )
    if fused := sorted({name for layer in layers for name in layer.merged_adapters}):
        raise InputError(f"the adapter {', '.join(fused)} is fused, so that no other can act; call pipe.unfuse_lora()")


@contextlib.contextmanager
def switchable_adapters(transformer, names: list[str], activate=activate_adapter):
    """Yield switch(name, scale), which lets one of the adapters `names` act; afterwards all are as before.

    Put back, layer by layer, is which are active, how strong, whether they are disabled and which train. Further
    ones that are active stay so all along. Raise InputError as check_adapters does.
    """
    check_adapters(transformer, names)
    states, others = [], {}
    for layer in adapted_layers(transformer):
        active, disabled = list(layer.active_adapters), layer.disable_adapters
        trains = {name: parameter.requires_grad for name, parameter in layer.named_parameters()}
        states.append((layer, active, disabled, dict(strengths(layer)), trains))
        others[layer] = [] if disabled else [name for name in active if name not in names]
    try:
        activate_adapter(transformer, None, others=others)
        yield lambda name, scale: activate(transformer, name, scale, others)
    finally:
        for layer, active, disabled, scaling, trains in states:
            layer.set_adapter(active)
            layer.enable_adapters(not disabled)
            strengths(layer).update({name: value for name, value in scaling.items() if name in strengths(layer)})
            for name, parameter in layer.named_parameters():
                parameter.requires_grad_(trains.get(name, parameter.requires_grad))


@contextlib.contextmanager
def glance_inference(
    pipe: DiffusionPipeline,
    schedule: Schedule | dict[str, list[float]],
    scales: dict[str, float] | None = None,
    activate=activate_adapter,
):
    """Run `pipe(...)` inside: one loop over all timesteps, one adapter a phase, exact hand-off between them.

        with glance_inference(pipe, Schedule({"slow": [...], "fast": [...]})) as kwargs:
            image = pipe(prompt, **kwargs).images[0]

    The adapters are loaded under the names of the schedule's phases; `scales` are their strengths, 1 by default. A
    pipeline that leaves steps out begins in the phase of its first step. Other active adapters stay so. Afterwards all
    is as it was. Raise InputError for names that are not loaded, and for a schedule that cannot be walked.
    """
    schedule = schedule if isinstance(schedule, Schedule) else Schedule(schedule)
    names, scales, active = schedule.phase_of_steps, scales or {}, None
    if unknown := ", ".join(sorted(set(scales) - set(schedule.phases))):
        raise InputError(f"scales: {unknown} is no phase; the phases are {', '.join(schedule.phases)}")
    with switchable_adapters(denoiser(pipe), list(schedule.phases), activate) as switch:

        def before_step(index: int) -> None:
            nonlocal active
            name = names[index] if index < len(names) else active
            if name != active or index == 0:
                switch(name, scales.get(name, 1.0))
            active = name

        original = pipe.scheduler
        pipe.scheduler = schedule.scheduler(original, before_step)
        try:
            yield {"num_inference_steps": len(names)} | schedule.guidance
        finally:
            pipe.scheduler = original
