"""Arguments of the pipeline's call that have a flag: where it has them they reach it, else one line says so."""

import json

import numpy as np
import pytest
import torch
from conftest import flags
from PIL import Image

from glance import inference_flags
from glance.files.recipe import WEIGHT_NAME, read_recipe
from glance.training import flags as training_flags
from glance_utils import InputError


FEW = {"max_train_steps": 1, "phase": "slow"}


@pytest.mark.parametrize("module", [training_flags, inference_flags])
def test_a_flag_is_short_for_a_key_and_wins(module):
    needed = {"pretrained_model_name_or_path": "b"} | ({"prompt": "a"} if module is inference_flags else {})

    def kwargs_of(**settings) -> dict:
        args = module.parse(flags(**needed, **settings))
        assert not hasattr(args, "max_sequence_length")
        return args.pipeline_kwargs

    given = kwargs_of(max_sequence_length=64, negative_prompt="blurry", true_cfg_scale=2)
    assert given == {"max_sequence_length": 64, "negative_prompt": "blurry", "true_cfg_scale": 2.0}
    twice = {"pipeline_kwargs": json.dumps({"max_sequence_length": 32, "x": 1}), "max_sequence_length": 64}
    assert kwargs_of(**twice) == {"max_sequence_length": 64, "x": 1} and kwargs_of() == {}


def test_they_are_stored_with_the_lora_and_change_the_picture(train, trained, infer, tmp_path):
    output = train("qwen", negative_prompt="blurry", true_cfg_scale=4, max_sequence_length=64, **FEW)
    wanted = {"negative_prompt": "blurry", "true_cfg_scale": 4.0, "max_sequence_length": 64}
    assert read_recipe(output / WEIGHT_NAME).pipeline_kwargs == wanted
    pictures = [
        np.asarray(Image.open(infer("qwen", lora=trained("qwen"), output=tmp_path / f"{name}.png", **settings)))
        for name, settings in {"plain": {}, "guided": {"negative_prompt": "a dog", "true_cfg_scale": 6}}.items()
    ]
    assert not np.array_equal(*pictures)


def test_a_pipeline_without_them_is_named_with_what_it_has(train, trained, infer):
    line = "StableDiffusion3Pipeline takes no 'true_cfg_scale' as a further argument; it takes .*skip_layer"
    with pytest.raises(InputError, match=line):
        train("sd3", true_cfg_scale=4)
    with pytest.raises(InputError, match=line):
        infer("sd3", lora=trained("sd3"), true_cfg_scale=4)


def test_tf32(train):
    before = torch.get_float32_matmul_precision()
    try:
        train(allow_tf32=True, **FEW)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
