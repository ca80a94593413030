"""What do the training flags come to? The launcher's values, the phases and their timesteps, services that are there.

Here belongs what takes a library to know; what the flags alone say is checked in glance/training/flags.py.
"""

from accelerate.tracking import get_available_trackers

from glance import base as load_base
from glance.command_line import Settings
from glance.training import launcher
from glance.training.optimizer import optimizer_class
from glance_utils import PHASES, InputError, parse_timesteps


def complete(args: Settings) -> Settings:
    """Return flags.parse's settings as a run takes them; raise InputError where they cannot be followed.

    `custom_timesteps` are the phases to train, each with its list or None where it is derived from the pipeline.
    """
    args = launcher.with_defaults(args)
    if args.report_to not in ("none", "all", *(kind.value for kind in get_available_trackers())):
        raise InputError(f"--report_to {args.report_to}: it is not installed; pip install {args.report_to}")
    optimizer_class(args.optimizer or "adamw")
    load_base.check_combination(args.quantization or "none", args.enable_group_offload)
    phases = choose_phases(args.phase, args.flow_custom_timesteps)
    if args.num_inference_steps == 1 and "fast" in phases:
        raise InputError("--num_inference_steps 1 leaves the fast phase no step; give 2 or more, or --phase slow")
    if args.parallel_phases and len(phases) == 1:
        raise InputError(
            "--parallel_phases trains both phases; leave it out, or --phase and a single list of timesteps"
        )
    return args.replace(custom_timesteps=phases)


def choose_phases(phase: str | None, custom: str | None) -> dict[str, list[float] | None]:
    """Return the phases to train, each with its custom timesteps or None where they are derived from the pipeline.

    `phase` is --phase, `custom` --flow_custom_timesteps; raise InputError where the two contradict each other.
    """
    if custom is None:
        return dict.fromkeys(PHASES if phase in (None, "both") else (phase,))
    lists = parse_timesteps(custom)
    if len(lists) == 2:
        if phase in PHASES:
            raise InputError(f"--flow_custom_timesteps holds two lists, but --phase {phase} trains one; give its list")
        return dict(zip(PHASES, lists))
    if phase == "both":
        raise InputError("--flow_custom_timesteps holds one list, but --phase both trains two: 'SLOW LIST;FAST LIST'")
    # Only the slow phase begins at pure noise.
    return {phase or ("slow" if lists[0][0] >= 990 else "fast"): lists[0]}
