"""What may be otherwise on a GPU: half precision, memory, streams, several cards.

`make gpu` runs it there. On a machine without one, what a CPU can do of it runs on the CPU, and the rest is skipped
with the reason.
"""

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, flags
from PIL import Image
from safetensors.torch import load_file
from test_benchmarks import benchmark  # noqa: F401
from test_out_of_memory import one_line


sys.path.insert(0, str(ROOT / "benchmarks"))

import shapes  # noqa: E402
import tiny_parts  # noqa: E402
import tiny_pipelines  # noqa: E402
import train_step  # noqa: E402

from glance.ask import pipeline as ask  # noqa: E402
from glance.files.recipe import WEIGHT_NAME  # noqa: E402
from glance.shared_flags import QUANTIZATIONS  # noqa: E402
from glance.training import distribution  # noqa: E402
from glance_utils import PHASES  # noqa: E402


pytestmark = [pytest.mark.gpu, pytest.mark.slow]
CUDA, CARDS = torch.cuda.is_available(), torch.cuda.device_count()


def only_cuda(reason: str):
    return pytest.mark.skipif(not CUDA, reason=f"no CUDA device: {reason}")


def lora(folder) -> torch.Tensor:
    """All numbers of both files, float32."""
    files = [load_file(folder / phase / WEIGHT_NAME) for phase in PHASES]
    return torch.cat([file[name].flatten() for file in files for name in sorted(file)])


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


# --------------------------------------------------------------------------------------------------------------------
# Half precision


@pytest.mark.parametrize(
    "precision", ["bf16", pytest.param("fp16", marks=only_cuda("accelerate scales no losses on a CPU"))]
)
def test_half_precision_trains_and_goes_on_from_a_checkpoint(precision, train, tmp_path):
    """A GPU adds up in another order each time, so that only on a CPU are two runs the same to the bit."""
    settings = {"mixed_precision": precision, "learning_rate": 1e-3, "checkpointing_steps": 6, "max_train_steps": 8}
    whole = train(output_dir=tmp_path / "whole", **settings)
    state = torch.load(whole / "checkpoint-6" / "training_state.pt", weights_only=True)
    assert (precision == "fp16") == ("scaler" in state) and state.get("scaler", {"scale": 1})["scale"] >= 1
    moved = [
        value.abs().max() > 1e-4 for name, value in load_file(whole / "slow" / WEIGHT_NAME).items() if "B" in name
    ]
    assert lora(whole).isfinite().all() and sum(moved) > 0.75 * len(moved)
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    (whole / "checkpoint-6").rename(resumed / "checkpoint-6")
    train(output_dir=resumed, resume_from_checkpoint="latest", **settings)
    assert distance(lora(resumed), lora(whole)) <= (0.02 if CUDA else 0)


@pytest.mark.parametrize("settings", [{}, {"loss": "trajectory", "num_base_steps": 10, "num_trajectories": 1}])
def test_the_same_run_twice_is_nearly_the_same(settings, train, tmp_path):
    settings |= {"mixed_precision": "bf16", "max_train_steps": 3, "num_inference_steps": 4}
    one, other = (lora(train(output_dir=tmp_path / name, **settings)) for name in ("one", "other"))
    assert distance(one, other) <= (0.02 if CUDA else 0)


# --------------------------------------------------------------------------------------------------------------------
# Memory

# Full widths with few blocks on a GPU, where a tiny model's kernels have more memory of their own than it has.
SHAPES = {
    "flux-dev": {"num_layers": 2, "num_single_layers": 4},
    "sd3.5-large": {"num_layers": 4},
    "qwen-image": {"num_layers": 3},
}
TINY = {"flux-dev": "tiny-flux", "sd3.5-large": "tiny-sd3.5", "qwen-image": "tiny-qwen"}


@pytest.mark.parametrize("shape", sorted(SHAPES))
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_checkpointing": True},
        *(
            pytest.param(
                {"gradient_checkpointing": True, "quantization": quantization, "use_8bit_adam": True},
                marks=only_cuda("other kernels, which unpack other weights"),
            )
            for quantization in ("nf4", "int8", "fp8")
        ),
    ],
    ids=["plain", "checkpointing", "nf4", "int8", "fp8"],
)
@pytest.mark.long
def test_the_estimated_peak_is_the_measured_one(shape, settings, benchmark, monkeypatch):  # noqa: F811
    """Random weights; of a CPU's step all tensors are counted, of a GPU's what its allocator gave."""
    pipeline, transformer, config = shapes.SHAPES[shape]
    monkeypatch.setitem(shapes.SHAPES, shape, (pipeline, transformer, config | SHAPES[shape]))
    where = {"shape": shape} if CUDA else {"shape": TINY[shape], "text_tokens": 64}
    settings = settings | where | {"resolution": None, "dtype": "bfloat16", "pretrained_model_name_or_path": None}
    result = benchmark(train_step, **settings, steps=1)
    assert result["estimated_peak_gib"] == pytest.approx(result["tensors_at_peak_gib"], rel=0.15)


@only_cuda("tests/test_lifetimes.py sees there that the encoders are gone")
def test_the_encoders_memory_is_free_before_the_transformer_is_read(train, tmp_path, monkeypatch):
    pipe = tiny_pipelines.make_flux.__wrapped__()
    pipe.text_encoder_2 = tiny_parts.t5(d_ff=2**17)  # 100 MB
    pipe.save_pretrained(tmp_path / "base", safe_serialization=True)
    encoder = sum(value.numel() * value.element_size() for value in pipe.text_encoder_2.parameters())
    before, load, seen = torch.cuda.memory_allocated(), distribution.load_transformer, []

    def watched(*args, **kwargs):
        seen.append((torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()))
        return load(*args, **kwargs)

    monkeypatch.setattr(distribution, "load_transformer", watched)
    torch.cuda.reset_peak_memory_stats()
    train(str(tmp_path / "base"), max_train_steps=1)
    now, most = seen[0]
    assert most - before >= encoder and now - before < encoder / 10


@only_cuda("tests/test_out_of_memory.py has a CPU's")
def test_a_full_card_is_one_line(train, capsys):
    torch.cuda.empty_cache()
    allowed = torch.cuda.memory_reserved() + 64 * 2**20
    torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.get_device_properties().total_memory)
    try:
        line = one_line(capsys, lambda: train(train_batch_size=10**5))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert line.startswith("out of memory while ") and "more were asked for; try --" in line


@only_cuda("there is no other memory to keep weights in")
@pytest.mark.parametrize("base", ["flux", "sd3", "qwen"])
def test_an_offloaded_base_stays_in_host_memory(base, train, monkeypatch):
    """But for a layer or two, which visit the card by a stream of their own."""
    weights, clip = {}, train_step.train.Accelerator.clip_grad_norm_

    def look(self, parameters, *args):
        parameters = list(parameters)
        frozen = [value for value in weights["of"].parameters() if not value.requires_grad]
        there = sum(value.numel() for value in frozen if value.is_cuda)
        assert there < 0.5 * sum(value.numel() for value in frozen) and all(value.is_cuda for value in parameters)
        return clip(self, parameters, *args)

    load = distribution.load_transformer
    monkeypatch.setattr(
        distribution, "load_transformer", lambda *args, **kwargs: weights.setdefault("of", load(*args, **kwargs))
    )
    with ask.replaced(train_step.train.Accelerator, "clip_grad_norm_", look):
        train(base, enable_group_offload=True, max_train_steps=2)


# --------------------------------------------------------------------------------------------------------------------
# Offload and quantization together, in inference


@pytest.mark.parametrize(
    "offload, quantization",
    [*itertools.product(["enable_model_cpu_offload"], QUANTIZATIONS), ("enable_group_offload", "none")],
)
def test_an_offloaded_base_draws_what_it_draws_on_the_card(offload, quantization, trained, infer, tmp_path):
    def draw(name, **settings):
        settings |= {"lora": trained(), "quantization": quantization, "output": tmp_path / name}
        return np.asarray(Image.open(infer(**settings))).astype(float)

    plain, offloaded = draw("plain.png"), draw("offloaded.png", **{offload: True})
    assert plain.std() > 0 and abs(plain - offloaded).mean() < 1


# --------------------------------------------------------------------------------------------------------------------
# Several cards


@pytest.mark.skipif(CARDS < 2, reason=f"{CARDS} CUDA devices, NCCL joins two; tests/test_distribution.py has gloo")
@pytest.mark.parametrize("kind", [["--multi_gpu"], ["--use_fsdp", "--fsdp_version=2"]], ids=["ddp", "fsdp"])
def test_two_cards_train_what_one_does(kind, train, pipelines, pair, tmp_path):
    settings = {"pretrained_model_name_or_path": pipelines["flux"], "instance_image": pair, "resolution": 32}
    settings |= {"rank": 4, "max_train_steps": 4, "learning_rate": 1e-4, "gradient_checkpointing": True}
    one = train(output_dir=tmp_path / "one", **settings | {"train_batch_size": 2})
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines=1", "--main_process_port=0"]
    launcher += ["--dynamo_backend=no", "--mixed_precision=no", "--num_processes=2", *kind]
    command = [*launcher, ROOT / "train_glance_lora.py", *flags(output_dir=tmp_path / "two", **settings)]
    done = subprocess.run(list(map(str, command)), env=os.environ, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert distance(lora(tmp_path / "two"), lora(one)) <= 0.02
