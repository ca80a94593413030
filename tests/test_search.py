"""--num_model_calls: plans, the curve of errors over numbers of calls, and the number that auto takes from it."""

import csv
import json
import random

import pytest
import torch
from conftest import REFUSED
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_distribution import KINDS, launch_runs

from glance.ask import sampler as grids
from glance.files.faults import CALLS, TRAJECTORIES
from glance.files.sampler import read_sampler
from glance.training import calls_chart, search, trajectories


FIRST = (0, "prompt"), (3, "negative"), (5, "both")
SHORT = {"max_train_steps": 0, "instance_image": None, "num_base_steps": 8, "num_trajectories": 2, "num_plans": 3}
GUIDED = {"guidance_scale": 3}


@pytest.fixture
def captions(tmp_path):
    path = tmp_path / "captions.txt"
    path.write_text("a red ring\na blue disc\n")
    return {"prompts_file": path}


def rows_of(folder) -> list[list]:
    with open(folder / CALLS, newline="") as file:
        header, *rows = csv.reader(file)
    assert tuple(header) == calls_chart.COLUMNS
    return [[int(row[0]), *(float(cell) if cell else None for cell in row[1:])] for row in rows]


# --------------------------------------------------------------------------------------------------------------------
# Plans


def test_a_plan_is_read_as_it_was_written():
    assert search.written(FIRST) == "P1 N4 B6"
    assert search.read_plan("P1 N4 B6", 50) == FIRST
    for calls, text in search.FOUND.items():
        assert search.written(search.read_plan(text, 50)) == text
        assert search.is_valid(search.read_plan(text, 50), calls, 50, guided=True)


@pytest.mark.parametrize(
    "plan, calls, steps, guided",
    [
        (((1, "prompt"), (2, "negative")), 2, 8, True),  # it must begin at the noise
        (((0, "prompt"), (3, "both"), (3, "prompt")), 4, 8, True),
        (((0, "prompt"), (8, "negative")), 2, 8, True),
        (FIRST, 3, 8, True),  # both are two calls
        (((0, "prompt"), (4, "prompt")), 2, 8, True),  # guidance would be forgotten
        (((0, "negative"), (4, "negative")), 2, 8, True),
        (((0, "both"),), 2, 8, True),
    ],
)
def test_a_plan_that_no_sampler_could_walk(plan, calls, steps, guided):
    assert search.is_valid(FIRST, 4, 8, True)
    assert not search.is_valid(plan, calls, steps, guided)


def test_changes_keep_a_base_without_guidance_on_its_one_branch():
    choice, plan, seen = random.Random(0), tuple((position, "prompt") for position in (0, 2, 4, 6)), set()
    for _ in range(200):
        seen.add(search.changed(plan, 8, False, choice))
    assert {branches for other in seen for _, branches in other} == {"prompt"} and len(seen) > 10
    mixed = {tuple(branches for _, branches in search.changed(FIRST, 8, True, choice)) for _ in range(200)}
    assert {("negative", "negative", "both"), ("both", "both"), ("prompt", "negative", "prompt", "negative")} <= mixed


def test_first_plans_are_valid_different_and_the_same_each_time():
    sigmas = [*(1 - index / 12 for index in range(12)), 0.0]
    points = list(torch.randn(13, 2, 4, generator=torch.Generator().manual_seed(0)).cumsum(0))
    for guided in (True, False):
        for calls in (4, 7, 10):
            plans = search.first_plans(calls, points, sigmas, guided)
            assert plans == search.first_plans(calls, points, sigmas, guided) and len(set(plans)) == len(plans) > 1
            assert all(search.is_valid(plan, calls, 12, guided) for plan in plans)
    assert search.first_plans(13, points, sigmas, False) == []  # more than there are steps


def test_any_number_of_pictures_is_made_up_of_the_sizes():
    assert search.batches_of(31, [1, 2, 4, 8, 16]) == [16, 8, 4, 2, 1]
    assert search.batches_of(5, [1]) == [1] * 5
    args = type("Args", (), {"num_trajectories": 3, "train_batch_size": 1})
    both = {"prompt": {}, "negative": {}}
    small, large = torch.Size((1, 16, 64)), torch.Size((1, 4096, 64))
    assert search.sizes_at_once(args, both, 8, small) == {"prompt": [1, 2], "negative": [1, 2, 4, 8, 16]}
    assert search.sizes_at_once(args, both, 8, large) == search.sizes_at_once(args, both, 8, None)


# --------------------------------------------------------------------------------------------------------------------
# The curve


@pytest.mark.parametrize("base, guidance, numbers", [("sd3", GUIDED, [4, 6, 8, 10, 14]), ("flux", {}, [4, 6, 8])])
def test_a_curve_with_guidance_and_without(base, guidance, numbers, train, captions, capsys, caplog):
    """As shipped, half as many steps as calls where each is two; the more calls, the nearer, up to all of them."""
    caplog.set_level("INFO")
    folder = train(base, **SHORT, **captions, **guidance, num_model_calls=6)
    rows, sampler = rows_of(folder), read_sampler(folder)
    assert [row[0] for row in rows] == numbers
    assert {row[0]: row[2] for row in rows}[6] == sampler.error and len(sum(sampler.phases.values(), [])) <= 6
    assert all(None not in row[:3] and row[3] is None for row in rows)
    if not guidance:  # all of its steps, of its own schedule and of a plan
        assert rows[-1][1] < 1e-5 and rows[-1][2] < rows[0][2]
    assert rows[0][1] > rows[-1][1]
    assert Image.open(folder / calls_chart.CHART).size == (calls_chart.WIDTH, calls_chart.HEIGHT)
    table = [message for message in caplog.messages if message.lstrip().startswith("4 ")]
    assert len(table) == 1 and f"{rows[0][1]:.4f}" in table[0] and f"{rows[0][2]:.4f}" in table[0]


def test_more_calls_than_the_base_has_steps_are_refused(train, captions):
    with pytest.raises(REFUSED, match="8 steps of this FluxPipeline are 8 model calls; give 8 at most"):
        train("flux", **SHORT, **captions, num_model_calls=10)


def test_choosing_from_a_curve(caplog):
    curve = [[4, 0.4, None], [6, 0.3, 0.2], [8, 0.2, 0.04], [10, None, 0.05]]
    assert search.choose_calls(curve, 0.1) == [8, 10] and search.choose_calls(curve, 0.3) == [6, 8, 10]
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    assert search.choose_calls(curve, 0.04) == [8]  # not below it
    (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert "8" in warning and "0.0400" in warning and "\n" not in warning


def test_auto_becomes_a_number_that_a_resumed_run_finds_again(train, captions, monkeypatch, caplog):
    caplog.set_level("INFO")
    auto = {"num_model_calls": "auto", "target_error": 100}
    folder = train("flux", **SHORT, **captions, **auto)
    rows, sampler = rows_of(folder), read_sampler(folder)
    assert sampler.branches == ["prompt"] * 4 and sampler.error == rows[0][2]
    content = {name: (folder / name).read_bytes() for name in ("sampler.json", CALLS, TRAJECTORIES)}
    (folder / CALLS).unlink()

    walked, walk = [], grids.walk
    monkeypatch.setattr(grids, "walk", lambda *args, **call: walked.append(1) or walk(*args, **call))
    train("flux", **SHORT, **captions, **auto)
    assert not walked and content == {name: (folder / name).read_bytes() for name in content}

    with safe_open(folder / TRAJECTORIES, "pt") as file:
        header = file.metadata()
    tensors = load_file(folder / TRAJECTORIES)
    entries = json.loads(header["sampler"])
    forged = [entries | {"curve": curve} for curve in ("forged", [[4, 0.1]], [[True, 0.1, 0.1]], 4, [[4, "x", 0.1]])]
    for other in [{name: entries[name] for name in entries if name != "curve"}, *forged]:
        assert trajectories.load(folder / TRAJECTORIES, header["digest"]) is not None
        save_file(tensors, folder / "forged", header | {"sampler": json.dumps(other)})
        assert trajectories.load(folder / "forged", header["digest"]) is None
    (folder / "forged").replace(folder / TRAJECTORIES)
    train("flux", **SHORT, **captions, **auto)
    assert walked and rows_of(folder) == rows


def test_auto_goes_on_where_a_number_does_not_keep_what_the_curve_said(train, captions, monkeypatch, caplog):
    errors = [read_sampler(train("flux", **SHORT, **captions, num_model_calls=calls)).error for calls in (4, 8)]
    assert errors[1] < errors[0]
    monkeypatch.setattr(search, "measure_curve", lambda *args: [[4, None, 0.0], [6, None, None], [8, None, 0.0]])
    caplog.clear()
    folder = train("flux", **SHORT, **captions, num_model_calls="auto", target_error=sum(errors) / 2)
    assert read_sampler(folder).error == errors[1]
    assert [row[2] for row in rows_of(folder)] == [errors[0], None, errors[1]]
    (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert f"4 model calls come to {errors[0]:.4f}" in warning


def test_auto_on_one_caption_stays_above_what_it_can_tell(train, pipelines):
    """Whose curve says nothing of fewer calls either."""
    one = {"instance_prompt": "a red ring", "num_model_calls": "auto", "target_error": 100}
    with pytest.raises(REFUSED, match="6 steps .* too few to choose from on one caption"):
        train("flux", **SHORT | {"num_base_steps": 6}, **one)
    folder = train("flux", **SHORT, **one)
    assert len(read_sampler(folder).branches) == 8
    assert [(row[0], row[2] is None) for row in rows_of(folder)] == [(4, True), (6, True), (8, False)]


def test_a_chart_of_any_curve_and_of_none(tmp_path):
    curve = [[4, None, 0.2], [6, 0.0, None], [8, 0.1, 0.1]]
    calls_chart.write_curve(tmp_path, curve, with_loras=(6, 0.05))
    assert rows_of(tmp_path)[1] == [6, 0.0, None, 0.05] and rows_of(tmp_path)[2] == [8, 0.1, 0.1, None]
    colors = {color for _, color in Image.open(tmp_path / calls_chart.CHART).convert("RGB").getcolors(10**6)}
    assert {(0xD6, 0x27, 0x28), (0x1F, 0x77, 0xB4), (0x88, 0x88, 0x88)} <= colors
    calls_chart.write_curve(tmp_path, curve, with_loras=(5, 0.05))
    assert [row[0] for row in rows_of(tmp_path)] == [4, 5, 6, 8]
    calls_chart.draw_chart([[8, None, None, None]])
    calls_chart.write_curve(tmp_path, None)
    assert not list(tmp_path.iterdir())


@pytest.mark.processes
def test_two_processes_find_the_sampler_of_one(train, captions, pipelines, tmp_path):
    settings = SHORT | captions | GUIDED | {"num_model_calls": 6}
    one = train("sd3", **settings, output_dir=tmp_path / "one")
    settings |= {"pretrained_model_name_or_path": pipelines["sd3"], "resolution": 32, "rank": 4}
    settings = {name: value for name, value in settings.items() if value is not None}
    run = settings | {"output_dir": tmp_path / "ddp", "no-gradient_checkpointing": True}
    done = launch_runs(KINDS["ddp"], 2, tmp_path, [(run, 0)])
    assert (tmp_path / "ddp" / CALLS).exists(), done.stderr[-3000:]
    first, second = read_sampler(one), read_sampler(tmp_path / "ddp")
    assert first.phases == second.phases and first.branches == second.branches
    torch.testing.assert_close(torch.tensor(first.coefficients), torch.tensor(second.coefficients), atol=1e-3, rtol=0)
    rows, others = (sum((row[:3] for row in rows_of(folder)), []) for folder in (one, tmp_path / "ddp"))
    assert rows == pytest.approx(others, rel=1e-2)
