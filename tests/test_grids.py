"""Which of the model's own steps are kept: the published grid, an even one, and the best by its trajectory."""

import itertools
import re

import pytest
import torch
from conftest import REFUSED
from diffusers import DiffusionPipeline

from glance.ask import pipeline as ask
from glance.ask import sampler as grids
from glance.ask.schedule import ask_timestep_table, ask_timesteps
from glance.files.recipe import WEIGHT_NAME, read_recipe
from glance_utils import PHASES, InputError, derive_timesteps, grid_positions


PUBLISHED = [0, 2, 4, 6, 8, 10, 20, 30, 40, 49]


def test_the_named_grids():
    assert grid_positions("glance", 10, 50) == PUBLISHED
    assert grid_positions("even", 10, 50) == [0, 5, 10, 15, 20, 25, 30, 35, 40, 45]
    for grid, count in itertools.product(("glance", "even"), (1, 4, 8, 16)):
        positions = grid_positions(grid, count, 50)
        assert len(set(positions)) == count and positions == sorted(positions) and positions[0] == 0


def test_the_first_half_is_slow():
    phases = derive_timesteps([1000 - 20 * step for step in range(50)], [0, 5, 20, 30, 45])
    assert phases == {"slow": [1000, 900, 600], "fast": [400, 100]}
    with pytest.raises(InputError, match="10 steps are too few for 20 distinct ones on this grid; give more"):
        derive_timesteps([1000.0 - step for step in range(10)], grid_positions("even", 20, 10))


def chord_cost(points, sigmas, positions) -> float:
    """As the docstring of best_positions says it, step by step."""
    total = 0.0
    for start, end in zip(positions, [*positions[1:], len(sigmas) - 1]):
        chord = (points[end] - points[start]) / (sigmas[end] - sigmas[start])
        for step in range(start, end):
            velocity = (points[step + 1] - points[step]) / (sigmas[step + 1] - sigmas[step])
            distance = (velocity - chord).square().mean().item()
            total += (sigmas[start] - sigmas[end]) * (sigmas[step] - sigmas[step + 1]) * distance
    return total


@pytest.mark.parametrize("count", [1, 2, 4, 9])
def test_the_best_positions_are_the_best_of_all(count):
    generator = torch.Generator().manual_seed(count)
    sigmas = [*(torch.rand(9, generator=generator).sort(descending=True).values.tolist()), 0.0]
    points = list(torch.randn(10, 2, 3, generator=generator, dtype=torch.float64).cumsum(0))
    found = grids.best_positions(points, sigmas, count)
    every = [[0, *rest] for rest in itertools.combinations(range(1, 9), count - 1)]
    least = min(chord_cost(points, sigmas, positions) for positions in every)
    assert chord_cost(points, sigmas, found) == pytest.approx(least)


@pytest.mark.parametrize("base", ["flux", "sd3", "qwen"])
def test_a_walk_is_the_stock_pipelines(base, pipelines):
    """All of the model's own steps with its own noise end where the pipeline ends."""
    pipe = DiffusionPipeline.from_pretrained(pipelines[base])
    call = ask.call_arguments(pipe, "a red ring", 32, 32, None, {})
    timesteps, table = ask_timesteps(pipe, 8, **call), ask_timestep_table(pipe, 8, **call)
    points = grids.walk(pipe, timesteps, table, 3, **call)
    stock = pipe(**call, num_inference_steps=8, generator=torch.Generator().manual_seed(3), output_type="latent")[0]
    assert len(points) == 9 and (points[-1] - stock).abs().max() < 1e-5


def test_auto_trains_and_draws_on_the_grid_that_measures_best(train, infer, caplog):
    caplog.set_level("INFO")
    output = train(grid="auto", num_inference_steps=6, num_base_steps=20, max_train_steps=3)
    errors = dict(re.findall(r"(\w+) grid, euler solver: error ([\d.]+) to 20 steps", " ".join(caplog.messages)))
    errors = {grid: float(error) for grid, error in errors.items()}
    assert set(errors) == {"auto", "glance", "even"} and list(errors.values()) == sorted(errors.values())
    recipes = [read_recipe(output / phase / WEIGHT_NAME) for phase in PHASES]
    assert [recipe.grid for recipe in recipes] == [next(iter(errors))] * 2
    assert [len(recipe.timesteps) for recipe in recipes] == [3, 3]
    infer(lora=output)


def test_a_given_list_is_no_grid(train):
    with pytest.raises(REFUSED, match="--flow_custom_timesteps gives the timesteps; leave --grid out"):
        train(flow_custom_timesteps="1000,900;500,100", grid="even")
