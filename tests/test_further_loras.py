"""--style_lora: further LoRAs act in every step, as if they were part of the base."""

import argparse

import pytest
import torch
from conftest import REFUSED, picture_distance, run_train
from diffusers import DiffusionPipeline
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from glance.command_line import file_and_scale
from glance.files.recipe import WEIGHT_NAME
from glance_utils import denoiser


@pytest.fixture(scope="module")
def styles(pipelines, tmp_path_factory):
    """styles(base): what --style_lora is given for two LoRAs, and a base that holds the first at 0.7, the second at
    1."""
    made = {}

    def call(base: str) -> tuple[list[str], str]:
        if base not in made:
            root = tmp_path_factory.mktemp(base)
            pipe = DiffusionPipeline.from_pretrained(pipelines[base])
            generator = torch.Generator().manual_seed(0)
            for name, layer in (("one", "to_q"), ("two", "to_out.0")):
                denoiser(pipe).add_adapter(LoraConfig(r=2, target_modules=[layer]), name)
                for key, value in denoiser(pipe).named_parameters():
                    if f".{name}." in key:
                        value.data.normal_(0, 0.3, generator=generator)
                denoiser(pipe).save_lora_adapter(root / name, adapter_name=name)
            denoiser(pipe).set_adapters(["one", "two"], [0.7, 1.0])
            denoiser(pipe).fuse_lora()
            denoiser(pipe).unload_lora()
            pipe.save_pretrained(root / "fused")
            made[base] = [f"{root / 'one' / WEIGHT_NAME}:0.7", str(root / "two")], str(root / "fused")
        return made[base]

    return call


@pytest.fixture(scope="module")
def mixed_sampler(pipelines, tmp_path_factory):
    """The folder of a sampler of four mixed calls."""
    root = tmp_path_factory.mktemp("mixed")
    (root / "prompts.txt").write_text("a red ring\na blue square\n")
    found = {"num_model_calls": 4, "num_plans": 1, "num_trajectories": 1, "num_base_steps": 8, "max_train_steps": 0}
    where = {"pretrained_model_name_or_path": pipelines["sd3"], "prompts_file": root / "prompts.txt"}
    return run_train(where, found | {"output_dir": root / "sampler", "guidance_scale": 3, "rank": None})


@pytest.mark.parametrize(
    "base, drawing",
    [("flux", {"lora": True}), ("flux", {"lora": True, "fuse_lora": True}), ("sd3", {"lora": True})]
    + [("flux", {"num_inference_steps": 4, "grid": "even", "height": 32, "width": 32}), ("sd3", {"sampler": True})],
    ids=["pair", "pair, fused", "pair, guided", "base alone", "mixed branches"],
)
def test_it_is_drawn_as_on_a_base_that_holds_them(base, drawing, styles, trained, mixed_sampler, infer, tmp_path):
    given, fused = styles(base)
    drawing = drawing | ({"lora": trained(base)} if "lora" in drawing else {})
    drawing = drawing | ({"sampler": mixed_sampler} if "sampler" in drawing else {})
    ours = infer(base, **drawing, style_lora=given)
    mismatch = {} if "grid" in drawing else {"allow_base_mismatch": True}
    wanted = infer(fused, **drawing, **mismatch, output=tmp_path / "wanted.png")
    without = infer(base, **drawing, output=tmp_path / "without.png")
    assert picture_distance(ours, wanted) <= 1 < picture_distance(ours, without)


def test_what_is_no_lora_of_the_base_is_refused_before_anything_is_drawn(styles, trained, infer, tmp_path):
    given, _ = styles("flux")
    weights = load_file(given[0].rpartition(":")[0])
    save_file(weights | {"text_encoder.layer.lora_A.weight": torch.ones(1, 1)}, tmp_path / "encoder.safetensors")
    for file, message in {
        tmp_path / "none.safetensors": "none.safetensors: no such style LoRA file",
        tmp_path / "encoder.safetensors": "it adapts a text encoder too",
        styles("sd3")[0][1]: "two/pytorch_lora_weights.safetensors",
    }.items():
        with pytest.raises(REFUSED, match=message) as error:
            infer("flux", lora=trained(), style_lora=[given[0], f"{file}:1.5"])
        assert "\n" not in str(error.value) and not (tmp_path / "out.png").exists()


def test_a_file_and_its_scale():
    assert file_and_scale("a/b.safetensors:0.8") == ("a/b.safetensors", 0.8)
    assert file_and_scale("a:-1") == ("a", -1.0)
    for text in ("a/b.safetensors", "C:\\a.safetensors", "5", "owner/name"):
        assert file_and_scale(text) == (text, 1.0)
    for text in (":1", "a:nan", "a:inf"):
        with pytest.raises(argparse.ArgumentTypeError, match="neither FILE nor FILE:SCALE"):
            file_and_scale(text)
