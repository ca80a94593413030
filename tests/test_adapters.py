"""Adapters and steps while glance_inference draws: whose turn it is in any pipeline, and that all is put back."""

import contextlib
import dataclasses
import json

import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    StableDiffusion3Img2ImgPipeline,
)
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image

from glance.adapters import fused_adapters
from glance.ask.pipeline import Probe
from glance_utils import (
    FixedSigmaScheduler,
    InputError,
    Schedule,
    activate_adapter,
    glance_inference,
    sigmas_to_timesteps,
)


PHASES = {"slow": [1000.0, 950.0, 900.0, 850.0, 800.0], "fast": [750.0, 600.0, 450.0, 300.0, 100.0]}
STEPS = [name for name, part in PHASES.items() for _ in part]
SIGMAS = [timestep / 1000 for timestep in sum(PHASES.values(), [])] + [0.0]
FITTED = [[1.1, 0.0]] + [[1.2 + 0.02 * step, -0.2 - 0.01 * step] for step in range(1, 10)]
CALL = {"prompt": "a ring", "height": 32, "width": 32, "output_type": "latent", "return_dict": False}


def add_adapters(model, **layers) -> None:
    """Adapters with random weights, by name the layers that they adapt."""
    for seed, (name, targets) in enumerate(layers.items()):
        model.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=targets), name)
        generator = torch.Generator().manual_seed(seed)
        for key, value in model.named_parameters():
            if f".{name}." in key:
                value.data = 0.3 * torch.randn(value.shape, generator=generator)


def load(base, **layers) -> DiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    add_adapters(pipe.transformer, **(layers or {"slow": ["to_q", "to_k"], "fast": ["to_q", "to_k"]}))
    return pipe


def draw(pipe, **arguments) -> torch.Tensor:
    return pipe(**CALL | arguments, generator=torch.Generator().manual_seed(0))[0]


def tuner_layers(model) -> dict:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}


def watched(pipe) -> list[dict]:
    """Of every call of the transformer: the latents it gets, what it predicts, and each layer's active adapters."""
    calls = []

    def note(module, args, kwargs, output):
        active = {
            name: [] if layer.disable_adapters else [key for key in layer.active_adapters if key in layer.scaling]
            for name, layer in tuner_layers(module).items()
        }
        latents = kwargs["hidden_states"].clone()
        calls.append({"latents": latents, "velocity": output[0].clone(), "active": active})

    pipe.transformer.register_forward_hook(note, with_kwargs=True)
    return calls


def turns(calls: list[dict]) -> list[str]:
    return ["+".join(next(iter(call["active"].values()))) for call in calls]


def with_picture(kind, pipe):
    """A pipeline of the same models that begins with a picture, and its further arguments."""
    image = Image.fromarray(np.random.RandomState(0).randint(0, 255, (32, 32, 3), dtype=np.uint8))
    mask = Image.new("L", (32, 32), 255)
    mask.paste(0, (0, 0, 16, 32))
    other = kind(**pipe.components)
    other.set_progress_bar_config(disable=True)
    return other, {"image": image} | ({"mask_image": mask} if "Inpaint" in kind.__name__ else {})


# --------------------------------------------------------------------------------------------------------------------
# Pipelines that begin with a picture leave the first steps out


@pytest.mark.parametrize(
    "base, kind",
    [("flux", FluxImg2ImgPipeline), ("flux", FluxInpaintPipeline), ("sd3", StableDiffusion3Img2ImgPipeline)],
)
def test_a_picture_is_begun_in_its_own_phase(base, kind, pipelines):
    """The same as plain diffusers, which is given the sigmas and switches by hand."""
    pipe, arguments = with_picture(kind, load(pipelines[base]))
    arguments |= {"guidance_scale": 1.0}
    calls = watched(pipe)
    with glance_inference(pipe, PHASES) as kwargs:
        found = {begin: draw(pipe, **arguments, **kwargs, strength=1 - begin / 10) for begin in (3, 5)}
        whole = draw(pipe, **arguments, **kwargs, strength=1.0)
    assert turns(calls) == STEPS[3:] + STEPS[5:] + STEPS

    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    for begin, latents in {**found, 0: whole}.items():

        def switch(pipe, step, timestep, tensors, begin=begin):
            pipe.set_adapters(STEPS[min(begin + step + 1, 9)])
            return tensors

        pipe.set_adapters(STEPS[begin])
        by_hand = {"num_inference_steps": 10, "sigmas": SIGMAS[:-1], "callback_on_step_end": switch}
        assert torch.equal(latents, draw(pipe, **arguments, **by_hand, strength=1 - begin / 10))


@pytest.mark.parametrize("begin", [0, 3])
def test_a_fitted_solver_begins_with_the_steps_own_numbers(begin, pipelines):
    """The first executed step has no velocity before it: it is Euler's, unless it is the fitted schedule's first."""
    pipe, arguments = with_picture(FluxImg2ImgPipeline, load(pipelines["flux"]))
    calls = watched(pipe)
    with glance_inference(pipe, Schedule(PHASES, coefficients=FITTED)) as kwargs:
        last = draw(pipe, **arguments, **kwargs, strength=1 - begin / 10)
    points = [call["latents"] for call in calls] + [last]
    assert len(calls) == 10 - begin
    for number, call in enumerate(calls):
        step = begin + number
        own, before = (1.0, 0.0) if number == 0 and begin else FITTED[step]
        slope = own * call["velocity"] + (before * calls[number - 1]["velocity"] if number else 0)
        wanted = points[number] + (SIGMAS[step + 1] - SIGMAS[step]) * slope
        assert (points[number + 1] - wanted).abs().max() < 1e-6 * wanted.abs().max()


def test_a_pipeline_that_only_cuts_its_timesteps_begins_in_the_right_phase(pipelines):
    """As those that have no set_begin_index: the picture's noise tells, and without it there is an error."""
    pipe, seen = load(pipelines["flux"]), []
    layer = next(iter(tuner_layers(pipe.transformer).values()))
    told = zip(sigmas_to_timesteps(SIGMAS[:-1]), [1000.0, 1000.0, *range(8, 0, -1)])
    with glance_inference(pipe, Schedule(PHASES, sorted(map(list, told)))):
        scheduler, x = pipe.scheduler, torch.ones(1, 2)
        for begin in (6, 0):
            scheduler.set_timesteps()
            noisy = scheduler.scale_noise(x, scheduler.timesteps[begin : begin + 1], torch.zeros(1, 2))
            assert noisy.unique().item() == pytest.approx(1 - SIGMAS[begin])
            for step in range(begin, 10):
                seen.append(list(layer.active_adapters))
                x = scheduler.step(torch.ones(1, 2), scheduler.timesteps[step], x)[0]
            assert scheduler.step_index == 10
        assert seen == [[name] for name in STEPS[6:] + STEPS]
        scheduler.set_timesteps()
        with pytest.raises(InputError, match="step 6 of 10.*set_begin_index"):
            scheduler.step(torch.ones(1, 2), scheduler.timesteps[6], x)


def test_a_probe_counts_its_steps_from_where_it_begins():
    for begin in (0, 1):
        probe = Probe([0.9, 0.5, 0.1], lambda index, model_output, sample: sample)
        probe.set_timesteps()
        probe.set_begin_index(begin)
        for step in range(begin, 3):
            probe.step(torch.ones(1), probe.timesteps[step], torch.ones(1))
            assert probe.step_index == step + 1 and probe.sigmas[probe.step_index] < probe.sigmas[step]


@pytest.mark.parametrize("told", [None, [990.0, 990.0, 300.0]])
def test_the_scheduler_is_saved_and_loaded_with_all_of_its_numbers(told, tmp_path, caplog):
    like = FlowMatchEulerDiscreteScheduler(shift=3.0, num_train_timesteps=1 if told is None else 1000)
    numbers = {"model_timesteps": told, "like": like, "coefficients": [[1.1, 0.0], [1.2, -0.2], [1.3, -0.3]]}
    own = FixedSigmaScheduler([1, np.float64(0.9), 0.5], **numbers)
    own.save_pretrained(tmp_path)
    kind = FixedSigmaScheduler
    assert "before_step" not in json.loads((tmp_path / "scheduler_config.json").read_text())
    loaded = [kind.from_pretrained(tmp_path), kind.from_config(own.config), type(own).from_config(dict(own.config))]
    loaded.append(kind.from_config(like.config, sigmas=[1, 0.9, 0.5], **numbers | {"like": None}))
    assert not caplog.records
    ends = []
    for scheduler in [own, *loaded]:
        scheduler.set_timesteps(7)
        x = torch.ones(2)
        for timestep in scheduler.timesteps:
            x = scheduler.step(x.square(), timestep, x).prev_sample
        ends.append((scheduler.timesteps, scheduler.sigmas, x))
        for mine, found in zip(ends[0], ends[-1]):
            assert torch.equal(mine, found)
    with pytest.raises(InputError, match="coefficients: 1 of them for 3 sigmas"):
        kind([1, 0.9, 0.5], coefficients=[[1, 0]])


# --------------------------------------------------------------------------------------------------------------------
# Everything is put back, and other adapters stay


def state(pipe) -> dict:
    layers = {}
    for part in (pipe.transformer, pipe.text_encoder):
        for name, layer in tuner_layers(part).items():
            trains = {key: value.requires_grad for key, value in layer.named_parameters()}
            weights = {key: value.clone() for key, value in layer.state_dict().items()}
            layers[type(part), name] = (
                list(layer.active_adapters),
                layer.disable_adapters,
                dict(layer.scaling),
                trains,
            )
            layers[type(part), name, "weights"] = {key: value.numpy().tobytes() for key, value in weights.items()}
    return layers


def enter_style(pipe):
    pipe.set_adapters(["style"], 0.7)


def enter_slow(pipe):
    pipe.transformer.set_adapters(["style", "slow"], [0.5, 0.2])  # as phases they are Glance's own


def enter_disabled(pipe):
    pipe.disable_lora()


@contextlib.contextmanager
def drawing(pipe, fuse: bool, scales=None):
    fused = fused_adapters(pipe.transformer) if fuse else contextlib.nullcontext(activate_adapter)
    with fused as activate, glance_inference(pipe, PHASES, scales, activate) as kwargs:
        yield kwargs


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("enter, beside", [(enter_style, "style"), (enter_slow, "style"), (enter_disabled, "")])
def test_other_adapters_stay_and_everything_is_put_back(enter, beside, fuse, pipelines):
    layers = {"slow": ["to_q", "to_k"], "fast": ["to_q", "to_v"], "style": ["to_q", "to_out.0"]}
    pipe = load(pipelines["flux"], **layers)
    pipe.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), "slow")
    enter(pipe)
    before, scheduler, calls = state(pipe), pipe.scheduler, watched(pipe)
    scale = next(iter(tuner_layers(pipe.transformer).values())).scaling["style"]
    with drawing(pipe, fuse, {"slow": 0.5}) as kwargs:
        found = draw(pipe, **kwargs)
        assert next(iter(tuner_layers(pipe.transformer).values())).scaling["style"] == scale
    assert state(pipe) == before and pipe.scheduler is scheduler
    for number, call in enumerate(calls):
        for name, active in call["active"].items():
            here = [part for part, ends in layers.items() if name.endswith(tuple(ends))]
            mine = [] if fuse else [STEPS[number]]
            assert active == [part for part in [beside, *mine] if part in here], name

    with pytest.raises(KeyError), drawing(pipe, fuse) as kwargs:
        draw(pipe, **kwargs, callback_on_step_end=lambda *rest: {}["nothing"])
    assert state(pipe) == before and pipe.scheduler is scheduler

    # by hand: both of them at their strengths, by diffusers' own set_adapters
    def switch(pipe, step, timestep, tensors):
        mine, strength = STEPS[min(step + 1, 9)], {"slow": 0.5, "fast": 1.0}
        names = [*([beside] if beside else []), mine]
        pipe.transformer.set_adapters(names, [{"style": scale / 2}.get(name) or strength[name] for name in names])
        return tensors

    pipe.enable_lora()
    switch(pipe, -1, None, None)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    wanted = draw(pipe, num_inference_steps=10, sigmas=SIGMAS[:-1], callback_on_step_end=switch)
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_names_that_are_not_loaded_are_an_error(pipelines):
    pipe = load(pipelines["flux"], early=["to_q"], fast=["to_k"])
    scheduler, before = pipe.scheduler, state(pipe)
    for settings, message in [
        ({"schedule": PHASES}, "'slow'.*early, fast"),
        ({"schedule": {"early": [1000.0], "fast": [500.0]}, "scales": {"slow": 2.0}}, "slow is no phase"),
        ({"schedule": {"early": [500.0], "fast": [1000.0]}}, "descending"),
        ({"schedule": Schedule({"early": [1000.0], "fast": [500.0]}, None, [[1.0, 0.0]])}, "1 of them for 2"),
    ]:
        with pytest.raises(InputError, match=message), glance_inference(pipe, **settings):
            pass
        assert pipe.scheduler is scheduler and state(pipe) == before
    pipe.set_adapters("early")
    pipe.fuse_lora()
    with pytest.raises(InputError, match="early is fused.*unfuse_lora"):
        with glance_inference(pipe, {"early": [1000.0], "fast": [500.0]}):
            pass
    pipe.unload_lora_weights()
    with pytest.raises(InputError, match="it has none"), glance_inference(pipe, PHASES):
        pass


# --------------------------------------------------------------------------------------------------------------------
# The schedule as data


def test_a_schedule_is_json_and_walks_what_it_says():
    """What the model is told is read off the table between its points; a plain dict says the phases alone."""
    table = [[0.0, 0.0], [500.0, 800.0], [1000.0, 1000.0]]
    own = Schedule({"slow": [1000, 750], "fast": [250]}, table, [[1.1, 0.0], [1.2, -0.2], [1.3, -0.3]], {"scale": 1.0})
    read = Schedule(**json.loads(json.dumps(dataclasses.asdict(own))))
    assert read == own and read.timesteps == [1000, 750, 250] and read.phase_of_steps == ["slow", "slow", "fast"]
    scheduler = read.scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0))
    scheduler.set_timesteps()
    assert scheduler.sigmas.tolist() == [1.0, 0.75, 0.25, 0.0] and scheduler.timesteps.tolist() == [1000, 900, 400]
    assert scheduler.config.coefficients == own.coefficients
    plain = Schedule({"slow": [1000.0], "fast": [500.0]}).scheduler()
    plain.set_timesteps()
    assert plain.timesteps.tolist() == [1000.0, 500.0]


def test_guidance_that_is_folded_in_is_switched_off_by_the_schedule(pipelines):
    pipe = load(pipelines["flux"], slow=["to_q"], fast=["to_k"])
    with glance_inference(pipe, Schedule(PHASES, guidance={"guidance_scale": 1.0})) as kwargs:
        assert kwargs == {"num_inference_steps": 10, "guidance_scale": 1.0}
