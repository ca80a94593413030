"""How does benchmarks/quality.py draw? With one pipeline and, for each row's settings, the call for its pictures.

A further kind of row is one more case in `prepared`; the noise of a picture must not depend on its row.
"""

import contextlib
import copy
import dataclasses
import functools
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from quality_rows import BASE_STEPS
from tqdm.auto import tqdm

from glance import drawing
from glance.adapters import fused_adapters
from glance.ask import latents as ask_latents
from glance.ask import mixed
from glance.ask import pipeline as ask
from glance.ask import sampler as grids
from glance.ask.pipeline import replaced
from glance.ask.prompts import remember_prompts
from glance.ask.schedule import ask_timesteps
from glance.files.lora import load_lora
from glance.files.recipe import WEIGHT_NAME, read_recipe, schedule_of
from glance.files.sampler import read_sampler
from glance.training.inference_steps import base_inference
from glance_utils import (
    PHASES,
    Schedule,
    denoiser,
    derive_timesteps,
    glance_inference,
    grid_positions,
    model_timesteps,
    segment_slopes,
    timesteps_to_sigmas,
)


SEEDS = {"reported": 9000, "validation": 1000, "training": 3000, "diversity": 7000}  # of each set's first picture


class Counter(drawing.Counter):
    """A counter of model calls and of linear layers' multiplications: a cache calls the model and skips most of it."""

    def __init__(self, pipe):
        super().__init__(pipe)
        self.products = 0
        for layer in denoiser(pipe).modules():
            if isinstance(layer, torch.nn.Linear):
                layer.register_forward_pre_hook(self.multiply)

    def multiply(self, layer, args):
        self.products += args[0].numel() * layer.out_features


@contextlib.contextmanager
def counted_forwards(kind: type):
    """Yield a count of the samples that pass models of this class inside, also in pipelines that are made there.

    Those with gradients count as "trained", others as "drawn"; tensors with a shape and no content do not count.
    """
    forward = kind.forward
    spent = {"trained": 0, "drawn": 0}

    @functools.wraps(forward)
    def count(model, *args, **kwargs):
        samples = ask.model_input(args, kwargs)
        if type(samples) in (torch.Tensor, list) and model.device.type != "meta":
            spent["trained" if torch.is_grad_enabled() else "drawn"] += len(samples)
        return forward(model, *args, **kwargs)

    with replaced(kind, "forward", count):
        yield spent


@dataclass(eq=False)
class Bench:
    """A pipeline, its answers, the captions to draw and the scorers: what every row needs."""

    args: object
    pipe: diffusers.DiffusionPipeline
    call: dict  # its arguments, as in inference
    single: dict  # those that switch classifier-free guidance off
    timesteps: list[float]  # of its own 50 steps
    timestep_table: list[list[float]] | None
    layout: ask_latents.LatentLayout
    counter: Counter
    sets: dict[str, list[str]]  # captions, one a picture
    judge: object = None
    scorers: dict = field(default_factory=dict)  # {name: function(images, prompts) -> list of floats}

    @functools.cached_property
    def trajectory(self) -> tuple[list[torch.Tensor], int]:
        """Return the base's trajectory of the training caption, for grid and solver, and its model calls."""
        calls, call = self.counter.calls, self.call | {"prompt": self.sets["training"][0]}
        points = grids.walk(self.pipe, self.timesteps, self.timestep_table, 0, **call)
        return points, self.counter.calls - calls

    @functools.cached_property
    def work_per_call(self) -> float:
        """Return the multiplications of one whole model call."""
        self.counter.calls = self.counter.products = 0
        draw(self, {"steps": 1, "grid": "even"}, "reported", count=1)
        return self.counter.products / self.counter.calls

    @functools.cached_property
    def teacher_pictures(self) -> torch.Tensor:
        """Return the teacher's pictures of the reported captions, float32 (N, 3, H, W) in 0..1."""
        return pictures(self, teacher(self, "reported"))


@functools.cache
def teacher(bench: Bench, name: str) -> torch.Tensor:
    """Return a set's final latents (N, ...) after all of the base's own steps."""
    return draw(bench, {"steps": BASE_STEPS, "grid": "even"}, name)


@functools.cache
def sampler(bench: Bench, grid: str, steps: int, solver: str) -> tuple[list[float], list[list[float]] | None]:
    """Return (timesteps, coefficients or None), as training finds them on one trajectory of the base."""
    if steps >= BASE_STEPS or grid == "shipped":
        return ask_timesteps(bench.pipe, steps, **bench.call), None
    points, sigmas = None, [*timesteps_to_sigmas(bench.timesteps), 0.0]
    if needs_trajectory({"grid": grid, "solver": solver}):
        points = bench.trajectory[0]
    if grid == "rotation":
        return equal_rotation(points, bench.timesteps, steps), None
    auto = grid == "auto"
    positions = grids.best_positions(points, sigmas, steps) if auto else grid_positions(grid, steps, BASE_STEPS)
    coefficients = grids.fit_coefficients(points, sigmas, positions) if solver == "fitted" else None
    return [bench.timesteps[position] for position in positions], coefficients


def needs_trajectory(settings: dict) -> bool:
    """Return whether a row's steps are found on a trajectory of the base."""
    return settings.get("grid") in ("auto", "rotation") or settings.get("solver") == "fitted"


def equal_rotation(points: list[torch.Tensor], timesteps: list[float], steps: int) -> list[float]:
    """Return so many timesteps between which the velocity turns by the same angle (TORS, arXiv 2603.00763).

    `points` (B, ...) are those of a trajectory at the base's own `timesteps`, and after the last. Angles in between
    are read off the line from one of its steps to the next.
    """
    velocities = [slope.flatten().double() for slope in segment_slopes(points, [*timesteps, 0.0])]
    turned = [0.0]
    for velocity, following in zip(velocities, velocities[1:]):
        cosine = torch.cosine_similarity(velocity, following, dim=0)
        turned.append(turned[-1] + cosine.clamp(-1, 1).acos().item())
    return np.interp(np.arange(steps) / steps * turned[-1], turned, timesteps).tolist()


def on_sigmas(kind: type, sigmas: list[float], told: list[float] | None) -> type:
    """Return a scheduler class of diffusers that walks these sigmas, then 0, whatever it is asked for.

    Its model is `told` these timesteps, 1000 * sigma where None: not rounded, as diffusers' own are.
    """

    class OnSigmas(kind):
        def set_timesteps(self, num_inference_steps=None, device=None, mu=None):
            super().set_timesteps(len(sigmas), device, mu=mu)
            # Their logarithms of 1 - sigma want no 1: UniPC has the same number for its own.
            self.sigmas = torch.tensor([*(min(sigma, 1 - 1e-6) for sigma in sigmas), 0.0])
            self.timesteps = torch.tensor(told or [1000 * sigma for sigma in sigmas], device=device)

    return OnSigmas


def scheduler_of(bench: Bench, settings: dict):
    """Return a row's scheduler of diffusers, set up for flow matching: on its own steps, or on those of a grid."""
    config, flow = bench.pipe.scheduler.config, {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    kind = getattr(diffusers, settings["scheduler"])
    if "grid" in settings:
        timesteps, _ = sampler(bench, settings["grid"], settings["steps"], "euler")
        sigmas = timesteps_to_sigmas(timesteps)
        kind = on_sigmas(kind, sigmas, model_timesteps(bench.timestep_table, sigmas))
    return kind.from_config(config, **flow, flow_shift=config.get("shift", 1.0))


@contextlib.contextmanager
def prepared(bench: Bench, settings: dict):
    """Yield (walk, call): walk(**call) returns the final latents of one batch of a row, the pipeline set up inside."""
    pipe, call = bench.pipe, bench.call
    kwargs = {"num_inference_steps": settings.get("steps", BASE_STEPS)}
    with contextlib.ExitStack() as stack:
        if "scheduler" in settings:
            stack.enter_context(replaced(pipe, "scheduler", scheduler_of(bench, settings)))
        elif "cache" in settings:
            name, options = settings["cache"]
            precise = {"taylor_factors_dtype": pipe.dtype} if "Taylor" in name else {}
            denoiser(pipe).enable_cache(getattr(diffusers.hooks, name)(**options, **precise))
            stack.callback(denoiser(pipe).disable_cache)
        elif "cache_dit" in settings:
            import cache_dit  # a package that is no requirement: without it the row is left out

            config = cache_dit.DBCacheConfig(num_inference_steps=BASE_STEPS, **settings["cache_dit"])
            cache_dit.enable_cache(pipe, cache_config=config)
            stack.callback(cache_dit.disable_cache, pipe)
        elif "lora" in settings:
            call, schedule = recipe_of(bench, settings["lora"])
            loras, scales = has_loras(settings["lora"]), settings.get("scales") or {}
            activate = stack.enter_context(fused_adapters(denoiser(pipe)))
            if schedule.branches:
                switch = SimpleNamespace(without_loras=not loras, lora_scale=scales)
                before_step = stack.enter_context(drawing.phase_switch(switch, pipe, schedule, activate))
                yield functools.partial(walk_mixed, pipe, schedule, before_step), call
                return
            kwargs = glance_inference(pipe, schedule, scales, activate) if loras else base_inference(pipe, schedule)
            kwargs = stack.enter_context(kwargs)
        else:
            timesteps, fitted = sampler(bench, settings["grid"], settings["steps"], settings.get("solver", "euler"))
            schedule = Schedule({"base": timesteps}, bench.timestep_table, fitted)
            stack.enter_context(replaced(pipe, "scheduler", schedule.scheduler(pipe.scheduler)))
            kwargs = {"num_inference_steps": len(timesteps)}
        call = call | kwargs | ({} if settings.get("guided", True) else bench.single)
        yield functools.partial(walk_loop, pipe), stack.enter_context(ask.plain_call(pipe, call))


def walk_loop(pipe, **call) -> torch.Tensor:
    """Return the final latents (B, ...), float32, of the pipeline's own loop."""
    return ask_latents.loop_points(pipe, **call)[-1]


def walk_mixed(pipe, schedule: Schedule, before_step, generator, **call) -> torch.Tensor:
    """Return the final latents (1, ...), float32, of a picture on a schedule of mixed branches."""
    pipe = copy.copy(pipe)
    remember_prompts(pipe)  # which is called for each step; this copy alone remembers
    calls = mixed.branch_calls(pipe, call, call | schedule.guidance)
    start = mixed.starting_latents(pipe, generator=generator, **calls["prompt"])
    return mixed.final_latents(pipe, schedule, calls, start, before_step).float().cpu()


def recipe_of(bench: Bench, folder: str) -> tuple[dict, Schedule]:
    """Return the call and the steps that a pair, or a sampler alone, was made for; the pipeline's where the pair's
    files do not say."""
    if has_loras(folder):
        recipes = {phase: read_recipe(lora_file(folder, phase), required=False) for phase in PHASES}
        if not all(recipes.values()):
            return bench.call, Schedule(derive_timesteps(bench.timesteps), bench.timestep_table)
        recipe, schedule = recipes["slow"], schedule_of(recipes)
    else:
        found = read_sampler(folder)
        recipe, schedule = found.recipe(), found.schedule()
    call = bench.call | recipe.pipeline_kwargs | {"height": recipe.height, "width": recipe.width}
    call |= {} if recipe.guidance_scale is None else {"guidance_scale": recipe.guidance_scale}
    call |= bench.single if recipe.guidance == "fold" else {}
    guidance = bench.single if schedule.branches else {}
    return call, dataclasses.replace(schedule, timestep_table=bench.timestep_table, guidance=guidance)


def has_loras(folder: str | Path) -> bool:
    """Return whether there is a LoRA, and not a sampler alone."""
    return any(lora_file(folder, phase).exists() for phase in PHASES)


def lora_file(folder: str | Path, phase: str) -> Path:
    return Path(folder) / phase / WEIGHT_NAME


@contextlib.contextmanager
def loaded(bench: Bench, folder: str | None):
    """Load both LoRAs of a folder into the pipeline, and unload them afterwards."""
    loras = folder and has_loras(folder)
    try:
        for phase in PHASES if loras else ():
            load_lora(bench.pipe, lora_file(folder, phase), phase)
        yield
    finally:
        if loras:
            denoiser(bench.pipe).unload_lora()


def draw(bench: Bench, settings: dict, name: str, count: int | None = None) -> torch.Tensor:
    """Return a set's final latents (N, ...), float32; picture i has the same noise in every row."""
    captions, parts = bench.sets[name][:count], []
    size = 1 if draws_singly(bench, settings) else bench.args.batch_size
    for start in tqdm(range(0, len(captions), size), desc=name, leave=False):
        texts = captions[start : start + size]
        with prepared(bench, settings) as (walk, call):
            generators = [torch.Generator().manual_seed(SEEDS[name] + start + i) for i in range(len(texts))]
            if len(texts) > 1:
                negative = [key for key in call if key.startswith("negative_prompt") and isinstance(call[key], str)]
                call |= {key: [call[key]] * len(texts) for key in negative}
                call |= {"prompt": texts, "generator": generators}
            else:
                call |= {"prompt": texts[0], "generator": generators[0]}
            parts.append(walk(**call))
    return torch.cat(parts)


def draws_singly(bench: Bench, settings: dict) -> bool:
    """Return whether a row draws one picture at a time: a cache decides for its whole batch at once, and a branch is
    called for one caption."""
    cached = "cache" in settings or "cache_dit" in settings
    return cached or ("lora" in settings and bool(recipe_of(bench, settings["lora"])[1].branches))


def pictures(bench: Bench, latents: torch.Tensor) -> torch.Tensor:
    """Return the pictures of final latents (N, ...), float32 (N, 3, H, W) in 0..1."""
    vae = getattr(bench.pipe, "vae", None)
    parts = [ask_latents.decode_pixels(vae, final[None].to(bench.args.device), bench.layout) for final in latents]
    return VaeImageProcessor.denormalize(torch.cat(parts).float().cpu())
