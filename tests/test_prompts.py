"""What a pipeline has encoded it need not encode again: one answer for equal arguments, and a copy of it each time."""

import gc
import weakref
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline
from diffusers.utils import BaseOutput
from PIL import Image

from glance.ask import prompts as ask_prompts


@dataclass
class Encoded(BaseOutput):
    embeds: torch.Tensor


@dataclass
class Plain:
    embeds: torch.Tensor


class Encoding(FluxPipeline):
    """With a further method that uses a text encoder and counts how often it does."""

    calls = 0

    def encode(self, value, device=None, generator=None, **further):
        self.calls += self.text_encoder is not None
        return value

    def embed(self, form):
        embeds = self.text_encoder.get_input_embeddings().weight[:2]
        return {
            "list": [embeds],
            "dict": {"nested": (None, [embeds])},
            "output": Encoded(embeds),
            "dataclass": Plain(embeds),
        }[form]


@pytest.fixture
def pipe(pipelines):
    pipe = Encoding(**DiffusionPipeline.from_pretrained(pipelines["flux"]).components)
    ask_prompts.remember_prompts(pipe)
    return pipe


def image(value, mode="RGB"):
    pixels = Image.new("L", (40, 40), 0)
    pixels.putpixel((20, 20), value)
    return pixels.convert(mode)


def palette(red):
    pixels = Image.new("P", (4, 4))
    pixels.putpalette([red, 0, 0])
    return pixels


def tensor(last, **kwargs):
    return torch.cat([torch.zeros(4000), torch.tensor([last])]).to(**kwargs)


# name: (make an argument, make another that differs where an abridged text of it does not)
DIFFERENT = {
    "prompts": (lambda: ["a", "b"], lambda: ["a", "c"]),
    "a list or a tuple": (lambda: ["a"], lambda: ("a",)),
    "True or 1": (lambda: [1], lambda: [True]),
    "tensors": (lambda: tensor(1.0), lambda: tensor(2.0)),
    "tensors in a list": (lambda: [tensor(1.0)], lambda: [tensor(2.0)]),
    "tensors in a dict": (lambda: {"a": {"b": (tensor(1.0),)}}, lambda: {"a": {"b": (tensor(2.0),)}}),
    "tensors to the last bit": (lambda: [torch.tensor(1.0)], lambda: [torch.tensor(1.0 + 2**-23)]),
    "tensors of other dtypes": (lambda: [tensor(1.0)], lambda: [tensor(1.0, dtype=torch.bfloat16)]),
    "tensors of other shapes": (lambda: [torch.zeros(2, 3)], lambda: [torch.zeros(3, 2)]),
    "arrays": (lambda: tensor(1.0).numpy(), lambda: tensor(2.0).numpy()),
    "arrays in a list": (lambda: [tensor(1.0).numpy()], lambda: [tensor(2.0).numpy()]),
    "arrays of objects": (lambda: np.array([{"a": 1}, "b"]), lambda: np.array([{"a": 2}, "b"])),
    "images": (lambda: image(1), lambda: image(2)),
    "images in a list": (lambda: [[image(1)]], lambda: [[image(2)]]),
    "images of other palettes": (lambda: palette(1), lambda: palette(2)),
    "dataclasses": (lambda: Plain(tensor(1.0)), lambda: Plain(tensor(2.0))),
    "namespaces": (lambda: SimpleNamespace(a=[1]), lambda: SimpleNamespace(a=[2])),
    "numbers": (lambda: {"scale": float("nan")}, lambda: {"scale": 1.0}),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_equal_arguments_alone_have_one_answer(name, pipe):
    make, make_other = DIFFERENT[name]
    pipe.encode(make())
    pipe.encode(value=make(), device=torch.device("cpu"), generator=[torch.Generator()])
    assert pipe.calls == 1
    pipe.encode(make_other())
    assert pipe.calls == 2
    pipe.encode(make())
    assert pipe.calls == 2


def test_a_dict_in_another_order_is_the_same_and_further_arguments_count(pipe):
    pipe.encode({"a": 1, "b": 2}, scale=tensor(1.0))
    pipe.encode({"b": 2, "a": 1}, scale=tensor(1.0))
    assert pipe.calls == 1
    pipe.encode({"a": 1, "b": 2}, scale=tensor(2.0))
    assert pipe.calls == 2


@pytest.mark.parametrize("form", ["list", "dict", "output", "dataclass"])
def test_what_is_written_into_an_answer_stays_out_of_the_next(form, pipe):
    def embeds():
        answer = pipe.embed(form)
        while not isinstance(answer, torch.Tensor):
            if isinstance(answer, dict) and not isinstance(answer, BaseOutput):
                answer = answer["nested"][1]
            answer = answer[0] if isinstance(answer, list) else answer.embeds
        return answer

    own = pipe.text_encoder.get_input_embeddings().weight
    before = own.detach().clone()
    expected = embeds().clone()
    assert torch.equal(expected, before[:2])
    with torch.no_grad():
        for _ in range(2):
            embeds().zero_()
    assert torch.equal(embeds(), expected) and torch.equal(own, before)
    if form != "dataclass":  # of which torch does not know that it holds tensors
        assert not embeds().requires_grad and embeds().untyped_storage().nbytes() == expected.nbytes


def test_an_argument_that_is_an_answer_may_be_written_into(pipe):
    given = tensor(1.0)
    pipe.encode(given)
    given.zero_()
    assert torch.equal(pipe.encode(tensor(1.0)), tensor(1.0)) and pipe.calls == 1


def test_remembering_keeps_no_encoder_alive(pipe):
    pipe.encode([pipe.text_encoder, "a red ring"])
    pipe.encode_prompt("a red ring", None)
    freed = [weakref.ref(pipe.text_encoder), weakref.ref(pipe.text_encoder_2), weakref.ref(pipe.vae)]
    ask_prompts.free_components(pipe)
    gc.collect()
    assert [reference() for reference in freed] == [None] * 3
    pipe.encode_prompt("a red ring", None)
    with pytest.raises(RuntimeError, match="it was not encoded before the encoders were freed"):
        pipe.encode_prompt("a blue ring", None)
