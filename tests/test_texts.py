"""Texts arrive as they were written: settings of a config file, prompts, captions."""

import datetime
import json

import datasets
import pytest
from conftest import REFUSED, ROOT, flags, own_size

import infer_glance
import train_glance_lora
from glance import command_line as cli
from glance.files.instance_data import load_pair
from glance_utils import InputError


def trained_with(path, text: str):
    """The training script's settings, of which the config file at `path` says `text`."""
    path.write_text(text)
    return train_glance_lora.parse_args(flags(pretrained_model_name_or_path="b", config=path))


# What YAML 1.1 reads as truth values, dates, numbers to the base 8, 16 and 60, floats, infinity and a merge key.
PLAIN = ["no", "Yes", "on", "OFF", "y", "True", "false", "2024-01-01", "2001-12-14 21:59:43", "010", "0o17", "0x1F"]
PLAIN += ["1_000", "12:30:45", "1e3", "1.10", "+7", ".5", "1.", ".inf", "-.INF", ".nan", "<<", "=", "007", "١٢"]


@pytest.mark.parametrize("text", PLAIN)
def test_a_text_flag_gets_the_text_of_a_yaml_file(text, tmp_path):
    for written in (text, f"'{text}'", f'"{text}"', f"!!str {text}"):
        assert trained_with(tmp_path / "a.yaml", f"instance_prompt: {written}\n").instance_prompt == text
    (tmp_path / "b.yaml").write_text(
        f"prompt: [{text}, '{text}']\n--output: {text}\npretrained_model_name_or_path: b\n"
    )
    args = infer_glance.parse_args(flags(config=tmp_path / "b.yaml"))
    assert (args.prompt, args.output) == ([text, text], text)


@pytest.mark.parametrize("number", ["1.10", "1e3", "100000000000000000000000", "-0", "true", "NaN"])
def test_a_text_flag_gets_the_text_of_a_json_file(number, tmp_path):
    assert trained_with(tmp_path / "a.json", f'{{"instance_prompt": {number}}}').instance_prompt == number
    (tmp_path / "b.json").write_text(f'{{"prompt": [{number}, "{number}"], "pretrained_model_name_or_path": "b"}}')
    assert infer_glance.parse_args(flags(config=tmp_path / "b.json")).prompt == [number] * 2


def test_several_lines_are_those_that_yaml_says(tmp_path):
    text = "instance_prompt: |\n  a red ring\n  no: 010\nlora_layers: >-\n  to_q,\n  to_k\n"
    args = trained_with(tmp_path / "a.yaml", text)
    assert (args.instance_prompt, args.lora_layers) == ("a red ring\nno: 010\n", "to_q, to_k")


@pytest.mark.parametrize("nothing", ["", "~", "null", "Null"])
def test_null_is_not_given(nothing, tmp_path):
    args = trained_with(
        tmp_path / "a.yaml", f"instance_prompt: {nothing}\nphase: {nothing}\nuse_8bit_adam: {nothing}\n"
    )
    assert (args.instance_prompt, args.phase, args.optimizer) == (None, None, "adamw")


def test_further_arguments_have_the_types_of_yaml_1_2(tmp_path):
    values = {"a": "no", "b": "12:30", "c": "2024-01-01", "d": "1_000", "e": "'7'", "f": "=", "g": "<<"}
    values |= {
        "h": "true",
        "i": "False",
        "j": "010",
        "k": "0x10",
        "l": "0o10",
        "m": "1e3",
        "n": "1.10",
        "o": "[yes, 1]",
    }
    wanted = {"a": "no", "b": "12:30", "c": "2024-01-01", "d": "1_000", "e": "7", "f": "=", "g": "<<"}
    wanted |= {"h": True, "i": False, "j": 10, "k": 16, "l": 8, "m": 1000.0, "n": 1.1, "o": ["yes", 1], "p": None}
    lines = "".join(f"  {key}: {value}\n" for key, value in values.items())
    args = trained_with(tmp_path / "a.yaml", f"pipeline_kwargs:\n{lines}  p:\n")
    assert args.pipeline_kwargs == wanted
    assert all(type(args.pipeline_kwargs[key]) is type(value) for key, value in wanted.items())
    args = trained_with(tmp_path / "a.json", json.dumps({"pipeline_kwargs": wanted}))
    assert args.pipeline_kwargs == wanted


@pytest.mark.parametrize("word", ["true", "True", "yes", "ON", "'true'", "false", "No", "off"])
def test_a_switch_takes_the_words_for_true_and_false(word, tmp_path):
    on = word.strip("'").lower() in ("true", "yes", "on")
    args = trained_with(tmp_path / "a.yaml", f"use_8bit_adam: {word}\ngradient_checkpointing: {word}\n")
    assert (args.optimizer == "adamw8bit", args.gradient_checkpointing) == (on, on)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("instance_prompt: [a red ring, in the sun]", "instance_prompt is a list"),
        ("instance_prompt: {a: ring}", "instance_prompt holds dict"),
        ("flow_custom_timesteps: [[1000, 900], [500, 100]]", "flow_custom_timesteps holds list"),
        ("lora_layers: [to_q, null]", "lora_layers holds NoneType"),
        ("use_8bit_adam: 1", "it takes true or false"),
        ("use_8bit_adam: [true]", "it takes true or false"),
        ("pipeline_kwargs: {when: !!timestamp 2024-01-01}", "could not determine a constructor"),
        ("instance_prompt: !!binary aGk=", "could not determine a constructor"),
        ("pipeline_kwargs: {a: !!bool maybe}", "not valid YAML"),
        ("pipeline_kwargs: {a: !!int many}", "not valid YAML"),
        ("pipeline_kwargs: {a: !!float [1]}", "not valid YAML"),
        ("rank: 2024-01-01", "'2024-01-01'"),
    ],
)
def test_what_is_no_setting_is_refused_in_one_line(text, word, tmp_path):
    with pytest.raises(REFUSED, match=word) as error:
        trained_with(tmp_path / "a.yaml", text)
    assert "\n" not in str(error.value)


def test_only_newlines_end_a_prompt_of_a_file(tmp_path):
    prompts = ["a\u2028red ring", "a blue\u2029dog", "a\u00a0cat"]
    (tmp_path / "a.txt").write_bytes("\r\n".join(prompts[:2]).encode() + b"\n\n" + prompts[2].encode() + b"\r")
    assert cli.read_prompts(tmp_path / "a.txt") == prompts
    for end in "\x0b\x0c\x1c\x1d\x1e\x85":
        (tmp_path / "a.txt").write_bytes(f"a red{end}ring".encode())
        with pytest.raises(REFUSED, match="is no text"):
            cli.read_prompts(tmp_path / "a.txt")


def caption_of_row(tmp_path, value, **settings) -> str:
    """The caption that a run takes from a data set whose one row holds `value`."""
    image = {"bytes": (ROOT / "demo" / "glance.png").read_bytes(), "path": None}
    rows = datasets.Dataset.from_dict({"image": [image], "text": [value]})
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    rows.cast_column("image", datasets.Image()).save_to_disk(folder)
    args = flags(pretrained_model_name_or_path="b", dataset_name=folder, resolution=16, **settings)
    return load_pair(train_glance_lora.parse_args(args), own_size)[1]


def test_of_several_captions_of_a_row_the_first_is_taken_and_said(tmp_path, caplog):
    caplog.set_level("INFO")
    assert caption_of_row(tmp_path, ["a red ring"]) == caption_of_row(tmp_path, " a red ring") == "a red ring"
    assert not [record for record in caplog.records if "caption" in record.message]
    assert caption_of_row(tmp_path, [None, " ", "a red ring", "a zebra", "none"]) == "a red ring"
    (line,) = [record.message for record in caplog.records if "caption" in record.message]
    assert line == "--caption_column text: row 0 holds 3 captions; Glance learns from the first"


@pytest.mark.parametrize(
    ("value", "word"),
    [
        *[(7, "int"), (1.5, "float"), (True, "bool"), (b"a ring", "bytes"), (None, "nothing"), ({"en": "a"}, "dict")],
        *[([], "list"), ([["a ring"]], "list"), ([1, 2], "list"), ([{"en": "a ring"}], "list")],
        (datetime.date(2024, 1, 1), "date"),
    ],
    ids=str,
)
def test_a_caption_that_is_no_text_is_refused(value, word, tmp_path):
    with pytest.raises(InputError, match=f"--caption_column text: row 0 holds {word}, not text") as error:
        caption_of_row(tmp_path, value)
    assert "\n" not in str(error.value)
    assert caption_of_row(tmp_path, value, instance_prompt="a dog") == "a dog"
