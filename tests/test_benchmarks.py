"""The benchmarks run, on a tiny pipeline and on random weights, and their count of FLOPs is torch's."""

import json
import sys

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import ROOT, flags
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


sys.path.insert(0, str(ROOT / "benchmarks"))

import against_diffusers  # noqa: E402
import infer  # noqa: E402
import shapes  # noqa: E402
import train_step  # noqa: E402

from glance.ask import pipeline as ask  # noqa: E402
from glance.ask.velocity import PipelineVelocity  # noqa: E402


@pytest.fixture
def benchmark(pipelines, tmp_path):
    """benchmark(script, **flags) -> its result, as in the JSON file that it writes."""

    def call(script, base="flux", **settings) -> dict:
        AcceleratorState._reset_state(reset_partial_state=True)
        defaults = {"pretrained_model_name_or_path": pipelines[base], "resolution": 32, "rank": 4, "warmup": 1}
        defaults |= {"steps": 2, "dtype": "float32", "json": tmp_path / "result.json"}
        settings = {key: value for key, value in (defaults | settings).items() if value is not None}
        script.main(flags(**settings))
        return json.loads((tmp_path / "result.json").read_text())

    yield call
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("base", ("flux", "sd3", "qwen"))
def test_train_step(base, benchmark, capsys):
    result = benchmark(train_step, base, batch_size=2)
    assert result["latents"][0] == 2 and len(result["step_seconds_all"]) == 2
    assert 0 < result["share_of_matmul_rate"] < 1 and result["peak_memory_gib"] > 0
    assert result["parameters"] < 100_000  # the base's alone
    assert "| step_seconds | " in capsys.readouterr().out


def test_a_named_shape_has_random_weights(benchmark, monkeypatch):
    config = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6)}
    config |= {"num_attention_heads": 2, "joint_attention_dim": 32, "guidance_embeds": True}
    monkeypatch.setitem(shapes.SHAPES, "small", (*shapes.SHAPES["small"][:2], config))
    settings = {"pretrained_model_name_or_path": None, "shape": "small", "text_tokens": 8, "dtype": "bfloat16"}
    result = benchmark(train_step, **settings, gradient_checkpointing=True)
    assert result["latents"] == [1, 4, 64] and result["step_seconds"] > 0


@pytest.mark.parametrize("base", ("flux", "sd3", "qwen"))
def test_infer(base, benchmark):
    result = benchmark(infer, base)
    assert result["steps"] == 10 and result["glance_to_base"] > 0 and result["glance_seconds"] > 0


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_against_diffusers(dtype, benchmark):
    result = benchmark(against_diffusers, dtype=dtype, same_layers=True)
    for name in ("pipeline", "bare", "dry", "glance", "example", "example_cached"):
        assert result[f"{name}_seconds"] > 0
    assert {"pipeline_to_bare", "glance_to_example", "glance_to_example_cached"} <= result.keys()
    assert result["dry_seconds"] < result["pipeline_seconds"]


@pytest.mark.parametrize("base", ("flux", "sd3", "qwen"))
def test_flops_are_those_that_torch_counts(base, pipelines):
    settings = flags(pretrained_model_name_or_path=pipelines[base], resolution=32, dtype="float32", batch_size=2)
    args = shapes.parse(shapes.parser(""), settings)
    pipe, call, latents = shapes.make_pipeline(args)
    counted = shapes.count_flops(lambda: train_step.velocity_once(pipe, call, latents))
    # Attention as plain products, so that torch counts it; what requires gradients here is the input of all blocks.
    call.pop(ask.batch_argument(pipe))
    model = PipelineVelocity(pipe, **call)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        model(latents, 1.0)
    assert forward.get_total_flops() == pytest.approx(counted.linear + counted.attention, rel=0.01)
    blocks = next(module for module in pipe.transformer.modules() if isinstance(module, torch.nn.ModuleList))
    blocks[0].register_forward_pre_hook(_require_gradients, with_kwargs=True)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as both:
        model(latents, 1.0).sum().backward()
    assert both.get_total_flops() == pytest.approx(shapes.training_flops(counted), rel=0.1)


def _require_gradients(module, args, kwargs):
    args = tuple(_as_leaf(value) for value in args)
    return args, {name: _as_leaf(value) for name, value in kwargs.items()}


def _as_leaf(value):
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.detach().requires_grad_()
    return value
