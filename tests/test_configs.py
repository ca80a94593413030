"""Every config under configs/ is understood by what it is for: training, inference or accelerate."""

import json

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from conftest import ROOT, picture_distance
from safetensors.torch import load_file, save_file

import infer_glance
import train_glance_lora
from glance.files.recipe import WEIGHT_NAME
from glance_utils import PHASES


CONFIGS = [*ROOT.glob("configs/*.yaml"), *ROOT.glob("configs/simpletuner/glance-*.json")]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_is_understood(path):
    args = train_glance_lora.parse_args([f"--config={path}", "--seed=7"])
    assert args.pretrained_model_name_or_path and args.seed == 7
    assert len(CONFIGS) >= 40


def test_the_published_weights_are_drawn_with_their_config(trained, infer, tmp_path):
    """Files without a recipe, of these names, at four times the strength that they say."""
    folder, path = tmp_path / "published", ROOT / "configs/published/qwen_image.yaml"
    folder.mkdir()
    for phase in PHASES:
        save_file(load_file(trained("qwen") / phase / WEIGHT_NAME), folder / f"glance_qwen_{phase}.safetensors")
    args = infer_glance.parse_args([f"--config={path}", "--prompt=a red fox"])
    assert (args.slow_lora, args.fast_lora, args.height, args.width) == (
        "CSU-JPG/Glance",
        "CSU-JPG/Glance",
        1024,
        1024,
    )
    assert args.pipeline_kwargs["true_cfg_scale"] == 5 and args.lora_scale == dict.fromkeys(PHASES, 4.0)
    where = {"slow_lora": folder, "fast_lora": folder, "height": 32, "width": 32, "dtype": "float32"}
    drawn = infer("qwen", config=path, **where)
    kwargs = json.dumps(args.pipeline_kwargs)
    plain = infer("qwen", lora=trained("qwen"), lora_scale=4, pipeline_kwargs=kwargs, output=tmp_path / "plain.png")
    weak = infer("qwen", config=path, **where, lora_scale=1, output=tmp_path / "weak.png")
    assert picture_distance(drawn, plain) <= 1 < picture_distance(drawn, weak)


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
