"""What `accelerate launch` says: the defaults of our flags, or one line."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT, flags

import infer_glance
import train_glance_lora
from glance_utils import InputError


PRECISION, ACCUMULATION = "ACCELERATE_MIXED_PRECISION", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
HEARD = [
    ({PRECISION: "bf16"}, {}, {"mixed_precision": "bf16"}),
    ({PRECISION: "no"}, {}, {"mixed_precision": "no"}),
    ({PRECISION: "no"}, {"mixed_precision": "bf16"}, {"mixed_precision": "bf16"}),
    ({PRECISION: "bf16"}, {"mixed_precision": "bf16"}, {"mixed_precision": "bf16"}),
    ({}, {}, {"mixed_precision": "no", "gradient_accumulation_steps": 1, "max_grad_norm": 1.0}),
    ({ACCUMULATION: "2"}, {}, {"gradient_accumulation_steps": 2}),
    ({}, {"num_model_calls": 8}, {"gradient_accumulation_steps": 4, "lr_scheduler": "cosine", "lr_warmup_steps": 10}),
    ({ACCUMULATION: "2"}, {"num_model_calls": 8}, {"gradient_accumulation_steps": 2}),
    ({}, {"loss": "trajectory"}, {"gradient_accumulation_steps": 1, "lr_scheduler": "constant", "lr_warmup_steps": 0}),
    ({ACCUMULATION: "auto"}, {"gradient_accumulation_steps": 3}, {"gradient_accumulation_steps": 3}),
    ({"ACCELERATE_GRADIENT_CLIPPING": "0.5"}, {}, {"max_grad_norm": 0.5}),
    (FSDP | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}, {"gradient_checkpointing": True}),
    (FSDP | {"FSDP_ACTIVATION_CHECKPOINTING": "false"}, {}, {"gradient_checkpointing": None}),
    ({"ACCELERATE_DYNAMO_BACKEND": "NO", "PARALLELISM_CONFIG_TP_SIZE": "1"}, {}, {"compile": False}),
]
REFUSED = [
    ({PRECISION: "bf16"}, {"mixed_precision": "fp16"}, "--mixed_precision is fp16, but accelerate was launched"),
    ({PRECISION: "bf16"}, {"mixed_precision": "no"}, "--mixed_precision is no, but accelerate was launched with bf16"),
    ({PRECISION: "fp8"}, {}, "--quantization fp8"),
    ({PRECISION: "fp8"}, {"mixed_precision": "bf16"}, "--quantization fp8"),
    ({PRECISION: "half"}, {}, "it takes no, fp16 or bf16"),
    ({ACCUMULATION: "2"}, {"gradient_accumulation_steps": 3}, "--gradient_accumulation_steps is 3"),
    ({ACCUMULATION: "many"}, {}, "a number above 0"),
    ({"ACCELERATE_GRADIENT_CLIPPING": "0.5"}, {"max_grad_norm": 1}, "--max_grad_norm is 1.0"),
    (
        FSDP | {"FSDP_ACTIVATION_CHECKPOINTING": "true"},
        {"no-gradient_checkpointing": True},
        "--gradient_checkpointing",
    ),
    ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, {}, "--compile"),
    ({"ACCELERATE_USE_MEGATRON_LM": "true"}, {}, "--use_fsdp"),
    ({"PARALLELISM_CONFIG_TP_SIZE": "2"}, {}, "tensor parallelism"),
    ({"PARALLELISM_CONFIG_CP_SIZE": "2"}, {}, "context parallelism"),
    ({"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2"}, {}, "leave it out"),
]


def parse(**settings):
    return train_glance_lora.parse_args(flags(pretrained_model_name_or_path="base", **settings))


@pytest.mark.parametrize("environment, settings, wanted", HEARD)
def test_the_launchers_values_are_the_defaults(environment, settings, wanted, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert vars(parse(**settings)) | wanted == vars(parse(**settings))


@pytest.mark.parametrize("environment, settings, word", REFUSED)
def test_what_the_launcher_says_in_vain_is_refused(environment, settings, word, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError) as error:
        parse(**settings)
    assert word in str(error.value) and "\n" not in str(error.value)


def test_a_config_file_contradicts_too(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text("mixed_precision: fp16\n")
    monkeypatch.setenv(PRECISION, "bf16")
    with pytest.raises(InputError, match="--mixed_precision is fp16"):
        parse(config=tmp_path / "config.yaml")


def test_inference_hears_the_launcher_too(monkeypatch):
    given = {"pretrained_model_name_or_path": "base", "prompt": "a dog"}
    assert infer_glance.parse_args(flags(**given)).dtype == "float32"
    monkeypatch.setenv(PRECISION, "bf16")
    assert infer_glance.parse_args(flags(**given)).dtype == "bfloat16"
    with pytest.raises(InputError, match="--dtype is float16"):
        infer_glance.parse_args(flags(**given, dtype="float16"))


def test_what_accelerate_cannot_begin_is_one_line(train, infer, trained, monkeypatch, tmp_path):
    loras = trained()
    for call in (train, lambda: infer(lora=loras)):
        monkeypatch.setenv("ACCELERATE_USE_CPU", "perhaps")
        with pytest.raises(InputError) as error:
            call()
        assert "accelerate cannot begin as it was launched (invalid truth value perhaps)" in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_more_processes_than_accelerators(monkeypatch, tmp_path):
    devices = torch.accelerator.device_count()
    few, many = max(devices, 1), devices + 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(few))
    parse()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(many))
    line = f"{many} processes were launched on a machine of {devices} accelerators?; launch with --num_processes {few}"
    with pytest.raises(InputError, match=line):
        parse(output_dir=tmp_path / "output")
    with pytest.raises(InputError, match=line):
        infer_glance.parse_args(flags(pretrained_model_name_or_path="base", prompt="a dog"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    parse()
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setenv("LOCAL_RANK", str(many - 1))  # all that some launchers say
    with pytest.raises(InputError, match=line):
        parse()


@pytest.mark.processes
def test_accelerate_launch_decides_the_bases_dtype(pipelines, capsys):
    """Through the real launcher; --dry_run names the dtype in which the base would be loaded, float32 by default."""
    launch = "-m accelerate.commands.launch --cpu --num_processes=1 --num_machines=1 --dynamo_backend=no"
    arguments = flags(pretrained_model_name_or_path=pipelines["flux"], resolution=32, rank=4, dry_run=True)
    command = [sys.executable, *launch.split(), "--mixed_precision=bf16", ROOT / "train_glance_lora.py"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=200)
    assert "bfloat16" in done.stdout and done.returncode == 0, done.stderr[-3000:]
    train_glance_lora.main(arguments)
    assert "bfloat16" not in capsys.readouterr().out
