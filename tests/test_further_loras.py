"""--style_lora and --base_lora: further LoRAs are drawn and trained with as if they were part of the base."""

import argparse
import dataclasses
import json
import shutil

import pytest
import torch
from conftest import REFUSED, picture_distance
from safetensors.torch import load_file, save_file

from glance.command_line import file_and_scale
from glance.files.comfyui import graph_of
from glance.files.recipe import WEIGHT_NAME, read_recipe
from glance_utils import PHASES


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


# --------------------------------------------------------------------------------------------------------------------
# --base_lora

TRAJECTORY = {"loss": "trajectory", "num_base_steps": 8, "num_inference_steps": 4, "num_trajectories": 1}
TRAJECTORY |= {"instance_image": None, "instance_prompt": "a red ring", "max_train_steps": 3}


def learned(folder) -> torch.Tensor:
    """All of what training has made of zeros."""
    files = sorted(folder.rglob(WEIGHT_NAME))
    return torch.cat([x.flatten() for file in files for name, x in load_file(file).items() if "lora_B" in name])


@pytest.mark.parametrize(
    "base, how",
    [("sd3", TRAJECTORY)] + [("flux", {"quantization": kind, "phase": "slow"}) for kind in ("nf4", "int8", "fp8")],
    ids=["trajectory", "nf4", "int8", "fp8"],
)
def test_it_is_trained_as_on_a_base_that_holds_them(base, how, styles, train, tmp_path):
    """What is drawn and what is quantized is the base with them."""
    given, fused = styles(base)
    found = learned(train(base, **how, base_lora=given))
    wanted = learned(train(fused, **how, output_dir=tmp_path / "fused"))
    assert (found - wanted).norm() < 0.02 * wanted.norm()


def test_inference_finds_them_by_the_recipe(styles, train, infer, tmp_path):
    given, fused = styles("flux")
    ours, wanted = train(base_lora=given), train(fused, output_dir=tmp_path / "fused")
    other = learned(train(output_dir=tmp_path / "without"))
    assert (learned(ours) - learned(wanted)).norm() < 0.02 * other.norm() < 0.2 * (other - learned(wanted)).norm()
    entries = read_recipe(ours / "slow" / WEIGHT_NAME).base_loras
    assert [(lora["file"], lora["scale"]) for lora in entries] == [(given[0].rpartition(":")[0], 0.7), (given[1], 1.0)]
    drawn = [infer(lora=ours), infer(fused, lora=wanted, output=tmp_path / "wanted.png")]
    assert picture_distance(*drawn) <= 1 and picture_distance(ours / "glance.png", wanted / "glance.png") <= 1


def test_a_sampler_found_with_them_is_drawn_with_them(styles, train, infer, tmp_path):
    given, fused = styles("flux")
    flags = {"max_train_steps": 0, "grid": "auto", "num_base_steps": 10, "num_inference_steps": 4, "rank": None}
    ours, wanted = train(**flags, base_lora=given), train(fused, **flags, output_dir=tmp_path / "fused")
    content = json.loads((ours / "sampler.json").read_text())
    assert content["base_loras"][0]["scale"] == 0.7
    drawn = [infer(sampler=ours), infer(fused, sampler=wanted, output=tmp_path / "wanted.png")]
    assert picture_distance(*drawn) <= 1


def test_a_run_goes_on_with_the_same_ones_alone(styles, train, infer, tmp_path):
    given, _ = styles("flux")
    moved = shutil.copy(given[0].rpartition(":")[0], tmp_path / "moved.safetensors")
    flags = {"phase": "slow", "checkpointing_steps": 2, "max_train_steps": 4}
    whole = train(**flags, base_lora=given[0])
    resumed = flags | {"output_dir": tmp_path / "again", "resume_from_checkpoint": whole / "checkpoint-2"}
    again = train(**resumed, base_lora=f"{moved}:0.7")  # known by its content
    assert all(torch.equal(x, y) for x, y in zip(*(load_file(x / WEIGHT_NAME).values() for x in (whole, again))))
    for other in (f"{moved}:0.8", None, [f"{moved}:0.7", given[1]]):
        with pytest.raises(REFUSED, match="its base_model is files .* use the same"):
            train(**resumed | {"output_dir": tmp_path / "other"}, base_lora=other)
    with pytest.raises(REFUSED, match="is of a run with other settings"):
        train(**flags)


def test_inference_wants_the_very_files(styles, trained, train, infer, tmp_path):
    given, _ = styles("flux")
    first, second = shutil.copy(given[0].rpartition(":")[0], tmp_path / "a.safetensors"), given[1]
    pair = train(base_lora=f"{first}:0.7")
    drawn = infer(lora=pair)
    moved = first.rename(tmp_path / "b.safetensors")
    for given, message in {
        None: "a LoRA that is part of the base: .*a.safetensors: no such LoRA file of the base; say where it is by",
        f"{moved}:0.5": r"a.safetensors:0.7 \(\w{16}\) was part of the base, .*b.safetensors:0.5 is not the same",
        f"{second}:0.7": "is not the same; give that file",
    }.items():
        with pytest.raises(REFUSED, match=message) as error:
            infer(lora=pair, base_lora=given, output=tmp_path / "none.png")
        assert "\n" not in str(error.value) and not (tmp_path / "none.png").exists()
    with pytest.raises(REFUSED, match="was not part of the base; --style_lora adds one"):
        infer(lora=pair, base_lora=[f"{moved}:0.7", second])
    with pytest.raises(REFUSED, match="of the base without; --style_lora adds one"):
        infer(lora=trained(), base_lora=second)
    assert picture_distance(infer(lora=pair, base_lora=f"{moved}:0.7", output=tmp_path / "again.png"), drawn) == 0
    with pytest.raises(REFUSED, match="the pair does not match: slow has base_loras"):
        infer(
            slow_lora=pair / "slow", fast_lora=trained() / "fast", base_lora=f"{moved}:0.7", allow_base_mismatch=True
        )


def test_what_cannot_be_added_is_refused_before_training(styles, train, tmp_path):
    weights = load_file(styles("flux")[0][0].rpartition(":")[0])
    magnitudes = {
        f"{name.split('.lora_')[0]}.lora_magnitude_vector": torch.ones(len(value))
        for name, value in weights.items()
        if "lora_B" in name
    }
    save_file(weights | magnitudes, tmp_path / "dora.safetensors")
    for file, message in {
        tmp_path / "none.safetensors": "none.safetensors: no such LoRA file of the base",
        tmp_path / "dora.safetensors": "is more than a LoRA .* give the folder that comes of it as the base",
        styles("sd3")[0][1]: "two/pytorch_lora_weights.safetensors",
    }.items():
        for how in ({}, {"dry_run": True}):
            with pytest.raises(REFUSED, match=message):
                train(base_lora=file, **how)
    assert not (tmp_path / "output" / "slow").exists()


def test_the_graph_for_comfyui_loads_them_first(trained):
    recipes = {phase: read_recipe(trained() / phase / WEIGHT_NAME) for phase in PHASES}
    loras = [{"file": "a/one.safetensors", "scale": 0.7, "digest": "1"}, {"file": "a/two", "scale": 1, "digest": "2"}]
    graph = graph_of({phase: dataclasses.replace(recipe, base_loras=loras) for phase, recipe in recipes.items()}, "")
    loaders = [node["inputs"] for node in graph.values() if node["class_type"] == "LoraLoaderModelOnly"]
    files = [(loader["lora_name"], loader["strength_model"]) for loader in loaders[:2]]
    assert files == [("one.safetensors", 0.7), ("two.safetensors", 1.0)]
    (last,) = (number for number, node in graph.items() if node["inputs"] is loaders[1])
    assert [loader["model"] for loader in loaders[2:]] == [[last, 0]] * 2
