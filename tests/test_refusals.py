"""What a pipeline refuses, in whatever way, and what a base's folder lacks: one line, before weights are read."""

import json
import shutil

import pytest
import torch
from conftest import flags, long, run_train
from diffusers import FluxPipeline
from test_errors import assert_one_line, assert_refused, snapshot
from test_families import FAMILIES
from tiny_pipelines import make_flux

import infer_glance
from glance import drawing
from glance.ask import pipeline as ask
from glance.ask import prompts as ask_prompts
from glance.ask.velocity import takes_batches
from glance.training.weightless import load_without_weights
from glance_utils import InputError


CALL = {"prompt": "a red ring", "height": 32, "width": 32}


class Unheard(Exception):
    """A kind of its own, as custom pipelines have."""


RAISED = [AssertionError(), RuntimeError("two\nlines"), NotImplementedError("not yet"), KeyError("colour")]
RAISED += [ZeroDivisionError("division by zero"), ValueError("no"), Unheard("wrong"), StopIteration(), OSError("gone")]


@pytest.fixture
def flux(pipelines):
    return ask.load_pipeline(pipelines["flux"])


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
def test_whatever_a_pipeline_raises_is_one_line(error, flux, monkeypatch):
    def check_inputs(*args, **kwargs):
        raise error

    monkeypatch.setattr(FluxPipeline, "check_inputs", check_inputs)
    with pytest.raises(InputError) as refused:
        ask.dry_step(flux, **CALL)
    assert_one_line(refused, "FluxPipeline refuses the call: ")
    assert refused.value.__cause__ is error


def test_a_wrong_argument_is_one_line(flux):
    with pytest.raises(InputError, match="FluxPipeline refuses the call: .*unexpected keyword argument 'colour'"):
        ask.dry_step(flux, **CALL, colour="red")


def test_a_mistake_of_ours_keeps_its_traceback(flux, monkeypatch):
    """Else a mistake in a probe would look like the user's, and `except InputError` would hide it."""
    monkeypatch.setattr(ask, "model_input", None)
    with pytest.raises(TypeError, match="not callable"):
        ask.dry_step(flux, **CALL)
    monkeypatch.undo()
    with pytest.raises(KeyboardInterrupt):
        ask.dry_step(flux, lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt), **CALL)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_a_lack_of_memory_is_no_refusal(error, flux, monkeypatch):
    def check_inputs(*args, **kwargs):
        raise error

    monkeypatch.setattr(FluxPipeline, "check_inputs", check_inputs)
    with pytest.raises(type(error)):
        ask.dry_step(flux, **CALL)


def test_a_freed_model_that_is_needed_after_all_is_one_line(flux, monkeypatch):
    ask_prompts.remember_prompts(flux)
    ask.dry_step(flux, **CALL)
    check_inputs = FluxPipeline.check_inputs
    monkeypatch.setattr(
        FluxPipeline, "check_inputs", lambda self, *args, **kwargs: (self.vae.quantize, check_inputs(self, *args))
    )
    with pytest.raises(InputError) as refused:
        ask_prompts.free_components(flux, **CALL)
    assert_one_line(refused, "quantize of a model that was freed")


# --------------------------------------------------------------------------------------------------------------------
# model_index.json and the folders that it names


ENTRIES = [5, "x", ["diffusers"], ["diffusers", 5], [["a"], ["b"]], {"a": 1}, ["diffusers", "Nope"], ["nolib", "No"]]
BROKEN = {f"{part} {entry}": {part: entry} for part in ("transformer", "vae") for entry in ENTRIES}
BROKEN |= {f"scheduler {entry}": {"scheduler": entry} for entry in (None, "x", ["diffusers", None])}
BROKEN |= {f"class {name}": {"_class_name": name} for name in (None, ["FluxPipeline"], "NopePipeline")}
RAW = {"binary": bytes(range(256)), "deep": b'{"a":' + b"[" * 9000, "empty": b"", "null": b"null", "text": b'"x"'}
CONFIGS = [b"{", b"[1]", RAW["deep"]]


@pytest.mark.forged
def test_a_malformed_base_is_one_line(pipelines, tmp_path):
    base, written = tmp_path / "flux", (pipelines["flux"] / "model_index.json").read_bytes()
    shutil.copytree(pipelines["flux"], base)
    index = json.loads(written)

    def refused(load=ask.load_pipeline):
        with pytest.raises(InputError) as error:
            load(str(base), torch.float32)
        assert_one_line(error, str(base))

    for entries in BROKEN.values():
        (base / "model_index.json").write_text(json.dumps(index | entries))
        refused()
    for content in RAW.values():
        (base / "model_index.json").write_bytes(content)
        refused()
    (base / "model_index.json").write_bytes(written)
    for part, file in (("transformer", "config.json"), ("vae", "config.json"), ("scheduler", "scheduler_config.json")):
        good = (base / part / file).read_bytes()
        for content in CONFIGS:
            (base / part / file).write_bytes(content)
            refused()
        (base / part / file).unlink()
        refused()
        refused(load_without_weights)
        (base / part / file).write_bytes(good)


# --------------------------------------------------------------------------------------------------------------------
# Inference


@pytest.fixture
def no_weights(monkeypatch):
    """No weights may be read: neither the transformer's nor the encoders'."""
    monkeypatch.setattr(infer_glance, "load_pipeline", None)


EARLY = {
    "smaller than a patch": ({"height": 2, "width": 2}, "2x2 is less than a patch of its latents"),
    "not divisible": ({"base": "sd3", "lora": "sd3", "height": 30}, "divisible by 4 but are 30 and 32"),
    "argument unknown": ({"pipeline_kwargs": '{"colour": 1}'}, "takes no 'colour'"),
    "argument of a wrong kind": ({"pipeline_kwargs": '{"max_sequence_length": 10000}'}, "max_sequence_length"),
    "encoder's folder gone": ({"gone": "vae"}, "vae"),
}


@pytest.mark.forged
@pytest.mark.parametrize("row", EARLY)
def test_refused_before_weights_are_read(row, trained, infer, no_weights, pipelines, tmp_path, capsys):
    settings, word = EARLY[row]
    settings = {"base": "flux", "lora": "flux"} | settings
    settings["lora"] = trained(settings["lora"])
    if part := settings.pop("gone", None):
        shutil.copytree(pipelines["flux"], tmp_path / "base" / "flux")
        shutil.rmtree(tmp_path / "base" / "flux" / part)
        settings["base"] = tmp_path / "base" / "flux"
    before = snapshot(tmp_path)
    assert_refused(capsys, word, infer, **settings)
    assert snapshot(tmp_path) == before


def test_a_lora_that_does_not_fit_is_refused_before_weights_are_read(trained, infer, no_weights, tmp_path, capsys):
    wide = make_flux(tmp_path / "flux", num_attention_heads=4)
    assert_refused(capsys, "is for width 32, but this base has 64", infer, base=wide, lora=trained("flux"))


def test_tiling_without_a_vae(pipelines, flux):
    flux.vae = None
    args = infer_glance.parse_args(
        flags(pretrained_model_name_or_path=pipelines["flux"], lora="x", prompt="x", enable_vae_tiling=True)
    )
    with pytest.raises(InputError) as error:
        infer_glance.check_parts(args, flux, {})
    assert_one_line(error, "--enable_vae_tiling: FluxPipeline has no VAE that can be tiled; leave it out")


def test_what_fails_only_while_drawing_is_one_line(trained, infer, monkeypatch, tmp_path, capsys):
    """A dry run bypasses the transformer and the VAE; the pictures before it stay."""
    drawn, decode = [], drawing.timed

    def timed(pipe, *args, **kwargs):
        drawn.append(pipe)
        if len(drawn) == 2:
            pipe.vae.decoder.conv_in.padding = (0, 0)
            pipe.vae.decoder.conv_in.kernel_size = (99, 99)
            pipe.vae.decoder.conv_in.weight = torch.nn.Parameter(torch.zeros(16, 4, 99, 99))
        return decode(pipe, *args, **kwargs)

    monkeypatch.setattr(drawing, "timed", timed)
    with pytest.raises(InputError) as error:
        infer(lora=trained(), num_images=3)
    assert_one_line(error, "FluxPipeline refuses the call: RuntimeError: ")
    assert [path.name for path in tmp_path.iterdir()] == ["out-000.png"]


def test_training_smaller_than_a_patch_is_one_line(pipelines, pair, tmp_path, capsys):
    base = {"pretrained_model_name_or_path": pipelines["flux"], "instance_image": pair, "output_dir": tmp_path / "o"}
    assert_refused(capsys, "2x2 is less than a patch", lambda: run_train(base, {"resolution": 2}))
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------------------------
# Pipelines whose steps or samples depend on each other


def test_a_pipeline_that_fills_a_cache_in_its_first_step_is_told_how_not_to(pair, tmp_path, capsys):
    """Qwen-Image 2.1 keeps the prompt's keys and values of its first step."""
    make, size, extra = FAMILIES["qwen21"]
    base, output = make(tmp_path / "base"), tmp_path / "output"
    settings = {"pretrained_model_name_or_path": base, "instance_image": pair, "output_dir": output}
    word = "kv_cache_mode is 'extract' in the first step and 'cached' after it, and training asks each step by itself"
    word += f"; give --pipeline_kwargs '{json.dumps(extra)}'"
    assert_refused(capsys, word, lambda: run_train(settings, {"resolution": size}))
    assert not output.exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", [long("prx"), "dreamlite"])
def test_a_pipeline_that_guides_one_picture_alone_trains_sample_by_sample(name, pair, tmp_path):
    """Their models get two timesteps or sizes, one for each branch, for any number of pictures."""
    make, size, extra = FAMILIES[name]
    base, output = make(tmp_path / "base"), tmp_path / "output"
    pipe = ask.load_pipeline(base)
    call = ask.call_arguments(pipe, "a red ring", size, size, None, extra)
    assert not takes_batches(pipe, **call)
    settings = {"pretrained_model_name_or_path": base, "instance_image": pair, "output_dir": output}
    settings |= {"resolution": size, "num_base_steps": 12, "num_inference_steps": 4, "grid": "even", "solver": "euler"}
    settings |= {"loss": "trajectory", "flow_weight": 0.5, "num_trajectories": 2, "max_train_steps": 2}
    settings |= {"timesteps_per_step": 2, "train_batch_size": 2, "no-gradient_checkpointing": None}
    run_train(settings, {"pipeline_kwargs": json.dumps(extra)})
    assert (output / "glance.png").exists()
