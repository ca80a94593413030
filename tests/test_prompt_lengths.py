"""A prompt that an encoder cuts is mentioned: once, with the number of tokens that are kept, without its words."""

import json
import logging
import shutil

import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from glance.ask import pipeline as ask
from glance.ask import prompt_lengths
from glance.ask import prompts as ask_prompts
from glance.ask.schedule import ask_timesteps


LONG = "zebra" * 30  # one token a letter


@pytest.fixture
def said(pipelines):
    """said(base, *prompts, **call): the lines about prompts that the base's pipeline encodes."""

    def call(base, *prompts, **further) -> list[str]:
        lines, pipe = [], ask.load_pipeline(pipelines[base])
        prompt_lengths.PromptLengths(pipe, lines.append).watch(pipe)
        ask_prompts.remember_prompts(pipe)
        for prompt in prompts:
            arguments = ask.call_arguments(pipe, prompt, 32, 32, None, further)
            ask.dry_step(pipe, **arguments)
            ask.dry_step(pipe, **arguments)
            ask_timesteps(pipe, 4, **arguments)
        return lines

    return call


def line(name: str, kept: int, tokens: int) -> str:
    return f"A prompt is cut: {name} keeps {kept} of its {tokens} tokens; what is beyond them is not seen"


def test_what_tokenizers_cut(said):
    assert said("flux", "a ring", LONG, LONG + "s") == [line("tokenizer", 77, 152)]
    assert said("flux", LONG, max_sequence_length=100) == [line("tokenizer", 77, 152), line("tokenizer_2", 100, 151)]
    assert said("flux", "a ring", prompt_2=LONG) == said("flux", "z" * 75) == []  # 77 with the marks around them
    assert said("flux", "z" * 76) == [line("tokenizer", 77, 78)]
    assert said("sd3", LONG) == [line("tokenizer", 77, 152)]  # both CLIPs


def test_what_is_cut_after_the_encoder(said):
    """Qwen-Image encodes the whole prompt and takes the first of what comes out."""
    assert said("qwen", LONG) == said("qwen", "z" * 100, max_sequence_length=100) == []
    assert said("qwen", "a ring", LONG, max_sequence_length=100) == [line("tokenizer", 100, 150)]


@pytest.mark.parametrize("base", ["flux", "sd3", "qwen"])
def test_watching_changes_nothing(base, pipelines):
    pipe, watched = ask.load_pipeline(pipelines[base]), ask.load_pipeline(pipelines[base])
    prompt_lengths.PromptLengths(watched, lambda line: None).watch(watched)
    for name, tokenizer in pipe.components.items():
        if isinstance(tokenizer, transformers.PreTrainedTokenizerBase):
            other = getattr(watched, name)
            assert isinstance(other, type(tokenizer)) and type(other).__name__ == type(tokenizer).__name__
            for how in ({}, {"truncation": True, "max_length": 9, "padding": "max_length", "return_tensors": "pt"}):
                for text in (LONG, ["a", LONG], ""):
                    assert str(dict(other(text, **how))) == str(dict(tokenizer(text, **how)))


@pytest.fixture
def few_words(pipelines, tmp_path):
    """FLUX whose second tokenizer knows the words of "a red ring" and no others."""
    base = shutil.copytree(pipelines["flux"], tmp_path / "few words")
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "</s>": 2, "a": 3, "red": 4, "ring": 5}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    kwargs = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>", "model_max_length": 512}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **kwargs).save_pretrained(base / "tokenizer_2")
    return base


def test_what_a_tokenizer_does_not_know(few_words):
    lines, pipe = [], ask.load_pipeline(few_words)
    prompt_lengths.PromptLengths(pipe, lines.append).watch(pipe)
    for prompt in ("a red ring", "a blue ring", "a red zebra drinks"):  # of the last two half at most
        ask.dry_step(pipe, prompt=prompt, height=32, width=32)
    assert lines == []
    for prompt in ("", "ein rotes Zebra trinkt a", "ein rotes Zebra"):
        ask.dry_step(pipe, prompt=prompt, height=32, width=32)
    (line,) = lines
    assert line.startswith("4 of 5 tokens of a prompt are unknown to tokenizer_2, ") and "Zebra" not in line


def test_training_and_inference_say_it_once(train, infer, caplog, capfd):
    caplog.set_level(logging.INFO)
    arguments = {"pipeline_kwargs": json.dumps({"max_sequence_length": 128})}
    output = train(instance_prompt=LONG, max_train_steps=2, **arguments)
    lines = [record.message for record in caplog.records if "prompt is cut" in record.message]
    assert lines == [line("tokenizer", 77, 152), line("tokenizer_2", 128, 151)]
    caplog.clear()
    infer(lora=output, prompt=["a ring", LONG], num_images=2)
    assert [record.message for record in caplog.records if "prompt is cut" in record.message] == lines
    out, err = capfd.readouterr()
    assert "zebra" not in caplog.text + out + err
