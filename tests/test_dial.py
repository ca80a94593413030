"""--num_model_calls: branches as stock calls, what draws with a pair of them, and which flags go with it."""

import contextlib
import re
import shutil

import pytest
import torch
from conftest import REFUSED, picture_distance, run_train
from diffusers import DiffusionPipeline
from test_bad_loras import forge
from test_errors import assert_refused
from tiny_chat_families import make_hunyuan_image, make_z_image
from tiny_image_families import make_lumina2

from glance.ask import mixed
from glance.ask import pipeline as ask
from glance.ask.guidance import ask_single_branch
from glance.ask.prompts import free_components, remember_prompts
from glance.ask.schedule import ask_timestep_table
from glance.files.recipe import WEIGHT_NAME
from glance.files.sampler import read_sampler
from glance.training import flags as training_flags
from glance_utils import FixedSigmaScheduler, Schedule, denoiser, model_timesteps


PROMPT = "a red ring"
PHASES = {"slow": [1000.0, 700.0], "fast": [400.0]}
SIGMAS = [1.0, 0.7, 0.4, 0.0]
BRANCHES = ["both", "negative", "prompt"]
WEIGHTS = [
    [1.5, 0, 0, -0.5, 0, 0, 0, 0.1],
    [0.9, 0, 0, 0.4, -0.2, 0, -0.1, 0.05],
    [1.1, -0.3, 0, 0.3, -0.1, 0, 0.05, 0],
]
FEW = {"num_base_steps": 8, "num_plans": 1, "num_trajectories": 1}
ALONE = {"max_train_steps": 0, "instance_image": None, "num_model_calls": 4}
NEGATIVE = {"negative_prompt": "a dog"}
# name: (further arguments of the guided call, those of its prompt's branch, those of the negative one or None)
FAMILIES = {
    "a doubled batch": ("sd3", NEGATIVE, {"guidance_scale": 1.0}, {"prompt": "a dog", "guidance_scale": 1.0}),
    "several prompts": (
        "sd3",
        {"prompt_2": "blue", "negative_prompt_3": "a cat"},
        {"prompt_2": "blue", "guidance_scale": 1.0},
        {"prompt": "", "prompt_3": "a cat", "guidance_scale": 1.0},
    ),
    "two calls": ("flux", NEGATIVE | {"true_cfg_scale": 3.0}, {}, {"prompt": "a dog"}),
    "two calls, rescaled": ("qwen", {"negative_prompt": " "}, {}, {"prompt": " "}),
    "embedded": ("flux", {"true_cfg_scale": 3.0}, {}, None),  # without a negative prompt it does nothing
    "off": ("sd3", NEGATIVE | {"guidance_scale": 1.0}, {"guidance_scale": 1.0}, None),
    "a component": (make_hunyuan_image, NEGATIVE, {}, {"prompt": "a dog"}),
    "inverted time": (make_z_image, NEGATIVE, {"guidance_scale": 0.0}, {"prompt": "a dog", "guidance_scale": 0.0}),
}


def load(base, pipelines, tmp_path) -> DiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(pipelines[base] if isinstance(base, str) else base(tmp_path / "base"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stock_output(pipe, latents, sigma: float, told, call: dict) -> torch.Tensor:
    """The velocity that the stock pipeline's second step goes along, in which it finds these latents."""
    seen, scheduler = [], FixedSigmaScheduler([sigma] * 2, told and told * 2, like=pipe.scheduler)

    def step(model_output, timestep, sample, **kwargs):
        seen.append((model_output, sample))
        return (latents.to(sample),)

    scheduler.step = step
    with ask.replaced(pipe, "scheduler", scheduler):
        pipe(**call, num_inference_steps=2, output_type="latent", generator=torch.Generator().manual_seed(0))
    assert torch.equal(seen[1][1], latents.to(seen[1][1]))
    return (-1 if pipe.scheduler.config.get("invert_sigmas") else 1) * seen[1][0].float()


def by_hand(pipe, start, table, prompt: dict, negative: dict | None, branches: list[str]) -> torch.Tensor:
    """The final latents of WEIGHTS, written out."""
    latents, outputs = start, {"prompt": [], "negative": []}
    for index, called in enumerate(branches):
        told = model_timesteps(table, [SIGMAS[index]])
        for branch, call in (("prompt", prompt), ("negative", negative)):
            if called in (branch, "both"):
                outputs[branch].insert(0, stock_output(pipe, latents, SIGMAS[index], told, call))
        weights, slope = WEIGHTS[index], 0
        for number in range(3):
            for first, branch in ((0, "prompt"), (3, "negative")):
                if number < len(outputs[branch]):
                    slope = slope + weights[first + number] * outputs[branch][number]
        slope = slope + (weights[6] * latents if index else 0) + weights[7] * start
        latents = latents + (SIGMAS[index + 1] - SIGMAS[index]) * slope
    return latents


def asked(pipe, extra: dict) -> tuple[dict, Schedule, list[str]]:
    """A call, a schedule of WEIGHTS for it, and the branches that it calls."""
    call = ask.call_arguments(pipe, PROMPT, 32, 32, None, extra)
    off = ask_single_branch(pipe, **call)
    branches = BRANCHES if call | off != call else ["prompt"] * 3
    table = ask_timestep_table(pipe, 20, **call)
    return call, Schedule(PHASES, table, WEIGHTS, off, branches), branches


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_a_loop_over_stock_calls(family, pipelines, tmp_path):
    """Also when the encoders are gone, and in as many calls of the model as its branches are."""
    base, extra, prompt, negative = FAMILIES[family]
    pipe, size = load(base, pipelines, tmp_path), {"height": 32, "width": 32}
    call, schedule, branches = asked(pipe, extra)
    assert (branches == BRANCHES) == (negative is not None)
    start = torch.randn(
        mixed.starting_latents(pipe, **call).shape, generator=torch.Generator().manual_seed(3)
    )  # another noise than that with which every call begins
    with ask.guiders_off(pipe) if schedule.guidance == {"guiders": False} else contextlib.nullcontext():
        expected = by_hand(
            pipe,
            start,
            schedule.timestep_table,
            {"prompt": PROMPT} | size | prompt,
            negative and size | negative,
            branches,
        )

    remember_prompts(pipe)
    calls, counted, forward = mixed.branch_calls(pipe, call, call | schedule.guidance), [], denoiser(pipe).forward
    for arguments in calls.values():
        ask.dry_step(pipe, **arguments)
    free_components(pipe)

    def counting(*args, **kwargs):
        counted.append(len(ask.model_input(args, kwargs)))
        return forward(*args, **kwargs)

    denoiser(pipe).forward = counting
    found = mixed.final_latents(pipe, schedule, calls, start)
    assert (found - expected).abs().max() <= 1e-5
    assert counted == [1] * mixed.count_calls(branches)


def test_such_a_base_is_refused_before_it_draws(tmp_path, capsys):
    settings = {"pretrained_model_name_or_path": make_lumina2(tmp_path / "lumina2"), "output_dir": tmp_path / "output"}
    (tmp_path / "captions.txt").write_text("a red ring\na blue disc\n")
    settings |= FEW | {"max_train_steps": 0, "num_model_calls": 4, "prompts_file": tmp_path / "captions.txt"}
    assert_refused(
        capsys, "of what its guidance changes is in neither", lambda **given: run_train({}, given), **settings
    )
    assert not (tmp_path / "output").exists()


@pytest.fixture(scope="module")
def pair_of_branches(trained, tmp_path_factory):
    """A pair of LoRAs whose headers hold mixed branches."""
    source, folder = trained("sd3"), tmp_path_factory.mktemp("mixed")
    for phase, first, last in (("slow", 0, 2), ("fast", 2, 3)):
        own = {"timesteps": PHASES[phase], "coefficients": WEIGHTS[first:last], "branches": BRANCHES[first:last]}
        forge(source / phase / WEIGHT_NAME, folder / phase / WEIGHT_NAME, **own, guidance="mix")
    return folder


def test_on_other_timesteps_a_pair_draws_as_any_other(pair_of_branches, trained, infer, tmp_path):
    """The weights are for the steps of the files alone: without these there is the pipeline's own guidance."""
    other = {"flow_custom_timesteps": "950,600;300"}
    ours = infer("sd3", lora=pair_of_branches, output=tmp_path / "ours.png", **other)
    plain = infer("sd3", lora=trained("sd3"), output=tmp_path / "plain.png", **other)
    assert picture_distance(ours, plain) <= 1


def test_guidance_is_the_files_own(pair_of_branches, trained, infer, capsys):
    for guidance in ("keep", "fold"):
        word = f"--guidance {guidance}: these are files whose steps call mixed branches; leave it out"
        assert_refused(capsys, word, infer, base="sd3", lora=pair_of_branches, guidance=guidance)
    word = "--guidance mix: these are files whose steps know no branches; leave it out"
    assert_refused(capsys, word, infer, base="sd3", lora=trained("sd3"), guidance="mix")


def test_another_strength_of_guidance_has_no_effect_and_that_is_said(pair_of_branches, infer, caplog, tmp_path):
    held = infer("sd3", lora=pair_of_branches, output=tmp_path / "held.png")
    assert "has no effect" not in caplog.text
    other = infer("sd3", lora=pair_of_branches, output=tmp_path / "other.png", guidance_scale=4.5)
    assert picture_distance(held, other) == 0
    assert "guidance_scale 4.5 has no effect on these files: their branches' weights hold 7.0;" in caplog.text
    assert "--num_model_calls 4 --max_train_steps 0, --guidance_scale 4.5" in caplog.text


def test_folded_guidance_has_no_other_strength_either(trained, infer, caplog, tmp_path):
    for phase in PHASES:
        forge(trained("sd3") / phase / WEIGHT_NAME, tmp_path / phase / WEIGHT_NAME, guidance="fold")
    infer("sd3", lora=tmp_path, guidance_scale=7.0)
    assert "has no effect" not in caplog.text
    infer("sd3", lora=tmp_path, guidance_scale=2)
    assert "guidance_scale 2.0 has no effect on these files: their LoRAs hold 7.0;" in caplog.text


def test_on_another_base_the_solver_may_be_the_wrong_one(
    pair_of_branches, trained, infer, pipelines, caplog, tmp_path
):
    shutil.copytree(pipelines["sd3"], tmp_path / "fine-tune")
    for lora, warned in ((trained("sd3"), 0), (pair_of_branches, 1)):
        infer(tmp_path / "fine-tune", lora=lora, allow_base_mismatch=True)
        assert caplog.text.count(f"the solver was found on {pipelines['sd3']}: on another base one that is") == warned


def test_without_guidance_there_is_no_negative_branch(pair_of_branches, infer, capsys):
    word = "guidance_scale 1.0, not 7.0: without guidance there is no negative prompt's branch, which these steps call"
    assert_refused(capsys, word, infer, base="sd3", lora=pair_of_branches, guidance_scale=1)


# --------------------------------------------------------------------------------------------------------------------
# Flags


REFUSED_FLAGS = [
    ({"target_error": 0.1}, "--target_error belongs to --num_model_calls"),
    ({"num_plans": 3}, "--num_plans belongs to --num_model_calls"),
    ({"train_coefficients_only": True}, "--train_coefficients_only belongs to --num_model_calls"),
    ({"num_model_calls": 8, "guidance": "keep"}, "--guidance keep is not mixed, as --num_model_calls means it"),
    ({"loss": "endpoint", "guidance": "fold"}, "--guidance fold is not mixed, as --loss endpoint means it"),
    ({"num_model_calls": 8, "loss": "flow"}, "--loss flow trains single steps, --num_model_calls is for"),
    ({"guidance": "mix", "loss": "trajectory"}, "--loss trajectory trains single steps, --guidance mix is for"),
    ({"num_model_calls": 8, "grid": "even"}, "--num_model_calls chooses the steps .*; leave --grid out"),
    ({"num_model_calls": 8, "solver": "euler"}, "--num_model_calls chooses the steps .*; leave --solver out"),
    ({"guidance": "mix", "num_inference_steps": 4}, "--guidance mix chooses .*; leave --num_inference_steps out"),
    ({"num_model_calls": 8, "flow_custom_timesteps": "900;300"}, "leave --flow_custom_timesteps out"),
    ({"num_model_calls": "auto"}, "--num_model_calls auto and --target_error go together"),
    ({"num_model_calls": 8, "target_error": 0.1}, "--num_model_calls auto and --target_error go together"),
    ({"num_model_calls": 3}, "'3' is neither auto nor a number from 4 to 100"),
    ({"num_model_calls": 101}, "'101' is neither auto nor a number from 4 to 100"),
    ({"num_model_calls": 8, "flow_weight": 0.1}, "--flow_weight is for losses of single steps"),
    ({"num_model_calls": 8, "segment_weights": "length"}, "--segment_weights is for losses of single steps"),
    ({"num_model_calls": 8, "timesteps_per_step": 2}, "--timesteps_per_step is for losses of single steps"),
    ({"num_model_calls": 8, "flow_timesteps_mode": "random"}, "--flow_timesteps_mode is for losses of single steps"),
    ({"num_model_calls": 8, "phase": "slow"}, "--phase slow: --loss endpoint trains both phases together"),
    ({"num_model_calls": 8, "compile": True}, "--compile: --loss endpoint switches LoRAs in each walk"),
    ({"num_model_calls": 8, "validation_prompt": "a", "validation_steps": 1}, "--validation_steps: --loss endpoint"),
    ({"num_model_calls": 8, "parallel_phases": True}, "--parallel_phases: --loss endpoint trains both phases"),
    *[
        ({"num_model_calls": 8, "max_train_steps": 0, name: value}, f"--{name}: --max_train_steps 0 finds a sampler")
        for name, value in (("resume_from_checkpoint", "latest"), ("validation_prompt", "a"))
    ],
]


@pytest.mark.parametrize("given, message", REFUSED_FLAGS, ids=[" ".join(given) for given, _ in REFUSED_FLAGS])
def test_flags_that_do_not_go_together(given, message, train, tmp_path):
    with pytest.raises(REFUSED, match=message) as error:
        train(**given)
    assert "\n" not in str(error.value) and not (tmp_path / "output").exists()


def test_the_dial_needs_no_image_and_no_caption():
    """It is then found on the general captions of the repository."""
    given = ["--pretrained_model_name_or_path=b", "--max_train_steps=0"]
    for flag in ("--num_model_calls=12", "--guidance=mix", "--loss=endpoint"):
        args = training_flags.parse([*given, flag])
        assert (args.guidance, args.loss) == ("mix", "endpoint") and args.prompts_file == str(training_flags.CAPTIONS)
        assert args.num_model_calls == (12 if "12" in flag else training_flags.CALLS)
        assert args.instance_prompt == training_flags.CAPTIONS.read_text().splitlines()[0]


def test_one_caption_tells_eight_calls_and_not_fewer(train, pair, capsys):
    settings = {"base": "sd3", "max_train_steps": 0, "dry_run": True, **FEW}
    word = "--num_model_calls 7: below 8 calls what is best for one caption is wrong for others; give two or more"
    for source in ({"instance_image": pair}, {"instance_image": None, "instance_prompt": "a red ring"}):
        assert_refused(capsys, word, train, **settings, **source, num_model_calls=7)
    train(**settings, instance_image=pair, num_model_calls=8)
    assert "| fitting |" in capsys.readouterr().out


def test_what_it_will_take_is_counted_and_fits(train, tmp_path, capsys, caplog):
    (tmp_path / "captions.txt").write_text("a red ring\na blue disc\n")
    settings = {"base": "sd3", **ALONE, "num_base_steps": 12, "prompts_file": tmp_path / "captions.txt"}

    def stages(**further) -> dict[str, list[str]]:
        train(**settings | further, dry_run=True)
        lines = re.findall(r"^\| ([a-z]+) \|(.*)\|$", capsys.readouterr().out, re.MULTILINE)
        return {name: [cell.strip() for cell in cells.split("|")] for name, cells in lines if name != "stage"}

    found = stages()
    assert set(found) == {"encoding", "drawing", "fitting", "all"}
    assert found["drawing"][1] == str(32 * 12)  # of 32 trajectories
    assert found["fitting"][1] == str(32 * (24 + 6 * 4 + 3 * 4))  # the curve, the search, the best plan again
    more = stages(num_trajectories=2, num_plans=5, max_train_steps=3, train_batch_size=2, guidance_scale=1)
    assert more["drawing"][1] == str(4 * 12) and more["training"][1] == str(3 * 4 * 4)  # four batches a step
    assert more["fitting"][1] == str(4 * (12 + 5 * 4 + 3 * 4))  # a single branch
    assert found["fitting"][0] == more["fitting"][0]  # the number of samples in training does not matter here

    with caplog.at_level("INFO"):
        train(**settings | FEW, fit="auto", memory="16GB")
    assert "Chosen for 16 GB: no flag that saves memory" in caplog.text
    sampler = read_sampler(tmp_path / "output")
    assert mixed.count_calls(sampler.branches) == 4 and sampler.guidance == "mix" and sampler.captions == 2
    assert "on captions on which it was not fitted" in caplog.text and "Sampler = mixed branches, pos" in caplog.text
