"""From training to drawing: the command that training ends with, and a base that is named by the LoRA files alone."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import flags, run_train
from PIL import Image
from safetensors.torch import load_file, save_file

import train_glance_lora
from glance import inference_flags
from glance.files.recipe import WEIGHT_NAME
from glance.training.draw_command import draw_command
from glance_utils import InputError


def words_of(folder="output/glance", phases=("slow", "fast"), **settings) -> list[str]:
    args = train_glance_lora.parse_args(flags(pretrained_model_name_or_path="somebody/base", **settings))
    line = draw_command(args, folder, list(phases))
    assert len(line.splitlines()) == 1
    return shlex.split(line)


@pytest.mark.processes
def test_the_command_that_training_ends_with_draws(pipelines, pair, tmp_path, capsys):
    """As it was printed, in the same folder: the picture is what the preview shows."""
    where = {"pretrained_model_name_or_path": pipelines["flux"], "instance_image": pair}
    output = run_train(where | {"output_dir": tmp_path / "it's here"}, {"mixed_precision": "bf16"})
    command = capsys.readouterr().out.splitlines()[-1]
    assert str(pipelines["flux"]) not in command  # the LoRA files name it
    command = command.replace('--prompt "..."', "--prompt 'a red ring'")
    shell = ["bash", "-c", f"{command} --output {shlex.quote(str(tmp_path / 'out.png'))}"]
    done = subprocess.run(shell, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    drawn, preview = (np.asarray(Image.open(path), float) for path in (tmp_path / "out.png", output / "glance.png"))
    assert np.abs(drawn - preview).mean() < 3  # of 255; the preview's VAE computes in float32


def test_what_it_says():
    args = inference_flags.parse(words_of()[2:])
    assert (args.lora, args.prompts, args.dtype) == ("output/glance", ["..."], None)
    assert args.pretrained_model_name_or_path is None
    given = {"revision": "v1", "variant": "fp16", "mixed_precision": "fp16", "quantization": "nf4"}
    args = inference_flags.parse(words_of(**given)[2:])
    assert [args.revision, args.variant, args.dtype, args.quantization] == ["v1", "fp16", "float16", "nf4"]
    assert inference_flags.parse(words_of(enable_group_offload=True)[2:]).enable_group_offload
    for phase, other in (("slow", "fast"), ("fast", "slow")):
        args = inference_flags.parse(words_of(phases=[phase])[2:])
        loras = {"slow": args.slow_lora, "fast": args.fast_lora}
        assert (args.lora, loras) == (None, {phase: "output/glance", other: "FOLDER"})


def test_a_folder_is_one_word_of_the_shell():
    for folder in ('it\'s "a" $HOME `ring`; #1\\', "-out put"):
        assert inference_flags.parse(words_of(folder)[2:]).lora == folder


def test_where_the_interpreter_and_the_script_are(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    assert words_of()[0] == "python"
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    python, script = words_of()[:2]
    assert python == sys.executable and Path(script).is_absolute() and Path(script).is_file()
    monkeypatch.chdir(Path(train_glance_lora.__file__).parent)
    assert words_of()[1] == "infer_glance.py"


def test_the_base_is_the_one_of_the_recipe(infer, trained, tmp_path, caplog):
    with caplog.at_level("INFO"):
        alone = infer(None, lora=trained(), output=tmp_path / "alone.png")
    assert any("as the files say" in message for message in caplog.messages)
    assert alone.read_bytes() == infer("flux", lora=trained()).read_bytes()
    with pytest.raises(InputError, match="fp16"):  # the base's other flags are heard
        infer(None, lora=trained(), variant="fp16")


def test_a_base_that_nobody_names_or_finds_is_one_line(infer, pipelines, pair, trained, tmp_path):
    for phase in ("slow", "fast"):
        (tmp_path / "plain" / phase).mkdir(parents=True)
        save_file(
            load_file(trained() / phase / WEIGHT_NAME), tmp_path / "plain" / phase / WEIGHT_NAME, {"format": "pt"}
        )
    shutil.copytree(pipelines["flux"], tmp_path / "base")
    where = {"pretrained_model_name_or_path": tmp_path / "base", "instance_image": pair, "max_train_steps": 1}
    output = run_train(where | {"output_dir": tmp_path / "output"}, {})
    (tmp_path / "base").rename(tmp_path / "moved")
    for lora, words in (
        (tmp_path / "plain", ["carry no recipe that names their base", "give a diffusers pipeline"]),
        (output, [f"{tmp_path / 'base'}", "that the files name", "give --pretrained_model_name_or_path"]),
    ):
        with pytest.raises(InputError) as error:
            infer(None, lora=lora)
        message = str(error.value)
        assert "\n" not in message and all(word in message for word in words), message
        assert not (tmp_path / "out.png").exists()
