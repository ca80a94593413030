"""Where encoders answer: on the device or, where they do not fit, in host memory; what they answer is the same."""

import dataclasses
import gc
import weakref

import numpy as np
import pytest
import torch
from conftest import flags
from lifetimes import EXPECTED, watch
from PIL import Image
from pretended_gpu import pretended_gpu
from safetensors.torch import load_file
from test_families import FAMILIES
from torch.utils._pytree import tree_leaves

import infer_glance
import train_glance_lora
from glance import encoders
from glance.ask import pipeline as ask
from glance.files.recipe import WEIGHT_NAME
from glance.training import dry_run, estimate, fit, prepare
from glance.training.weightless import Counter, decoding_bytes, load_without_weights
from glance_utils import PHASES


CPU = torch.device("cpu")
FLUX = {"vae": 168, "text_encoder": 246, "text_encoder_2": 9525}  # FLUX.1-dev's, in MB
QWEN = {"vae": 254, "text_encoder": 16584}


@pytest.mark.parametrize(
    "sizes, memory, away",
    [
        (FLUX, 24_000, []),
        (FLUX, 11_100, []),  # 9,939 of 9,990
        (FLUX, 11_000, ["text_encoder_2"]),
        (FLUX, 8_000, ["text_encoder_2"]),
        (FLUX, 400, ["text_encoder", "text_encoder_2"]),
        (QWEN, 16_000, ["text_encoder"]),
        (QWEN, 24_000, []),
        (QWEN, -5_000, ["text_encoder"]),  # what a picture's decoding needs may be more than there is
        ({"text_encoder": 100}, 0, ["text_encoder"]),
        ({"vae": 100}, 0, []),
        ({}, 0, []),
    ],
)
def test_the_largest_encoders_stay_off_where_not_all_fit(sizes, memory, away):
    assert encoders.kept_away(sizes, memory) == away


def offload_all(pipe, device, memory):
    """place_encoders on a device without memory, but that this one is a CPU."""
    for name, model in ask.freeable_components(pipe).items():
        if name != "vae":
            encoders.offload_layers(model, device)


def inputs(name: str, folder, place) -> tuple[list[torch.Tensor], list, list[bool]]:
    """What the transformer is told of a prompt, references to the encoders, and whether their weights are away."""
    _, size, extra = FAMILIES[name]
    pipe, seen = ask.load_pipeline(str(folder)), []
    place(pipe, CPU, 0)

    def forward(*args, **kwargs):
        seen.extend(leaf.clone() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))
        return ask.no_prediction(*args, **kwargs)

    ask.dry_step(pipe, forward, **ask.call_arguments(pipe, "a red ring", size, size, None, extra))
    models = [model for part, model in ask.freeable_components(pipe).items() if part != "vae"]
    away = [parameter.is_meta for model in models for parameter in model.parameters()]
    return seen, [weakref.ref(model) for model in models], away


# CLIP and T5, several of them; chat models; one that writes tokens; one that pipelines ask for its device
@pytest.mark.parametrize("name", ["flux", "qwen", "flux2", "hidream", "glm", "longcat", "easyanimate"])
def test_an_offloaded_encoder_answers_the_same_and_leaves_nothing(name, tmp_path):
    folder = FAMILIES[name][0](tmp_path)
    wanted, _, there = inputs(name, folder, encoders.place_encoders)
    found, models, away = inputs(name, folder, offload_all)
    assert len(found) == len(wanted) > 2 and all(torch.equal(*pair) for pair in zip(found, wanted))
    assert all(away) and not any(there)
    gc.collect()
    assert [model() for model in models] == [None] * len(models)


@pytest.mark.slow
@pytest.mark.parametrize("base", ["flux", "qwen"])
def test_a_run_whose_encoders_are_offloaded_is_the_same_run(base, train, infer, tmp_path, monkeypatch):
    settings = {"max_train_steps": 2, "learning_rate": 1e-2}
    plain = train(base, output_dir=tmp_path / "plain", **settings)
    wanted = np.asarray(Image.open(infer(base, lora=plain)))
    monkeypatch.setattr(prepare, "place_encoders", offload_all)
    monkeypatch.setattr(infer_glance, "place_encoders", offload_all)
    moments = watch(monkeypatch.setattr)
    offloaded = train(base, output_dir=tmp_path / "offloaded", **settings)
    assert moments == EXPECTED
    for phase in PHASES:
        one, other = (load_file(folder / phase / WEIGHT_NAME) for folder in (plain, offloaded))
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    drawn = infer(base, lora=plain, output=tmp_path / "offloaded.png", num_images=2).with_stem("offloaded-000")
    assert np.array_equal(np.asarray(Image.open(drawn)), wanted)


@pytest.mark.parametrize("base", ["flux", "qwen"])
def test_what_decoding_takes_is_counted_without_weights(base, pipelines):
    """Inference keeps so much of the device free of encoders."""
    call = {"prompt": "a red ring", "height": 128, "width": 128}
    asked = load_without_weights(str(pipelines[base]), torch.float32)
    counted = decoding_bytes(asked, torch.float32, **call)
    assert decoding_bytes(asked, torch.bfloat16, **call) == counted // 2
    pipe = ask.load_pipeline(str(pipelines[base]))
    latents = {"flux": torch.zeros(1, 4, 64, 64), "qwen": torch.zeros(1, 4, 1, 32, 32)}[base]
    with torch.no_grad(), Counter(pipe.vae) as counter:
        pipe.vae.decode(latents)
    assert counted == pytest.approx(counter.peak, rel=0.05)


def test_a_dry_run_says_which_encoders_would_not_fit(pipelines):
    args = train_glance_lora.parse_args(flags(pretrained_model_name_or_path=pipelines["flux"], rank=4, dry_run=True))
    args = args.replace(custom_timesteps={"slow": None})
    needed = fit.estimate_settings(args, ["a red ring"], (32, 32), False, [False], None)
    large = dataclasses.replace(needed, encoders=needed.encoders | {"text_encoder_2": 10**9})
    choices = [estimate.Choice()]
    assert "host" not in dry_run.advice(needed, choices, 8 * 10**8, "800 MB")
    assert dry_run.advice(large, choices, 8 * 10**8, "800 MB").endswith(
        "; text_encoder_2 in host memory, layer by layer on the device"
    )


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real one, for tests/test_gpu.py")
@pytest.mark.parametrize(
    "base, kept", [("flux", "text_encoder (0.0 GB) and text_encoder_2"), ("qwen", "text_encoder")]
)
def test_a_full_gpu_prepares_and_draws_what_an_empty_one_does(
    base, kept, trained, train, infer, tmp_path, monkeypatch, caplog
):
    """What a layer meets is where its weights just are: pretended_gpu refuses operations on tensors of two devices."""
    found, lora = {}, trained(base)
    caplog.set_level("INFO")
    with pretended_gpu(monkeypatch):
        for name in ("empty", "full"):
            if name == "full":
                monkeypatch.setattr(prepare, "free_memory", lambda device: 0)
                monkeypatch.setattr(infer_glance, "free_memory", lambda device: 0)
            caplog.clear()
            output = train(base, output_dir=tmp_path / name, max_train_steps=1, phase="slow")
            picture = infer(base, lora=lora, output=tmp_path / f"{name}.png")
            found[name] = load_file(output / WEIGHT_NAME), np.asarray(Image.open(picture)).astype(int)
            lines = [line for line in caplog.messages if line.startswith("Encoders: ")]
            why = f"{kept} (0.0 GB) in host memory, layer by layer on cuda" if name == "full" else "all on cuda"
            assert len(lines) == 2 and all(why in line for line in lines)  # trained and drawn
    (lora, picture), (other, drawn) = found.values()
    assert all((value - other[name]).abs().max() <= 1e-6 for name, value in lora.items())
    assert abs(picture - drawn).max() <= 1
