"""What does the frozen base teach about itself? It draws its captions in all its steps, once; a few points are kept.

From them come the grid that follows the model best, the fitted solver's coefficients, what the trajectory loss trains
on, and the training image where none is given. They stay beside the LoRAs, so that a resumed run, or another one that
draws the same, need not draw them again.
"""

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors

from glance.ask import latents as ask_latents
from glance.ask import sampler as grids
from glance.ask.pipeline import further_denoisers
from glance.ask.velocity import PipelineVelocity
from glance.files import faults
from glance.files.atomic import replace_file
from glance.files.checkpoints import NOT_COMPARED, NOT_DRAWN
from glance.files.lora import in_order
from glance.files.pipeline_images import call_with, digest_of, pictures_of
from glance.files.recipe import is_number
from glance.training import distribution, stages
from glance.training.calls_chart import write_curve
from glance_utils import InputError, __version__, denoiser, grid_positions, segment_slopes, timesteps_to_sigmas


logger = logging.getLogger(__name__)
FORMAT = 5  # of the file, and of how its content is made; one of another format is drawn again
MOST_FITTED = 4  # trajectories that tell the sampler; the grid of one alone varies by a tenth in what it loses


@dataclass(frozen=True)
class Trajectories:
    """The base's own trajectories, with its guidance: `captions` x `seeds` of them, at the steps that were kept."""

    digest: str  # of all that they depend on
    grid: str
    positions: list[int]  # the kept steps, 0-based, among all of the model's
    lengths: list[float]  # of each of them, in sigma
    coefficients: list[list[float]] | None  # a Schedule's, for each kept step
    branches: list[str] | None  # that each kept step calls, where they are mixed (glance/ask/mixed.py)
    error: float | None  # of the sampler to all steps, on another trajectory; None where there was nothing to choose
    curve: list[list] | None  # search.measure_curve's, where a number of model calls was asked for
    picture: torch.Tensor  # (1, ...) float32 on the CPU, where the first ends: what the base draws of its caption
    starts: torch.Tensor  # (captions, seeds, steps, ...) float32 on the CPU, the points at the kept steps
    targets: torch.Tensor  # the same shape: the velocities that lead from each of them to the next
    # With mixed branches there is no velocity from one to the next: of each trajectory its start, and its end.


def check_can_draw(pipe) -> None:
    """Raise InputError where the pipeline guides with a second model, which training does not load."""
    if further_denoisers(pipe):
        raise InputError(
            f"{type(pipe).__name__} guides with a second model, which training does not load, so it cannot draw; give "
            "an image, --loss flow, --grid glance or even, --solver euler"
        )


class Teacher:
    """The base that draws with all its steps, to be learned from."""

    def __init__(self, pipe, base_timesteps: list[float], timestep_table, call: dict):
        self.pipe, self.timesteps, self.call = pipe, base_timesteps, call
        self.timestep_table = timestep_table
        self.sigmas = [*timesteps_to_sigmas(base_timesteps), 0.0]

    def draw(
        self, caption: str, seed: int, positions=None, coefficients=None, advance=lambda: None
    ) -> list[torch.Tensor]:
        """Return all points of a trajectory, before each step and after the last, (1, ...) float32 each.

        `positions` are the steps to walk, all by default; `coefficients` are a fitted solver's, [a, c] for each;
        advance() is called after each step.
        Raise FloatingPointError where the trajectory does not end at finite numbers: what learns from it would not.
        """
        timesteps = self.timesteps if positions is None else [self.timesteps[position] for position in positions]
        points = grids.walk(
            self.pipe,
            timesteps,
            self.timestep_table,
            seed,
            coefficients,
            advance=advance,
            **call_with(self.call, caption),
        )
        with faults.explained(f"what the base draws to be trained on, in {denoiser(self.pipe).dtype}"):
            ask_latents.check_finite(points[-1], "its final latents")
        return points

    @torch.no_grad()
    def check(self, points: list[torch.Tensor], seed: int, positions: list[int]) -> None:
        """Raise InputError where a single step, as training sees it, has another velocity than the trajectory of the
        seed has at one of the positions."""
        model = PipelineVelocity(self.pipe, self.timestep_table, **self.call)
        slopes = segment_slopes(points, self.sigmas)
        for position in positions:
            velocity = model(points[position], self.sigmas[position], [seed]).float().cpu()
            if (error := grids.relative_error(velocity, slopes[position])) > 0.02:
                raise InputError(
                    f"{type(self.pipe).__name__}: its guidance at timestep {self.timesteps[position]:.0f} depends on "
                    f"the steps before (the velocity alone is {error:.2f} off); train with --guidance fold"
                )


def choose_sampler(args, teacher: Teacher, points: list[torch.Tensor], measured: tuple[str, int], exact: torch.Tensor):
    """Return (grid, positions, coefficients or None, error or None), found on some trajectories, whose `points` are
    (N, ...), and measured on another, `measured` (caption, seed), which ends at `exact`.

    Where there is a choice, every way draws once and the one that ends nearest to all the model's own steps is taken:
    --grid auto may end with any grid, --solver fitted with Euler where the numbers do not carry over.
    """
    count, steps = args.num_inference_steps, len(teacher.timesteps)
    choices = []
    for grid in ("auto", "glance", "even") if args.grid == "auto" else (args.grid,):
        if grid == "auto":
            positions = grids.best_positions(points, teacher.sigmas, count)
        else:
            positions = grid_positions(grid, count, steps)
            if args.grid == "auto" and len(set(positions)) < count:
                continue  # too few steps of the model's own for the published grid
        choices.append((grid, "euler", positions, None))
        if args.solver == "fitted":
            choices.append((grid, "fitted", positions, grids.fit_coefficients(points, teacher.sigmas, positions)))
    choices = distribution.gather_on_host(choices)[0]  # another kind of processor may round otherwise

    def measure(choice, advance) -> float:
        return grids.relative_error(teacher.draw(*measured, *choice[2:], advance)[-1], exact)

    if len(choices) > 1:
        stages.enter("choosing")
        errors = distribution.share(choices, measure, "choosing a sampler", count)
        ranked = sorted(zip(errors, choices), key=lambda pair: pair[0])
        for error, (grid, solver, positions, _) in ranked:
            kept = " ".join(str(position + 1) for position in positions)  # as the paper counts them
            logger.info(f"  {grid} grid, {solver} solver: error {error:.4f} to {steps} steps, positions {kept}")
        best, (grid, _, positions, coefficients) = ranked[0]
        return grid, positions, coefficients, best
    grid, _, positions, coefficients = choices[0]
    return grid, positions, coefficients, None


def seeds_per_caption(args) -> int:
    """Return how many trajectories of a caption are learned from."""
    return 1 if args.loss == "flow" else args.num_trajectories


def trajectory_seeds(args, captions: list[str]) -> list[list[int]]:
    """Return the seeds of what is learned from, (captions, trajectories of each)."""
    seeds = seeds_per_caption(args)
    # Other noises than the preview's, which has --seed itself.
    return [[args.seed + 1 + i * seeds + k for k in range(seeds)] for i in range(len(captions))]


def list_jobs(args, captions: list[str]) -> list[tuple[str, int]]:
    """Return (caption, seed) of every trajectory that is drawn: those that are learned from and, where there would be
    none to measure a sampler by, one more."""
    jobs = [(caption, seed) for caption, seeds in zip(captions, trajectory_seeds(args, captions)) for seed in seeds]
    if len(jobs) == 1 and (args.grid == "auto" or args.solver == "fitted"):
        jobs.append((captions[0], args.seed + 2))  # nothing is trained on it
    return jobs


def saved_or_drawn(args, teacher: Teacher, base: str, captions: list[str], draw) -> Trajectories:
    """Return the base's trajectories: those in the output folder if they are of these settings, else draw(digest),
    by all processes together. They are not written yet. `base` is base.identify's."""
    path = Path(args.output_dir) / faults.TRAJECTORIES
    digest = settings_digest(args, teacher, base, captions)
    digest = distribution.gather_on_host(digest)[0]  # files may have another date on another machine
    saved = load(path, digest)
    if all(distribution.gather_on_host(saved is not None)):
        logger.info(f"Trajectories: those in {path}")
        return saved
    return draw(digest)


def draw_trajectories(args, accelerator, teacher: Teacher, captions: list[str], digest: str) -> Trajectories:
    """Return the base's trajectories, each of them drawn once."""
    seeds, jobs = seeds_per_caption(args), list_jobs(args, captions)
    number = len(captions) * seeds
    # A few of them, spread over all but the last, tell the sampler; the last measures it. They are drawn first, with
    # as many more as there are processes that would draw none.
    spread = sorted({(number - 1) * part // MOST_FITTED for part in range(MOST_FITTED)})
    last = len(jobs) - 1
    early = sorted({*spread, last})
    order = early + [index for index in range(len(jobs)) if index not in early]
    drawn = {}

    def draw_early(index: int, advance) -> list[torch.Tensor] | None:
        drawn[index] = teacher.draw(*jobs[index], advance=advance)
        return drawn[index] if index in early else None

    def learn(index: int, advance) -> list[torch.Tensor]:
        points = drawn.pop(index, None) or teacher.draw(*jobs[index], advance=advance)
        return [torch.stack(part) for part in grids.segment_targets(points, teacher.sigmas, positions, coefficients)]

    stages.enter("drawing")
    steps = len(teacher.timesteps)
    rounds = -(-len(early) // accelerator.num_processes)
    first = order[: rounds * accelerator.num_processes]
    shared = dict(zip(first, distribution.share(first, draw_early, "drawing, to choose by", steps)))
    points = [torch.cat(parts) for parts in zip(*(shared[index] for index in spread))]
    grid, positions, coefficients, error = choose_sampler(args, teacher, points, jobs[last], shared[last][-1])
    if args.loss == "trajectory" and args.guidance == "keep":
        teacher.check(shared[0], jobs[0][1], positions)
    picture = shared[0][-1]
    if len(order) > len(first):
        stages.enter("drawing")
    learned = dict(zip(order, distribution.share(order, learn, "drawing", steps)))
    learned = [learned[index] for index in range(number)]
    starts, targets = (torch.stack(part)[:, :, 0].unflatten(0, (len(captions), seeds)) for part in zip(*learned))
    ends = [teacher.sigmas[position] for position in positions] + [0.0]
    lengths = [high - low for high, low in zip(ends, ends[1:])]
    return Trajectories(digest, grid, positions, lengths, coefficients, None, error, None, picture, starts, targets)


def settings_digest(args, teacher: Teacher, base: str, captions: list[str]) -> str:
    """Return the SHA-256 of all that trajectories depend on: all flags but those that say how LoRAs are trained."""
    flags = {name: value for name, value in vars(args).items() if name not in NOT_COMPARED | NOT_DRAWN}
    settings = flags | {
        "version": __version__,
        "kept": FORMAT,
        "found_on": MOST_FITTED,
        "base": base,
        "captions": captions,
        "call": teacher.call,
        "timesteps": teacher.timesteps,
    }
    pictures = [pictures_of(caption) for caption in captions]
    settings |= {"pictures": pictures} if any(pictures) else {}
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=digest_of).encode()).hexdigest()


def save(directory: Path, trajectories: Trajectories) -> None:
    """Write them where the next run of the same settings finds them, and calls.csv and calls.png of their curve."""
    tensors = {name: getattr(trajectories, name).contiguous() for name in ("picture", "starts", "targets")}
    names = ("grid", "positions", "lengths", "coefficients", "branches", "error", "curve")
    sampler = {name: getattr(trajectories, name) for name in names}
    content = save_tensors(tensors, {"digest": trajectories.digest, "sampler": json.dumps(sampler)})
    replace_file(directory / faults.TRAJECTORIES, lambda temporary: temporary.write_bytes(in_order(content)))
    write_curve(directory, trajectories.curve)


def is_curve(value) -> bool:
    """Return whether it is None or rows of a number of calls and two errors, of which each may be None."""
    return value is None or all(
        type(calls) is int and calls > 0 and all(error is None or is_number(error) for error in (shipped, calibrated))
        for calls, shipped, calibrated in value
    )


def load(path: Path, digest: str) -> Trajectories | None:
    """Return what `save` wrote with this digest, or None."""
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            if header.get("digest") != digest:
                return None
            tensors = {name: file.get_tensor(name) for name in ("picture", "starts", "targets")}
            drawn = Trajectories(digest, **json.loads(header["sampler"]), **tensors)
            return drawn if is_curve(drawn.curve) else None
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None
