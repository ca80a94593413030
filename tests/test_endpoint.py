"""The endpoint loss: weights of mixed branches and both LoRAs, trained on where a picture ends."""

import json
import re

import pytest
import torch
from conftest import long, picture_distance
from diffusers import DiffusionPipeline
from peak_memory import allocated, small_flux
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from test_model_card import NOTHING_IN_PLAIN
from test_train import lora, recipe_of

from glance.adapters import fresh_lora, lora_layers, with_adapters
from glance.ask import pipeline as ask
from glance.ask.guidance import ask_single_branch
from glance.ask.mixed import branch_calls, final_latents, starting_latents
from glance.ask.velocity import PipelineVelocity
from glance.files.lora import load_lora
from glance.files.recipe import WEIGHT_NAME
from glance.files.sampler import read_sampler
from glance.training import endpoint
from glance_utils import PHASES, InputError, Schedule, activate_adapter


TERMS = 8
SHORT = {"num_model_calls": 4, "num_base_steps": 8, "num_plans": 1, "num_trajectories": 1, "instance_image": None}
SHORT |= {"max_train_steps": 4, "learning_rate": 3e-2, "guidance_scale": 3, "gradient_accumulation_steps": 1}
SHORT |= {"lr_scheduler": "constant", "lr_warmup_steps": 0}


@pytest.fixture
def prompts(tmp_path) -> str:
    path = tmp_path / "prompts.txt"
    path.write_text("a red ring\na blue square\n")
    return path


def ends_of(pipe, branches: list[str], guidance_scale: float | None = 3) -> tuple[endpoint.Ends, torch.Tensor]:
    """Where the pipeline's walk of these branches ends, with a LoRA for each phase, and noise to begin with."""
    call = ask.call_arguments(pipe, "a red ring", 32, 32, guidance_scale, {})
    calls = branch_calls(pipe, call, call | ask_single_branch(pipe, **call))
    transformer = with_adapters(pipe.transformer).requires_grad_(False)
    layers = lora_layers(transformer)
    for number, phase in enumerate(PHASES):
        shape = {"r": 4, "lora_alpha": 4, "lora_dropout": 0.0}
        fresh_lora(transformer, phase, layers, torch.device("cpu"), number, **shape)
    parameters = {name: part for name, part in transformer.named_parameters() if ".lora_" in name}
    generator = torch.Generator().manual_seed(0)
    for part in parameters.values():
        part.data.normal_(0, 0.1, generator=generator)

    def switch(phase: str) -> None:
        activate_adapter(transformer, phase)
        for part in parameters.values():
            part.requires_grad_(True)

    switch("slow")
    sigmas = torch.linspace(1, 0.1, len(branches)).tolist()
    half = -(-len(branches) // 2)
    phases = {"slow": [1000 * sigma for sigma in sigmas[:half]], "fast": [1000 * sigma for sigma in sigmas[half:]]}
    weights = torch.randn(len(branches), TERMS, generator=generator) / 4
    schedule = Schedule(phases, coefficients=weights.tolist(), branches=branches)
    ends = endpoint.Ends(PipelineVelocity(pipe), schedule, calls, switch)
    start = torch.randn(2, *starting_latents(pipe, **call).shape[1:], generator=generator)
    return ends, start


def gradients(ends: endpoint.Ends, start: torch.Tensor, recompute: bool) -> dict[str, torch.Tensor]:
    ends.zero_grad()
    ends(start, "a red ring", recompute).square().mean().backward()
    return {name: part.grad.clone() for name, part in ends.named_parameters() if part.grad is not None}


@pytest.mark.parametrize("base", ["sd3", "qwen"])
def test_recomputed_calls_give_the_gradients_of_the_unrolled_walk(base, pipelines):
    pipe = DiffusionPipeline.from_pretrained(pipelines[base])
    ends, start = ends_of(
        pipe, ["prompt", "both", "prompt", "prompt"] if base == "qwen" else ["prompt", "negative", "both"]
    )
    if base == "qwen":  # without a negative prompt it has no guidance
        assert list(ends.calls) == ["prompt"]
        ends.schedule = Schedule(
            ends.schedule.phases, coefficients=ends.schedule.coefficients, branches=["prompt"] * 4
        )
    kept, recomputed = (gradients(ends, start, recompute) for recompute in (False, True))
    assert kept.keys() == recomputed.keys()
    for phase in PHASES:
        of_phase = [name for name in kept if f".{phase}." in name]
        reached = [bool(kept[name].abs().max() > 0) for name in of_phase]
        assert sum(reached) > len(reached) / 2  # the last block's text is not looked at
    for name, gradient in kept.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()))


def test_the_gradient_is_the_slope_of_the_loss(pipelines):
    ends, start = ends_of(DiffusionPipeline.from_pretrained(pipelines["sd3"]), ["both", "prompt", "negative"])
    slope = gradients(ends, start, True)["weights"][1, 0].item()
    losses = []
    for change in (-1e-2, 1e-2):
        with torch.no_grad():
            ends.weights[1, 0] += change
            losses.append(ends(start, "a red ring", False).double().square().mean().item())
            ends.weights[1, 0] -= change
    assert (losses[1] - losses[0]) / 2e-2 == pytest.approx(slope, rel=1e-2)


def test_many_calls_take_hardly_more_memory_than_two(pipelines):
    peaks = {}
    for calls in (2, 10):
        transformer = small_flux(num_layers=1, num_single_layers=1)
        pipe = DiffusionPipeline.from_pretrained(pipelines["flux"], transformer=transformer)
        ends, start = ends_of(pipe, ["prompt"] * calls, None)
        with allocated() as found:
            gradients(ends, start[:1], True)
        peaks[calls] = found["peak"]
    assert peaks[10] < 1.1 * peaks[2]


def test_both_loras_and_the_weights_are_trained_written_and_drawn_with(train, infer, prompts):
    output = train("sd3", prompts_file=prompts, **SHORT)
    found, sampler = json.loads(header(output)["sampler"]), read_sampler(output)
    assert sampler.branches == found["branches"] and sampler.error is None  # of two captions none is left out
    assert sampler.coefficients != found["coefficients"]
    pieces = [recipe_of(output / phase) for phase in PHASES]
    assert sum((piece.coefficients for piece in pieces), []) == sampler.coefficients
    assert sum((piece.branches for piece in pieces), []) == sampler.branches
    for phase in PHASES:
        values = {name: value for name, value in lora(output / phase).items() if "lora_B" in name}
        trained = [bool(value.abs().max() > 0) for value in values.values()]
        assert sum(trained) > len(trained) / 2  # the last block's text is not looked at
    drawn = infer("sd3", lora=output, prompt="a red ring")
    assert picture_distance(output / "glance.png", drawn) <= 1
    without = infer("sd3", sampler=output, prompt="a red ring", output=drawn.with_name("without.png"))
    assert picture_distance(without, drawn) > 1
    assert Image.open(drawn).size == (32, 32)


def test_which_trajectories_are_not_trained_on():
    assert endpoint.left_out(9, 2).tolist() == [[False] * 2] * 7 + [[True] * 2] * 2
    assert endpoint.left_out(3, 4).tolist() == [[False] * 3 + [True]] * 3
    assert not endpoint.left_out(3, 3).any() and not endpoint.left_out(1, 1).any()


@pytest.mark.parametrize("rate", [3e-3, long(0.3)])
def test_the_error_is_that_of_a_caption_that_was_not_trained_on(rate, train, pipelines, tmp_path, monkeypatch, caplog):
    """Equal to that of the walk that inference goes; a run that made it worse says so; a resumed one keeps it."""
    caplog.set_level("INFO")
    seen, loss = set(), endpoint.endpoint_loss
    monkeypatch.setattr(
        endpoint,
        "endpoint_loss",
        lambda ends, prepared, draw, device: seen.add(draw.caption) or loss(ends, prepared, draw, device),
    )
    (tmp_path / "four.txt").write_text("a red ring\na blue square\na green star\na white disc\n")
    settings = SHORT | {"prompts_file": tmp_path / "four.txt", "instance_prompt": "a red ring", "learning_rate": rate}
    output = train("sd3", **settings)
    sampler, drawn = read_sampler(output), load_file(output / "trajectories.safetensors")
    assert seen == {0, 1, 2} and drawn["starts"].shape[:2] == (4, 1)
    pipe = DiffusionPipeline.from_pretrained(pipelines["sd3"])
    for phase in PHASES:
        load_lora(pipe, output / phase / WEIGHT_NAME, phase)
    call = ask.call_arguments(pipe, "a white disc", 32, 32, 3, {})
    calls, phases = branch_calls(pipe, call, call | ask_single_branch(pipe, **call)), sampler.schedule().phase_of_steps
    end = final_latents(
        pipe,
        sampler.schedule(),
        calls,
        drawn["starts"][3, :, 0],
        lambda index: activate_adapter(pipe.transformer, phases[index]),
    )
    exact = drawn["targets"][3, :, 0]
    assert sampler.error == pytest.approx(float((end - exact).norm() / exact.norm()), rel=1e-4)
    row = [line.split(",") for line in (output / "calls.csv").read_text().splitlines() if line.startswith("4,")]
    assert float(row[0][3]) == sampler.error
    told = json.loads(header(output)["sampler"])["error"]
    assert told != sampler.error
    card = (output / "README.md").read_text()
    before = re.search(r"Error = [\d.]+, before training ([\d.]+)", caplog.text)[1]
    assert "Left out, to measure on: 1 of the captions. No image was learned." in card
    assert f"On captions that were not trained on: {before} before training, {sampler.error:.4f} after." in card
    assert "in 4 steps with 4 model calls" in card or "in 3 steps with 4 model calls" in card
    assert NOTHING_IN_PLAIN in card and "](./calls.png)" in card and "there is no comfyui.json" in card
    warned = [record.message for record in caplog.records if "training made it worse" in record.message]
    assert len(warned) == (rate > 0.1)
    train("sd3", **settings, resume_from_checkpoint="latest")
    assert read_sampler(output) == sampler
    assert [
        line.split(",") for line in (output / "calls.csv").read_text().splitlines() if line.startswith("4,")
    ] == row


@pytest.mark.long
def test_the_loss_falls(train, prompts):
    output = train("sd3", prompts_file=prompts, **SHORT | {"max_train_steps": 30, "learning_rate": 1e-2})
    losses = [float(line.rsplit(",", 1)[1]) for line in (output / "loss.csv").read_text().splitlines()[1:]]
    assert len(losses) == 30
    assert sum(losses[-6:]) < 0.9 * sum(losses[:6])


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(train, prompts, tmp_path):
    whole = train("sd3", prompts_file=prompts, checkpointing_steps=2, lora_dropout=0.1, **SHORT)
    again = tmp_path / "again"
    settings = SHORT | {"output_dir": again, "resume_from_checkpoint": whole / "checkpoint-2"}
    train("sd3", prompts_file=prompts, lora_dropout=0.1, **settings)
    for phase in PHASES:
        first, second = lora(whole / phase), lora(again / phase)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert (whole / "sampler.json").read_text() == (again / "sampler.json").read_text()
    assert (whole / "loss.csv").read_text() == (again / "loss.csv").read_text()


def test_a_finished_run_is_not_trained_again(train, prompts, caplog):
    settings = SHORT | {"num_trajectories": 4}  # of which some are left out, to measure on
    output = train("sd3", prompts_file=prompts, **settings)
    assert "before training" in (output / "README.md").read_text()
    kept = [*output.rglob("*.safetensors"), output / "sampler.json", output / "README.md"]
    before = {path: path.read_bytes() for path in kept}
    caplog.clear()
    train("sd3", prompts_file=prompts, resume_from_checkpoint="latest", **settings)
    assert "training both phases" not in caplog.text.lower()
    assert {path: path.read_bytes() for path in before} == before


def test_coefficients_alone_are_trained_without_loras(train, infer, prompts):
    output = train("sd3", prompts_file=prompts, train_coefficients_only=True, **SHORT)
    card = (output / "README.md").read_text()
    assert "trained the weights of the steps together" in card and f"--sampler {output}" in card
    assert not [word for word in ("Left out", "lora\n", "instance_prompt", "glance.png") if word in card]
    assert not list(output.rglob("pytorch_lora_weights.safetensors"))
    found, sampler = json.loads(header(output)["sampler"]), read_sampler(output)
    assert sampler.coefficients != found["coefficients"]
    assert Image.open(infer("sd3", sampler=output, prompt="a red ring")).size == (32, 32)


@pytest.mark.parametrize("wrong", ["a phase is missing", "another rank"])
def test_a_checkpoint_of_another_run_is_refused(wrong, train, prompts, tmp_path):
    output = train("sd3", prompts_file=prompts, checkpointing_steps=2, **SHORT)
    path = output / "checkpoint-2" / "training_state.pt"
    state = torch.load(path, weights_only=True)
    if wrong == "a phase is missing":
        state["lora"] = {name: value for name, value in state["lora"].items() if name.startswith("slow.")}
    else:
        state["lora"] = {name: torch.zeros(3, *value.shape[1:]) for name, value in state["lora"].items()}
    torch.save(state, path)
    settings = SHORT | {"output_dir": tmp_path / "again", "resume_from_checkpoint": output / "checkpoint-2"}
    with pytest.raises(InputError, match="--resume_from_checkpoint: its LoRA"):
        train("sd3", prompts_file=prompts, **settings)


def header(output) -> dict:
    with safe_open(output / "trajectories.safetensors", "pt") as file:
        return file.metadata()
