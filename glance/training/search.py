"""Which branches does a sampler call at which of the base's steps, for so many model calls? Found by trying.

A plan says it: the step of each call and the branches that are called there. For a plan the weights are fitted along
its own path to the base's points, on the trajectories of one half of the captions; where it ends on those of the
other half says how good it is. Trying goes on from the best plans so far, until it has cost as many model calls as
drawing the trajectories did. The weights of the best plan are then fitted on all of them.
"""

import itertools
import logging
import random
from dataclasses import dataclass

import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from glance.ask import sampler as grids
from glance.ask.mixed import count_calls, normal_equations, solve_weights, walk_branches
from glance.ask.velocity import PipelineVelocity
from glance.training import distribution, stages
from glance.training.trajectories import Teacher, Trajectories, list_jobs
from glance_utils import grid_positions


logger = logging.getLogger(__name__)

Plan = tuple[tuple[int, str], ...]  # (position among the base's steps, 0-based, branches called there), ascending
LETTERS = {"P": "prompt", "N": "negative", "B": "both"}
# By calls, the best that were found on the demo model among 50 steps, counted from 1: where a search begins.
FOUND = {
    4: "P1 P10 N39 P40",
    6: "P1 N17 B19 N41 P42",
    8: "P1 N12 P13 N20 B38 N44 P45",
    10: "P1 N5 P7 N12 B21 B38 B46",
    14: "P1 N4 P5 N9 B15 P21 N30 B33 B43 N47 P48",
    20: "B1 B3 N7 P8 B13 B15 P22 N25 B30 B38 B45 B49",
}
SURVIVORS = 4  # plans that are changed to get the next


def written(plan: Plan) -> str:
    """Return the plan as one line, steps counted from 1: P the prompt's branch, N the negative prompt's, B both."""
    letters = {branches: letter for letter, branches in LETTERS.items()}
    return " ".join(f"{letters[branches]}{position + 1}" for position, branches in plan)


def read_plan(text: str, steps: int) -> Plan:
    """Return a plan that was written for 50 steps, scaled to so many."""
    return tuple(((round((int(word[1:]) - 1) * (steps - 1) / 49)), LETTERS[word[0]]) for word in text.split())


@dataclass(frozen=True)
class Examples:
    """Trajectories of the base that this process tries plans on, those of a caption side by side."""

    captions: list[str]  # of each of them
    points: torch.Tensor  # (trajectories, steps + 1, ...) float32 on the CPU
    fitted: torch.Tensor  # (trajectories,) bool: in the half on which weights are fitted
    own: int  # so many are this process's; others fill its share up, so that a sharded base computes on all


class Trials:
    """A base on which plans are tried."""

    def __init__(self, model: PipelineVelocity, calls: dict[str, dict], sigmas: list[float], batch_size: int):
        """`calls` are branch_calls', `sigmas` the base's own with the 0 at the end; so many pictures of a caption are
        asked for at once."""
        self.model, self.calls, self.sigmas, self.batch_size = model, calls, sigmas, batch_size

    def velocity(self, captions: list[str], branch: str, latents: torch.Tensor, sigma: float) -> torch.Tensor:
        """Return a branch's velocities (B, ...) float32 at latents (B, ...) of these captions, on the CPU."""
        prompts = captions if branch == "prompt" else [self.calls[branch]["prompt"]] * len(captions)
        velocities = []
        for prompt, run in itertools.groupby(range(len(latents)), prompts.__getitem__):
            for rows in torch.tensor(list(run)).split(self.batch_size):
                call = self.calls[branch] | {"prompt": prompt}
                velocities.append(self.model(latents[rows], sigma, **call).float().cpu())
        return torch.cat(velocities)

    @torch.no_grad()
    def fit(self, plan: Plan, examples: Examples, rows: torch.Tensor) -> tuple[list[list[float]], torch.Tensor]:
        """Return the plan's weights, fitted on `rows` (trajectories,) bool of the examples of all processes, and the
        final latents of all."""
        positions, branches = zip(*plan)
        ends = [*positions[1:], len(self.sigmas) - 1]
        sigmas = [self.sigmas[position] for position in (*positions, ends[-1])]
        rows = rows & (torch.arange(len(rows)) < examples.own)
        weights = []

        def velocity(index, branch, latents):
            return self.velocity(examples.captions, branch, latents, sigmas[index])

        def weigh(index, terms):
            latents = terms[-1] if terms[-2] is None else terms[-2]
            slope = (examples.points[:, ends[index]] - latents) / (sigmas[index + 1] - sigmas[index])
            equations = normal_equations([term if term is None else term[rows] for term in terms], slope[rows])
            equations = sum(distribution.gather_on_host(equations))
            weights.append(distribution.gather_on_host(solve_weights(equations))[0])
            return weights[-1]

        return weights, walk_branches(velocity, examples.points[:, 0], sigmas, branches, weigh)

    def error(self, plan: Plan, examples: Examples, folds: tuple[bool, ...]) -> float:
        """Return how far from the base's own ends the plan ends, in the mean over `folds`: fitted on one half of the
        captions, measured on the other."""
        off = size = 0.0
        for fold in folds:
            rows = examples.fitted == fold
            _, ends = self.fit(plan, examples, rows)
            measured = ~rows & (torch.arange(len(rows)) < examples.own)
            exact = examples.points[measured, -1].double()
            parts = distribution.gather_on_host(((ends[measured] - exact).square().sum(), exact.square().sum()))
            off, size = off + sum(part for part, _ in parts), size + sum(part for _, part in parts)
        error = float((off / size) ** 0.5)
        return error if error == error else float("inf")


def draw_examples(args, teacher: Teacher, captions: list[str]) -> Examples:
    """Let the base draw --num_trajectories of each caption, each on one process, and return this process's."""
    state, jobs, points = PartialState(), list_jobs(args, captions), {}
    numbers = list(range(len(jobs)))

    def draw(number: int, advance) -> None:
        points[number] = torch.cat(teacher.draw(*jobs[number], advance=advance))

    stages.enter("drawing")
    distribution.share(numbers, draw, "drawing", len(teacher.timesteps))
    own = numbers[state.process_index :: state.num_processes]
    share = -(-len(jobs) // state.num_processes) if distribution.is_sharded() else len(own)
    rows = own + [max(points)] * (share - len(own))
    # Of several captions every other one is fitted on, of a single one the first half of its trajectories.
    seeds = args.num_trajectories
    fitted = [row // seeds % 2 == 0 if captions[1:] else row < seeds / 2 for row in rows]
    points = torch.stack([points[row] for row in rows])
    return Examples([jobs[row][0] for row in rows], points, torch.tensor(fitted), len(own))


def find_sampler(args, teacher: Teacher, trials: Trials, digest: str, captions: list[str]) -> Trajectories:
    """Return the sampler of --num_model_calls that was found, with where the base's trajectories begin and end."""
    examples = draw_examples(args, teacher, captions)
    stages.enter("choosing")
    steps, calls, guided = len(teacher.timesteps), args.num_model_calls, "negative" in trials.calls
    tries = args.num_plans or max(1, steps * (2 if guided else 1) // calls)
    plan, _ = find_plan(trials, examples, calls, tries, guided, args.seed)
    error = trials.error(plan, examples, (True, False))
    weights, _ = trials.fit(plan, examples, torch.ones_like(examples.fitted))
    logger.info(f"  {calls} model calls: error {error:.4f} to {steps} steps, {written(plan)}")
    positions, branches = map(list, zip(*plan))
    shares = distribution.gather_on_host(examples.points[: examples.own, [0, -1]])
    count, number = len(shares), len(captions) * args.num_trajectories
    both = torch.stack([shares[index % count][index // count] for index in range(number)])
    both = both.unflatten(0, (len(captions), -1))
    ends = [teacher.sigmas[position] for position in positions] + [0.0]
    lengths = [high - low for high, low in zip(ends, ends[1:])]
    return Trajectories(
        digest, "mix", positions, lengths, weights, branches, error, both[0, 0, 1:], both[:, :, :1], both[:, :, 1:]
    )


def first_plans(calls: int, points: list[torch.Tensor], sigmas: list[float], guided: bool) -> list[Plan]:
    """Return plans of so many calls to begin with: the one found elsewhere, and grids of the base's own steps.

    `points` and `sigmas` are one or several trajectories', as best_positions takes them; `guided` says whether there
    is a negative branch.
    """
    steps = len(sigmas) - 1
    plans = [read_plan(FOUND[calls], steps)] if guided and calls in FOUND else []
    for both in (True, False) if guided else (False,):
        count = calls // 2 if both else calls
        grids_of = [grids.best_positions(points, sigmas, count)] if count <= steps else []
        grids_of += [grid_positions(grid, count, steps) for grid in ("glance", "even")]
        for positions in grids_of:
            names = ["both"] * count if both else ["prompt"] * count
            if guided and not both:
                names = [("prompt", "negative")[index % 2] for index in range(count)]
            plan = tuple(zip(positions, names))
            if both and calls % 2:  # one call more, in the longest step
                plan = tuple(sorted((*plan, (widest_gap([*positions, steps]), "prompt"))))
            plans.append(plan)
    return list(dict.fromkeys(plan for plan in plans if is_valid(plan, calls, steps, guided)))


def widest_gap(positions: list[int]) -> int:
    """Return the middle of the longest distance between positions."""
    start, end = max(zip(positions, positions[1:]), key=lambda pair: pair[1] - pair[0])
    return (start + end) // 2


def is_valid(plan: Plan, calls: int, steps: int, guided: bool) -> bool:
    """Return whether the plan begins at the first step, ascends, takes so many calls and, where there is guidance,
    calls either branch."""
    positions, branches = zip(*plan)
    ascends = all(low < high for low, high in zip(positions, positions[1:]))
    return (
        positions[0] == 0
        and ascends
        and positions[-1] < steps
        and len(plan) > 1
        and count_calls(branches) == calls
        and (not guided or set(branches) - {"prompt"} != set())
        and set(branches) != {"negative"}
    )


def changed(plan: Plan, steps: int, guided: bool, choice: random.Random) -> Plan:
    """Return the plan with one change: a step moved, a branch swapped, a step of both split, or two steps joined.

    It need not be valid.
    """
    plan = [list(part) for part in plan]
    kind = choice.random() if guided else 0.0
    if kind < 0.55:
        plan[choice.randrange(1, len(plan))][0] += choice.choice((-5, -3, -2, -1, 1, 2, 3, 5))
    elif kind < 0.7:
        part = choice.choice(plan)
        part[1] = {"prompt": "negative", "negative": "prompt"}.get(part[1], part[1])
    elif kind < 0.85:
        both = [index for index, (_, branches) in enumerate(plan) if branches == "both"]
        if both:
            index = choice.choice(both)
            end = plan[index + 1][0] if index + 1 < len(plan) else steps
            first, second = choice.choice((("prompt", "negative"), ("negative", "prompt")))
            plan[index][1] = first
            plan.insert(index + 1, [choice.randint(plan[index][0], max(end - 1, plan[index][0])), second])
    else:
        pairs = [i for i in range(len(plan) - 1) if {plan[i][1], plan[i + 1][1]} == {"prompt", "negative"}]
        if pairs:
            index = choice.choice(pairs)
            plan[index][1] = "both"
            del plan[index + 1]
    return tuple((position, branches) for position, branches in plan)


def find_plan(
    trials: Trials, examples: Examples, calls: int, tries: int, guided: bool, seed: int
) -> tuple[Plan, float]:
    """Return the best of so many plans, tried on the examples, and its error.

    All processes try the same ones. The same arguments find the same plan.
    """
    steps, choice = len(trials.sigmas) - 1, random.Random(seed)
    first = first_plans(calls, list(examples.points.unbind(1)), trials.sigmas, guided)
    first = distribution.gather_on_host(first)[0]
    ranked, tried = [], set()
    hidden = not PartialState().is_local_main_process
    with tqdm(total=tries, desc=f"trying plans of {calls} calls", delay=1, disable=hidden) as progress:
        while len(tried) < tries:
            if len(tried) < len(first):
                plan = first[len(tried)]
            else:
                plan = next_plan([plan for _, plan in ranked[:SURVIVORS]], tried, calls, steps, guided, choice)
                if plan is None:
                    break
            tried.add(plan)
            ranked.append((trials.error(plan, examples, (True,)), plan))
            ranked.sort(key=lambda pair: pair[0])
            progress.update()
            progress.set_postfix(error=f"{ranked[0][0]:.4f}", refresh=False)
    return ranked[0][1], ranked[0][0]


def next_plan(best: list[Plan], tried: set[Plan], calls: int, steps: int, guided: bool, choice) -> Plan | None:
    """Return a valid change of one of the best plans that was not tried yet, None where a thousand attempts find
    none: all near ones are known."""
    for _ in range(1000):
        plan = changed(choice.choice(best), steps, guided, choice)
        if plan not in tried and is_valid(plan, calls, steps, guided):
            return plan
    return None
