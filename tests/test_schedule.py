"""The schedule: the published lists, the exact hand-off and the three known ways to miss it, the loss.

FLUX.1-dev and Qwen-Image walk their 1024x1024 schedules here at 256x256 and 512x512: the tiny VAEs shrink less, and
only the number of image tokens counts.
"""

import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig

from glance.ask import pipeline as ask
from glance.ask import prompts as ask_prompts
from glance.ask import sampler as grids
from glance.ask.schedule import ask_timesteps
from glance.ask.velocity import PipelineVelocity
from glance_utils import (
    PHASES,
    FixedSigmaScheduler,
    InputError,
    add_noise,
    check_timesteps,
    derive_timesteps,
    flow_matching_loss,
    glance_inference,
    parse_timesteps,
    sigmas_to_timesteps,
    timestep_order,
    timesteps_to_sigmas,
)


BASES = ("flux", "sd3", "qwen")
FLUX = {
    "slow": [1000, 986.9786, 973.2042, 958.6094, 943.1188],
    "fast": [926.6473, 825.7017, 677.9868, 441.1997, 60.5503],
}
QWEN = {
    "slow": [1000, 979.1915, 957.5157, 934.9171, 911.3354],
    "fast": [886.7053, 745.0728, 562.9505, 320.0802, 20],
}
PUBLISHED = {"flux": FLUX, "qwen": QWEN}
# Height and width at which the tiny pipelines have the 4,096 image tokens of 1024x1024.
SIZE_1024 = {"flux": (256, 256), "qwen": (512, 512)}
UNSHIFTED = {"shift": 1.0, "use_dynamic_shifting": False, "shift_terminal": None}


# --------------------------------------------------------------------------------------------------------------------
# The published lists, derived


@pytest.fixture(scope="module")
def derive(pipelines):
    """derive(base, height, width, num_base_steps): Glance's lists, asked of the pipeline."""
    loaded = {}

    def call(base, height, width, num_base_steps=50):
        if base not in loaded:
            loaded[base] = ask.load_pipeline(str(pipelines[base]))
            ask_prompts.remember_prompts(loaded[base])
        arguments = ask.call_arguments(loaded[base], "a red ring", height, width, None, {})
        return derive_timesteps(ask_timesteps(loaded[base], num_base_steps, **arguments))

    return call


@pytest.mark.parametrize("base", PUBLISHED)
def test_published_lists_come_out_of_the_pipeline(base, derive):
    derived = derive(base, *SIZE_1024[base])
    assert list(derived) == ["slow", "fast"]
    for phase in PHASES:
        assert derived[phase] == pytest.approx(PUBLISHED[base][phase], abs=1e-3)


@pytest.mark.parametrize(
    ("base", "size", "sixth"),
    [
        ("qwen", (832, 464), 895.7),  # 104 x 58 tokens, as at 1664x928
        ("flux", (128, 128), 882.5),  # 32 x 32 tokens, as at 512x512
        ("flux", (416, 232), 946.0),  # 104 x 58 tokens, as at 1664x928
    ],
)
def test_the_list_depends_on_the_resolution(base, size, sixth, derive):
    found = derive(base, *size)["fast"][0]
    assert found == pytest.approx(sixth, abs=0.05)
    assert abs(found - PUBLISHED[base]["fast"][0]) > 5


def test_sd3_shifts_alike_at_every_resolution(derive):
    derived = derive("sd3", 32, 32)
    assert derived == derive("sd3", 64, 48)
    assert derived["slow"][1] == pytest.approx(986.057, abs=1e-3)


@pytest.mark.parametrize(
    ("num_base_steps", "positions"),
    [
        (28, [0, 1, 2, 3, 4, 6, 11, 17, 22, 27]),
        (30, [0, 1, 2, 4, 5, 6, 12, 18, 24, 29]),
        (50, [0, 2, 4, 6, 8, 10, 20, 30, 40, 49]),
        (100, [0, 4, 8, 12, 16, 20, 40, 61, 81, 99]),
    ],
)
def test_positions_scale_with_the_base_steps(num_base_steps, positions):
    walked = [1000.0 - position for position in range(num_base_steps)]
    derived = derive_timesteps(walked)
    assert [1000 - timestep for timestep in derived["slow"] + derived["fast"]] == positions


@pytest.mark.parametrize("num_base_steps", [28, 30, 100])
def test_other_base_steps_end_where_the_pipeline_ends(num_base_steps, derive):
    def shifted(sigma):  # FLUX's at 256 tokens, where mu is 0.5
        return math.exp(0.5) * sigma / (1 + (math.exp(0.5) - 1) * sigma)

    # SD3's scheduler and Qwen-Image's end at the same sigma in any number of steps
    ends = {"flux": 1000 * shifted(1 / num_base_steps), "sd3": 8.928571, "qwen": 20}
    for base, end in ends.items():
        derived = derive(base, 64, 64, num_base_steps)
        assert derived["slow"][0] == 1000
        assert derived["fast"][-1] == pytest.approx(end, abs=1e-3)


def test_any_25_steps_or_more_are_enough():
    for count in range(25, 201):
        derived = derive_timesteps([1000 * (count - index) / count for index in range(count)])
        assert len(set(derived["slow"] + derived["fast"])) == 10
        assert derived["fast"][-1] == pytest.approx(1000 / count)


@pytest.mark.parametrize("num_base_steps", [1, 4, 10, 20])
def test_too_few_base_steps_are_named(num_base_steps, derive):
    with pytest.raises(InputError, match=f"num_base_steps: {num_base_steps} steps are too few for 10 distinct ones"):
        derive("flux", 32, 32, num_base_steps)


# --------------------------------------------------------------------------------------------------------------------
# Exactness: what was asked is what the model is told and what is integrated


@pytest.fixture
def stock(pipelines):
    """stock(base) is a fresh pipeline, as diffusers loads it."""

    def call(base):
        pipe = DiffusionPipeline.from_pretrained(pipelines[base])
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return call


def unshifted(pipe):
    return FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, **UNSHIFTED)


def small_call(**arguments):
    return {"prompt": "a red ring", "height": 32, "width": 32, "output_type": "latent"} | arguments


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("lists", [FLUX, QWEN], ids=["flux list", "qwen list"])
def test_requested_and_used_sigmas_are_equal(base, lists, stock):
    requested = torch.tensor(lists["slow"] + lists["fast"]) / 1000
    pipe = stock(base)
    pipe.scheduler = FixedSigmaScheduler(requested.tolist())
    walked = []

    def record(pipe, step, timestep, callback_kwargs):
        walked.append(timestep)
        return callback_kwargs

    # the pipeline itself asks for other steps
    pipe(**small_call(num_inference_steps=3, callback_on_step_end=record))
    assert torch.equal(pipe.scheduler.sigmas, torch.cat([requested, torch.zeros(1)]))
    assert torch.equal(pipe.scheduler.timesteps, requested * 1000)
    assert torch.equal(torch.stack(walked), requested * 1000)


@pytest.mark.parametrize("base", BASES)
def test_the_fixed_scheduler_is_stock_eulers_unshifted_one(base, stock):
    sigmas = timesteps_to_sigmas(QWEN["slow"] + QWEN["fast"])
    pipe, images = stock(base), []
    own = unshifted(pipe)
    for scheduler, asked in [(FixedSigmaScheduler(sigmas), {"num_inference_steps": 10}), (own, {"sigmas": sigmas})]:
        pipe.scheduler = scheduler
        images.append(pipe(**small_call(generator=torch.Generator().manual_seed(0)), **asked).images)
        assert torch.equal(scheduler.sigmas, torch.tensor([*sigmas, 0.0]))
        assert torch.equal(scheduler.timesteps, own.timesteps if scheduler is own else 1000 * torch.tensor(sigmas))
    assert torch.equal(*images)


DESCENDING = st.lists(st.integers(1, 1_000_000), min_size=1, max_size=30, unique=True).map(
    lambda values: [value / 1000 for value in sorted(values, reverse=True)]
)


@given(DESCENDING)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_euler_steps_add_up_to_the_first_sigma(timesteps):
    sigmas = timesteps_to_sigmas(timesteps)
    scheduler = FixedSigmaScheduler(sigmas)
    scheduler.set_timesteps(num_inference_steps=7, mu=1.15)
    used = [Fraction(sigma) for sigma in scheduler.sigmas.tolist()]
    assert len(used) == len(sigmas) + 1
    assert sum(after - before for before, after in zip(used, used[1:])) == -Fraction(torch.tensor(sigmas[0]).item())
    sample = torch.tensor([sigmas[0], 2.0])
    for timestep in scheduler.timesteps:
        sample = scheduler.step(torch.ones(2), timestep, sample).prev_sample
    assert sample.tolist() == pytest.approx([0, 2 - sigmas[0]], abs=1e-6)


@pytest.fixture
def walk(stock, monkeypatch):
    """walk(pipe, latents, **call) -> (told, held, last): the timestep that each call of the transformer is told, the
    latents' value at that moment, and after the last step, in a stock run at 4,096 tokens.

    The transformer predicts the velocity 1 everywhere, so from latents 0 at sigma 1 exact integration holds
    sigma - 1 wherever it is, and ends at -1.
    """

    def call(pipe, latents=0.0, **arguments):
        told, held = [], []

        def ones(*args, hidden_states, timestep, **kwargs):
            told.append(1000 * timestep.item())
            held.append(hidden_states.mean().item())
            return (torch.ones_like(hidden_states),)

        monkeypatch.setattr(pipe.transformer, "forward", ones)
        base = "flux" if "Flux" in type(pipe).__name__ else "qwen"
        height, width = SIZE_1024[base]
        start = torch.full((1, 4096, pipe.transformer.config.in_channels), latents)
        call = {"prompt": "a red ring", "height": height, "width": width, "output_type": "latent"}
        last = pipe(**call, latents=start, **arguments).images
        assert last.min() == last.max()
        return told, held, last.mean().item()

    return call


def with_adapters(pipe):
    for phase in PHASES:
        pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), phase)
    pipe.transformer.disable_lora()
    return pipe


@pytest.mark.parametrize("base", PUBLISHED)
@pytest.mark.parametrize("lists", [FLUX, QWEN], ids=["flux list", "qwen list"])
def test_glance_tells_and_integrates_exactly_what_was_trained(base, lists, stock, walk):
    pipe = with_adapters(stock(base))
    with glance_inference(pipe, lists) as kwargs:
        told, held, last = walk(pipe, **kwargs)
    trained = lists["slow"] + lists["fast"]
    assert told == pytest.approx(trained, abs=1e-3)
    assert held == pytest.approx([timestep / 1000 - 1 for timestep in trained], abs=1e-6)
    assert last == pytest.approx(-1, abs=1e-6)


def test_known_mistake_sigmas_are_shifted_once_more_by_flux(stock, walk):
    sigmas = timesteps_to_sigmas(QWEN["slow"] + QWEN["fast"])
    told = walk(stock("flux"), sigmas=sigmas)[0]
    assert told[1] == pytest.approx(993.3, abs=0.05)  # 979.2 was trained


def test_known_mistake_the_slow_list_is_stretched_to_qwens_terminal(stock, walk):
    told = walk(stock("qwen"), sigmas=timesteps_to_sigmas(QWEN["slow"]))[0]
    assert told == pytest.approx([1000, 778, 542, 289, 20], abs=0.6)


def test_known_mistake_the_slow_list_alone_denoises_completely(stock, walk):
    pipe = stock("qwen")
    pipe.scheduler = unshifted(pipe)
    _, held, last = walk(pipe, sigmas=timesteps_to_sigmas(QWEN["slow"]))
    assert held[-1] == pytest.approx(0.9113354 - 1, abs=1e-6)
    assert pipe.scheduler.sigmas[-1] == 0
    assert last == pytest.approx(-1, abs=1e-6)  # clean already: 0.911 of the path in the last of five steps
    told, held, last = walk(pipe, last, sigmas=timesteps_to_sigmas(QWEN["fast"]))
    assert told[0] == pytest.approx(886.7053, abs=1e-3)
    assert held[0] == pytest.approx(-1, abs=1e-6)  # yet nothing but image: noise at 0.887 holds -0.113
    assert last == pytest.approx(-1.8867053, abs=1e-6)


class Overwritten(FlowMatchEulerDiscreteScheduler):
    """The official code: after set_timesteps the timesteps are overwritten in bfloat16, the sigmas stay."""

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None):
        super().set_timesteps(num_inference_steps, device, sigmas, mu)
        self.timesteps = torch.tensor(self.overwrite, dtype=torch.bfloat16).float()


def test_known_mistake_overwritten_timesteps_leave_the_sigmas_alone(stock, walk):
    pipe = stock("qwen")
    pipe.scheduler = Overwritten.from_config(pipe.scheduler.config)
    pipe.scheduler.overwrite = QWEN["slow"]
    told, _, last = walk(pipe, num_inference_steps=50)  # the official slow pipeline sets 50 steps and walks five
    slow = -last
    assert told[1] == pytest.approx(980, abs=1e-3)  # 979.1915 in bfloat16
    assert slow == pytest.approx(1 - 0.946, abs=5e-4)  # on to the fast list it should be 1 - 0.887
    pipe.scheduler.overwrite = QWEN["fast"]
    told, _, last = walk(pipe, last, num_inference_steps=5)
    assert told[0] == pytest.approx(888, abs=1e-3)  # 886.7053 in bfloat16
    assert -last - slow == pytest.approx(1, abs=1e-6)  # from 0.887 it should be 0.887
    assert -last == pytest.approx(1.054, abs=5e-4)  # of a path that is 1 long


@pytest.mark.parametrize("base", BASES)
def test_glance_switches_the_adapter_after_the_slow_list_and_leaves_none(base, stock):
    pipe = with_adapters(stock(base))
    scheduler, active = pipe.scheduler, []
    pipe.transformer.register_forward_pre_hook(lambda *_: active.append(tuple(pipe.transformer.active_adapters())))
    with glance_inference(pipe, {"slow": [1000, 900, 800], "fast": [700, 300]}) as kwargs:
        pipe(**small_call(), **kwargs)
    calls = len(active) // 5  # two a step would be guidance
    assert active == [("slow",)] * 3 * calls + [("fast",)] * 2 * calls
    assert pipe.scheduler is scheduler
    layers = [module for module in pipe.transformer.modules() if hasattr(module, "disable_adapters")]
    assert layers and all(layer.disable_adapters for layer in layers)


def test_glance_puts_everything_back_after_an_error(stock):
    pipe = with_adapters(stock("flux"))
    scheduler = pipe.scheduler
    with pytest.raises(KeyError, match="in the middle"):
        with glance_inference(pipe, FLUX):
            assert pipe.scheduler is not scheduler
            raise KeyError("in the middle")
    assert pipe.scheduler is scheduler
    layers = [module for module in pipe.transformer.modules() if hasattr(module, "disable_adapters")]
    assert layers and all(layer.disable_adapters for layer in layers)


# --------------------------------------------------------------------------------------------------------------------
# Lists that users write


@pytest.mark.parametrize(
    ("text", "lists"),
    [
        ("1000,979.1915,957.5157", [[1000, 979.1915, 957.5157]]),
        ("1000, 979.1915 957.5157\n", [[1000, 979.1915, 957.5157]]),
        ("886.7053,20.0;10", [[886.7053, 20], [10]]),
        ("1, 0.9791915, 0.02", [[1000, 979.1915, 20]]),
        ("1;0.5,0.25", [[1000], [500, 250]]),
        ("1", [[1000]]),
        ("500", [[500]]),
        ("1e3;5e2", [[1000], [500]]),
        (",".join(map(str, QWEN["slow"])) + ";" + ",".join(map(str, QWEN["fast"])), [QWEN["slow"], QWEN["fast"]]),
    ],
)
def test_timesteps_and_sigmas_are_told_apart(text, lists):
    parsed = parse_timesteps(text)
    assert len(parsed) == len(lists)
    for found, wanted in zip(parsed, lists):
        assert found == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        (" , ", "empty"),
        (";", "empty"),
        ("1000,900;", "empty"),
        (";500", "empty"),
        ("1000,0.9", "mixed"),
        ("1000,1", "mixed"),
        ("1000,0", "mixed"),
        ("1000,900;0.5,0.25", "mixed"),
        ("nan", "out of range"),
        ("1000,nan,900", "out of range"),
        ("inf,900", "out of range"),
        ("1000,-inf", "out of range"),
        ("0.9,-inf", "out of range"),
        ("500,1000", "descending"),
        ("0.5,0.7", "descending"),
        ("1000,900,900", "descending"),
        ("0.5,0.5", "descending"),
        ("1000.5,900", "out of range"),
        ("900,-5", "out of range"),
        ("0.9,0", "out of range"),
        ("0.9,-0.1", "out of range"),
        ("1000;900;800", "3 lists"),
        ("slow", "numbers"),
        ("1000,nine hundred", "numbers"),
        ("[1000,900]", "numbers"),
        ("1000,900;950,800", "descending"),
        ("1000,900;900,800", "descending"),
        ("0.9,0.8;0.85,0.1", "descending"),
    ],
)
def test_a_wrong_list_is_named(text, reason):
    with pytest.raises(InputError, match=f"^--flow_custom_timesteps: .*{reason}") as error:
        parse_timesteps(text)
    assert "\n" not in str(error.value)


TIMESTEPS = st.lists(st.floats(1, 1000, exclude_min=True), min_size=1, max_size=20, unique=True).map(
    lambda values: sorted(values, reverse=True)
)


@given(TIMESTEPS, st.integers(1, 19))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_descending_list_round_trips(timesteps, cut):
    texts = [repr(timestep) for timestep in timesteps]
    assert parse_timesteps(",".join(texts)) == [timesteps]
    if cut < len(timesteps):
        parsed = parse_timesteps(",".join(texts[:cut]) + ";" + ",".join(texts[cut:]))
        assert parsed == [timesteps[:cut], timesteps[cut:]]


@given(TIMESTEPS.filter(lambda timesteps: len(timesteps) > 1), st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_no_other_order_of_a_list_is_taken(timesteps, random):
    shuffled = random.sample(timesteps, len(timesteps))
    if shuffled != timesteps:
        with pytest.raises(InputError, match="descending"):
            parse_timesteps(",".join(map(repr, shuffled)))


NUMBERS = st.one_of(st.floats(-10, 2000), st.floats(), st.sampled_from(["x", "", "1e9", "1_0", "0x1", "\u0663", "-0"]))


LISTS = st.builds(lambda values, comma: comma.join(map(str, values)), st.lists(NUMBERS), st.sampled_from(",; "))


@given(st.text() | LISTS)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_any_text_is_a_schedule_or_an_error_of_one_line(text):
    try:
        lists = parse_timesteps(text)
    except InputError as error:
        assert str(error).isprintable() and len(str(error)) < 1000
        return
    values = sum(lists, [])
    assert 1 <= len(lists) <= 2 and all(lists)
    assert values[0] <= 1000 and values[-1] > 0 and all(low < high for high, low in zip(values, values[1:]))


@given(st.lists(st.floats(1e-3, 1000), min_size=50, max_size=300, unique=True))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_schedule_gives_ten_of_its_timesteps_from_first_to_last(base):
    base = sorted(base, reverse=True)
    phases = derive_timesteps(base)
    ten = phases["slow"] + phases["fast"]
    assert len(ten) == 10 and set(ten) <= set(base) and (ten[0], ten[-1]) == (base[0], base[-1])
    assert check_timesteps(ten) == sorted(set(ten), reverse=True)


@given(st.integers(1, 12), st.integers(1, 200), st.sampled_from(["stratified", "random"]), st.integers(0, 2**32))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_order_has_its_length_and_visits_alike(timesteps, count, mode, seed):
    order = timestep_order(timesteps, count, mode, torch.Generator().manual_seed(seed))
    visits = torch.bincount(order, minlength=timesteps)
    assert order.shape == (count,) and len(visits) == timesteps
    if mode == "stratified":
        assert visits.max() - visits.min() <= 1


# --------------------------------------------------------------------------------------------------------------------
# The order in which training visits them


def order(num_timesteps, count, mode, seed=0):
    return timestep_order(num_timesteps, count, mode, torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("num_timesteps", [1, 5, 7])
def test_stratified_visits_each_once_a_round(num_timesteps):
    found = order(num_timesteps, 12 * num_timesteps + 1, "stratified")
    assert len(found) == 12 * num_timesteps + 1
    rounds = [found[start : start + num_timesteps] for start in range(0, 12 * num_timesteps, num_timesteps)]
    assert all(sorted(part) == list(range(num_timesteps)) for part in rounds)
    assert num_timesteps == 1 or len(set(map(tuple, rounds))) > 1  # shuffled anew


def test_a_last_round_cut_short_repeats_nothing():
    found = order(5, 13, "stratified")
    assert len(found) == 13 and len(set(found[10:])) == 3


def test_random_draws_with_replacement():
    found = order(5, 5000, "random")
    assert len(found) == 5000
    counts = [found.count(index) for index in range(5)]
    assert sum(counts) == 5000 and all(900 < count < 1100 for count in counts)
    assert any(len(set(found[start : start + 5])) < 5 for start in range(0, 50, 5))


def test_half_of_all_random_runs_draw_one_timestep_twice_as_often():
    def uneven(seed):
        counts = [order(5, 60, "random", seed).count(index) for index in range(5)]
        return max(counts) >= 2 * min(counts)

    assert 0.42 < sum(map(uneven, range(400))) / 400 < 0.62


@pytest.mark.parametrize("mode", ["stratified", "random"])
def test_the_seed_decides_the_order(mode):
    assert order(5, 60, mode, seed=3) == order(5, 60, mode, seed=3)
    assert order(5, 60, mode, seed=3) != order(5, 60, mode, seed=4)


def test_the_order_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    for mode in ("stratified", "random"):
        order(5, 60, mode)
    assert torch.equal(torch.get_rng_state(), before)


# --------------------------------------------------------------------------------------------------------------------
# The loss


def tensors(dtype, count=3):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 6, 4, generator=generator).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sigma", [0.0, 0.02, 0.5, 0.9791915, 1.0])
def test_noisy_is_a_point_on_the_straight_path_in_float32(dtype, sigma):
    latents, noise = tensors(dtype, 2)
    noisy = add_noise(latents, noise, sigma)
    assert noisy.dtype == torch.float32
    exact = (1 - sigma) * latents.double() + sigma * noise.double()
    assert (noisy - exact).abs().max() < 1e-6
    if sigma in (0.0, 1.0):
        assert torch.equal(noisy, (noise if sigma else latents).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loss_is_the_mean_squared_error_of_the_velocity_in_float32(dtype):
    velocity, latents, noise = tensors(dtype)
    loss = flow_matching_loss(velocity, latents, noise)
    assert loss.dtype == torch.float32 and loss.shape == ()
    exact = ((velocity.double() - (noise.double() - latents.double())) ** 2).mean()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)


def test_loss_is_zero_at_the_target_and_its_gradient_points_there():
    velocity, latents, noise = tensors(torch.float32)
    assert flow_matching_loss(noise - latents, latents, noise) == 0
    velocity.requires_grad_()
    flow_matching_loss(velocity, latents, noise).backward()
    wanted = 2 * (velocity.detach() - (noise - latents)) / velocity.numel()
    assert torch.allclose(velocity.grad, wanted, rtol=1e-5, atol=1e-8)


def test_every_sigma_has_the_same_weight():
    _, latents, noise = tensors(torch.float32)
    target = noise - latents
    for sigma in (0.02, 0.5, 1.0):
        # a step of the target from the noisy point back to sigma 0 is the image itself
        assert torch.allclose(add_noise(latents, noise, sigma) - sigma * target, latents, atol=1e-6)
    assert flow_matching_loss(target + 0.5, latents, noise).item() == pytest.approx(0.25, rel=1e-5)


def test_sigmas_and_timesteps_are_a_factor_of_a_thousand_apart():
    assert timesteps_to_sigmas([1000, 500, 20]) == [1, 0.5, 0.02]
    assert sigmas_to_timesteps([1, 0.5, 0.02]) == [1000, 500, 20]
    for timesteps in (FLUX["slow"], QWEN["fast"]):
        back = sigmas_to_timesteps(timesteps_to_sigmas(timesteps))
        assert all(math.isclose(one, other, rel_tol=1e-15) for one, other in zip(back, timesteps))


# --------------------------------------------------------------------------------------------------------------------
# Numbers of any library


@pytest.mark.parametrize(
    "kind", [tuple, np.array, torch.tensor, lambda values: [np.float32(value) for value in values]]
)
def test_lists_may_be_arrays_and_tensors(kind):
    timesteps = [1000.0, 750.0, 500.0, 250.0]
    assert check_timesteps(kind(timesteps)) == timesteps
    assert sigmas_to_timesteps(timesteps_to_sigmas(kind(timesteps))) == timesteps
    phases = derive_timesteps(kind(timesteps), np.array([0, 1, 3]))
    assert phases == {"slow": [1000, 750], "fast": [250]} and json.dumps(phases)
    points = [torch.full((1, 2), float(index**2)) for index in range(5)]
    sigmas = [1.0, 0.75, 0.5, 0.25, 0.0]
    assert grids.best_positions(points, kind(sigmas), 2) == grids.best_positions(points, sigmas, 2)
    fitted = grids.fit_coefficients(points, kind(sigmas), [0, 2])
    np.testing.assert_allclose(
        fitted, grids.fit_coefficients(points, sigmas, [0, 2]), rtol=1e-12
    )  # memory's alignment


@pytest.mark.parametrize("sigma", [1, np.float64(0.5), np.float32(0.5), np.int64(1), torch.tensor(0.5), np.array(0.5)])
def test_a_sigma_may_be_any_number(sigma, pipelines):
    latents, noise = torch.ones(1, 256, 16), torch.randn(1, 256, 16)
    noisy = add_noise(latents, noise, sigma)
    assert noisy.dtype == torch.float32
    assert torch.equal(noisy, add_noise(latents, noise, float(sigma)))
    pipe = DiffusionPipeline.from_pretrained(pipelines["flux"])
    pipe.set_progress_bar_config(disable=True)
    model = PipelineVelocity(pipe, prompt="a red ring", height=64, width=64)
    with torch.no_grad():
        expected = model(noisy, float(sigma))
        for given in (sigma, [sigma], np.array([float(sigma)]), torch.tensor([float(sigma)])):
            assert torch.equal(model(noisy, given), expected)
        with pytest.raises(ValueError, match="2 sigmas for a batch of 1"):
            model(noisy, [sigma, sigma])
