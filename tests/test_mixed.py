"""Mixed branches: single calls of either branch of guidance, put together, against stock pipelines."""

import dataclasses
import json

import pytest
import torch
from diffusers import DiffusionPipeline
from tiny_chat_families import FAMILIES as CHAT_FAMILIES
from tiny_image_families import FAMILIES as IMAGE_FAMILIES

from glance.ask import mixed
from glance.ask import pipeline as ask
from glance.ask.guidance import ask_single_branch
from glance.ask.latents import loop_points
from glance.ask.mixed import NEWEST, TERMS
from glance.ask.prompts import free_components, remember_prompts
from glance.ask.sampler import relative_error
from glance.ask.schedule import ask_timestep_table, ask_timesteps
from glance.ask.velocity import PipelineVelocity
from glance.files.recipe import check_pair
from glance.files.sampler import Sampler, read_sampler
from glance_utils import InputError, Schedule


STEPS = 4
SCALE = {"guidance_scale": 3.0}
# base: (further arguments of its call, weight of the prompt's branch, of the negative one's) of its guidance
GUIDED = {
    "sd3": (SCALE | {"negative_prompt": "blue"}, 3, -2),  # a doubled batch
    "flux with two calls": ({"true_cfg_scale": 3.0, "negative_prompt": "blue"}, 3, -2),
    "flux": ({}, 1, 0),  # told its scale
    "z_image": (SCALE | {"negative_prompt": "blue"}, 4, -3),  # which counts from 0, and reverses time
    "kandinsky5": (SCALE, 3, -2),
}
SAMPLER = {
    "base_model": "base",
    "pipeline": "StableDiffusion3Pipeline",
    "height": 32,
    "width": 32,
    "guidance_scale": 3.0,
    "pipeline_kwargs": {},
    "num_base_steps": 8,
    "phases": {"slow": [1000.0], "fast": [500.0]},
    "coefficients": [[0.5] * TERMS] * 2,
    "branches": ["both", "prompt"],
    "guidance": "mix",
    "grid": "mix",
    "captions": 2,
    "error": 0.1,
    "version": "0.1.0",
}


@pytest.fixture
def base(pipelines, tmp_path):
    """base(name) is (pipeline, its call's arguments, both weights of its guidance)."""

    def load(name: str):
        further, *weights = GUIDED[name]
        name, size = name.split()[0], 32
        if name in pipelines:
            folder = pipelines[name]
        else:
            make, size, more = (IMAGE_FAMILIES | CHAT_FAMILIES)[name]
            folder, further = make(tmp_path / name), more | further
        pipe = DiffusionPipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        return pipe, ask.call_arguments(pipe, "a red ring", size, size, None, further), weights

    return load


def guided_steps(pipe, call: dict, weights: list[float], single: dict) -> Schedule:
    """The pipeline's own steps, with its guidance put together of both branches."""
    step = [0.0] * TERMS
    step[0], step[NEWEST] = weights
    branches = ["both" if weights[1] else "prompt"] * STEPS
    timesteps, table = ask_timesteps(pipe, STEPS, **call), ask_timestep_table(pipe, STEPS, **call)
    return Schedule({"slow": timesteps}, table, [step] * STEPS, single, branches)


@pytest.mark.parametrize("freed", [False, True])
@pytest.mark.parametrize("name", GUIDED)
def test_both_branches_put_together_are_the_stock_pipeline(name, freed, base):
    pipe, call, weights = base(name)
    off = ask_single_branch(pipe, **call)
    calls = mixed.branch_calls(pipe, call, call | off)
    assert list(calls) == (["prompt", "negative"] if weights[1] else ["prompt"])
    schedule = guided_steps(pipe, call, weights, off)
    generator = torch.Generator().manual_seed(5)
    stock = loop_points(pipe, generator=generator, num_inference_steps=STEPS, **call)[-1]
    if freed:
        remember_prompts(pipe)
        for part in calls.values():
            ask.dry_step(pipe, **part)
        free_components(pipe)
    start = mixed.starting_latents(pipe, generator=torch.Generator().manual_seed(5), **calls["prompt"])
    drawn = mixed.final_latents(pipe, schedule, calls, start)
    assert relative_error(drawn, stock) < 1e-5


def test_the_picture_is_the_stock_pipelines(base):
    pipe, call, weights = base("sd3")
    schedule = guided_steps(pipe, call, weights, ask_single_branch(pipe, **call))
    stock = pipe(**call, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(5), output_type="np")
    drawn = mixed.draw(pipe, schedule, call, 5, output_type="np")
    assert abs(stock.images - drawn.images).max() < 1e-4


def test_a_call_that_is_left_out_is_not_made(base):
    pipe, call, weights = base("sd3")
    schedule = guided_steps(pipe, call, weights, ask_single_branch(pipe, **call))
    schedule = dataclasses.replace(schedule, branches=["prompt", "negative", "both", "prompt"])
    called = []

    def count(module, args, kwargs, output):
        if not isinstance(output, ask.NoPrediction):
            called.append(len(ask.model_input(args, kwargs)))

    pipe.transformer.register_forward_hook(count, with_kwargs=True)
    mixed.draw(pipe, schedule, call, 5)
    assert called == [1] * mixed.count_calls(schedule.branches) == [1] * 5


def test_weights_that_made_a_target_are_found():
    generator = torch.Generator().manual_seed(0)
    terms = [torch.randn(3, 4, 5, generator=generator) for _ in range(TERMS)]
    terms[2] = terms[6] = None
    made = [0.5, -1, 0, 2, 0.25, 0, 0, 3]
    target = sum(weight * term for weight, term in zip(made, terms) if term is not None)
    whole = mixed.normal_equations(terms, target)
    halves = [
        mixed.normal_equations([term if term is None else term[rows] for term in terms], target[rows])
        for rows in (slice(0, 1), slice(1, 3))
    ]
    torch.testing.assert_close(sum(halves), whole)
    found = mixed.solve_weights(whole)
    assert found[2] == found[6] == 0
    assert found == pytest.approx([*made], abs=2e-3)


def test_guidance_that_treats_the_negative_prompt_otherwise_is_refused(tmp_path, base):
    make, size, further = IMAGE_FAMILIES["lumina2"]
    pipe = DiffusionPipeline.from_pretrained(make(tmp_path / "lumina2"))
    call = ask.call_arguments(pipe, "a red ring", size, size, 3.0, further)
    calls = mixed.branch_calls(pipe, call, call | ask_single_branch(pipe, **call))
    with pytest.raises(InputError, match="Lumina2Pipeline: .*leave --num_model_calls out"):
        mixed.check_branches(PipelineVelocity(pipe), call, calls, 1.0)
    for name in ("sd3", "z_image"):
        pipe, call, _ = base(name)
        calls = mixed.branch_calls(pipe, call, call | ask_single_branch(pipe, **call))
        mixed.check_branches(PipelineVelocity(pipe), call, calls, 1.0)


def test_a_mixed_schedule_has_no_scheduler():
    schedule = Schedule({"slow": [1000.0]}, coefficients=[[1.0] * TERMS], branches=["prompt"])
    with pytest.raises(InputError, match="mixed branches"):
        schedule.scheduler()


def test_a_sampler_of_branches_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "sampler.json"
    path.write_text(json.dumps(SAMPLER))
    sampler = read_sampler(path)
    later = {"base_loras": None, "pipeline_images": None}  # which earlier files lack
    assert dataclasses.asdict(sampler) == SAMPLER | later
    assert sampler.schedule().branches == SAMPLER["branches"]
    assert sampler.of_phase("fast") == {"coefficients": [[0.5] * TERMS], "branches": ["prompt"]}


@pytest.mark.parametrize(
    "forged",
    [
        {"branches": ["both", "neither"]},
        {"branches": ["both"]},
        {"branches": "both"},
        {"branches": None},
        {"branches": ["negative", "negative"]},
        {"coefficients": None},
        {"coefficients": [[1.0, 0.0]] * 2},
        {"coefficients": [[0.5] * TERMS]},
        {"coefficients": [[0.5] * (TERMS - 1)] * 2},
        {"coefficients": [[0.5] * (TERMS - 1) + [1e9]] * 2},
        {"coefficients": [[0.5] * (TERMS - 1) + ["1"]] * 2},
    ],
)
def test_a_forged_sampler_is_refused_in_one_line(forged, tmp_path):
    path = tmp_path / "sampler.json"
    path.write_text(json.dumps(SAMPLER | forged))
    with pytest.raises(InputError) as caught:
        read_sampler(path)
    assert str(caught.value).startswith(f"--sampler {path}: ") and "\n" not in str(caught.value)


def test_a_pair_of_which_one_is_mixed_does_not_match():
    sampler = Sampler.from_json(json.dumps(SAMPLER))
    recipes = {
        phase: dataclasses.replace(sampler.recipe(), phase=phase, timesteps=timesteps, **sampler.of_phase(phase))
        for phase, timesteps in sampler.phases.items()
    }
    check_pair(recipes, dict.fromkeys(recipes))
    recipes["fast"] = dataclasses.replace(recipes["fast"], branches=None)
    with pytest.raises(InputError, match="mixed branches"):
        check_pair(recipes, dict.fromkeys(recipes))
