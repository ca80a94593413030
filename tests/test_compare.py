"""infer_glance.py --compare: its columns, and the errors under them as computed by hand from final latents."""

import re

import pytest
import torch
from conftest import run_train
from test_families import FAMILIES, load
from test_infer import PHASES, recipes_of, same, seeded

from glance.ask import latents as ask_latents
from glance.ask import mixed
from glance.ask import pipeline as ask
from glance.ask.guidance import ask_single_branch, count_model_calls
from glance.files import pictures
from glance.files.sampler import NAME, SCHEDULER, read_sampler
from glance_utils import FixedSigmaScheduler, Schedule


PROMPT = "a blue disc"
FEW = {"num_base_steps": 12, "num_inference_steps": 4}
LORAS = {"loss": "trajectory", "num_trajectories": 1, "max_train_steps": 2, "learning_rate": 3e-2, **FEW}
LORAS |= {"instance_image": None, "instance_prompt": "a red ring"}
KINDS = {
    "euler": ("flux", LORAS | {"grid": "glance", "solver": "euler"}),
    "fitted": ("qwen", LORAS | {"grid": "even", "solver": "fitted"}),
    "folded": ("sd3", LORAS | {"grid": "even", "solver": "euler", "guidance": "fold"}),
}


@pytest.fixture(scope="module")
def folders(pipelines, tmp_path_factory):
    """folders(kind): the base and what training wrote, once: LoRAs of one of KINDS, or a mixed sampler of 6 calls."""
    made = {}

    def call(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            base, settings = KINDS.get(kind, ("sd3", {}))
            if kind == "mixed":
                (folder / "prompts.txt").write_text("a red ring\na blue dog\n")
                settings = {"prompts_file": folder / "prompts.txt", "num_model_calls": 6, "max_train_steps": 0}
                settings |= {"num_base_steps": 12, "num_trajectories": 1}
            output = {"pretrained_model_name_or_path": pipelines[base], "output_dir": folder / "output"}
            made[kind] = base, run_train(output, settings)
        return made[kind]

    return call


@pytest.fixture
def rows(monkeypatch):
    """The rows of --compare: {label: (image, details)} each, in the order of columns."""
    found, draw_row = [], pictures.draw_row

    def watched(row, prompt):
        found.append({label: rest for label, *rest in row})
        return draw_row(row, prompt)

    monkeypatch.setattr(pictures, "draw_row", watched)
    return found


def errors_in(row: dict) -> list[float]:
    """The errors that a row says, of each column but the first, which says none."""
    first, *others = (details.splitlines() for _, details in row.values())
    assert len(first) == 1 and all(len(lines) == 2 for lines in others)
    return [float(re.fullmatch(r"error (\d+\.\d{4}) to the full run", line).group(1)) for _, line in others]


def assert_errors(row: dict, latents: list[torch.Tensor]) -> None:
    """The errors said are those of these final latents to the first of them, and no two columns have the same."""
    full, *others = (part.double() for part in latents)
    wanted = [((part - full).square().sum() / full.square().sum()).sqrt().item() for part in others]
    assert errors_in(row) == pytest.approx(wanted, abs=1e-4)
    assert len({round(error, 3) for error in wanted}) == len(wanted) and min(wanted) > 1e-3


def calls_in(row: dict) -> list[int]:
    return [int(re.search(r"(\d+) model calls", details).group(1)) for _, details in row.values()]


def stock(pipelines, base, folder=None):
    pipe = load(pipelines[base])
    for phase in PHASES if folder else ():
        pipe.load_lora_weights(folder / phase, adapter_name=phase)
    return pipe


def final(pipe, call, **settings) -> torch.Tensor:
    """The final latents of a stock pipeline's call: all of these return the loop's own layout."""
    return pipe(**call, **settings, output_type="latent", generator=seeded()).images


def hand_over(pipe, step, timestep, kwargs) -> dict:
    if step == 1:  # of four
        pipe.set_adapters("fast")
    return kwargs


@pytest.mark.parametrize("kind", KINDS)
def test_errors_are_those_of_stock_latents(kind, folders, pipelines, infer, rows, capsys):
    base, folder = folders(kind)
    infer(base, lora=folder, prompt=PROMPT, compare=True)
    (row,) = rows
    recipe, fold = recipes_of(folder)["slow"], kind == "folded"
    call = {"prompt": PROMPT, "height": recipe.height, "width": recipe.width}
    call |= {} if recipe.guidance_scale is None else {"guidance_scale": recipe.guidance_scale}
    few = 2 if fold else 4
    names = [f"without LoRAs{', guided' * fold}, 4 steps", "Glance, 4 steps"]
    assert list(row) == ["base, 12 steps", f"base, {few} steps", *names]
    assert calls_in(row) == ([24, 4, 8, 4] if fold else [12, 4, 4, 4])

    pipe = stock(pipelines, base)
    latents = [final(pipe, call, num_inference_steps=count) for count in (12, few)]
    scheduler = FixedSigmaScheduler.from_pretrained(folder / SCHEDULER)
    assert bool(scheduler.config.coefficients) == (kind == "fitted")
    pipe.scheduler = scheduler
    latents.append(final(pipe, call, num_inference_steps=4))
    pipe = stock(pipelines, base, folder)
    pipe.scheduler = scheduler
    pipe.set_adapters("slow")
    single = {"guidance_scale": 1.0} if fold else {}
    latents.append(final(pipe, call | single, num_inference_steps=4, callback_on_step_end=hand_over))
    assert_errors(row, latents)

    line = capsys.readouterr().out.splitlines()[-1]
    said = "; ".join(f"{label} {error:.4f}" for label, error in zip([*row][1:], errors_in(row)))
    assert line.endswith(f"model calls each; error to the full run: {said}")


def test_errors_of_mixed_branches_too(folders, pipelines, infer, rows):
    base, folder = folders("mixed")
    infer(None, sampler=folder, prompt=PROMPT, compare=True)
    (row,) = rows
    sampler = read_sampler(folder)
    steps = len(sampler.branches)
    assert list(row) == ["base, 12 steps", "base, 3 steps", f"sampler, {steps} steps"]
    assert calls_in(row) == [24, 6, 6]

    pipe = stock(pipelines, base)
    call = {"prompt": PROMPT, "height": sampler.height, "width": sampler.width}
    latents = [final(pipe, call, num_inference_steps=count) for count in (12, 3)]
    calls = mixed.branch_calls(pipe, call, call | ask_single_branch(pipe, **call))
    start = mixed.starting_latents(pipe, generator=seeded(), **calls["prompt"])
    schedule = Schedule(sampler.phases, coefficients=sampler.coefficients, branches=sampler.branches)
    latents.append(mixed.final_latents(pipe, schedule, calls, start))
    assert_errors(row, latents)


@pytest.mark.parametrize("kind", ["euler", "fitted"])
def test_the_column_without_loras_is_the_sampler_alone(kind, folders, infer, rows, tmp_path):
    """Also where the LoRAs are added to the weights in the next column."""
    base, folder = folders(kind)
    alone = infer(base, sampler=folder / NAME, prompt=PROMPT, output=tmp_path / "alone.png")
    for settings in ({}, {"fuse_lora": True}):
        infer(base, lora=folder, prompt=PROMPT, compare=True, **settings)
        assert same(rows[-1]["without LoRAs, 4 steps"][0], alone)
        assert not same(rows[-1]["Glance, 4 steps"][0], alone)


def test_so_it_is_with_loras_on_mixed_branches(folders, trained, infer, rows, tmp_path):
    (base, folder), loras = folders("mixed"), trained("sd3")
    alone = infer(base, sampler=folder, prompt=PROMPT, output=tmp_path / "alone.png")
    with_loras = infer(base, sampler=folder, lora=loras, prompt=PROMPT, output=tmp_path / "loras.png")
    infer(base, sampler=folder, lora=loras, prompt=PROMPT, compare=True)
    (row,) = rows
    full, few, without, glance = row
    assert (few, without[:15], glance[:8]) == ("base, 3 steps", "without LoRAs, ", "Glance, ")
    assert calls_in(row)[1:] == [6, 6, 6]
    assert same(row[without][0], alone) and same(row[glance][0], with_loras) and not same(alone, with_loras)


def test_of_several_rows_the_mean_error_is_said(folders, infer, rows, capsys):
    base, folder = folders("euler")
    infer(base, lora=folder, prompt=PROMPT, num_images=2, compare=True)
    first, second = (errors_in(row) for row in rows)
    assert first != second
    line = capsys.readouterr().out.splitlines()[-1]
    said = [float(number) for number in re.findall(r"steps (\d\.\d{4})", line.partition("error to the full run")[2])]
    assert said == pytest.approx([(one + other) / 2 for one, other in zip(first, second)], abs=2e-4)
    assert "error" not in (infer(base, lora=folder, prompt=PROMPT) and capsys.readouterr().out)


def test_a_base_that_has_no_so_few_steps_is_left_out(pipelines, infer, rows, caplog):
    """Qwen-Image's own schedule is NaN in a single step: its last one is stretched to an end of its own."""
    settings = {"num_base_steps": 12, "num_inference_steps": 1, "grid": "even", "height": 32, "width": 32}
    infer("qwen", prompt=PROMPT, compare=True, **settings)
    assert list(rows[0]) == ["base, 12 steps", "even grid, euler, 1 steps"]
    assert "--compare leaves out the base at as many model calls: QwenImagePipeline" in caplog.text


def test_calls_of_a_step_are_counted_by_whichever_way_it_guides(pipelines):
    ways = {"flux": {}, "sd3": {}, "qwen": {"true_cfg_scale": 3.0, "negative_prompt": ""}}
    call = {"prompt": PROMPT, "height": 32, "width": 32}
    counts = [count_model_calls(load(pipelines[base]), **call, **way) for base, way in ways.items()]
    assert counts == [1, 2, 2]


def test_a_scheduler_that_the_pipeline_copies_for_each_frame_is_watched_too(tmp_path):
    make, size, extra = FAMILIES["skyreels_forcing"]
    pipe = load(make(tmp_path / "base"))
    call = ask.call_arguments(pipe, PROMPT, size, size, None, extra) | {"num_inference_steps": 4}
    points = ask_latents.loop_points(pipe, **call, generator=seeded())
    step = type(pipe.scheduler).step
    with ask_latents.final_latents(pipe) as ends:
        pipe(**call, generator=seeded())
    assert torch.equal(ends[-1].float(), points[-1]) and type(pipe.scheduler).step is step
