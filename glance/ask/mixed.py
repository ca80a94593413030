"""How does a pipeline draw in a few single calls? Each step calls the prompt's branch, the negative prompt's, or both.

Classifier-free guidance calls both at every step and forgets them. Here a step goes along a linear combination of the
newest outputs of either branch, the latents and the noise that they began with, so that a call may be left out where
an older one still tells enough. Which branch is called where, and the weights, are found in glance/training/search.py.

A branch is the same pipeline call with guidance off and, for the negative one, the negative prompt as its prompt. The
pipeline is called a step at a time, as in training; its own decode path makes the picture.
"""

import torch
from diffusers import DiffusionPipeline

from glance.ask.pipeline import Answer, Probe, accepted_arguments, refusals, run_pipeline
from glance.ask.velocity import PipelineVelocity
from glance_utils import InputError, Schedule, timesteps_to_sigmas


CALLED = {"prompt": ("prompt",), "negative": ("negative",), "both": ("prompt", "negative")}  # by a step's branches
NEWEST = 3  # outputs of each branch that a step combines
TERMS = 2 * NEWEST + 2  # with the latents and the start
RIDGE = 1e-4  # of the mean square of the terms
# The share of what guidance changes that neither branch may tell. At the first step of tiny pipelines of all families
# it is 0.24 at most where the branches are those of the guidance (0 but where it rescales norms or pads prompts
# alike), and 0.66 to 1 where the pipeline prepares the negative prompt in another way (Lumina2, GLM, OmniGen, Bria
# FIBO 2, DreamLite) or does not guide all channels (Lumina).
UNTOLD = 0.5
ROUNDING = 0.02  # of the velocity: as much may be rounding in half precision, where guidance changes little


def branch_calls(pipe: DiffusionPipeline, call: dict, single_call: dict) -> dict[str, dict]:
    """Return the arguments of the call that is one branch of `call`, by the branch's name; "prompt" alone where the
    pipeline has no classifier-free guidance, or its guidance is off.

    `single_call` are `call`'s with ask_single_branch's answer.
    """
    if single_call == call:
        return {"prompt": single_call}
    accepted = accepted_arguments(pipe)
    negative = {}
    for name in accepted:
        if name.startswith("negative_prompt") and name.removeprefix("negative_") in accepted:
            text = call.get(name)
            default = accepted[name].default
            negative[name.removeprefix("negative_")] = default if text is None and isinstance(default, str) else text
    rest = {
        name: value for name, value in single_call.items() if name not in negative and not name.startswith("negative_")
    }
    others = {name: text for name, text in negative.items() if text is not None}
    return {"prompt": single_call, "negative": rest | {"prompt": ""} | others}


@torch.no_grad()
def check_branches(model: PipelineVelocity, call: dict, calls: dict[str, dict], sigma: float) -> None:
    """Raise InputError where `call`'s guidance is not made of the branches `calls`, branch_calls', at its first noise.

    The guided velocity should be a combination of the two, as it is where the pipeline treats the negative prompt as
    it would treat a prompt.
    """
    if "negative" not in calls:
        return
    noise = starting_latents(model.pipe, **calls["prompt"])
    guided, *branches = (
        model(noise, sigma, **arguments).double().flatten() for arguments in (call, calls["prompt"], calls["negative"])
    )

    def untold(count: int) -> float:
        """Return how much of the guided velocity no combination of the first branches is."""
        known = torch.stack(branches[:count], dim=1)
        nearest = known @ torch.linalg.lstsq(known, guided[:, None]).solution[:, 0]
        return float((guided - nearest).norm() / guided.norm())

    changed, left = untold(1), untold(2)
    if left > ROUNDING and left > UNTOLD * changed:
        raise InputError(
            f"{type(model.pipe).__name__}: {left / changed:.0%} of what its guidance changes is in neither of its "
            "branches, as it treats the negative prompt otherwise than a prompt; leave --num_model_calls out"
        )


def walk_branches(velocity, start: torch.Tensor, sigmas: list[float], branches: list[str], weigh) -> torch.Tensor:
    """Return the final latents (B, ...) float32 of a walk from `start`, one step for each of `branches`.

    velocity(index, branch, latents) is a branch's velocity (B, ...) float32 in a step. weigh(index, terms) returns the
    step's weights for `terms`: the newest outputs of the prompt's branch, newest first, the negative one's, latents
    and start, each (B, ...), or None where there is none yet, or the same as another. `sigmas` has the end's 0 too.
    """
    latents, outputs = start, {"prompt": [None] * NEWEST, "negative": [None] * NEWEST}
    for index, called in enumerate(branches):
        for branch in CALLED[called]:
            outputs[branch] = [velocity(index, branch, latents), *outputs[branch][:-1]]
        terms = [*outputs["prompt"], *outputs["negative"], latents if index else None, start]
        weights = weigh(index, terms)
        slope = sum(weight * term for weight, term in zip(weights, terms) if term is not None)
        latents = latents + (sigmas[index + 1] - sigmas[index]) * slope
    return latents


def normal_equations(terms: list[torch.Tensor | None], target: torch.Tensor) -> torch.Tensor:
    """Return the sums, float64 (TERMS + 1, TERMS + 1), of products of the terms and the target, each (B, ...): what
    least squares over these and other samples needs to know of these."""
    total = torch.zeros(TERMS + 1, TERMS + 1, dtype=torch.float64)
    there = [index for index, term in enumerate((*terms, target)) if term is not None]
    for sample in zip(*((*terms, target)[index] for index in there)):
        rows = torch.stack([part.flatten() for part in sample]).double()
        total[torch.tensor(there)[:, None], torch.tensor(there)] += rows @ rows.T
    return total


def solve_weights(equations: torch.Tensor) -> list[float]:
    """Return the weights of each term, 0 where it was not there, with which they come nearest to the target.

    Ridge least squares: without it near equal terms get large weights of opposite signs, which do not carry over.
    """
    there = equations.diagonal()[:-1].nonzero().flatten()
    products, moments = equations[there[:, None], there], equations[there, -1]
    ridge = RIDGE * products.diagonal().mean() * torch.eye(len(there), dtype=torch.float64)
    weights = torch.zeros(TERMS, dtype=torch.float64)
    weights[there] = torch.linalg.solve(products + ridge, moments)
    # Rounded: the last digits depend on where in memory the numbers lay, and a file would be another each time.
    return [round(weight, 9) for weight in weights.tolist()]


def starting_latents(pipe: DiffusionPipeline, **call) -> torch.Tensor:
    """Return the noise (B, ...) float32 with which the pipeline's call begins, in its loop's layout."""

    def on_step(index, model_output, sample):
        raise Answer(sample.to(torch.float32, copy=True))

    try:
        with torch.no_grad(), refusals(pipe):
            run_pipeline(pipe, Probe([1.0], on_step, None, pipe.scheduler), **call)
    except Answer as answer:
        return answer.args[0]
    raise RuntimeError(f"{type(pipe).__name__} ended before its first step")


def decoded(pipe: DiffusionPipeline, latents: torch.Tensor, **call):
    """Return what the pipeline's call returns where its loop ends at these latents (B, ...); nothing is denoised."""
    probe = Probe([1.0], lambda index, model_output, sample: latents.to(sample), None, pipe.scheduler)
    with torch.no_grad(), refusals(pipe):
        output = run_pipeline(pipe, probe, **call)
    pipe.maybe_free_model_hooks()
    return output


@torch.no_grad()
def final_latents(
    pipe, schedule: Schedule, calls: dict[str, dict], start: torch.Tensor, before_step=lambda index: None
):
    """Return the final latents (B, ...) float32 of a schedule with branches, which begins with `start`.

    `calls` are branch_calls'; before_step(index) is called before each step's model calls.
    """
    sigmas = [*timesteps_to_sigmas(schedule.timesteps), 0.0]
    model = PipelineVelocity(pipe, schedule.timestep_table)
    begun = set()

    def velocity(index: int, branch: str, latents: torch.Tensor) -> torch.Tensor:
        if index not in begun:
            begun.add(index)
            before_step(index)
        return model(latents, sigmas[index], **calls[branch]).to(latents)

    return walk_branches(velocity, start, sigmas, schedule.branches, lambda index, terms: schedule.coefficients[index])


def draw(
    pipe: DiffusionPipeline,
    schedule: Schedule,
    call: dict,
    seed: int,
    before_step=lambda index: None,
    keep=lambda latents: None,
    **kwargs,
):
    """Return what pipe(**call, **kwargs) returns, drawn on a schedule with branches; `seed` is its generator's.

    `schedule.guidance` switches the call's classifier-free guidance off (ask_single_branch). before_step(index) is
    called before each step's model calls, keep(latents) with the final ones, (1, ...) float32.
    """
    calls = branch_calls(pipe, call, call | schedule.guidance)
    start = starting_latents(pipe, generator=torch.Generator().manual_seed(seed), **calls["prompt"])
    latents = final_latents(pipe, schedule, calls, start, before_step)
    keep(latents)
    return decoded(pipe, latents, generator=torch.Generator().manual_seed(seed), **calls["prompt"], **kwargs)


def count_calls(branches: list[str]) -> int:
    """Return how many model calls a picture takes."""
    return sum(len(CALLED[called]) for called in branches)
