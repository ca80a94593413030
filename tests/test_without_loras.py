"""infer_glance.py without LoRAs: the base on a few of its own steps; and what it says of seconds and steps."""

import re

import pytest
from conftest import REFUSED, picture_distance
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from test_infer import seeded

import infer_glance
from glance.ask.schedule import ask_timesteps
from glance.drawing import Written
from glance.files import pictures
from glance_utils import grid_positions


PROMPT = "a blue disc"
SIZE = {"height": 32, "width": 32}
FEW = {"num_base_steps": 12, "num_inference_steps": 4}
WHOLE = {"lora": None, **SIZE, "prompt": PROMPT}


@pytest.fixture
def rows(monkeypatch):
    """The rows of --compare: [(label, image, details)] each."""
    found, draw_row = [], pictures.draw_row
    monkeypatch.setattr(pictures, "draw_row", lambda row, prompt: found.append(row) or draw_row(row, prompt))
    return found


# --------------------------------------------------------------------------------------------------------------------
# What is drawn


@pytest.mark.parametrize("base, grid", [("flux", "glance"), ("qwen", "even"), ("sd3", None)])
def test_it_is_plain_diffusers_on_these_steps(base, grid, infer, pipelines, tmp_path):
    """Its own Euler scheduler, which is told not to shift; the published grid is the default."""
    picture = infer(base, **WHOLE, **FEW, grid=grid)
    pipe = DiffusionPipeline.from_pretrained(pipelines[base])
    pipe.set_progress_bar_config(disable=True)
    own = ask_timesteps(pipe, 12, prompt=PROMPT, **SIZE)
    sigmas = [own[position] / 1000 for position in grid_positions(grid or "glance", 4, 12)]
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(
        pipe.scheduler.config, shift=1.0, use_dynamic_shifting=False, shift_terminal=None
    )
    call = {"prompt": PROMPT, "num_inference_steps": 4, "sigmas": sigmas, **SIZE}
    pipe(**call, generator=seeded()).images[0].save(tmp_path / "wanted.png")
    assert picture_distance(picture, tmp_path / "wanted.png") <= 1


def test_the_sampler_that_is_found_is_training_s(train, infer, rows, tmp_path):
    """On the same trajectories; LoRAs that count nothing leave the base on the steps, with the numbers, of theirs."""
    found = {"grid": "auto", "solver": "fitted"} | FEW
    caption = {"instance_image": None, "instance_prompt": PROMPT, "num_trajectories": 1}
    folder = train(loss="trajectory", max_train_steps=1, **caption, **found)
    with_loras = infer(lora=folder, lora_scale=0, prompt=PROMPT, output=tmp_path / "with.png")
    assert picture_distance(infer(**WHOLE, **found), with_loras) <= 1
    infer(**WHOLE, **found, compare=True)
    full, few, last = (label for label, _, _ in rows[0])
    assert (full, few) == ("base, 12 steps", "base, 4 steps")
    assert re.fullmatch("(auto|glance|even) grid, (fitted|euler), 4 steps", last)


def test_it_is_compared_with_the_base_at_as_many_steps(infer, rows):
    """Nothing differs where the grid is all of the base's own."""
    infer(**WHOLE, num_base_steps=4, num_inference_steps=4, grid="even", compare=True)
    (row,) = rows
    assert [label for label, _, _ in row] == ["base, 4 steps", "base, 4 steps", "even grid, euler, 4 steps"]
    assert all(details.splitlines()[0].endswith(", 4 model calls") for _, _, details in row)
    assert row[0][1].tobytes() == row[1][1].tobytes()


REFUSALS = {
    "with LoRAs": ({"lora": "x", "grid": "even"}, "--grid: LoRAs are for the steps .* or --lora to draw the base"),
    "without a base": (
        {"pretrained_model_name_or_path": None, "solver": "euler"},
        "give --pretrained_model_name_or_p",
    ),
    "too many": (FEW | {"num_inference_steps": 13}, "12 steps are too few for 13 .*; give more, or --num_inference_s"),
    "no such grid": ({"grid": "odd"}, "--grid: invalid choice: 'odd'"),
    "folded": ({"num_inference_steps": 4, "guidance": "fold"}, "--guidance is for LoRAs, and --num_inference_steps"),
    "weaker": ({"grid": "auto", "lora_scale": "0.5"}, "--lora_scale is for LoRAs, and --grid draws without"),
    "fused": ({"solver": "fitted", "fuse_lora": True}, "--fuse_lora is for LoRAs, and --solver draws without"),
    "given steps": (FEW | {"flow_custom_timesteps": "900;300"}, "--flow_custom_timesteps is for LoRAs"),
    "nothing said": ({}, "give --lora FOLDER, .*; or, to draw the base without LoRAs, --num_inference_steps"),
}


@pytest.mark.parametrize("row", REFUSALS)
def test_what_cannot_be_is_one_line(row, infer, tmp_path):
    settings, message = REFUSALS[row]
    with pytest.raises(REFUSED, match=message):
        infer(**WHOLE | settings)
    assert list(tmp_path.iterdir()) == []


def test_nan_of_the_base_is_one_line_with_inference_s_flags(infer, tmp_path, monkeypatch):
    load_pipeline = infer_glance.load_pipeline

    def with_nan(*args):
        pipe = load_pipeline(*args)
        pipe.transformer.proj_out.bias.data.fill_(float("nan"))
        return pipe

    monkeypatch.setattr(infer_glance, "load_pipeline", with_nan)
    for settings in ({"grid": "auto"}, {"grid": "even"}):
        with pytest.raises(
            FloatingPointError, match="final latents are not finite .* in --dtype float32; try"
        ) as error:
            infer(**WHOLE, **FEW, **settings)
        assert "lora" not in str(error.value) and list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------------------------
# Bars and seconds


def test_a_single_picture_has_the_bar_of_its_steps(infer, capfd):
    infer(**WHOLE, **FEW, grid="even")
    written = capfd.readouterr()
    assert "even grid, euler, 4 steps: 100%" in written.err and "images" not in written.err
    assert re.search(r"out\.png: 1 x 4 steps, \d+\.\d\d s and 4 model calls each\n$", written.out)


def test_of_several_the_first_is_timed_apart(infer, capfd, rows):
    infer(**WHOLE, **FEW, num_images=3)
    written = capfd.readouterr()
    assert "images: 100%" in written.err and "4 steps" not in written.err
    seconds = r"first picture \d+\.\d\d s, then \d+\.\d\d s each"
    assert re.search(rf"out-\*\.png: 3 x 4 steps, 4 model calls each; {seconds}\n$", written.out)
    infer(**WHOLE, **FEW, num_images=2, compare=True)
    first, second = ([details.startswith("first ") for _, _, details in row] for row in rows)
    assert first == [True] * 3 and second == [False] * 3


def test_seconds_are_the_mean_of_all_but_each_process_s_first():
    told = [(9.0, True), (2.0, False), (7.0, True), (4.0, False)]
    drawn = [Written(number, None, seconds, 10, first, {}) for number, (seconds, first) in enumerate(told)]
    assert infer_glance.report(drawn) == "10 model calls each; first picture 9.00 s, then 3.00 s each"
    assert infer_glance.report(drawn[:1]) == "9.00 s and 10 model calls each"
    assert infer_glance.report(drawn[1:2]) == "2.00 s and 10 model calls each"  # the first one was not finite
