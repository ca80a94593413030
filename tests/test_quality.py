"""benchmarks/quality.py: its numbers on cases with a known answer, and a few pictures of the demo model."""

import json
import math
import sys
from argparse import Namespace

import diffusers
import pytest
import tiny_parts
import torch
import torch.nn.functional as F
from conftest import ROOT, flags
from PIL import Image
from scenes import caption_of, render, split_scenes
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor


sys.path.insert(0, str(ROOT / "benchmarks"))

import quality  # noqa: E402
import quality_draw  # noqa: E402
import quality_numbers as numbers  # noqa: E402
import quality_rows  # noqa: E402

import train_glance_lora  # noqa: E402
from glance.ask import mixed  # noqa: E402
from glance.ask.sampler import relative_error  # noqa: E402
from glance.files.recipe import read_recipe  # noqa: E402
from glance.files.sampler import Sampler, write_sampler  # noqa: E402
from glance_utils import InputError  # noqa: E402


SMALL = {"num_prompts": 2, "diversity_captions": 1, "diversity_seeds": 2, "training_seeds": 1, "seeds": 1}


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """measured(rows, **flags) runs quality.py's main on the demo model; returns {row's name: its numbers}."""
    monkeypatch.chdir(ROOT)

    def call(rows: str, **settings) -> dict[str, dict]:
        settings = SMALL | {"output_dir": tmp_path, "rows": rows} | settings
        quality.main(flags(**{key: value for key, value in settings.items() if value is not None}))
        results = json.loads((tmp_path / "results.json").read_text())
        return {entry["name"]: entry["numbers"] for entry in results["rows"] if entry["name"]}

    return call


def test_psnr_and_relative_error_of_known_pairs():
    image = torch.full((1, 3, 8, 8), 0.5)
    assert numbers.psnr(image + 0.1, image) == pytest.approx(20, abs=1e-4)
    assert numbers.psnr(image, image) == math.inf
    assert relative_error(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0])) == pytest.approx(0.2)


def test_frechet_of_two_known_gaussians():
    x = torch.randn(500, 3, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T  # mean 0, covariance 1
    other = x * torch.tensor([2.0, 1.0, 0.5]) + torch.tensor([1.0, 0.0, 3.0])
    # |means apart|^2 + the sum of (deviations apart)^2
    assert numbers.frechet(other, x) == pytest.approx(10 + 1 + 0 + 0.25)
    rotated = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.double))[0]
    assert numbers.frechet(other @ rotated, x @ rotated) == pytest.approx(11.25)
    assert numbers.frechet(x, x) == pytest.approx(0, abs=1e-6)


def test_fine_detail_falls_with_blur_and_rises_with_noise():
    images = render(split_scenes()[1][:4], torch.Generator().manual_seed(0))
    noise = 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    assert numbers.fine_detail(F.avg_pool2d(F.pad(images, [1] * 4, "replicate"), 3, 1), images) < 0.5
    assert numbers.fine_detail(images, images) == 1
    assert numbers.fine_detail(images + noise, images) > 1.5
    wave = torch.cos(2 * torch.pi * 5 * torch.arange(32) / 32).expand(1, 3, 32, 32)
    assert numbers.radial_power(wave).argmax() == 5  # cycles a picture


def test_diversity_is_the_distance_between_pictures_of_one_caption():
    same, other = torch.ones(1, 4), torch.ones(1, 4) + torch.tensor([3.0, 4.0, 0.0, 0.0])
    assert numbers.diversity(torch.cat([same, same, other, other]), seeds=2) == 0
    assert numbers.diversity(torch.cat([same, other, other, same]), seeds=2) == pytest.approx(5)


def test_held_out_captions_are_not_among_those_that_train(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    sets = quality.captions_of(quality.parse_args(["--output_dir", str(tmp_path)]))
    reported, validation, training = (set(sets[name]) for name in ("reported", "validation", "training"))
    further = set((tmp_path / "captions-63.txt").read_text().splitlines())
    assert len(reported) == 96 and len(validation) == 64 and len(further) == 63 and len(training) == 1
    assert not reported & validation and not (reported | validation) & (training | further)
    assert {caption_of(scene) for scene in split_scenes()[0]} >= further
    (tmp_path / "prompts.txt").write_text("\n".join([*sorted(validation), *training]))
    with pytest.raises(InputError, match="would be trained on"):
        quality.captions_of(quality.parse_args(flags(output_dir=tmp_path, prompts_file=tmp_path / "prompts.txt")))


@pytest.mark.slow
def test_the_base_against_itself_and_on_few_steps(measured, tmp_path, monkeypatch, capsys):
    rows = r"base, 50 steps$|base, (even|auto) grid, 4 steps|lite, interval 5|even grid, fitted solver, 10"
    found = measured(rows)
    teacher, even = found["base, 50 steps"], found["base, even grid, 4 steps"]
    assert max(teacher["error"], teacher["training_error"]) < 1e-5 and teacher["psnr"] > 100
    assert teacher["frechet"] == pytest.approx(0, abs=1e-3)
    assert (teacher["diversity"], teacher["detail"]) == pytest.approx((1, 1), abs=1e-5)
    assert teacher["judge"] >= 0.5 and 0.05 < even["error"] < 0.5 and 15 < even["psnr"] < 40 and even["frechet"] > 0
    unguided = found["base, even grid, 4 steps, no guidance"]
    assert (teacher["calls"], even["calls"], unguided["calls"]) == (100, 8, 4)
    assert even["work"] == pytest.approx(8) and unguided["work"] == pytest.approx(4)
    assert even["spent"] == 0 and found["base, auto grid, 4 steps"]["spent"] == 100
    fitted = found["base, even grid, fitted solver, 10 steps"]
    assert fitted["calls"] == 20 and fitted["spent"] == 100 and fitted["error"] < even["error"] / 2
    cached = found["TaylorSeer lite, interval 5, order 2"]
    assert cached["calls"] == 100 and 20 < cached["work"] < 40 and 0 < cached["error"] < 0.1
    assert (tmp_path / "quality.png").read_bytes()[:4] == b"\x89PNG"
    assert "| base, even grid, 4 steps | 8 | 8.0 |" in (tmp_path / "table.md").read_text()

    def measure(*args):
        raise AssertionError("a finished row is measured again")

    before = (tmp_path / "results.json").read_bytes()
    monkeypatch.setattr(quality, "measure", measure)
    measured(rows)
    assert (tmp_path / "results.json").read_bytes() == before
    with pytest.raises(InputError, match="measured otherwise"):
        measured(rows, num_prompts=3)


@pytest.mark.slow
def test_schedulers_of_diffusers_are_set_up_for_flow(measured):
    found = measured(r"(UniPC|DPM\+\+), (50|10|4) steps")
    for name in ("UniPC", "DPM++"):
        errors = [found[f"{name}, {steps} steps"]["error"] for steps in (50, 10, 4)]
        assert errors[0] < 0.02 < errors[1] < errors[2]


@pytest.mark.slow
def test_a_pair_is_trained_once_and_its_model_calls_are_counted(measured, tmp_path, monkeypatch):
    quick = {"train": ["--max_train_steps=2"], "rates": [1e-4, 1e-2]}
    off = {"scales": {"slow": 0.0, "fast": 0.0}}
    rows = {"pair": quick, "no LoRA": quick | off, "unknown": {"train": ["--no_such_flag"]}}
    monkeypatch.setattr(quality_rows, "TRAINED", {"quick": rows})
    monkeypatch.setattr(quality, "VALIDATION", 2)
    found = measured(r"quick:|base, glance grid, 10 steps$")
    trained, untrained = found["quick: pair"], found["quick: no LoRA"]
    # two phases of two steps, backward as two calls, and the ten guided steps of the picture at the end
    assert trained["spent"] == 2 * 2 * 3 + 20 and trained["tuning"] == 2 * 2 * 2 * 3 + 20
    assert trained["rate"] == 1e-4 and trained["calls"] == 20
    assert trained["error"] != untrained["error"]
    assert untrained["error"] == pytest.approx(found["base, glance grid, 10 steps"]["error"], rel=1e-4)
    assert len(found) == 3  # without the row whose flag is unknown
    assert len(list((tmp_path / "loras").glob("*/*/spent.json"))) == 2


@pytest.mark.slow
@pytest.mark.long
def test_runs_of_other_rates_share_what_the_base_drew(measured, tmp_path, monkeypatch):
    flags = ["--loss=trajectory", "--grid=even", "--solver=euler", "--num_trajectories=1", "--max_train_steps=2"]
    rows = {"pair": {"train": flags, "rates": [1e-4, 1e-5]}, "folded": {"train": [*flags, "--guidance=fold"]}}
    rows["folded"] |= {"rates": [1e-4]}
    rows["apart"] = {"train": flags, "rates": [1e-4], "phases": {"slow": ["--rank=2"], "fast": ["--rank=4"]}}
    monkeypatch.setattr(quality_rows, "TRAINED", {"quick": rows})
    monkeypatch.setattr(quality, "VALIDATION", 2)
    found = measured("quick:")
    pair, folded, apart = (found[f"quick: {name}"] for name in rows)
    # steps guided in training as in inference, a trajectory of 50, a check of some velocities, the preview
    trained, drawn = 2 * 2 * 2 * 3, 50 * 2
    assert pair["spent"] >= trained + drawn + 20 and pair["tuning"] == pair["spent"] + trained
    assert pair["calls"] == apart["calls"] == 20 and folded["calls"] == 10
    assert folded["spent"] < pair["spent"] < apart["spent"]
    ranks = [read_recipe(file).rank for file in tmp_path.glob("loras/*/*/*/pytorch*.safetensors")]
    assert {2, 4} <= set(ranks)


def test_clip_scores_from_a_local_folder(tmp_path):
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = size | {"image_size": 32, "patch_size": 8, "projection_dim": 8}
    text = tiny_parts.text_config(projection_dim=8)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(tmp_path)
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tiny_parts.clip_tokenizer()).save_pretrained(tmp_path)
    clip = quality.load_scorers(Namespace(scorer=[], clip=str(tmp_path)))["CLIP"]
    with torch.no_grad():
        scores = clip([Image.new("RGB", (40, 40), color) for color in ("red", "blue")], ["a red ring", "a cross"])
    assert len(scores) == 2 and all(-1 <= score <= 1 for score in scores) and scores[0] != scores[1]


@pytest.mark.slow
@pytest.mark.parametrize("base", ("sd3", "qwen"))
def test_any_pipeline_any_pair_any_scorer(base, measured, pipelines, trained, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red ring\na blue ring\n")
    (tmp_path / "scorer.py").write_text("def width(images, prompts):\n    return [image.width for image in images]\n")
    settings = {"pretrained_model_name_or_path": pipelines[base], "prompts_file": tmp_path / "prompts.txt"}
    settings |= {"batch_size": 2, "scorer": f"{tmp_path}/scorer.py:width"}
    found = measured("mine|base, even grid, 4", lora=f"mine={trained(base)}", **settings)
    assert {"mine", "base, even grid, 4 steps"} <= set(found) and found["mine"]["width"] == 32
    guided = found["mine"]["calls"] == 20
    assert ("base, even grid, 4 steps, no guidance" in found) is guided
    assert found["mine"]["error"] > 0 and "judge" not in found["mine"] and "spent" not in found["mine"]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """The demo model with two reported captions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        args = quality.parse_args(flags(num_prompts=2, output_dir=tmp_path_factory.mktemp("quality")))
        return quality.make_bench(args, quality.captions_of(args))


def test_pictures_do_not_depend_on_the_batch(bench):
    few = {"steps": 4, "grid": "even"}
    with torch.no_grad():
        both, first = (quality_draw.draw(bench, few, "reported", count=count) for count in (2, 1))
    assert torch.allclose(both[:1], first, atol=1e-4)


def test_equal_rotation_turns_by_the_same_angle():
    timesteps = [1000.0, 900.0, 500.0, 400.0, 300.0, 200.0, 100.0, 50.0]
    angles = [0.0, 0.1, 0.2, 0.3, 0.7, 0.8, 0.9, 1.2]  # of the velocity in each step
    points = [torch.zeros(1, 2)]
    for angle, start, end in zip(angles, timesteps, [*timesteps[1:], 0.0]):
        velocity = torch.tensor([[math.cos(angle), math.sin(angle)]])
        points.append(points[-1] + (end - start) * velocity)
    # 0.3 is at 400; 0.6 three quarters of the way from there to 300, where it is 0.7; 0.9 at 100
    found = quality_draw.equal_rotation(points, timesteps, 4)
    assert found == pytest.approx([1000.0, 400.0, 325.0, 100.0], abs=0.1)


@pytest.mark.parametrize("name", ("UniPCMultistepScheduler", "DPMSolverMultistepScheduler"))
def test_schedulers_of_diffusers_walk_the_grid_of_the_row(name, bench):
    scheduler = quality_draw.scheduler_of(bench, {"scheduler": name, "grid": "even", "steps": 4})
    scheduler.set_timesteps(17, mu=0.5)
    timesteps, _ = quality_draw.sampler(bench, "even", 4, "euler")
    assert scheduler.timesteps.tolist() == pytest.approx(timesteps)
    assert scheduler.sigmas.tolist() == pytest.approx([timestep / 1000 for timestep in timesteps] + [0], abs=2e-6)
    assert isinstance(scheduler, getattr(diffusers, name))
    noise, velocity = torch.randn(2, 1, 4, generator=torch.Generator().manual_seed(0))
    latents = noise
    for timestep in scheduler.timesteps:
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    assert torch.allclose(latents, noise - velocity, atol=1e-3)  # along a straight line any order is exact


def test_a_sampler_of_mixed_branches_is_drawn_as_by_inference(bench, tmp_path):
    timesteps = bench.timesteps
    found = Sampler(
        base_model="demo/model",
        pipeline="FluxPipeline",
        height=96,
        width=96,
        guidance_scale=None,
        pipeline_kwargs={},
        num_base_steps=50,
        phases={"slow": [timesteps[0]], "fast": [timesteps[20], timesteps[40]]},
        coefficients=[[1, 0, 0, 0, 0, 0, 0, 0.1], [0, 0, 0, 1, 0, 0, 0, 0], [3, 0, 0, -2, 0, 0, 0.01, 0]],
        branches=["prompt", "negative", "both"],
        guidance="mix",
        grid="mix",
        captions=2,
        error=0.1,
        version="1",
    )
    write_sampler(tmp_path, found)
    settings, ends = {"lora": str(tmp_path)}, []
    bench.counter.calls = 0
    with torch.no_grad(), quality_draw.loaded(bench, str(tmp_path)):
        latents = quality_draw.draw(bench, settings, "reported")
        assert bench.counter.calls == 4 * len(latents) == 8
        for number, caption in enumerate(bench.sets["reported"]):
            call, schedule = quality_draw.recipe_of(bench, str(tmp_path))
            seed = quality_draw.SEEDS["reported"] + number
            mixed.draw(bench.pipe, schedule, call | {"prompt": caption}, seed, keep=ends.append)
    assert torch.equal(latents, torch.cat(ends).cpu())
    assert "encode_prompt" not in vars(bench.pipe)  # no other row's seconds profit from what was remembered


def test_a_cache_of_a_package_that_is_not_installed_is_left_out_with_the_reason(bench, monkeypatch):
    monkeypatch.setitem(sys.modules, "cache_dit", None)  # as where it is not installed
    rows = [row for row in quality_rows.all_rows(bench.args) if "cache_dit" in row.settings]
    assert rows and all("cache_dit" in quality.measure_row(bench, {"rows": []}, row) for row in rows)


def test_the_rows_of_the_dial_are_taken_by_the_script(bench):
    rows = quality_rows.dialled_rows()
    assert {row.settings["train"][0] for row in rows} == {
        f"--num_model_calls={calls}" for calls in (4, 6, 8, 10, 14, 20)
    }
    for row in rows:
        given = quality.with_captions(bench.args, row.settings["train"])
        args = train_glance_lora.parse_args(["--config", str(ROOT / "configs/demo.yaml"), *given])
        alone = "mixed" in row.name
        assert (args.guidance, args.loss, args.max_train_steps == 0) == ("mix", "endpoint", alone)
        assert alone or row.settings["sampler"][0] == row.settings["train"][0]
    assert len({row.name for row in quality_rows.all_rows(bench.args)}) == len(quality_rows.all_rows(bench.args))


def test_the_plot_names_at_most_seven_series_at_their_lines(bench, tmp_path):
    rows = quality_rows.all_rows(bench.args)
    results = {"rows": [{"name": row.name, "numbers": {"work": 10, "error": 0.1}} for row in rows]}
    series = numbers.series_of(results, rows)
    assert len(series) == 7 and {"mixed branches, 32 captions", "endpoint LoRAs", "base, shipped"} <= set(series)
    numbers.plot(results, rows, tmp_path / "quality.png")
    assert Image.open(tmp_path / "quality.png").width == 1100
    assert numbers.spread([0.0, 0.01, 1.0], 0.1) == pytest.approx([-0.045, 0.055, 1.0])
