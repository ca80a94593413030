"""The base's own trajectories: what is drawn, what of it is trained on, and what inference makes of that."""

import functools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import long, picture_distance
from diffusers import DiffusionPipeline, SD3Transformer2DModel
from PIL import Image
from safetensors.torch import load_file, save_file
from test_train import assert_close, assert_equal, lora, lora_content, recipe_of
from tiny_image_families import make_lumina2

import train_glance_lora
from glance.ask import pipeline as ask
from glance.ask import sampler as grids
from glance.ask.schedule import ask_timestep_table, ask_timesteps
from glance.ask.velocity import PipelineVelocity
from glance.files.faults import TRAJECTORIES
from glance.files.lora import load_lora
from glance.files.recipe import WEIGHT_NAME
from glance.training import losses, trajectories
from glance_utils import (
    FixedSigmaScheduler,
    InputError,
    Schedule,
    glance_inference,
    segment_slopes,
    timesteps_to_sigmas,
)


PHASES = ("slow", "fast")
SHORT = {"loss": "trajectory", "num_base_steps": 12, "num_inference_steps": 4, "grid": "even", "num_trajectories": 1}
SHORT |= {"solver": "euler", "learning_rate": 3e-4}
QUICK = {"phase": "slow", "max_train_steps": 1}  # where it matters what is drawn, not what is learned


def drawn(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / TRAJECTORIES)


@pytest.fixture
def teacher(pipelines):
    """teacher(base, steps, dtype) draws in that many steps, at 32x32 pixels."""

    def call(base="flux", steps=12, dtype=torch.float32, **extra) -> trajectories.Teacher:
        pipe = DiffusionPipeline.from_pretrained(pipelines[base], dtype=dtype)
        arguments = ask.call_arguments(pipe, "a red ring", 32, 32, None, extra)
        timesteps = ask_timesteps(pipe, steps, **arguments)
        table = ask_timestep_table(pipe, steps, **arguments)
        return trajectories.Teacher(pipe, timesteps, table, arguments)

    return call


@pytest.fixture
def walks(monkeypatch):
    """The (caption, seed, number of steps) of every picture that the base draws for training."""
    seen, walk = [], grids.walk

    def watched(pipe, timesteps, timestep_table, seed, coefficients=None, **call):
        seen.append((call["prompt"], seed, len(timesteps)))
        return walk(pipe, timesteps, timestep_table, seed, coefficients, **call)

    monkeypatch.setattr(grids, "walk", watched)
    return seen


# --------------------------------------------------------------------------------------------------------------------
# What is drawn


def test_each_target_leads_from_its_point_to_the_next(train):
    output = train(**SHORT, max_train_steps=1)
    found, recipes = drawn(output), [recipe_of(output / phase) for phase in PHASES]
    sigmas = [timestep / 1000 for recipe in recipes for timestep in recipe.timesteps] + [0.0]
    starts, targets = found["starts"][0, 0], found["targets"][0, 0]
    assert len(starts) == len(targets) == 4
    ends = [*starts[1:], found["picture"][0]]
    for step, (start, target, end) in enumerate(zip(starts, targets, ends)):
        assert (start + (sigmas[step + 1] - sigmas[step]) * target - end).abs().max() < 1e-5


@pytest.mark.parametrize("base", ["flux", "sd3", "qwen"])
def test_points_are_those_of_the_pipeline_with_its_guidance(base, train, pipelines):
    found = drawn(train(base, **SHORT, **QUICK, guidance_scale=4.0))
    pipe = DiffusionPipeline.from_pretrained(pipelines[base])
    pipe.set_progress_bar_config(disable=True)
    arguments = {"height": 32, "width": 32, "guidance_scale": 4.0, "output_type": "latent"}
    stock = pipe("a red ring", num_inference_steps=12, generator=torch.Generator().manual_seed(1), **arguments)[0]
    assert (found["picture"] - stock).abs().max() < 1e-5


def test_a_bfloat16_pipelines_steps_are_summed_in_float32(teacher):
    """Rounded to bfloat16 at every point, a small step would be lost in the rounding."""
    points = teacher(dtype=torch.bfloat16, steps=40).draw("a red ring", 1)
    assert all(point.dtype == torch.float32 for point in points)
    assert not torch.equal(points[20], points[20].bfloat16().float())


def test_other_noises_than_the_previews(train, walks):
    """The picture that is shown after training is not one that was trained on."""
    train(**SHORT | QUICK | {"num_trajectories": 3}, seed=7)
    assert [seed for _, seed, _ in walks] == [8, 9, 10]


def test_every_caption_is_drawn_and_trained_on_equally_often(train, walks, monkeypatch, tmp_path):
    (tmp_path / "prompts.txt").write_text("a blue disc\n\n a green star \na red ring\n")
    asked, forward = [], PipelineVelocity.forward

    def watched(self, noisy, sigmas, **kwargs):
        asked.append(kwargs.get("prompt"))
        return forward(self, noisy, sigmas, **kwargs)

    monkeypatch.setattr(PipelineVelocity, "forward", watched)
    settings = SHORT | {"num_trajectories": 2, "guidance": "fold", "max_train_steps": 6}
    output = train(**settings, prompts_file=tmp_path / "prompts.txt")
    captions = ("a red ring", "a blue disc", "a green star")
    assert [caption for caption, _, _ in walks] == [caption for caption in captions for _ in range(2)]
    assert len({seed for _, seed, _ in walks}) == 6
    assert drawn(output)["starts"].shape[:3] == (3, 2, 4)
    assert all(asked.count(caption) == 4 for caption in captions)


# --------------------------------------------------------------------------------------------------------------------
# What is learned


def end_error(teacher, output: Path, seed: int) -> tuple[float, float]:
    """How far the base and the LoRAs end from all the base's steps, on the LoRAs' grid."""
    phases = {phase: recipe_of(output / phase).timesteps for phase in PHASES}
    exact = teacher.draw("a red ring", seed)[-1]
    for phase in PHASES:
        load_lora(teacher.pipe, output / phase / WEIGHT_NAME, phase)
    errors = []
    for scale in (0.0, 1.0):
        arguments = teacher.call | {"output_type": "latent", "generator": torch.Generator().manual_seed(seed)}
        schedule = Schedule(phases, teacher.timestep_table)
        with glance_inference(teacher.pipe, schedule, dict.fromkeys(PHASES, scale)) as kwargs:
            errors.append(grids.relative_error(teacher.pipe(**arguments, **kwargs)[0], exact))
    return tuple(errors)


@pytest.mark.slow
@pytest.mark.parametrize("base", [long("flux"), "sd3", long("qwen")])
def test_the_loras_land_where_all_the_bases_steps_do(base, train, teacher):
    output = train(
        base, **SHORT | {"max_train_steps": 60, "learning_rate": 1e-2, "lr_scheduler": "cosine"}, timesteps_per_step=2
    )
    before, after = end_error(teacher(base), output, seed=1)
    assert after < 0.5 * before


@pytest.mark.parametrize("guidance, batch", [("keep", 2), ("fold", 1)])
def test_keep_trains_both_branches_and_fold_one(guidance, batch, train, monkeypatch):
    """SD3 guides with a doubled batch."""
    sizes, forward = [], SD3Transformer2DModel.forward

    @functools.wraps(forward)
    def watched(self, *args, **kwargs):
        if torch.is_grad_enabled():
            sizes.append(len(kwargs["hidden_states"]))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(SD3Transformer2DModel, "forward", watched)
    train("sd3", **SHORT, **QUICK, guidance=guidance)
    assert set(sizes) == {batch}


@pytest.mark.slow
def test_folded_guidance_is_not_added_again(train, infer, capsys, tmp_path):
    output = train("sd3", **SHORT, guidance="fold", max_train_steps=1)
    assert [recipe_of(output / phase).guidance for phase in PHASES] == ["fold"] * 2
    pictures = {}
    for name, settings in {"as trained": {}, "fold": {"guidance": "fold"}, "keep": {"guidance": "keep"}}.items():
        capsys.readouterr()
        picture = infer("sd3", lora=output, output=tmp_path / f"{name}.png", **settings)
        pictures[name] = np.asarray(Image.open(picture))
        assert f"{8 if name == 'keep' else 4} model calls" in capsys.readouterr().out
    assert np.array_equal(pictures["as trained"], pictures["fold"])
    assert not np.array_equal(pictures["as trained"], pictures["keep"])
    assert picture_distance(output / "glance.png", draw_caption(infer, "sd3", output, tmp_path)) <= 1


def draw_caption(infer, base, output, tmp_path) -> Path:
    """What infer_glance.py draws of training's caption with training's seed, as the preview."""
    return infer(base, lora=output, prompt="a red ring", output=tmp_path / "preview.png")


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"timesteps_per_step": 2, "train_batch_size": 2}], ids=["one", "four"])
def test_folding_without_guidance_learns_what_keeping_does(settings, train, tmp_path):
    """FLUX here has its guidance embedded: there is one branch."""
    outputs = [train(**SHORT, **settings, guidance=name, output_dir=tmp_path / name) for name in ("keep", "fold")]
    assert_close(*outputs, 1e-5)


def test_the_trajectory_loss_does_not_look_at_the_image_unless_the_flow_loss_is_mixed_in(train, tmp_path):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "other.png")
    other, found = {"instance_image": tmp_path / "other.png", "instance_prompt": "a red ring"}, {}
    for weight in (None, 0.5):
        for name, image in {"noise": {}, "red": other}.items():
            output = train(**SHORT, **QUICK, **image, flow_weight=weight, output_dir=tmp_path / f"{name}-{weight}")
            found[name, weight] = lora(output)
    assert_equal(found["noise", None], found["red", None])
    assert any(not torch.equal(value, found["red", 0.5][key]) for key, value in found["noise", 0.5].items())
    assert any(not torch.equal(value, found["noise", 0.5][key]) for key, value in found["noise", None].items())


def test_segment_weights_are_the_steps_lengths_one_in_the_mean(train, monkeypatch):
    seen, segment_weights = {}, losses.segment_weights

    def watched(lengths, kind):
        weights = segment_weights(lengths, kind)
        seen.setdefault(kind, []).extend(weights.tolist())
        return weights

    monkeypatch.setattr(losses, "segment_weights", watched)
    for name in ("uniform", "length", "length_squared"):
        output = train(**SHORT, segment_weights=name, max_train_steps=1, overwrite_output_dir=True)
    sigmas = [timestep / 1000 for phase in PHASES for timestep in recipe_of(output / phase).timesteps] + [0.0]
    lengths = np.array([high - low for high, low in zip(sigmas, sigmas[1:])]).reshape(2, 2)
    assert seen["uniform"] == [1.0] * 4
    for name, power in (("length", 1), ("length_squared", 2)):
        expected = lengths**power / (lengths**power).mean(1, keepdims=True)
        np.testing.assert_allclose(seen[name], expected.flatten(), rtol=1e-5)


# --------------------------------------------------------------------------------------------------------------------
# One sentence is enough


@pytest.mark.parametrize("loss", ["flow", "trajectory"])
def test_without_an_image_the_base_draws_its_own(loss, train, pipelines):
    output = train(
        instance_image=None,
        instance_prompt="a blue disc",
        num_base_steps=12,
        num_inference_steps=4,
        loss=loss,
        height=32,
        width=48,
        phase="fast",
        max_train_steps=1,
    )
    pipe = DiffusionPipeline.from_pretrained(pipelines["flux"])
    stock = pipe(
        "a blue disc", num_inference_steps=12, height=32, width=48, generator=torch.Generator().manual_seed(1)
    ).images[0]
    shown = np.asarray(Image.open(output / "instance.png")).astype(int)
    assert np.abs(shown - np.asarray(stock)).max() <= 1
    assert all(value.any() for key, value in lora(output).items() if "lora_B" in key)


def test_the_flow_loss_learns_the_drawn_picture_as_it_would_the_same_image(train, monkeypatch, tmp_path):
    """The latents that are trained on are the drawn ones, not another noise's."""
    settings = {
        "instance_image": None,
        "instance_prompt": "a red ring",
        "num_base_steps": 12,
        "num_inference_steps": 4,
    }
    seen = []
    flow_batch = losses.flow_batch

    def watched(flow, sigmas, noise):
        noisy, target = flow_batch(flow, sigmas, noise)
        seen.append(noise - target)
        return noisy, target

    monkeypatch.setattr(losses, "flow_batch", watched)
    picture = drawn(train(**settings, max_train_steps=1))["picture"]
    assert len(seen) == 2 and all((latents - picture).abs().max() < 1e-5 for latents in seen)


# --------------------------------------------------------------------------------------------------------------------
# Drawn once


def test_trajectories_are_drawn_once_for_the_same_settings(train, walks):
    settings = SHORT | QUICK | {"grid": "auto", "num_trajectories": 2}
    first, count = lora(train(**settings)), len(walks)
    assert count == 2 + 3  # two trajectories, and the second on three grids to measure them by
    assert_equal(lora(train(**settings)), first)
    assert len(walks) == count
    settings["overwrite_output_dir"] = True
    assert train(**settings | {"learning_rate": 1e-5}) and len(walks) == count
    train(**settings, seed=5)
    assert len(walks) == 2 * count


@pytest.mark.parametrize("how", ["base", "broken", "header"])
def test_trajectories_of_anything_else_are_drawn_again(how, train, pipelines, walks, tmp_path):
    base = tmp_path / "model[1]"  # no pattern
    DiffusionPipeline.from_pretrained(pipelines["flux"]).save_pretrained(base)
    output = train(base, **SHORT, **QUICK)
    path = output / TRAJECTORIES
    if how == "base":
        (weights,) = (base / "transformer").glob("*.safetensors")
        changed = load_file(weights)
        changed["proj_out.weight"][0, 0] += 1
        save_file(changed, weights, {"format": "pt"})
    elif how == "broken":
        path.write_bytes(path.read_bytes()[:-10])
    else:
        path.write_bytes(path.read_bytes().replace(b"positions", b"positioms"))
    train(base, **SHORT, **QUICK, overwrite_output_dir=True)
    assert len(walks) == 2


@pytest.mark.slow
@pytest.mark.parametrize("extra", [{}, {"flow_weight": 0.5, "timesteps_per_step": 2, "solver": "fitted"}])
def test_resumed_equals_uninterrupted(extra, train, tmp_path):
    settings = SHORT | {"num_trajectories": 3, "max_train_steps": 4, "checkpointing_steps": 3} | extra
    whole = train(**settings)
    content = lora_content(whole)
    for phase in PHASES:
        (whole / phase / WEIGHT_NAME).unlink()
    assert lora_content(train(**settings, resume_from_checkpoint=whole / "checkpoint-3")) == content


def test_a_resumed_run_of_other_trajectories_is_refused(train):
    settings = SHORT | QUICK | {"checkpointing_steps": 1}
    output = train(**settings)
    content = (output / TRAJECTORIES).read_bytes()
    with pytest.raises(InputError, match="its guidance is keep, this run's is fold"):
        train(**settings, guidance="fold", resume_from_checkpoint=output / "checkpoint-1")
    assert (output / TRAJECTORIES).read_bytes() == content


# --------------------------------------------------------------------------------------------------------------------
# The fitted solver


def test_coefficients_are_the_least_squares(teacher):
    asked = teacher()
    points, positions = asked.draw("a red ring", 1), [0, 3, 6, 10]
    found = grids.fit_coefficients(points, asked.sigmas, positions)
    starts, sigmas, velocities = grids.at_positions(points, asked.sigmas, positions)
    assert found[0][1] == 0.0 and len(found) == 4
    for step, slope in enumerate(segment_slopes(starts, sigmas)):

        def error(own, before, step=step, slope=slope):
            return (own * velocities[step] + before * velocities[step - 1] * bool(step) - slope).norm().item()

        own, before = found[step]
        for change in (-1e-2, 1e-2):
            assert error(own, before) < error(own + change, before)
            assert step == 0 or error(own, before) < error(own, before + change)


def test_a_step_of_the_models_own_is_left_alone(teacher):
    """Where no steps are left out there is nothing to fit."""
    asked = teacher(steps=6)
    found = grids.fit_coefficients(asked.draw("a red ring", 1), asked.sigmas, range(6))
    np.testing.assert_allclose(found, [[1, 0]] * 6, atol=1e-4)


@pytest.mark.parametrize("base", ["flux", "sd3", "qwen"])
def test_the_fitted_solver_is_measured_and_taken_where_it_is_nearer(base, train, teacher, caplog):
    """It is not on the tiny SD3."""
    caplog.set_level("INFO")
    output = train(
        base, **SHORT | {"num_inference_steps": 6, "solver": "fitted", "learning_rate": 1e-9}, max_train_steps=1
    )
    asked, positions = teacher(base), [0, 2, 4, 6, 8, 10]
    fitted = grids.fit_coefficients(asked.draw("a red ring", 1), asked.sigmas, positions)
    exact = asked.draw("a red ring", 2)[-1]
    errors = [grids.relative_error(asked.draw("a red ring", 2, positions, way)[-1], exact) for way in (None, fitted)]
    said = dict(re.findall(r"even grid, (\w+) solver: error (\S+) to 12 steps", caplog.text))
    np.testing.assert_allclose([float(said[solver]) for solver in ("euler", "fitted")], errors, atol=1e-4)
    found = [recipe_of(output / phase).coefficients for phase in PHASES]
    assert (base == "sd3") == (errors[1] > errors[0]) == (found == [None, None])
    if base != "sd3":
        np.testing.assert_allclose(sum(found, []), fitted, atol=1e-4)


def test_inference_goes_along_both_velocities(train, infer, teacher, tmp_path):
    """The LoRAs do nothing here, so the picture is that of the base on the fitted solver."""
    settings = SHORT | {"num_inference_steps": 6, "solver": "fitted", "learning_rate": 1e-9}
    output = train(**settings, max_train_steps=1)
    asked = teacher()
    found = sum((recipe_of(output / phase).coefficients for phase in PHASES), [])
    exact = asked.draw("a red ring", 0, [0, 2, 4, 6, 8, 10], found)[-1]
    phases = {phase: recipe_of(output / phase).timesteps for phase in PHASES}
    arguments = asked.call | {"output_type": "latent"}
    for phase in PHASES:
        load_lora(asked.pipe, output / phase / WEIGHT_NAME, phase)
    with glance_inference(asked.pipe, Schedule(phases, coefficients=found)) as kwargs:
        for _ in range(2):  # the second picture begins anew, with no previous velocity
            latents = asked.pipe(**arguments, **kwargs, generator=torch.Generator().manual_seed(0))[0]
            assert (latents - exact).abs().max() < 1e-4
    picture = draw_caption(infer, "flux", output, tmp_path)
    assert picture_distance(output / "glance.png", picture) <= 1
    given = ";".join(",".join(map(str, part)) for part in phases.values())
    plain = infer(lora=output, prompt="a red ring", flow_custom_timesteps=given, output=tmp_path / "euler.png")
    assert picture_distance(plain, picture) > 1


def follow(found: dict[str, torch.Tensor], caption: int, recipes: list) -> float:
    """How far inference misses the kept points at most where the model predicts just the targets."""
    coefficients = sum((recipe.coefficients for recipe in recipes), [])
    sigmas = timesteps_to_sigmas(sum((recipe.timesteps for recipe in recipes), []))
    scheduler = FixedSigmaScheduler(sigmas, coefficients=coefficients)
    scheduler.set_timesteps()
    starts, targets = found["starts"][caption, 0], found["targets"][caption, 0]
    sample, errors = starts[0], []
    for timestep, target, wanted in zip(scheduler.timesteps, targets, [*starts[1:], found["ends"][caption]]):
        sample = scheduler.step(target, timestep, sample)[0]
        errors.append((sample - wanted).abs().max().item())
    return max(errors)


@pytest.mark.parametrize("base", ["flux", "qwen"])
def test_a_lora_that_predicts_the_fitted_solvers_targets_lands_on_the_kept_points(base, train, teacher, tmp_path):
    """Also after another's step: the fast phase goes on from the velocity that the slow one predicted last, and its
    targets are the same where it is trained alone."""
    settings = SHORT | {"num_inference_steps": 6, "solver": "fitted", "max_train_steps": 1}
    (tmp_path / "prompts.txt").write_text("a blue disc\n")
    both = train(base, **settings, prompts_file=tmp_path / "prompts.txt")
    recipes, found = [recipe_of(both / phase) for phase in PHASES], drawn(both)
    found["ends"] = [teacher(base).draw(*job)[-1][0] for job in (("a red ring", 1), ("a blue disc", 2))]
    assert max(abs(before) for recipe in recipes for _, before in recipe.coefficients) > 0.1
    assert follow(found, 0, recipes) < 1e-5 and follow(found, 1, recipes) < 1e-5
    alone = train(base, **settings, prompts_file=tmp_path / "prompts.txt", phase="fast", output_dir=tmp_path / "fast")
    np.testing.assert_allclose(recipe_of(alone).coefficients, recipes[1].coefficients, rtol=1e-6)
    torch.testing.assert_close(drawn(alone)["targets"], drawn(both)["targets"], rtol=1e-5, atol=1e-5)


def test_trajectories_that_an_earlier_version_made_otherwise_are_drawn_again(train, walks, monkeypatch):
    with monkeypatch.context() as earlier:
        earlier.setattr(trajectories, "FORMAT", trajectories.FORMAT - 1)
        train(**SHORT, **QUICK)
    count = len(walks)
    train(**SHORT, **QUICK)
    assert len(walks) == 2 * count


# --------------------------------------------------------------------------------------------------------------------
# What cannot be


def test_guidance_that_depends_on_the_step_cannot_be_kept(train, tmp_path):
    """Lumina 2 can guide its first steps alone; what a single step shows is then not what the trajectory did."""
    base = make_lumina2(tmp_path / "lumina2")
    settings = SHORT | QUICK | {"pipeline_kwargs": '{"cfg_trunc_ratio": 0.5}'}
    with pytest.raises(InputError, match="depends on the steps before .* train with --guidance fold"):
        train(base, **settings)
    train(base, **settings, guidance="fold")


def test_each_losss_defaults_are_what_measured_best(train):
    """The flow loss's are the published method's."""
    settings = QUICK | {"num_base_steps": 30, "num_inference_steps": 8, "overwrite_output_dir": True}
    recipes = {loss: recipe_of(train(**settings, loss=loss)) for loss in ("flow", "trajectory")}
    assert recipes["flow"].grid == "glance" and recipes["flow"].coefficients is None
    defaults = train_glance_lora.parse_args(["--loss=trajectory", "--pretrained_model_name_or_path=x"])
    assert (defaults.grid, defaults.solver, defaults.learning_rate) == ("auto", "fitted", 1e-5)
    defaults = train_glance_lora.parse_args(["--pretrained_model_name_or_path=x"])
    assert (defaults.grid, defaults.solver, defaults.learning_rate) == ("glance", "euler", 3e-4)
    fold = ["--loss=trajectory", "--guidance=fold", "--pretrained_model_name_or_path=x"]
    assert train_glance_lora.parse_args(fold).learning_rate == 3e-4
