"""What a LoRA file says of itself: written, read again, of earlier versions too, and joined to steps."""

import dataclasses
import json

import pytest

from glance.files.recipe import Recipe, schedule_of


SLOW = Recipe(
    phase="slow",
    timesteps=[1000.0, 900.0],
    base_model="some/base",
    pipeline="FluxPipeline",
    height=32,
    width=48,
    guidance_scale=None,
    pipeline_kwargs={"max_sequence_length": 16},
    num_base_steps=50,
    grid="auto",
    coefficients=[[1.1, 0.0], [1.2, -0.3]],
    loss="trajectory",
    max_train_steps=60,
    rank=32,
    version="0.1.0",
)


def test_a_recipe_is_read_as_it_was_written():
    finished = dataclasses.replace(SLOW, run="0" * 64, asked="1" * 64)
    assert Recipe.from_json(SLOW.to_json()) == SLOW and Recipe.from_json(finished.to_json()) == finished
    assert not {"run", "asked"} & json.loads(SLOW.to_json()).keys()
    assert list(json.loads(finished.to_json())) == [field.name for field in dataclasses.fields(Recipe)]


def test_what_earlier_files_lack_means_what_they_meant_by_it():
    said = json.loads(SLOW.to_json())
    early = {name: said[name] for name in said if name not in ("grid", "coefficients", "guidance")}
    expected = dataclasses.replace(SLOW, grid=None, coefficients=None, guidance="keep")
    assert Recipe.from_json(json.dumps(early | {"of_a_later_version": 1})) == expected
    del early["num_base_steps"]
    with pytest.raises(KeyError, match="num_base_steps"):
        Recipe.from_json(json.dumps(early))


def test_a_pair_is_one_schedule():
    fast = dataclasses.replace(SLOW, phase="fast", timesteps=[500.0], coefficients=[[1.3, -0.1]])
    pair = {"slow": SLOW, "fast": fast}
    schedule = schedule_of(pair)
    assert schedule.phases == {"slow": [1000.0, 900.0], "fast": [500.0]}
    assert schedule.coefficients == [[1.1, 0.0], [1.2, -0.3], [1.3, -0.1]]
    euler = {
        phase: dataclasses.replace(recipe, coefficients=None) for phase, recipe in (("slow", SLOW), ("fast", fast))
    }
    assert schedule_of(euler).coefficients is None
