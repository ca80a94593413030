"""Which branches does a sampler call at which of the base's steps, for so many model calls? Found by trying.

A plan says it: the step of each call and the branches that are called there. For a plan the weights are fitted along
its own path to the base's points, on the trajectories of one half of the captions; where it ends on those of the
other half says how good it is. Trying goes on from the best plans so far, until it has cost as many model calls as
drawing the trajectories did. The weights of the best plan are then fitted on all of them.

Before, a few numbers of calls are measured by plans to begin with, beside what the base as shipped comes to in as
many: a curve, from which --num_model_calls auto takes its number.
"""

import contextlib
import itertools
import logging
import random

import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from glance.ask import sampler as grids
from glance.ask.mixed import count_calls, normal_equations, solve_weights, walk_branches
from glance.ask.schedule import ask_timestep_table, ask_timesteps, has_own_steps
from glance.ask.velocity import PipelineVelocity
from glance.training import distribution, stages
from glance.training.examples import Examples, distance, draw_examples, filled
from glance.training.own_defaults import FEW_CALLS
from glance.training.trajectories import Teacher, Trajectories
from glance_utils import InputError, grid_positions


logger = logging.getLogger(__name__)

Plan = tuple[tuple[int, str], ...]  # (position among the base's steps, 0-based, branches called there), ascending
LETTERS = {"P": "prompt", "N": "negative", "B": "both"}
# By calls, the best that were found on the demo model among 50 steps, counted from 1: where a search begins.
FOUND = {
    4: "P1 P13 N39 P40",
    6: "P1 N17 B19 N41 P42",
    8: "P1 N12 P13 N20 B38 N44 P45",
    10: "P1 N5 P7 N12 B21 B38 B46",
    14: "P1 N4 P5 N9 B15 P21 N30 B33 B43 N47 P48",
    20: "B1 B4 B7 B10 B17 P22 N25 B30 B38 B45 B49",
}
AT_ONCE = (1, 2, 4, 8, 16)  # pictures that are asked for at once,
LARGEST = 2**18  # as far as their latents have no more numbers: those of FLUX.1 at 1024x1024
SURVIVORS = 4  # plans that are changed to get the next
CURVE = (4, 6, 8, 10, 14, 20, 28, 40)  # numbers of calls that are measured
MOST_MEASURED, MOST_PLANS = 16, 3  # trajectories and plans, for each of these
Shipped = tuple[list[float], list[list[float]] | None]  # timesteps and timestep_table of the base's own few steps


def written(plan: Plan) -> str:
    """Return the plan as one line, steps counted from 1: P the prompt's branch, N the negative prompt's, B both."""
    letters = {branches: letter for letter, branches in LETTERS.items()}
    return " ".join(f"{letters[branches]}{position + 1}" for position, branches in plan)


def read_plan(text: str, steps: int) -> Plan:
    """Return a plan that was written for 50 steps, scaled to so many."""
    return tuple(((round((int(word[1:]) - 1) * (steps - 1) / 49)), LETTERS[word[0]]) for word in text.split())


def sizes_at_once(args, branches: dict, captions: int, shape: torch.Size | None) -> dict[str, list[int]]:
    """Return how many pictures of a prompt each of the branches may be asked for at once: 1, --train_batch_size and,
    as any number is made up of them, powers of two, as far as their latents are together no larger than one picture's
    of 1024x1024.

    `shape` is that of a picture's latents (1, ...), None where the pipeline takes one at a time.
    """
    if shape is None:
        return {branch: [1] for branch in branches}
    room = LARGEST // shape.numel()
    most = {"prompt": args.num_trajectories, "negative": captions * args.num_trajectories}
    powers = {branch: {size for size in AT_ONCE if size <= min(room, most[branch])} for branch in branches}
    return {branch: sorted({1, args.train_batch_size} | sizes) for branch, sizes in powers.items()}


def batches_of(count: int, sizes: list[int]) -> list[int]:
    """Return as few of the sizes, 1 among them, as make up the count, the largest first."""
    batches = []
    while count:
        batches.append(max(size for size in sizes if size <= count))
        count -= batches[-1]
    return batches


class Trials:
    """A base on which plans are tried."""

    def __init__(
        self, model: PipelineVelocity, calls: dict[str, dict], sigmas: list[float], sizes: dict[str, list[int]]
    ):
        """`calls` are branch_calls', `sigmas` the base's own with the 0 at the end, `sizes` sizes_at_once's."""
        self.model, self.calls, self.sigmas, self.sizes = model, calls, sigmas, sizes

    @property
    def guided(self) -> bool:
        """Return whether there is a negative branch."""
        return "negative" in self.calls

    @property
    def most_calls(self) -> int:
        """Return how many model calls the base's own steps are."""
        return (len(self.sigmas) - 1) * (2 if self.guided else 1)

    def velocity(self, captions: list[str], branch: str, latents: torch.Tensor, sigma: float) -> torch.Tensor:
        """Return a branch's velocities (B, ...) float32 at latents (B, ...) of these captions, on the CPU."""
        prompts = captions if branch == "prompt" else [self.calls[branch]["prompt"]] * len(captions)
        velocities = []
        for prompt, run in itertools.groupby(range(len(latents)), prompts.__getitem__):
            rows = list(run)
            for size in batches_of(len(rows), self.sizes[branch]):
                call = self.calls[branch] | {"prompt": prompt}
                velocities.append(self.model(latents[rows[:size]], sigma, **call).float().cpu())
                del rows[:size]
        return torch.cat(velocities)

    @torch.no_grad()
    def fit(self, plan: Plan, examples: Examples, rows: torch.Tensor) -> tuple[list[list[float]], torch.Tensor]:
        """Return the plan's weights, fitted on `rows` (trajectories,) bool of the examples of all processes, and the
        final latents of all."""
        positions, branches = zip(*plan)
        ends = [*positions[1:], len(self.sigmas) - 1]
        sigmas = [self.sigmas[position] for position in (*positions, ends[-1])]
        rows = rows & examples.own_rows()
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
        return distance(examples, [(self.fit(plan, examples, examples.fitted == half)[1], half) for half in folds])


def ask_shipped(pipe, args, steps: int, call: dict, guided: bool, captions: int) -> dict[int, Shipped | None]:
    """Return the schedule that the pipeline itself takes for so many calls, None where it has none, for each number of
    calls that is measured: those of CURVE and --num_model_calls that its `steps` can take.

    With guidance, `guided`, each of its steps is two calls. A base that ships a list of its own steps has no other
    schedule. Raise InputError where the number that is asked for is not among them, or auto has none to choose from
    on so many captions.
    """
    most, calls = steps * (2 if guided else 1), args.num_model_calls
    possible = sorted(number for number in {*CURVE, *([] if calls == "auto" else [calls])} if number <= most)
    these = f"--num_model_calls {calls}: the {steps} steps of this {type(pipe).__name__} are {most} model calls"
    if calls == "auto" and not set(possible) - not_told(possible, captions):
        raise InputError(f"{these}, too few to choose from{'' if captions > 1 else ' on one caption'}; give a number")
    if calls != "auto" and calls > most:
        raise InputError(f"{these}; give {most} at most")
    shipped, fixed = dict.fromkeys(possible), has_own_steps(pipe, steps, **call)
    for number in [] if fixed else possible:
        few = number // 2 if guided else number
        with contextlib.suppress(InputError):  # with so few steps it walks no schedule of one after another
            shipped[number] = ask_timesteps(pipe, few, **call), ask_timestep_table(pipe, few, **call)
    return shipped


def not_told(numbers: list[int], captions: int) -> set[int]:
    """Return the numbers of calls of which so many captions do not tell what is best for others."""
    return {number for number in numbers if captions == 1 and number < FEW_CALLS}


def shipped_error(teacher: Teacher, shipped: Shipped, examples: Examples) -> float:
    """Return how far from the base's own ends it ends on another schedule of its own, over the half of the captions
    that plans are measured on."""
    timesteps, table = shipped
    ends = examples.points[:, -1].clone()
    for row in filled((~examples.fitted & examples.own_rows()).nonzero().flatten().tolist()):
        call = teacher.call | {"prompt": examples.captions[row]}
        ends[row] = grids.walk(teacher.pipe, timesteps, table, examples.seeds[row], **call)[-1]
    return distance(examples, [(ends, True)])


def measure_curve(
    teacher: Teacher, trials: Trials, examples: Examples, shipped: dict[int, Shipped | None], left_out: set[int]
) -> list[list]:
    """Return [calls, error as shipped, error calibrated] for each number of calls of `shipped`, which is ask_shipped's
    answer; an error is None where there is none to say.

    Calibrated is the best of a few of first_plans, but for the numbers that are left out. At most MOST_MEASURED
    trajectories are tried on, half of them to fit and half to measure, and as many plans, MOST_PLANS at most, as let
    all of it cost about as many calls as drawing all of the trajectories did.
    """
    few, points, none = examples.some(MOST_MEASURED), examples.to_begin_with(), float("inf")
    known = few.all_own()
    measured = sum(not fitted for _, fitted in known)
    share = len(examples.all_own()) * trials.most_calls / len(shipped)  # of the calls, for each number
    curve, hidden = [], not PartialState().is_local_main_process
    for calls, schedule in tqdm(shipped.items(), desc="measuring numbers of calls", delay=1, disable=hidden):
        tries = min(max(int((share - calls * measured) / (calls * len(known))), 1), MOST_PLANS)
        plans = [] if calls in left_out else first_plans(calls, points, trials.sigmas, trials.guided)[:tries]
        plans = distribution.gather_on_host(plans)[0]
        own = shipped_error(teacher, schedule, few) if schedule else none
        calibrated = min((trials.error(plan, few, (True,)) for plan in plans), default=none)
        curve.append([calls, *(None if error == none else error for error in (own, calibrated))])
    return distribution.gather_on_host(curve)[0]


def choose_calls(curve: list, target: float) -> list[int]:
    """Return the numbers of calls of the curve that may do, ascending: from the fewest whose calibrated error is below
    the target; where none is, say so and return the one with the least."""
    told = [(error, calls) for calls, _, error in curve if error is not None]
    enough = min((calls for error, calls in told if error < target), default=None)
    if enough is not None:
        logger.info(f"  {enough} model calls are the fewest with an error below {target:g}")
        return [calls for _, calls in told if calls >= enough]
    error, calls = min(told)
    logger.warning(
        f"--target_error {target:g}: no number of model calls that was tried comes so near; {calls} come nearest, "
        f"with {error:.4f}"
    )
    return [calls]


def plans_tried(args, most_calls: int, calls: int) -> int:
    """Return how many plans are tried: so many that they cost what drawing did, `most_calls` a picture, unless
    --num_plans says it."""
    return args.num_plans or max(1, most_calls // calls)


def find_sampler(
    args, teacher: Teacher, trials: Trials, shipped: dict[int, Shipped | None], digest: str, captions: list[str]
) -> Trajectories:
    """Return the sampler of --num_model_calls that was found, with where the base's trajectories begin and end.

    `shipped` is ask_shipped's answer.
    """
    examples = draw_examples(args, teacher, captions)
    stages.enter("choosing")
    steps, calls = len(teacher.timesteps), args.num_model_calls
    curve = measure_curve(teacher, trials, examples, shipped, {calls} | not_told(list(shipped), len(captions)))
    found, target = {}, args.target_error or 0.0
    for calls in choose_calls(curve, target) if calls == "auto" else [calls]:
        plan, _ = find_plan(trials, examples, calls, plans_tried(args, trials.most_calls, calls), args.seed)
        error = found[calls] = trials.error(plan, examples, (True, False))
        if error < target:
            break
        if target:  # the curve is of fewer captions
            logger.warning(f"--target_error {target:g}: on all captions {calls} model calls come to {error:.4f}")
    weights, _ = trials.fit(plan, examples, torch.ones_like(examples.fitted))
    logger.info(f"  {calls} model calls: error {error:.4f} to {steps} steps, {written(plan)}")
    positions, branches = map(list, zip(*plan))
    shares = distribution.gather_on_host(examples.points[: examples.own, [0, -1]])
    count, number = len(shares), len(captions) * args.num_trajectories
    both = torch.stack([shares[index % count][index // count] for index in range(number)])
    both = both.unflatten(0, (len(captions), -1))
    ends = [teacher.sigmas[position] for position in positions] + [0.0]
    return Trajectories(
        digest=digest,
        grid="mix",
        positions=positions,
        lengths=[high - low for high, low in zip(ends, ends[1:])],
        coefficients=weights,
        branches=branches,
        error=error,
        curve=[[calls, shipped, found.get(calls, calibrated)] for calls, shipped, calibrated in curve],
        picture=both[0, 0, 1:],
        starts=both[:, :, :1],
        targets=both[:, :, 1:],
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


def find_plan(trials: Trials, examples: Examples, calls: int, tries: int, seed: int) -> tuple[Plan, float]:
    """Return the best of so many plans, tried on the examples, and its error.

    All processes try the same ones. The same arguments find the same plan.
    """
    steps, guided, choice = len(trials.sigmas) - 1, trials.guided, random.Random(seed)
    first = first_plans(calls, examples.to_begin_with(), trials.sigmas, guided)
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
