"""What a LoRA file says of itself: written, read again, of earlier versions too, and joined to steps."""

import dataclasses
import json

import pytest

from glance.ask.mixed import TERMS
from glance.files.recipe import LEFT_OUT, Recipe, check_pair, schedule_of
from glance_utils import InputError


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
WEIGHTS = [[0.5] * TERMS, [-0.25] * TERMS]
MIXED = dataclasses.replace(
    SLOW, coefficients=WEIGHTS, branches=["prompt", "negative"], guidance="mix", loss="endpoint"
)
REST = dataclasses.replace(MIXED, phase="fast", timesteps=[500.0], coefficients=WEIGHTS[:1], branches=["both"])
PATHS = {"slow": "slow.safetensors", "fast": "fast.safetensors"}


def test_a_recipe_is_read_as_it_was_written():
    loras = [{"file": "style.safetensors", "scale": 0.8, "digest": "0" * 16}]
    beside = {"base_loras": loras, "pipeline_images": ["image"]}
    finished = dataclasses.replace(MIXED, run="0" * 64, asked="1" * 64, **beside)
    for recipe in (SLOW, MIXED, finished):
        assert Recipe.from_json(recipe.to_json()) == recipe
    assert not set(LEFT_OUT) & json.loads(SLOW.to_json()).keys()
    assert list(json.loads(finished.to_json())) == [field.name for field in dataclasses.fields(Recipe)]


def test_what_earlier_files_lack_means_what_they_meant_by_it():
    said = json.loads(SLOW.to_json())
    early = {name: said[name] for name in said if name not in ("grid", "coefficients", "branches", "guidance")}
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


def test_a_pair_of_mixed_branches_is_one_schedule():
    pair = {"slow": MIXED, "fast": REST}
    check_pair(pair, PATHS)
    schedule = schedule_of(pair)
    assert schedule.branches == ["prompt", "negative", "both"]
    assert schedule.coefficients == WEIGHTS + WEIGHTS[:1]


def test_a_phase_may_call_the_negative_prompts_branch_alone_but_not_both():
    """As of P1 N20 | N39 N40: a search may come to it, and its files are read again."""
    alone = dataclasses.replace(REST, branches=["negative"])
    assert Recipe.from_json(alone.to_json()) == alone
    check_pair({"slow": MIXED, "fast": alone}, PATHS)
    slow = dataclasses.replace(MIXED, branches=["negative"] * 2)
    with pytest.raises(InputError, match="the pair does not match: its branches never call the prompt's; train it"):
        check_pair({"slow": slow, "fast": alone}, PATHS)


def test_a_pair_of_which_one_is_mixed_is_refused():
    fitted = dataclasses.replace(SLOW, phase="fast", timesteps=[500.0], coefficients=[[1.3, -0.1]])
    plain = dataclasses.replace(fitted, guidance="mix")  # forged: it says so and knows none
    for fast, reason in ((fitted, "slow has guidance mix, fast has keep"), (plain, "one was trained for mixed")):
        with pytest.raises(InputError, match=f"the pair does not match: {reason}") as error:
            check_pair({"slow": MIXED, "fast": fast}, PATHS)
        assert "\n" not in str(error.value)


FORGED = {
    "unknown branch": ({"branches": ["prompt", "empty"]}, "branches \\['prompt', 'empty'\\]"),
    "no text": ({"branches": ["prompt", ["negative"]]}, "branches \\['prompt', \\['negative'\\]\\]"),
    "a text": ({"branches": "prompt"}, "branches 'prompt'"),
    "too few": ({"branches": ["prompt"]}, "branches for 1 of 2 timesteps"),
    "none": ({"branches": []}, "branches for 0 of 2 timesteps"),
    "weights of another length": ({"coefficients": [[0.5] * 7] * 2}, "coefficients "),
    "weights of two lengths": ({"coefficients": [[0.5] * 8, [1.0, 0.0]]}, "coefficients "),
    "NaN": ({"coefficients": [[float("nan")] * 8] * 2}, "coefficients \\[\\[nan"),
    "huge weights": ({"coefficients": [[101.0] * 8] * 2}, "coefficients \\[\\[101"),
    "no weights": ({"coefficients": None}, "branches and their weights do not go together"),
    "weights of the fitted solver": ({"coefficients": [[1.0, 0.0]] * 2}, "branches and their weights do not go"),
    "weights without branches": ({"branches": None}, "branches and their weights do not go together"),
}


@pytest.mark.parametrize("kind", FORGED)
def test_forged_branches_are_no_recipe(kind):
    changes, message = FORGED[kind]
    with pytest.raises(ValueError, match=message):
        Recipe.from_json(json.dumps(json.loads(MIXED.to_json()) | changes))
