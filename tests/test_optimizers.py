"""--optimizer, the learning rate's schedule, --lora_dropout: they do what they say, and a resumed run is the same."""

import argparse
import importlib.util
import shutil
import sys

import pytest
import torch
from conftest import flags
from peft import LoraConfig
from safetensors.torch import load_file

import train_glance_lora
from glance.adapters import compute_as_saved
from glance.base import load_transformer
from glance.files.checkpoints import run_settings
from glance.files.recipe import WEIGHT_NAME
from glance.training import flags as training_flags
from glance.training.optimizer import make_optimizer, state_bytes
from glance.training.settings import complete
from glance_utils import InputError


HAS_PRODIGY = importlib.util.find_spec("prodigyopt") is not None
NEEDS_PRODIGY = pytest.mark.skipif(not HAS_PRODIGY, reason="prodigyopt is not installed")
OPTIMIZERS = [
    pytest.param(name, marks=NEEDS_PRODIGY if name == "prodigy" else []) for name in training_flags.OPTIMIZERS
]


def parse(**settings):
    return training_flags.parse(flags(pretrained_model_name_or_path="b", **settings))


def lora(folder) -> dict[str, torch.Tensor]:
    return {path.parent.name: load_file(path) for path in sorted(folder.rglob(WEIGHT_NAME))}


def assert_equal(one, other):
    one, other = lora(one), lora(other)
    assert one.keys() == other.keys() and one
    for phase, tensors in one.items():
        for name, value in tensors.items():
            assert torch.equal(value, other[phase][name]), name


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        *[({}, "adamw"), ({"optimizer": "AdamW"}, "adamw"), ({"use_8bit_adam": True}, "adamw8bit")],
        *[({"optimizer": "AdamW8bit"}, "adamw8bit"), ({"optimizer": "adamw", "use_8bit_adam": True}, "adamw8bit")],
        *[({"optimizer": "adamw8bit", "use_8bit_adam": "false"}, "adamw8bit"), ({"optimizer": "Prodigy"}, "prodigy")],
    ],
)
def test_both_spellings_are_one_setting(given, wanted):
    args = parse(**given)
    assert args.optimizer == wanted and not hasattr(args, "use_8bit_adam")


def test_the_learning_rate_that_an_optimizer_is_used_to():
    assert [parse(optimizer=name).learning_rate for name in ("adamw", "adafactor", "prodigy")] == [3e-4, 3e-4, 1.0]
    assert parse(optimizer="prodigy", loss="trajectory").learning_rate == 1.0
    assert parse(optimizer="prodigy", learning_rate=0.5).learning_rate == 0.5


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"optimizer": "lion"}, "invalid choice: 'lion'"),
        ({"optimizer": "prodigy", "use_8bit_adam": True}, "--use_8bit_adam is not --optimizer prodigy"),
        ({"optimizer": "adafactor", "adam_beta1": 0.8}, "--adam_beta1 belongs to AdamW and Prodigy"),
        ({"adam_beta2": 1}, "--adam_beta2: 1 is not from 0 to below 1"),
        ({"lora_dropout": 1}, "--lora_dropout: 1 is not from 0 to below 1"),
        ({"lora_dropout": "nan"}, "--lora_dropout: nan is not from 0 to below 1"),
        ({"adam_epsilon": 0}, "--adam_epsilon: 0 is not above 0"),
        ({"lr_num_cycles": 0}, "--lr_num_cycles: 0 is not above 0"),
    ],
)
def test_what_is_refused(given, word):
    with pytest.raises(argparse.ArgumentError, match=word):
        parse(**given)


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "prodigyopt", None)  # as if it were not installed
    with pytest.raises(InputError, match="--optimizer prodigy: prodigyopt is not installed; pip install prodigyopt"):
        complete(parse(optimizer="prodigy"))


def test_other_optimizers_do_not_go_with_deepspeed():
    args = parse(optimizer="adafactor").replace(mixed_precision="no")
    with pytest.raises(InputError, match="--optimizer does not go with DeepSpeed"):
        train_glance_lora.distribution.refuse(args, "DeepSpeed", "optimizer")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_handed_on_and_how_large_the_state_is(name):
    rank, sides = 16, (512, 768)
    generator = torch.Generator().manual_seed(0)
    shapes = [(rank, side) for side in sides] + [(side, rank) for side in sides]
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for parameter in parameters[:2]:
        parameter.data.normal_(generator=generator)
    adam = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-7} if name != "adafactor" else {}
    args = parse(optimizer=name, learning_rate=1e-2, adam_weight_decay=0.1, rank=rank, **adam)
    optimizer, _ = make_optimizer(args, parameters)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (1e-2, 0.1)
    assert name == "adafactor" or (tuple(group["betas"]), group["eps"]) == ((0.8, 0.95), 1e-7)
    before = [parameter.detach().clone() for parameter in parameters]
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    assert not any(torch.equal(old, new) for old, new in zip(before, parameters))
    held = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    measured = sum(tensor.nbytes for tensor in held) / sum(parameter.numel() for parameter in parameters)
    assert measured == pytest.approx(state_bytes(name, rank), rel=0.15)


def test_the_schedules_numbers():
    def rates(**settings) -> list[float]:
        optimizer, schedule = make_optimizer(parse(max_train_steps=8, learning_rate=1.0, **settings), [torch.ones(2)])
        found = []
        for _ in range(8):
            found.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        return found

    assert rates(lr_scheduler="cosine_with_restarts", lr_num_cycles=2)[4] == pytest.approx(1.0)
    assert rates(lr_scheduler="cosine_with_restarts")[4] == pytest.approx(0.5)
    assert rates(lr_scheduler="polynomial", lr_power=2.0)[4] == pytest.approx(0.25, rel=1e-3)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"optimizer": "prodigy", "lr_scheduler": "cosine"}, marks=NEEDS_PRODIGY),
        {"optimizer": "adafactor", "learning_rate": 1e-3},
        {"lora_dropout": 0.5, "learning_rate": 1e-2, "gradient_accumulation_steps": 2},
    ],
    ids=["prodigy", "adafactor", "dropout"],
)
def test_resumed_equals_uninterrupted(settings, train, tmp_path):
    settings |= {"checkpointing_steps": 3, "max_train_steps": 4, "phase": "slow"}
    whole, resumed = (tmp_path / name / "run" for name in ("whole", "resumed"))
    train(output_dir=whole, **settings)
    shutil.copytree(whole / "checkpoint-3", resumed / "checkpoint-3")
    train(output_dir=resumed, resume_from_checkpoint="latest", **settings)
    assert_equal(resumed, whole)
    assert all(value.any() for tensors in lora(whole).values() for value in tensors.values())


# --------------------------------------------------------------------------------------------------------------------
# Dropout


def test_dropout_changes_the_lora_and_checkpointing_sees_the_same_masks(train, tmp_path):
    settings = {"phase": "slow", "learning_rate": 1e-2, "max_train_steps": 3}
    without = train(output_dir=tmp_path / "without", **settings)
    dropped = train(output_dir=tmp_path / "dropped", lora_dropout=0.5, **settings)
    again = train(output_dir=tmp_path / "again", lora_dropout=0.5, gradient_checkpointing=True, **settings)
    one, other, third = (load_file(folder / WEIGHT_NAME) for folder in (dropped, again, without))
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-6)
    assert max((value - third[name]).abs().max() for name, value in one.items()) > 1e-3


def test_no_picture_is_drawn_with_dropout(pipelines):
    """It acts where there are gradients to compute, and nowhere else."""
    transformer = load_transformer(str(pipelines["flux"]), torch.float32, torch.device("cpu"))
    layers = [name for name, layer in transformer.named_modules() if name.endswith("to_q")]
    transformer.add_adapter(LoraConfig(r=4, lora_dropout=0.5, target_modules=layers, init_lora_weights=False), "a")
    compute_as_saved(transformer)
    layer = transformer.get_submodule(layers[0])
    x = torch.ones(1, 3, layer.in_features)
    assert not torch.equal(layer(x), layer(x))
    with torch.no_grad():
        plain = layer(x)
        assert torch.equal(layer(x), plain)
    outputs = torch.stack([layer(x).detach() for _ in range(4000)])
    torch.testing.assert_close(outputs.mean(0), plain, rtol=0.1, atol=0.1)


def test_what_masks_depend_on_is_compared_where_there_are_some():
    for dropout, compared in ((0.0, set()), (0.1, {"train_batch_size", "compile"})):
        settings = run_settings(parse(lora_dropout=dropout), None, "base", "pair", 1)
        assert settings.keys() & {"train_batch_size", "compile"} == compared
        assert settings["lora_dropout"] == dropout
