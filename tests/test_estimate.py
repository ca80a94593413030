"""What a run will need, said before: held against what it then allocates, and the settings that are chosen by it."""

import json

import pytest
import torch
from accelerate import init_empty_weights
from conftest import flags
from peak_memory import allocated, small_flux
from safetensors.torch import load_file
from test_families import FAMILIES
from tiny_pipelines import make_flux, make_qwen, make_sd3

import train_glance_lora
from glance import base as load_base
from glance.adapters import lora_layers
from glance.ask import pipeline as ask
from glance.ask.velocity import PipelineVelocity
from glance.files.recipe import WEIGHT_NAME
from glance.shared_flags import QUANTIZATIONS
from glance.training import estimate, fit
from glance.training.dry_run import readable
from glance_utils import InputError


CPU = torch.device("cpu")
# Wide enough that neither weights nor activations are all of a step: 7 M parameters, 65 MB of activations or more.
WIDER = {
    "flux": (make_flux, {"num_layers": 2, "num_single_layers": 2, "num_attention_heads": 16}, 96),
    "sd3": (make_sd3, {"num_attention_heads": 16, "caption_projection_dim": 256, "pos_embed_max_size": 48}, 96),
    "qwen": (make_qwen, {"num_attention_heads": 16}, 192),
}
TWO_CALLS = {"pipeline_kwargs": json.dumps({"true_cfg_scale": 4.0, "negative_prompt": " "})}
SHORT = {"num_base_steps": 4, "num_inference_steps": 2, "grid": "even", "solver": "euler", "num_trajectories": 1}
TRAJECTORY = {"loss": "trajectory", **SHORT}
ON, OFF = {"gradient_checkpointing": True}, {"no-gradient_checkpointing": True}


@pytest.fixture(scope="module")
def wider(tmp_path_factory):
    root = tmp_path_factory.mktemp("wider")
    return {name: make(root / name, **config) for name, (make, config, _) in WIDER.items()}


def size_of(module: torch.nn.Module) -> int:
    return sum(value.numel() * value.element_size() for value in module.state_dict().values())


# --------------------------------------------------------------------------------------------------------------------
# Memory


def test_estimated_sizes_are_the_loaded_ones(pipelines):
    for base, path in pipelines.items():
        pipe = ask.load_pipeline(str(path), torch.bfloat16)
        for quantization in QUANTIZATIONS:
            loaded = load_base.load_transformer(str(path), torch.bfloat16, CPU, quantization)
            size = size_of(loaded)
            found = estimate.base_bytes(pipe.transformer, quantization)
            # bitsandbytes' state also holds its table of 16 values and a few words for every layer
            layers = sum(isinstance(layer, torch.nn.Linear) for layer in loaded.modules())
            slack = 256 * layers if quantization in ("nf4", "int8") else 0
            assert size - slack <= found <= size, (base, quantization)


@pytest.mark.parametrize(
    ("base", "settings"),
    [
        ("flux", OFF),  # guidance embedded
        ("flux", ON),
        ("flux", {"quantization": "nf4", **OFF}),
        ("flux", {"quantization": "nf4", "use_8bit_adam": True, **ON}),
        ("flux", {"quantization": "int8", **OFF}),
        ("flux", {"quantization": "int8", **ON}),
        ("flux", {"quantization": "fp8", **ON}),
        ("flux", {"flow_weight": 0.5, **TRAJECTORY, **OFF}),  # a call for each loss
        ("sd3", {"timesteps_per_step": 5, **OFF}),  # guidance switched off
        ("sd3", {**TRAJECTORY, **OFF}),  # a batch of two
        ("sd3", {**TRAJECTORY, **ON}),
        ("qwen", {**TRAJECTORY, **TWO_CALLS, **OFF}),
        ("qwen", {**TRAJECTORY, **TWO_CALLS, **ON}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_the_estimated_peak_of_training_is_the_measured_one(base, settings, wider, train, monkeypatch):
    """By the allocator's own count, in the second step, when the optimizer has its state."""
    found, train_phase = {}, train_glance_lora.train_phase

    def measured(args, accelerator, prepared, phase):
        weights = size_of(prepared.models.pipe.transformer)
        with allocated() as memory:
            train_phase(args, accelerator, prepared, phase)
        found.update(measured=weights + memory["peak"], args=args, captions=prepared.captions)

    monkeypatch.setattr(train_glance_lora, "train_phase", measured)
    side = WIDER[base][2]
    train(wider[base], resolution=side, rank=8, max_train_steps=2, phase="slow", **settings)
    args = found["args"]
    needed = fit.estimate_settings(args, found["captions"], (side, side), False, [args.gradient_checkpointing], print)
    assert needed.stages(args)["training"] == pytest.approx(found["measured"], rel=0.15)


# --------------------------------------------------------------------------------------------------------------------
# What --dry_run prints


@pytest.mark.parametrize("base", ["flux", "sd3", "qwen"])
def test_a_dry_run_reads_configs_alone(base, pipelines, pair, train, tmp_path, capsys):
    """No weights lie there, and what is said of the LoRA is what training writes."""
    for path in pipelines[base].rglob("*"):
        if path.is_file() and path.suffix not in (".safetensors", ".bin"):
            copy = tmp_path / "configs" / path.relative_to(pipelines[base])
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    settings = {"pretrained_model_name_or_path": tmp_path / "configs", "resolution": 32, "rank": 4, "dry_run": True}
    train_glance_lora.main(flags(**settings, output_dir=tmp_path / "nothing"))
    printed = capsys.readouterr().out
    assert not (tmp_path / "nothing").exists()
    count = sum(value.numel() for value in load_file(train(base, phase="slow") / WEIGHT_NAME).values())
    assert f"{readable(count, '')} parameters, {readable(4 * count, 'B')} a file" in printed
    stages = ["stage", "encoding", "training", "preview", "all"]
    rows = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("| ")]
    assert rows[:5] == stages and len(rows) == len(stages) + 1 + 4 * 2 - 1


def test_flops_are_those_of_the_products(pipelines):
    """By hand for a FLUX of 90 M parameters, 576 image and 512 text tokens: forward, and backward to what the LoRA
    needs alone, since the base is frozen."""
    pipe = ask.load_pipeline(str(pipelines["flux"]))
    with init_empty_weights():
        pipe.transformer = small_flux()
    call = ask.call_arguments(pipe, "a red ring", 96, 96, None, {})
    layers = lora_layers(pipe.transformer, "proj_out")  # the last layer of each single block
    model = PipelineVelocity(pipe, **call)
    work = estimate.Work(lambda: model(torch.zeros(1, 576, 16), 1.0).square().mean())
    found = estimate.estimate(pipe, layers, 1, work, checkpointing=[False])
    width, image, text = 768, 576, 512
    block = 12 * width * width * 2 * (image + text)
    attention = 4 * (image + text) ** 2 * width
    forward = 6 * (block + attention) + 2 * width * (2 * 16 * image + 32 * text)
    # To the first single block's output and no further: three blocks, whose attention costs 2.5 times as much.
    backward = 3 * (block + 2.5 * attention) + 2 * width * 16 * image
    assert found.training[False].flops == pytest.approx(forward + backward, rel=0.02)


def test_checkpointing_is_switched_on_where_the_step_would_not_fit(train, tmp_path, monkeypatch):
    switched, train_phase = [], train_glance_lora.train_phase

    def watched(args, accelerator, prepared, phase, *others):
        switched.append(prepared.models.pipe.transformer.is_gradient_checkpointing)
        train_phase(args, accelerator, prepared, phase, *others)

    monkeypatch.setattr(train_glance_lora, "train_phase", watched)
    settings = {"phase": "slow", "max_train_steps": 1}
    asked = settings | {"no-gradient_checkpointing": None}
    train(output_dir=tmp_path / "fits", **asked)
    monkeypatch.setattr(fit, "free_memory", lambda device: 1_000_000)
    train(output_dir=tmp_path / "does not", **asked)
    train(output_dir=tmp_path / "but no", **settings, **{"no-gradient_checkpointing": True})
    assert switched == [False, True, False]


def test_a_model_that_decides_by_numbers_is_said_to(tmp_path):
    make, size, _ = FAMILIES["hidream"]
    with pytest.raises(InputError, match="HiDreamImageTransformer2DModel decides by numbers, so a step without"):
        train_glance_lora.main(
            flags(pretrained_model_name_or_path=make(tmp_path), resolution=size, rank=4, dry_run=True)
        )


def test_readable():
    assert [readable(value, "B") for value in (5, 1234, 23.8e9, 2e15)] == [
        "5 B",
        "1.23 kB",
        "23.8 GB",
        "2 PB",
    ]
