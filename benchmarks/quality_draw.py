"""How does benchmarks/quality.py draw? With one pipeline and, for each row's settings, the call for its pictures.

A further kind of row is one more case in `prepared`; the noise of a picture must not depend on its row.
"""

import contextlib
import dataclasses
import functools
from dataclasses import dataclass, field
from pathlib import Path

import diffusers
import torch
from diffusers.image_processor import VaeImageProcessor
from quality_rows import BASE_STEPS
from tqdm.auto import tqdm

from glance import drawing
from glance.adapters import fused_adapters
from glance.ask import latents as ask_latents
from glance.ask import pipeline as ask
from glance.ask import sampler as grids
from glance.ask.pipeline import replaced
from glance.ask.schedule import ask_timesteps
from glance.files.lora import load_lora
from glance.files.recipe import WEIGHT_NAME, read_recipe, schedule_of
from glance_utils import (
    PHASES,
    Schedule,
    denoiser,
    derive_timesteps,
    glance_inference,
    grid_positions,
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
    if steps >= BASE_STEPS:
        return ask_timesteps(bench.pipe, steps, **bench.call), None
    points, sigmas = None, [*timesteps_to_sigmas(bench.timesteps), 0.0]
    if grid == "auto" or solver == "fitted":
        points = bench.trajectory[0]
    auto = grid == "auto"
    positions = grids.best_positions(points, sigmas, steps) if auto else grid_positions(grid, steps, BASE_STEPS)
    coefficients = grids.fit_coefficients(points, sigmas, positions) if solver == "fitted" else None
    return [bench.timesteps[position] for position in positions], coefficients


@contextlib.contextmanager
def prepared(bench: Bench, settings: dict):
    """Yield the call's arguments for one batch of a row, the pipeline set up for it inside."""
    pipe, call = bench.pipe, bench.call
    kwargs = {"num_inference_steps": settings.get("steps", BASE_STEPS)}
    with contextlib.ExitStack() as stack:
        if "scheduler" in settings:
            config, flow = pipe.scheduler.config, {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
            scheduler = getattr(diffusers, settings["scheduler"])
            scheduler = scheduler.from_config(config, **flow, flow_shift=config.get("shift", 1.0))
            stack.enter_context(replaced(pipe, "scheduler", scheduler))
        elif "cache" in settings:
            name, options = settings["cache"]
            precise = {"taylor_factors_dtype": pipe.dtype} if "Taylor" in name else {}
            denoiser(pipe).enable_cache(getattr(diffusers.hooks, name)(**options, **precise))
            stack.callback(denoiser(pipe).disable_cache)
        elif "lora" in settings:
            call, schedule = recipe_of(bench, settings["lora"])
            scales = settings.get("scales")
            activate = stack.enter_context(fused_adapters(denoiser(pipe)))
            kwargs = stack.enter_context(glance_inference(pipe, schedule, scales, activate))
        else:
            timesteps, fitted = sampler(bench, settings["grid"], settings["steps"], settings.get("solver", "euler"))
            schedule = Schedule({"base": timesteps}, bench.timestep_table, fitted)
            stack.enter_context(replaced(pipe, "scheduler", schedule.scheduler(pipe.scheduler)))
            kwargs = {"num_inference_steps": len(timesteps)}
        call = call | kwargs | ({} if settings.get("guided", True) else bench.single)
        yield stack.enter_context(ask.plain_call(pipe, call))


def recipe_of(bench: Bench, folder: str) -> tuple[dict, Schedule]:
    """Return the call and the steps that a pair was trained for; the pipeline's where its files do not say."""
    recipes = {phase: read_recipe(lora_file(folder, phase), required=False) for phase in PHASES}
    if not all(recipes.values()):
        return bench.call, Schedule(derive_timesteps(bench.timesteps), bench.timestep_table)
    recipe = recipes["slow"]
    call = bench.call | recipe.pipeline_kwargs | {"height": recipe.height, "width": recipe.width}
    call |= {} if recipe.guidance_scale is None else {"guidance_scale": recipe.guidance_scale}
    call |= bench.single if recipe.guidance == "fold" else {}
    return call, dataclasses.replace(schedule_of(recipes), timestep_table=bench.timestep_table)


def lora_file(folder: str | Path, phase: str) -> Path:
    return Path(folder) / phase / WEIGHT_NAME


@contextlib.contextmanager
def loaded(bench: Bench, folder: str | None):
    """Load both LoRAs of a folder into the pipeline, and unload them afterwards."""
    try:
        for phase in PHASES if folder else ():
            load_lora(bench.pipe, lora_file(folder, phase), phase)
        yield
    finally:
        if folder:
            denoiser(bench.pipe).unload_lora()


def draw(bench: Bench, settings: dict, name: str, count: int | None = None) -> torch.Tensor:
    """Return a set's final latents (N, ...), float32; picture i has the same noise in every row."""
    captions, parts = bench.sets[name][:count], []
    size = 1 if "cache" in settings else bench.args.batch_size  # a cache decides for its whole batch at once
    for start in tqdm(range(0, len(captions), size), desc=name, leave=False):
        texts = captions[start : start + size]
        with prepared(bench, settings) as call:
            generators = [torch.Generator().manual_seed(SEEDS[name] + start + i) for i in range(len(texts))]
            if len(texts) > 1:
                negative = [key for key in call if key.startswith("negative_prompt") and isinstance(call[key], str)]
                call |= {key: [call[key]] * len(texts) for key in negative}
                call |= {"prompt": texts, "generator": generators}
            else:
                call |= {"prompt": texts[0], "generator": generators[0]}
            parts.append(ask_latents.loop_points(bench.pipe, **call)[-1])
    return torch.cat(parts)


def pictures(bench: Bench, latents: torch.Tensor) -> torch.Tensor:
    """Return the pictures of final latents (N, ...), float32 (N, 3, H, W) in 0..1."""
    vae = getattr(bench.pipe, "vae", None)
    parts = [ask_latents.decode_pixels(vae, final[None].to(bench.args.device), bench.layout) for final in latents]
    return VaeImageProcessor.denormalize(torch.cat(parts).float().cpu())
