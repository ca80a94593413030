"""A stranger's files are data, and what is private stays out of logs."""

import ast
import json
import logging

import pytest
import torch
from conftest import REFUSED, ROOT, flags

import infer_glance
import train_glance_lora
from glance import command_line as cli
from glance.ask.components import component_class
from glance.files.lora import load_lora
from glance.files.recipe import WEIGHT_NAME
from glance.training import push
from glance_utils import InputError


SOURCES = sorted([*ROOT.glob("*.py"), *ROOT.glob("glance/**/*.py")])
SECRET = "zebra ballet"


def calls_in(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_nothing_evaluates_or_unpickles(path):
    for name, keywords in calls_in(path):
        last = name.split(".")[-1]
        assert name not in ("eval", "exec", "compile", "__import__", "yaml.unsafe_load", "yaml.full_load")
        assert "pickle" not in name and "trust_remote_code" not in keywords and "token" not in keywords
        if name == "torch.load":
            assert keywords["weights_only"] == "True"
        if last == "from_pretrained" and "config_class" not in name:  # a config has no weights
            assert keywords["use_safetensors"] == "True"


@pytest.mark.forged
def test_a_config_names_no_module_to_import(tmp_path, monkeypatch):
    (tmp_path / "outsider.py").write_text("from pathlib import Path\nPath('ran').touch()\nclass Model: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ImportError, match="never imported"):
        component_class(("outsider", "Model"))
    assert not (tmp_path / "ran").exists()
    assert component_class(("diffusers", "FluxTransformer2DModel")).__name__ == "FluxTransformer2DModel"


def test_no_flag_takes_a_token(capsys):
    for module in (train_glance_lora, infer_glance):
        for flag in (["--hub_token=hf_secret"], ["--token", "hf_secret"], ["--use_auth_token=hf_secret"]):
            with pytest.raises(REFUSED, match="HF_TOKEN") as error:
                module.parse_args(flag)
            assert "hf_secret" not in str(error.value)


def test_words_behind_no_flag_are_counted_not_repeated():
    with pytest.raises(REFUSED, match="2 words") as error:
        infer_glance.parse_args(["--prompt", "a", *SECRET.split()])
    assert "zebra" not in str(error.value)


def test_the_hubs_own_login_is_all_that_an_upload_uses(monkeypatch):
    called = []
    monkeypatch.setattr(push, "create_repo", lambda *args, **kwargs: called.append(kwargs) or called)
    with pytest.raises(InputError):
        push.create_hub_repo(train_glance_lora.parse_args(flags(pretrained_model_name_or_path="b", output_dir="x")))
    assert called[0] == {"exist_ok": True}


def test_prompts_and_tokens_never_land_in_logs(train, infer, tmp_path, monkeypatch, caplog, capfd):
    """Not of a long prompt either, of which text encoders tell what they cut off; the model card holds the caption."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    prompt = f"{SECRET} " * 100
    arguments = {"pipeline_kwargs": json.dumps({"prompt_2": f"{SECRET} too"}), "report_to": "tensorboard"}
    with caplog.at_level(logging.DEBUG, logger="command_line"):
        output = train(instance_prompt=prompt, **arguments, max_train_steps=1)
        infer(lora=output, prompt=prompt)
    out, err = capfd.readouterr()
    logged = out + err + caplog.text
    assert "zebra" not in logged and "hf_secret" not in logged
    for path in (output / "logs").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert b"zebra" not in content and b"hf_secret" not in content
    assert any(path.is_file() for path in (output / "logs").rglob("*"))
    assert SECRET in (output / "README.md").read_text()
    assert all(b"hf_secret" not in path.read_bytes() for path in output.rglob("*") if path.is_file())


@pytest.mark.forged
def test_a_lora_is_read_as_safetensors_alone(pipelines, tmp_path):
    """Also by the functions that people copy: the file is named .safetensors, its content is a pickle."""
    path = tmp_path / WEIGHT_NAME
    torch.save({"transformer.x.lora_A.weight": torch.ones(4, 4)}, path)
    args = infer_glance.parse_args(flags(pretrained_model_name_or_path=pipelines["flux"], prompt="x"))
    pipe = infer_glance.load_pipeline(args, {}, torch.device("cpu"))
    with pytest.raises(Exception, match="[Hh]eader"):
        load_lora(pipe, path, "slow")


@pytest.mark.forged
def test_yaml_builds_no_objects(tmp_path):
    (tmp_path / "a.yaml").write_text(f"rank: !!python/object/apply:os.mkdir ['{tmp_path}/ran']")
    with pytest.raises(REFUSED, match="constructor"):
        cli.Parser().parse([f"--config={tmp_path}/a.yaml"])
    assert not (tmp_path / "ran").exists()
