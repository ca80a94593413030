"""Bases that draw in few steps already: told, and taken to fewer."""

import json

import pytest
from test_families import FAMILIES

from glance.files.recipe import WEIGHT_NAME, read_recipe


@pytest.fixture
def warnings(caplog):
    return lambda: [record.getMessage() for record in caplog.records if "draws in few steps already" in record.message]


@pytest.mark.parametrize(
    "name, told",
    [
        ("FLUX.1-schnell", True),
        ("Z-Image-Turbo", True),
        ("qwen-image-lightning-8steps-fused", True),
        ("models--ByteDance--Hyper-SD/snapshots/0123456789abcdef", True),
        ("FLUX.1-dev", False),
        ("Qwen-Image", False),
        ("turbo/sd3.5-medium", False),
        ("hyperion", False),
    ],
)
def test_a_base_is_known_by_its_name(name, told, train, pipelines, tmp_path, warnings):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).symlink_to(pipelines["flux"])
    train(tmp_path / name, max_train_steps=1)
    assert len(warnings()) == told
    assert not told or "imitating 50 of them gains nothing; give --num_base_steps" in warnings()[0]


@pytest.mark.families
def test_a_base_is_known_by_its_configuration_and_taken_from_8_to_4(train, tmp_path, warnings):
    base = FAMILIES["flux2_klein"][0](tmp_path / "klein")
    index = base / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"is_distilled": True}))
    train(base, max_train_steps=1)
    assert len(warnings()) == 1 and "model_index.json says is_distilled" in warnings()[0]
    assert "--guidance_scale" not in warnings()[0]  # the pipeline has none of it
    output = train(base, num_base_steps=8, num_inference_steps=4, loss="trajectory", output_dir=tmp_path / "few")
    assert len(warnings()) == 1
    recipes = [read_recipe(output / phase / WEIGHT_NAME) for phase in ("slow", "fast")]
    assert sum(len(recipe.timesteps) for recipe in recipes) == 4 and recipes[0].num_base_steps == 8


def test_a_lora_on_the_base_is_known_by_its_name(train, trained, tmp_path, warnings):
    lora = tmp_path / "Qwen-Image-Lightning-4steps.safetensors"
    lora.write_bytes((trained() / "slow" / WEIGHT_NAME).read_bytes())
    train(base_lora=f"{lora}:0.5", max_train_steps=1)
    assert len(warnings()) == 1 and "by the name of Qwen-Image-Lightning-4steps.safetensors" in warnings()[0]
