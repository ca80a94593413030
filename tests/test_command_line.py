"""The command line of both scripts: answered before any library is there, in groups, into settings that stay."""

import argparse
import copy
import os
import re
import subprocess
import sys

import pytest
from accelerate.utils import LoggerType
from conftest import ROOT, flags
from diffusers.optimization import SchedulerType

import infer_glance
import train_glance_lora
from glance import foreign_flags, inference_flags, shared_flags
from glance.command_line import Settings
from glance.training import flags as training_flags
from glance.training import losses
from glance.training.optimizer import state_bytes


SCRIPTS = {"train_glance_lora.py": "pretrained_model_name_or_path: b\n", "infer_glance.py": "prompt: a dog\n"}
# Runs a script as `python SCRIPT ...` does, and says which of the libraries are there when it ends.
WATCHED = """
import runpy, sys
heavy = ("torch", "diffusers", "transformers", "accelerate", "peft", "numpy", "datasets", "glance_utils")
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    print(*[name for name in heavy if name in sys.modules], file=sys.stderr)
    sys.exit(end.code)
"""


def answer(script: str, *arguments, **kwargs) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", WATCHED, ROOT / script, *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, **kwargs)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("arguments", "config", "word"),
    [
        (["--lerning_rate=1"], "", "unknown flag --lerning_rate"),
        ([], "sede: 1\n", "unknown key 'sede': did you mean 'seed'?"),
        ([], "seed: one\n", "--seed: invalid seed value: 'one'"),
        (["--height=0"], "", "--height: 0 is not above 0"),
        (["--quantization=int4"], "", "--quantization: invalid choice: 'int4'"),
        ([], "seed: [\n", "not valid YAML or JSON"),
        (["--config=none.yaml"], "", "none.yaml: cannot be read"),
        (["--guidance=keep", "fold"], "", "1 words belong to no flag"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_mistake_is_answered_before_any_library(script, arguments, config, word, tmp_path):
    (tmp_path / "config.yaml").write_text(SCRIPTS[script] + config)
    done = answer(script, f"--config={tmp_path / 'config.yaml'}", *arguments)
    line, heavy = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith(f"{script}: error: ") and word in line
    assert heavy == "" and done.stdout == ""


@pytest.mark.parametrize(
    ("script", "arguments", "word"),
    [
        ("train_glance_lora.py", [], "--pretrained_model_name_or_path is missing"),
        ("train_glance_lora.py", ["--flow_weight=1"], "--flow_weight belongs to the trajectory loss"),
        ("infer_glance.py", [], "no prompt"),
        ("infer_glance.py", ["--prompts_file=none.txt"], "none.txt: cannot be read"),
        ("infer_glance.py", ["--prompt=a", "--fuse_lora", "--quantization=nf4"], "--fuse_lora changes weights"),
    ],
)
def test_so_are_flags_that_do_not_go_together(script, arguments, word):
    base = [] if "missing" in word else ["--pretrained_model_name_or_path=b"]
    done = answer(script, *base, *arguments)
    line, heavy = done.stderr.splitlines()
    assert done.returncode == 2 and word in line and heavy == ""


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_comes_in_groups_and_before_any_library(script):
    done = answer(script, "--help")
    assert (done.returncode, done.stderr) == (0, "\n")
    assert "(default: None)" not in done.stdout and "(default: False)" not in done.stdout
    assert "memory and speed:\n" in done.stdout and done.stdout.count("usage:") == 1
    module = training_flags if script.startswith("train") else inference_flags
    parser = module.make_parser()
    assert {action.dest for action in parser._optionals._group_actions} == {"help", "config"}  # the rest has a group
    for action in parser._actions:
        assert action.help and all(flag in done.stdout for flag in action.option_strings)


@pytest.mark.processes
def test_a_config_file_that_can_be_read_once(pipelines):
    """A shell's <(...) is a pipe: it is read before the libraries are imported and not again."""
    script = f"train_glance_lora.py --config <(echo 'dry_run: true') {' '.join(flags(resolution=32, rank=4))}"
    command = f"{sys.executable} {script} --pretrained_model_name_or_path {pipelines['flux']}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and "parameters" in done.stdout, done.stderr[-3000:]


def test_what_is_written_out_is_what_the_libraries_have():
    rules = {SchedulerType.PIECEWISE_CONSTANT.value}
    assert set(training_flags.LR_SCHEDULERS) == {kind.value for kind in SchedulerType} - rules
    assert set(training_flags.TRACKERS) == {kind.value for kind in LoggerType}
    assert {state_bytes(name, 32) > 0 for name in training_flags.OPTIMIZERS} == {True}
    assert list(training_flags.SEGMENT_WEIGHTS) == list(losses.SEGMENT_POWERS)
    assert list(infer_glance.DTYPES) == list(inference_flags.DTYPES)


def test_flags_of_both_scripts_are_declared_once():
    train, infer = (
        {flag: action for action in module.make_parser()._actions for flag in action.option_strings}
        for module in (training_flags, inference_flags)
    )
    assert train.keys() & infer.keys() - {"-h", "--help", "--config"} == shared_flags.SHARED.keys()
    for flag in shared_flags.SHARED:
        for name in ("dest", "nargs", "const", "type", "choices"):
            assert getattr(train[flag], name) == getattr(infer[flag], name), flag


def test_nothing_writes_to_settings(tmp_path):
    train = train_glance_lora.parse_args(flags(pretrained_model_name_or_path="b"))
    infer = infer_glance.parse_args(flags(pretrained_model_name_or_path="b", prompt="a"))
    for settings in (train, infer, copy.deepcopy(train)):
        before = dict(vars(settings))
        for change in (lambda: setattr(settings, "seed", 1), lambda: setattr(settings, "new", 1)):
            with pytest.raises(AttributeError, match="replace"):
                change()
        with pytest.raises(AttributeError, match="replace"):
            del settings.seed
        with pytest.raises(TypeError, match="sede"):
            settings.replace(sede=1)
        other = settings.replace(seed=7)
        assert isinstance(other, Settings) and vars(other) == before | {"seed": 7} and vars(settings) == before


def test_output_that_nobody_can_show_ends_no_run():
    """Neither a terminal without the letters of a caption nor one that is closed."""
    code = "from glance import start; start.as_script('', None); print('红 ring')"
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    for redirection, shown in (("", "\\u7ea2 ring\n"), (">&-", "")):
        command = ["bash", "-c", f'"$0" -c "$1" {redirection}', sys.executable, code]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
        assert (done.returncode, done.stdout, done.stderr) == (0, shown, "")


# --------------------------------------------------------------------------------------------------------------------
# What is pasted


def said_of(*arguments, module=training_flags) -> str:
    """The one line that refuses these arguments."""
    with pytest.raises(argparse.ArgumentError) as error:
        module.parse([str(argument) for argument in arguments])
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_paste_is_answered_in_one_go_and_its_values_are_not_repeated():
    pasted = "--network_dim 4 --random_flip --class_prompt HUSH --hub_token=HUSH --lr HUSH --whatever HUSH"
    line = said_of(*pasted.split(), "--instance_promt", "-a HUSH", "--lerning_rate=1", "--compile", "HUSH", "-HUSH it")
    for flag, answer in {
        **{"network_dim": "give --rank", "random_flip": "leave out (the one image is learned as it is)"},
        **{"class_prompt": "leave out (a sampler is learned", "hub_token": "tokens are read from HF_TOKEN"},
        **{"lr": "give --learning_rate", "lerning_rate": "did you mean 'learning_rate'?"},
    }.items():
        assert f"--{flag}: {answer}" in line
    assert "; --whatever, --instance_promt; " in line and "HUSH" not in line


@pytest.mark.parametrize(
    "flag", ["--max_token_length", "--tokenizer_max_length", "--num_new_tokens_per_abstraction", "--validation_tokens"]
)
def test_only_a_token_is_taken_for_one(flag):
    assert "HF_TOKEN" not in said_of(flag, 5)
    assert "HF_TOKEN" in said_of("--hub_token=x", module=inference_flags)


@pytest.mark.parametrize("flag", ["--instance_promt", "--instance_imag", "--prompts_fil", "--dataset_names"])
def test_a_data_flag_is_never_suggested(flag):
    assert said_of(flag, "x").startswith(f"unknown flag {flag}; see ")
    assert said_of("--promt", "x", module=inference_flags).startswith("unknown flag --promt; see ")


def test_the_table_answers_for_flags_that_are_not_ours_by_flags_that_are():
    ours = set(training_flags.make_parser()._option_string_actions)
    assert not ours & {f"--{name}" for name in foreign_flags.ANSWERS}
    for answer in set(foreign_flags.ANSWERS.values()):
        assert set(re.findall(r"--\w+", answer)) <= ours, answer
    rows = (foreign_flags.RENAMED, foreign_flags.ALWAYS, foreign_flags.NOT_DONE)
    names = [name for table in rows for names in table.values() for name in names.split()]
    assert len(names) == len(set(names))


def test_the_page_has_the_tables_answers():
    _, _, section = (ROOT / "docs/training.md").read_text().partition("## Coming from another trainer")
    rows = re.findall(r"^\| (`\w.*`) \| `(--.*)` \|$", section.partition("\n## ")[0], re.MULTILINE)
    answers = {name: f"give {here}" for there, here in rows for name in re.findall(r"\w+", there)}
    assert len(rows) > 8 and answers.items() <= foreign_flags.ANSWERS.items()


AI_TOOLKIT = """
job: extension
config:
  name: HUSH
  process:
    - type: sd_trainer
      network: {type: lora, linear: 16}
      datasets:
        - {folder_path: HUSH, resolution: [512, 768]}
      train: {steps: 2000, lr: 1e-4}
      sample: {prompts: [HUSH], seed: 42}
"""


def test_a_nested_config_of_another_trainer(tmp_path):
    (tmp_path / "a.yaml").write_text(AI_TOOLKIT)
    line = said_of("--config", tmp_path / "a.yaml", "--unet_lr=1")
    assert line.startswith(f"--config {tmp_path / 'a.yaml'}: unknown keys 'job', 'type': ") and "HUSH" not in line
    for part in (
        "'linear': give --rank",
        "'folder_path': give --instance_data_dir",
        "'steps': give --max_train_steps",
    ):
        assert part in line
    assert "'resolution', 'seed': it belongs to the top level" in line
    assert line.endswith("unknown flag --unet_lr: give --learning_rate")


SWITCHED = [
    *[((), False), (("--compile",), True), (("--compile", "true"), True), (("--compile=TRUE",), True)],
    *[(("--compile", "false"), False), (("--compile=no",), False), (("--compile", "--compile=False"), False)],
]


@pytest.mark.parametrize(("arguments", "wanted"), SWITCHED, ids=str)
@pytest.mark.parametrize("module", [training_flags, inference_flags])
def test_switches_take_true_and_false(module, arguments, wanted, tmp_path):
    (tmp_path / "a.yaml").write_text("compile: true\n" + ("prompt: a\n" if module is inference_flags else ""))
    needed = ["--pretrained_model_name_or_path=b", *(["--prompt=a"] if module is inference_flags else [])]
    assert module.parse([*needed, *arguments, "--seed=1"]).compile is wanted
    over_config = module.parse([f"--config={tmp_path / 'a.yaml'}", *needed, *arguments])
    assert over_config.compile is (wanted if arguments else True)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        *[([], None), (["--gradient_checkpointing"], True), (["--no-gradient_checkpointing"], False)],
        *[(["--gradient_checkpointing", "false"], False), (["--no-gradient_checkpointing=false"], True)],
    ],
    ids=str,
)
def test_a_switch_that_decides_itself(arguments, wanted):
    assert training_flags.parse(["--pretrained_model_name_or_path=b", *arguments]).gradient_checkpointing is wanted


@pytest.mark.parametrize("text", ["{negative_prompt: HUSH}", "HUSH", '["HUSH"]', '{"a": "HUSH"', "{'a': 'HUSH'}"])
def test_what_is_no_json_object_is_shown_one(text):
    line = said_of("--pipeline_kwargs", text)
    assert """such as '{"max_sequence_length": 256}'""" in line and "HUSH" not in line
    assert ("not valid JSON" in line) == (text != '["HUSH"]')
