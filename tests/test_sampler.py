"""sampler.json: found alone or beside LoRAs, drawn with by infer_glance.py and by any diffusers pipeline."""

import json

import pytest
from conftest import REFUSED, picture_distance
from diffusers import DiffusionPipeline
from PIL import Image
from test_infer import recipes_of, same, seeded
from test_model_card import draw_as_said

from glance.files.sampler import NAME, SCHEDULER, read_sampler
from glance.training.estimate import Estimate
from glance_utils import PHASES, FixedSigmaScheduler, InputError


ALONE = {"max_train_steps": 0, "instance_image": None, "instance_prompt": "a blue disc", "num_base_steps": 12}
FEW = {"num_inference_steps": 4}
# Every sampler there is: by default it is the one that measures best.
SAMPLERS = {"fitted": {"grid": "auto"}, "euler": {"grid": "even", "solver": "euler"}}


def test_alone_nothing_is_estimated_said_or_fitted_for_training(train, capsys, caplog, monkeypatch):
    """What fits is what the base can draw in, with less memory than a step of training takes."""
    train(**ALONE, **FEW, dry_run=True)
    rows = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert rows == ["stage", "encoding", "drawing", "fitting", "all"]

    sizes, peak = [], Estimate.peak
    monkeypatch.setattr(Estimate, "peak", lambda *given: sizes.append(peak(*given)) or sizes[-1])
    with caplog.at_level("INFO"):
        train(**ALONE, **FEW, fit="auto", memory="16GB")
        alone = max(sizes)
        train(**ALONE | {"max_train_steps": 1}, **FEW, fit="auto", memory="16GB", overwrite_output_dir=True)
    assert alone < max(sizes)
    assert sum("trainable parameters" in message for message in caplog.messages) == 1


@pytest.mark.parametrize("solver", SAMPLERS)
@pytest.mark.parametrize("base", ["flux", "qwen"])
def test_alone_it_is_the_same_picture_in_a_stock_pipeline(
    base, solver, train, infer, pipelines, tmp_path, capsys, monkeypatch
):
    folder = train(base, **ALONE, **FEW, **SAMPLERS[solver])
    written = {path.name for path in folder.iterdir()}
    assert {NAME, SCHEDULER, "README.md"} <= written and not written & {*PHASES, "glance.png"}
    command = capsys.readouterr().out.splitlines()[-1]
    assert f"--sampler {folder}" in command and "lora" not in command
    sampler = read_sampler(folder)
    assert [len(part) for part in sampler.phases.values()] == [2, 2] and sampler.captions == (solver == "fitted")
    assert bool(sampler.coefficients) == (solver == "fitted")

    picture = infer(None, sampler=folder, prompt="a red ring", output=tmp_path / "ours.png")  # it names its base
    card = (folder / "README.md").read_text()
    assert "lora" not in card.split("---")[1] and "glance.png" not in card and "instance_prompt" not in card
    assert (
        ("These steps and this solver measured best on" in card)
        == ("This sampler: 0." in card)
        == (solver == "fitted")
    )
    assert (
        ("Nothing was trained, and nothing measured" in card) == ("by diffusers alone" in card) == (solver == "euler")
    )
    by_command, by_lines = draw_as_said(folder, tmp_path, monkeypatch)
    assert same(by_command, Image.open(by_lines))
    pipe = DiffusionPipeline.from_pretrained(pipelines[base])
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = FixedSigmaScheduler.from_pretrained(folder / SCHEDULER)
    call = {"height": sampler.height, "width": sampler.width, "num_inference_steps": 4}
    assert same(picture, pipe("a red ring", **call, generator=seeded()).images[0])
    again = FixedSigmaScheduler.from_config(pipe.scheduler.config)
    assert dict(again.config) == dict(pipe.scheduler.config)


def test_beside_loras_it_says_what_they_say(train, infer, tmp_path):
    """So that it serves in place of what their headers hold, and alone."""
    loss = {"loss": "trajectory", "num_trajectories": 1, "learning_rate": 1e-2, "max_train_steps": 2}
    folder = train(**ALONE | loss, **FEW)
    sampler, recipes = read_sampler(folder), recipes_of(folder)
    assert sampler.phases == {phase: recipe.timesteps for phase, recipe in recipes.items()}
    assert {phase: sampler.of_phase(phase) for phase in PHASES} == {
        phase: {"coefficients": recipe.coefficients, "branches": None} for phase, recipe in recipes.items()
    }
    with_loras = infer(lora=folder, output=tmp_path / "loras.png")
    assert same(with_loras, infer(lora=folder, sampler=folder, output=tmp_path / "both.png"))
    alone = infer(sampler=folder / NAME, output=tmp_path / "alone.png")
    assert not same(with_loras, alone)
    assert same(alone, infer(lora=folder, lora_scale=0, output=tmp_path / "nothing.png"))


def test_another_sampler_s_steps_come_before_the_loras_own(train, trained, infer, tmp_path):
    other = train(**ALONE, num_inference_steps=6, grid="even", solver="euler")
    loras = trained("flux")
    sampler = read_sampler(other)
    lists = ";".join(",".join(map(str, part)) for part in sampler.phases.values())
    by_file = infer(lora=loras, sampler=other, output=tmp_path / "file.png")
    by_flag = infer(lora=loras, flow_custom_timesteps=lists, output=tmp_path / "flag.png")
    assert picture_distance(by_file, by_flag) <= 1


def test_trajectories_that_a_sampler_was_found_on_serve_the_loras_too(train, caplog):
    """Training for a sampler that was found before draws nothing again."""
    caption = {"loss": "trajectory", "num_trajectories": 1}
    found = read_sampler(train(**ALONE, **FEW, **caption))
    with caplog.at_level("INFO"):
        folder = train(**ALONE | {"max_train_steps": 1}, **FEW, **caption, learning_rate=1e-3)
    assert "Trajectories: those in" in caplog.text and read_sampler(folder) == found


def changed(**changes):
    return lambda entries: entries | changes


FORGED = {
    "no JSON": (lambda entries: "{", "Expecting"),
    "a list": (lambda entries: [entries], "it holds no fields"),
    "a field is missing": (
        lambda entries: {k: v for k, v in entries.items() if k != "phases"},
        "it has no 'phases'",
    ),
    "a phase is missing": (changed(phases={"slow": [1000.0]}), "phases {'slow'"),
    "it ascends": (changed(phases={"slow": [500.0], "fast": [900.0]}), "900 follows 500"),
    "out of range": (changed(phases={"slow": [2000.0], "fast": [900.0]}), "2000 is out of range"),
    "NaN": (changed(phases={"slow": [float("nan")], "fast": [900.0]}), "phases {'slow': \\[nan"),
    "too few numbers": (changed(coefficients=[[1.0, 0.0]]), "coefficients for 1 of 4 timesteps"),
    "a text for numbers": (changed(coefficients="1"), "coefficients '1'"),
    "a huge size": (changed(width=10**9), "width 1000000000"),
    "an argument of ours": (changed(pipeline_kwargs=[1]), "pipeline_kwargs \\[1\\]"),
    "another pipeline": (changed(pipeline="WanPipeline"), "the sampler is for a WanPipeline, the base is a Flux"),
    "another base": (changed(base_model="other/model"), "the sampler is of other/model, not of .*base_mismatch"),
}


@pytest.fixture(scope="module")
def entries(pipelines) -> dict:
    """What a sampler.json of four steps holds."""
    shared = {"base_model": str(pipelines["flux"]), "pipeline": "FluxPipeline", "height": 32, "width": 32}
    shared |= {"guidance_scale": 3.5, "pipeline_kwargs": {}, "num_base_steps": 50, "guidance": "keep", "grid": "even"}
    phases = {"slow": [1000.0, 750.0], "fast": [500.0, 250.0]}
    return shared | {"phases": phases, "coefficients": None, "captions": 0, "error": None, "version": "0.1.0"}


@pytest.mark.forged
@pytest.mark.parametrize("kind", FORGED)
def test_a_forged_file_is_refused_in_one_line(kind, entries, infer, tmp_path):
    forge, message = FORGED[kind]
    path, content = tmp_path / NAME, forge(entries)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError, match=message) as error:
        infer(sampler=path)
    assert "\n" not in str(error.value) and not (tmp_path / "out.png").exists()


def test_a_file_that_is_not_there_is_one_line(infer, tmp_path):
    with pytest.raises(InputError, match="--sampler .*nowhere: No such file .*; give a sampler.json"):
        infer(sampler=tmp_path / "nowhere")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"resume_from_checkpoint": "latest"}, "--resume_from_checkpoint: --max_train_steps 0 finds a sampler"),
        ({"phase": "slow"}, "--phase: --max_train_steps 0"),
        ({"flow_custom_timesteps": "900;300"}, "--flow_custom_timesteps: --max_train_steps 0"),
        ({"validation_prompt": "a"}, "--validation_prompt: --max_train_steps 0"),
        ({"guidance": "fold"}, "--guidance fold: without LoRAs"),
    ],
)
def test_flags_that_need_loras_are_refused_without(settings, message, train, tmp_path):
    with pytest.raises(REFUSED, match=message):
        train(**ALONE | settings)
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"grid": "even"}, "--sampler holds the steps; leave --grid out"),
        ({"flow_custom_timesteps": "900;300", "lora": "x"}, "--sampler holds the steps; leave --flow_custom"),
        ({"fuse_lora": True}, "--fuse_lora is for LoRAs, and --sampler draws without"),
    ],
)
def test_flags_that_contradict_a_sampler_are_refused(settings, message, infer, tmp_path):
    with pytest.raises(REFUSED, match=message):
        infer(sampler=tmp_path, **settings)
