"""The benchmarks run, on a tiny pipeline and on random weights, and their count of FLOPs is torch's."""

import json
import sys

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import ROOT, flags, long
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


sys.path.insert(0, str(ROOT / "benchmarks"))

import against_diffusers  # noqa: E402
import gpu  # noqa: E402
import infer  # noqa: E402
import shapes  # noqa: E402
import train_step  # noqa: E402

from glance.ask import pipeline as ask  # noqa: E402
from glance.ask.velocity import PipelineVelocity  # noqa: E402
from glance_utils import InputError  # noqa: E402


pytestmark = pytest.mark.slow


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


@pytest.mark.parametrize("base", ("flux", long("sd3"), long("qwen")))
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
    counted = shapes.count_flops(pipe.transformer, lambda: train_step.velocity_once(pipe, call, latents))
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


# --------------------------------------------------------------------------------------------------------------------
# All of them on one page


def test_the_page_is_written_though_a_part_fails(tmp_path, monkeypatch, capsys):
    tiny = " --resolution 32 --text_tokens 8"
    monkeypatch.setattr(gpu, "STEPS", [f"--shape flux-dev{tiny}", "--shape sd3.5-large --rank 0"])
    monkeypatch.setattr(gpu, "INFERENCE", [f"--shape flux-dev{tiny}"])
    monkeypatch.setattr(gpu, "AGAINST", [f"--shape flux-dev{tiny} --pipeline_only"])
    monkeypatch.setattr(gpu, "SMALL_FLAGS", "--device cpu --steps 1 --warmup 1")
    AcceleratorState._reset_state(reset_partial_state=True)
    assert gpu.main(["--small", "--output", str(tmp_path)]) == 1
    page = (tmp_path / "cpu.md").read_text()
    assert "nothing here says anything of a card" in page
    assert "| failed: argument --rank: 0 is not above 0" in page
    [row] = [line for line in page.splitlines() if line.startswith("| FLUX.1-dev in bf16: the steps of a pair")]
    assert "at most 60 s" in row and ("| met |" in row or "| missed by " in row)
    assert "| Qwen-Image in nf4: peak | at most 16 GiB |  | not measured |" in page
    rows = [line for line in page.splitlines() if line.startswith("| `--shape tiny-")]
    assert len(rows) == 4 and sum("failed" in row for row in rows) == 1
    assert "torch | 2." in page and capsys.readouterr().out.endswith(f"{tmp_path / 'cpu.md'}\n")


def test_what_does_not_fit_is_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "STEPS", ["--shape flux-dev --resolution 32 --text_tokens 8"])
    monkeypatch.setattr(train_step, "free_memory", lambda device: 1000)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert gpu.main(["--small", "--output", str(tmp_path), "--only", "train_step"]) == 0
    assert "left out: it needs 0.0 GiB by the estimate, 0.0 GiB are free" in (tmp_path / "cpu.md").read_text()


def test_what_came_of_the_tests_is_said(tmp_path):
    path = tmp_path / "test_three.py"
    path.write_text(
        "import pytest\n\ndef test_good(): pass\n\ndef test_bad(): assert 1 == 2, 'no luck'\n\n"
        "def test_left(): pytest.skip('one card')\n"
    )
    tests = gpu.run_tests(100, str(path))
    [(name, message)] = tests.failed.items()
    assert tests.passed == 1 and name.endswith("test_three.test_bad") and "no luck" in message
    assert tests.skipped == {"one card": 1}
    assert gpu.run_tests(0, str(path)).error == "not done after 0 s"
    lines = "\n".join(gpu.test_lines(tests))
    assert "1 passed, 1 failed" in lines and "skipped, 1: one card" in lines


def test_a_target_says_by_how_much_it_is_missed():
    assert gpu.Target("peak", 12.0, 10.0, "GiB").verdict() == "missed by 20.0 %"
    assert gpu.Target("peak", 10.0, 10.0, "GiB").verdict() == "met"
    assert gpu.Target("share", 45.0, 60.0, "%", least=True).verdict() == "missed by 25.0 %"
    assert gpu.Target("share", None, 60.0, "%", least=True).verdict() == "not measured"


def test_without_a_gpu_it_is_said_what_can_be_done(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="no CUDA device here; --small"):
        gpu.main([])
