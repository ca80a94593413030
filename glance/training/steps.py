"""Which steps does a run train? So many of the base's own, or those that are given, shared out to the phases.

The numbers of steps in the settings may be None, "as the base has them"; here they become numbers.
"""

import logging
import re
from dataclasses import dataclass

from glance.ask.sampler import most_positions
from glance.ask.schedule import ask_timesteps, has_own_steps
from glance.ask.velocity import ask_velocity_shares
from glance.command_line import Settings
from glance_utils import InputError, derive_timesteps, grid_positions


logger = logging.getLogger(__name__)

BASE_STEPS, STEPS = 50, 10  # unless flags or the base say otherwise
MOST_OF_FEW = 16  # steps that a base is distilled to
# Names of such bases: FLUX.1-schnell, Z-Image-Turbo, Qwen-Image-Lightning-8steps, ...
FEW_STEPS = re.compile(r"schnell|turbo|lightning|distill|(?<![a-z])(lcm|dmd2?|hyper)(?![a-z])|\d[-_ ]?steps?", re.I)


@dataclass(frozen=True)
class Steps:
    """The steps that are trained, and where each phase begins among those of both."""

    grid: str | None  # how they were picked from the base's own; None where they were given
    phases: dict[str, list[float]]  # the timesteps (0..1000, descending) of each phase that is trained
    first: dict[str, int]  # the index of each phase's first step
    whole: dict[str, list[float]]  # of both phases, also where but one of them is trained
    coefficients: list[list[float]] | None = None  # a Schedule's, for the steps of both phases
    branches: list[str] | None = None  # likewise

    def places(self, phase: str) -> slice:
        """Return where the phase's steps are among those of both."""
        return slice(self.first[phase], self.first[phase] + len(self.phases[phase]))

    def coefficients_of(self, phase: str) -> list[list[float]] | None:
        """Return a Schedule's coefficients for the steps of this phase."""
        return self.coefficients and self.coefficients[self.places(phase)]

    def branches_of(self, phase: str) -> list[str] | None:
        """Return the branches that the steps of this phase call, where they are mixed."""
        return self.branches and self.branches[self.places(phase)]


def pick_steps(
    custom: dict[str, list[float] | None],
    base_timesteps: list[float],
    positions: list[int],
    grid: str | None,
    coefficients: list[list[float]] | None = None,
    branches: list[str] | None = None,
) -> Steps:
    """Return the phases that `custom` names, with its lists or, where there is None, the base's own at `positions`."""
    derived = derive_timesteps(base_timesteps, positions)
    phases = {phase: timesteps or derived[phase] for phase, timesteps in custom.items()}
    # A given list need not chain with the derived ones of the other phase.
    slow = phases.get("slow") or [timestep for timestep in derived["slow"] if timestep > phases["fast"][0]]
    fast = phases.get("fast") or [timestep for timestep in derived["fast"] if timestep < slow[-1]]
    first = {"slow": 0, "fast": len(derived["slow"])}
    return Steps(grid, phases, first, {"slow": slow, "fast": fast}, coefficients, branches)


def choose_count(args, pipe, grid: str, walked: int, fixed: bool) -> int:
    """Return how many steps Glance keeps of the base's, which walked so many when it was asked.

    `fixed`: it ships a list of its own few steps and walks those whatever is asked. InputError where that is not what
    the flags say, or where it has too few for them.
    """
    this = f"this {type(pipe).__name__} has its own {walked} steps"
    count = args.num_inference_steps
    if args.guidance == "mix":  # as many steps at most, until it is known how many: each calls its model
        count = min(STEPS if args.num_model_calls == "auto" else args.num_model_calls, walked)
    if args.num_base_steps not in (None, walked):
        raise InputError(f"--num_base_steps {args.num_base_steps}: {this}, whatever is asked; leave it out")
    usual = most_positions(grid, min(STEPS, max(2, -(-walked // 2))), walked)
    count = count or (usual if fixed or args.flow_custom_timesteps else STEPS)
    most = most_positions(grid, count, walked)
    if most < count:
        if fixed:
            few = f"{usual}, at most {most}" if most > usual else f"{usual}"
            reason, mend = f"{this}, which", f"--num_inference_steps {few}"
        else:
            reason, mend = f"--num_base_steps: {walked} steps", f"more, or --num_inference_steps {most} at most"
        raise InputError(f"{reason} are too few for {count} distinct ones on the {grid} grid; give {mend}")
    if count == 1 and "fast" in args.custom_timesteps:
        raise InputError(f"{this}, which leave the fast phase none; give --phase slow")
    if fixed:
        logger.info(f"{this[0].upper()}{this[1:]}, whatever is asked; {count} of them are kept")
    return count


def choose_steps(args: Settings, pipe, call: dict) -> tuple[Settings, list[float], Steps]:
    """Return the settings with the numbers of steps that this base has, all of its timesteps, and those to train.

    --grid auto needs the base's trajectory: until that is drawn, it is the even grid. Raise InputError where the base
    has too few steps for the flags.
    """
    asked_for = args.num_base_steps or BASE_STEPS
    base_timesteps = ask_timesteps(pipe, asked_for, **call)
    fixed = has_own_steps(pipe, asked_for, **call)
    walked, grid = len(base_timesteps), "even" if args.grid == "auto" else args.grid
    warn_of_few(args, pipe, walked)
    count = choose_count(args, pipe, grid, walked, fixed)
    positions = grid_positions(grid, count, walked)
    settings = args.replace(num_base_steps=walked, num_inference_steps=count)
    picked_by = None if args.flow_custom_timesteps else args.grid
    steps = pick_steps(args.custom_timesteps, base_timesteps, positions, picked_by)
    if args.flow_custom_timesteps:
        warn_of_distance(steps.phases, derive_timesteps(base_timesteps, positions))
    return settings, base_timesteps, steps


def found_distilled(args, pipe) -> str | None:
    """Return what says that the base draws in few steps already: its configuration, its name, or that of a LoRA on it;
    None where nothing does."""
    if pipe.config.get("is_distilled"):
        return "its model_index.json says is_distilled"
    paths = [args.pretrained_model_name_or_path, str(pipe.config.get("_name_or_path"))]
    for path in [*paths, *(source for source, _ in args.base_lora)]:
        # The last part, and of a snapshot in the hub's cache the repository's.
        names = [re.split(r"[\\/]", path.rstrip("\\/"))[-1], *re.findall("models--[^/]+", path)]
        if found := next((name for name in names if FEW_STEPS.search(name)), None):
            return f"by the name of {found}"
    return None


def warn_of_few(args, pipe, walked: int) -> None:
    """Warn of a base that was distilled to few steps and is to be imitated in many."""
    if walked <= MOST_OF_FEW or not (reason := found_distilled(args, pipe)):
        return
    guidance = "" if pipe.config.get("is_distilled") else ", and its --guidance_scale, often 0 or 1"
    logger.warning(
        f"{args.pretrained_model_name_or_path}: it draws in few steps already ({reason}), and imitating {walked} of "
        "them gains nothing; give --num_base_steps as its card says, with half as many --num_inference_steps, such as "
        f"8 and 4{guidance}"
    )


def warn_of_distance(phases: dict[str, list[float]], derived: dict[str, list[float]]) -> None:
    """Warn of given timesteps that are more than 10 off the model's own."""
    for phase, timesteps in phases.items():
        distance = max(abs(given - expected) for given, expected in zip(timesteps, derived[phase]))
        if len(timesteps) == len(derived[phase]) and distance > 10:
            texts = ",".join(f"{timestep:.4f}" for timestep in derived[phase])
            logger.warning(
                f"--flow_custom_timesteps: {phase} is up to {distance:.0f} timesteps off this model's own: {texts}"
            )


def warn_of_shares(pipe, phases: dict[str, list[float]], timestep_table, single_call: dict) -> None:
    """Warn of timesteps at which the pipeline takes less than the velocity that its model predicts."""
    for phase, timesteps in phases.items():
        shares = ask_velocity_shares(pipe, timesteps, timestep_table, **single_call)
        for timestep, share in zip(timesteps, shares):
            if share < 0.99:
                logger.warning(
                    f"{phase}: at timestep {timestep:.1f} this pipeline takes only {share:.2f} of the velocity to the "
                    "image that its model predicts; give --flow_custom_timesteps that end above"
                )
