"""Bases whose steps are not fifty Euler steps: what cannot be a schedule is refused, a list of their own is taken."""

import json
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_chat_families import make_qwen21

from glance.ask import pipeline as ask
from glance.ask import prompts as ask_prompts
from glance.ask.schedule import ask_timestep_table, ask_timesteps, has_own_steps
from glance.files import pictures
from glance.files.recipe import WEIGHT_NAME, read_recipe
from glance_utils import PHASES, InputError


# --------------------------------------------------------------------------------------------------------------------
# Walks that are no schedule


@pytest.fixture(scope="module")
def heun(pipelines, tmp_path_factory):
    """Stable Diffusion 3 with a scheduler of second order, which calls the model at all but the first point twice."""
    folder = shutil.copytree(pipelines["sd3"], tmp_path_factory.mktemp("heun") / "sd3")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"scheduler": ["diffusers", "FlowMatchHeunDiscreteScheduler"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    FlowMatchHeunDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"dry_run": True},
        {"loss": "trajectory", "instance_image": None, "instance_prompt": "a red ring"},
        {"grid": "even", "num_base_steps": 20, "num_inference_steps": 4},
    ],
)
def test_a_scheduler_of_second_order_is_refused_in_training(settings, heun, train, tmp_path):
    steps, calls = (20, 39) if "num_base_steps" in settings else (50, 99)
    with pytest.raises(
        InputError,
        match=f"its FlowMatchHeunDiscreteScheduler {steps} steps are {calls} model calls; .* a copy of the base whose "
        "model_index.json and scheduler_config.json say FlowMatchEulerDiscreteScheduler$",
    ):
        train(heun, **settings)
    assert not (tmp_path / "output").exists()


def test_a_scheduler_of_second_order_is_refused_in_inference(heun, trained, infer, tmp_path):
    with pytest.raises(InputError, match="its FlowMatchHeunDiscreteScheduler 50 steps are 99 model calls"):
        infer(heun, lora=trained("sd3"), compare=True)
    assert not (tmp_path / "out.png").exists()


def test_a_scheduler_that_the_pipeline_cannot_set_is_named(pipelines):
    pipe = DiffusionPipeline.from_pretrained(pipelines["flux"])  # which gives its scheduler sigmas
    pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    with pytest.raises(InputError, match="custom sigmas .* it has a FlowMatchHeunDiscreteScheduler, so try a copy"):
        ask_timesteps(pipe, 50, prompt="a red ring", height=32, width=32)


def with_points(change):
    """A scheduler whose timesteps, 0..1000 and without the last sigma 0, are `change`d."""

    class Changed(FlowMatchEulerDiscreteScheduler):
        def set_timesteps(self, *args, **kwargs):
            super().set_timesteps(*args, **kwargs)
            self.timesteps = change(self.timesteps)
            self.sigmas = torch.cat([self.timesteps / 1000, torch.zeros(1)])

    return Changed()


WALKS = {
    "a point more": (lambda t: torch.cat([t, t[-1:] / 2]), "50 steps are 51 model calls"),
    "a point less": (lambda t: t[1:], "50 steps are 49 model calls"),
    "no more than once": (lambda t: (t / 40).ceil().unique().flip(0) * 40, "50 steps are 25 model calls"),
    "one twice": (lambda t: torch.cat([t[:1], t[:-1]]), r"50 steps visit timestep 1000 \(1000, 1000, "),
    "upwards": (lambda t: t.flip(0), r"50 steps visit timestep [\d.]+ \(1, "),
    "not a number": (lambda t: torch.cat([t[:9], t[9:] * float("nan")]), "50 steps visit timestep nan"),
    "beyond noise": (lambda t: 80 * t, "50 steps visit timestep 80000"),
    "an end at the image": (lambda t: t - t[-1], "50 steps visit timestep 0 "),
    "an end beyond it": (lambda t: t - 2 * t[-1], "50 steps visit timestep -1 "),
}


@pytest.mark.parametrize("name", WALKS)
def test_a_walk_that_does_not_descend_point_by_point_is_refused(name, pipelines):
    change, message = WALKS[name]
    pipe = DiffusionPipeline.from_pretrained(pipelines["sd3"])
    pipe.scheduler = with_points(change)
    for question in (ask_timesteps, ask_timestep_table):
        with pytest.raises(InputError, match=f"^StableDiffusion3Pipeline: with its Changed {message}") as error:
            question(pipe, 50, prompt="a red ring", height=32, width=32)
        assert "\n" not in str(error.value) and "FlowMatchEulerDiscreteScheduler" in str(error.value)


def test_a_terminal_that_a_single_step_cannot_have_is_refused(train):
    with pytest.raises(InputError, match="1 steps visit timestep nan .* give another --num_base_steps"):
        train("qwen", num_base_steps=1, num_inference_steps=1, phase="slow")


# --------------------------------------------------------------------------------------------------------------------
# A list of the pipeline's own


SAMPLE_SIGMAS = [1.0, 0.96, 0.9, 0.82, 0.7, 0.55, 0.38, 0.2]
CALL = {"resolution": 64, "pipeline_kwargs": '{"use_kv_cache": false}'}


@pytest.fixture(scope="module")
def turbo(tmp_path_factory):
    """As Qwen-Image 2.1 Turbo is: model_index.json says which eight steps it walks."""
    folder = make_qwen21(tmp_path_factory.mktemp("turbo") / "turbo")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"sample_sigmas": SAMPLE_SIGMAS}))
    return folder


@pytest.fixture(scope="module")
def own_timesteps(turbo):
    """What the stock pipeline walks, at 64x64."""
    pipe, found = DiffusionPipeline.from_pretrained(turbo), []
    pipe.set_progress_bar_config(disable=True)

    def record(pipe, step, timestep, callback_kwargs):
        found.append(timestep.item())
        return callback_kwargs

    pipe("a red ring", height=64, width=64, callback_on_step_end=record, output_type="latent")
    assert len(found) == 8
    return found


def test_its_own_steps_are_the_schedule(turbo, own_timesteps):
    pipe = ask.load_pipeline(str(turbo))
    ask_prompts.remember_prompts(pipe)
    call = {"prompt": "a red ring", "height": 64, "width": 64}
    for count in (50, 8, 4):
        assert ask_timesteps(pipe, count, **call) == own_timesteps
        assert has_own_steps(pipe, count, **call)


@pytest.mark.parametrize(
    ("settings", "positions"),
    [
        ({"num_base_steps": 8}, [0, 1, 3, 7]),
        ({"grid": "even", "num_inference_steps": 6}, [0, 1, 2, 4, 5, 6]),
        ({"loss": "trajectory", "num_trajectories": 1}, None),  # whichever of the grids measures best
    ],
)
def test_fewer_calls_than_its_own_are_trained(settings, positions, turbo, own_timesteps, train, caplog):
    caplog.set_level("INFO")
    output = train(turbo, max_train_steps=1, **CALL, **settings)
    recipes = [read_recipe(output / phase / WEIGHT_NAME) for phase in PHASES]
    timesteps = sum([recipe.timesteps for recipe in recipes], [])
    assert [recipe.num_base_steps for recipe in recipes] == [8, 8]
    kept = [own_timesteps.index(timestep) for timestep in timesteps]
    assert kept == positions if positions else len(kept) == 4 and kept == sorted(set(kept))
    assert f"its own 8 steps, whatever is asked; {len(kept)} of them are kept" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_inference_steps": 10}, "its own 8 steps, which are too few for 10 .*; give --num_inference_steps 4$"),
        ({"num_inference_steps": 5}, "too few for 5 distinct ones on the glance grid; give --num_inference_steps 4$"),
        ({"num_inference_steps": 9, "grid": "even"}, "give --num_inference_steps 4, at most 8$"),
        ({"num_base_steps": 50}, "^--num_base_steps 50: .* its own 8 steps, whatever is asked; leave it out$"),
        ({"num_inference_steps": 10, "dry_run": True}, "its own 8 steps, .*; give --num_inference_steps 4$"),
    ],
)
def test_more_than_its_own_is_refused(settings, message, turbo, train):
    with pytest.raises(InputError, match=message):
        train(turbo, **CALL, **settings)


def test_its_comparison_is_with_all_of_its_own(turbo, own_timesteps, train, infer, tmp_path, monkeypatch):
    """And without a column that would say four steps and draw eight."""
    output, rows = train(turbo, max_train_steps=1, **CALL), []
    draw = pictures.draw_row
    monkeypatch.setattr(pictures, "draw_row", lambda found, *more: rows.append(found) or draw(found, *more))
    path = infer(turbo, lora=output, compare=True)
    assert [label for label, _, _ in rows[0]] == ["base, 8 steps", "without LoRAs, 4 steps", "Glance, 4 steps"]
    calls = [details.splitlines()[0].partition(", ")[2] for _, _, details in rows[0]]
    assert calls == ["8 model calls", "4 model calls", "4 model calls"]
    assert Image.open(path).size[0] > 0
    infer(turbo, num_inference_steps=4, grid="even", height=64, width=64, compare=True)
    assert [label for label, _, _ in rows[1]] == ["base, 8 steps", "even grid, euler, 4 steps"]

    silent = tmp_path / "silent"  # the same LoRAs, as other trainers write them
    for phase in PHASES:
        (silent / phase).mkdir(parents=True)
        save_file(load_file(output / phase / WEIGHT_NAME), silent / phase / WEIGHT_NAME)
    listed = ", ".join(f"{timestep:.4f}" for timestep in own_timesteps)
    with pytest.raises(InputError, match=f"its own 8 steps, too few for .* --flow_custom_timesteps .* of {listed}"):
        infer(turbo, lora=silent, height=64, width=64)


def test_too_few_steps_of_any_base_say_how_many_fit(train):
    message = "--num_base_steps: 8 steps are too few for 10 .*; give more, or --num_inference_steps 4 at most"
    with pytest.raises(InputError, match=message):
        train(num_base_steps=8)
