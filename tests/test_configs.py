"""Every config under configs/ is understood by the training script, those under configs/accelerate by accelerate."""

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from conftest import ROOT

import train_glance_lora


CONFIGS = [*ROOT.glob("configs/*.yaml"), *ROOT.glob("configs/simpletuner/glance-*.json")]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_is_understood(path):
    args = train_glance_lora.parse_args([f"--config={path}", "--seed=7"])
    assert args.pretrained_model_name_or_path and args.seed == 7
    assert len(CONFIGS) >= 40


@pytest.mark.parametrize("path", ROOT.glob("configs/accelerate/*.yaml"), ids=lambda path: path.stem)
def test_accelerate_understands(path):
    kind = {"fsdp": "FSDP", "deepspeed": "DEEPSPEED"}.get(path.stem, "MULTI_GPU")
    assert load_config_from_file(str(path)).distributed_type.value == kind
    arguments = [f"--config_file={path}", "--num_processes=4", "train_glance_lora.py", "--rank=4"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    assert (args.num_processes, args.training_script_args) == (4, ["--rank=4"])
    launchers = {"FSDP": args.use_fsdp, "DEEPSPEED": args.use_deepspeed, "MULTI_GPU": args.multi_gpu}
    assert [name for name, used in launchers.items() if used] == [kind]
    assert args.num_machines == (2 if path.stem == "two_nodes" else 1)
    assert kind != "FSDP" or args.fsdp_version == 2
    assert kind != "DEEPSPEED" or args.zero_stage == 2
