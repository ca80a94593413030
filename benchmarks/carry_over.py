"""Does a sampler that was calibrated on the demo model serve what becomes of it? Other guidance, sizes and weights.

    python benchmarks/carry_over.py                      # a run that was cut goes on where it was
    python benchmarks/carry_over.py --rows "guidance"    # only these changes

Writes table.md and results.json into --output_dir, and trains there, once, the LoRAs and the fine-tune of
carry_over_bases.py. For each change, on the demo's held-out captions 64..95, how far the final latents are from those
of the changed base's own 50 guided steps:

- shipped: its own schedule at as many model calls
- carried: the sampler of demo/model at 96x96 and guidance 3, as its file would be drawn with
- weights anew: its steps and branches, the numbers fitted on the changed base
- all anew: the steps and branches are searched for there too
- changed by: where the base's own 50 steps end, before and after the change; no number for another size
"""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent.parent / "demo"))
sys.path.insert(0, str(Path(__file__).parent.parent))

from glance import start


if __name__ == "__main__":
    start.as_script("what was not measured yet is lost")

import functools
import json
import logging
import re
from dataclasses import dataclass

import torch
from carry_over_bases import LORAS, SHIFTED, load
from scenes import caption_of, split_scenes
from tqdm import tqdm

import train_glance_lora
from glance import command_line as cli
from glance.ask import mixed
from glance.ask import sampler as grids
from glance.ask.guidance import ask_single_branch
from glance.ask.schedule import ask_timestep_table, ask_timesteps
from glance.ask.velocity import PipelineVelocity
from glance.files.atomic import replace_file, replace_text
from glance.training.examples import Examples, draw_examples
from glance.training.search import Trials, find_plan, plans_tried, sizes_at_once
from glance.training.trajectories import Teacher
from glance_utils import InputError, Schedule


logger = logging.getLogger(__name__)
ROOT = Path(__file__).parent.parent
CALL = {"height": 96, "width": 96, "max_sequence_length": 16, "negative_prompt": "", "true_cfg_scale": 3.0}
SAMPLERS = {"mixed, 10 calls": 10, "mixed, 4 calls": 4, "fitted Euler, 10 steps": 20}  # model calls
UNCHANGED = "none (control)"
CHANGES = {UNCHANGED: {}} | {
    f"guidance {value:g}": {"true_cfg_scale": value} for value in (1.5, 2.0, 2.5, 3.5, 4.5, 6.0)
}
CHANGES |= {f"{w}x{h}": {"width": w, "height": h} for w, h in ((64, 64), (80, 80), (128, 128), (96, 144))}
CHANGES |= {change: {} for change in (SHIFTED, *LORAS, "fine-tune")}
COLUMNS = ("shipped", "carried", "weights anew", "all anew")
SEED = 9000  # of the first held-out picture, as in quality.py


# --------------------------------------------------------------------------------------------------------------------
# Samplers


@dataclass(eq=False)
class Base:
    """A base, and what it draws in all its steps: of captions to calibrate on, and of those that are held out."""

    args: object
    teacher: Teacher
    trials: Trials
    examples: Examples
    held_out: list[tuple[str, int]]  # (caption, seed)
    ends: torch.Tensor  # (held_out, ...) float32

    def calibrate(self, calls: int, kept: dict | None = None) -> dict:
        """Return the sampler of so many model calls that the base's own trajectories tell, or `kept`'s steps and
        branches with numbers that are fitted anew."""
        if calls == SAMPLERS["fitted Euler, 10 steps"]:
            points, branches = self.examples.to_begin_with(), None
            positions = kept["positions"] if kept else grids.best_positions(points, self.teacher.sigmas, 10)
            numbers = grids.fit_coefficients(points, self.teacher.sigmas, positions)
        else:
            plan = kept and list(zip(kept["positions"], kept["branches"]))
            tries = plans_tried(self.args, self.trials.most_calls, calls)
            plan = plan or find_plan(self.trials, self.examples, calls, tries, self.args.seed)[0]
            numbers, _ = self.trials.fit(plan, self.examples, torch.ones_like(self.examples.fitted))
            positions, branches = map(list, zip(*plan))
        timesteps = [self.teacher.timesteps[position] for position in positions]
        return {"positions": positions, "branches": branches, "timesteps": timesteps, "coefficients": numbers}

    @torch.no_grad()
    def error(self, sampler: dict) -> float:
        """Return how far from the base's own ends a sampler ends, over all held-out pictures."""
        pipe, table, ends = self.teacher.pipe, self.teacher.timestep_table, []
        timesteps, numbers, branches = (sampler[name] for name in ("timesteps", "coefficients", "branches"))
        for caption, seed in self.held_out:
            if branches is None:
                call = self.teacher.call | {"prompt": caption}
                ends.append(grids.walk(pipe, timesteps, table, seed, numbers, **call)[-1])
                continue
            calls = self.trials.calls | {"prompt": self.trials.calls["prompt"] | {"prompt": caption}}
            noise = mixed.starting_latents(pipe, generator=torch.Generator().manual_seed(seed), **calls["prompt"])
            schedule = Schedule({"base": timesteps}, table, numbers, branches=branches)
            ends.append(mixed.final_latents(pipe, schedule, calls, noise))
        return grids.relative_error(torch.cat(ends), self.ends)


def ask_base(args, pipe, call: dict) -> Base:
    """Let a base draw in all its steps, and return all that samplers are calibrated and measured by."""
    training, held_out = ([caption_of(scene) for scene in scenes] for scenes in split_scenes())
    captions = training[: args.captions]
    held_out = list(zip(held_out[64 : 64 + args.num_prompts], range(SEED, SEED + args.num_prompts)))
    call = {"prompt": captions[0]} | CALL | call
    branches = mixed.branch_calls(pipe, call, call | ask_single_branch(pipe, **call))
    teacher = Teacher(pipe, ask_timesteps(pipe, 50, **call), ask_timestep_table(pipe, 50, **call), call)
    flags = ["--config", str(ROOT / "configs/demo.yaml"), "--num_model_calls=10", "--max_train_steps=0"]
    settings = train_glance_lora.parse_args([*flags, "--num_trajectories=1", "--seed=0"])
    settings = settings.replace(num_plans=args.num_plans)
    examples = draw_examples(settings, teacher, captions)
    sizes = sizes_at_once(settings, branches, len(captions), examples.points[:1, 0].shape)
    trials = Trials(PipelineVelocity(pipe, teacher.timestep_table), branches, teacher.sigmas, sizes)
    ends = torch.cat([teacher.draw(*job)[-1] for job in tqdm(held_out, desc="held out", leave=False)])
    return Base(settings, teacher, trials, examples, held_out, ends)


def measure(base: Base, own: dict) -> dict[str, dict[str, float]]:
    """Return, by the samplers of SAMPLERS and by column, the errors on a changed base; `own` are the base's own."""
    errors = {}
    for name, calls in SAMPLERS.items():
        shipped = ask_timesteps(base.teacher.pipe, calls // 2, **base.teacher.call)
        samplers = {"shipped": {"timesteps": shipped, "coefficients": None, "branches": None}, "carried": own[name]}
        samplers |= {"weights anew": base.calibrate(calls, own[name]), "all anew": base.calibrate(calls)}
        errors[name] = {column: base.error(sampler) for column, sampler in samplers.items()}
    return errors


# --------------------------------------------------------------------------------------------------------------------
# The command line


def make_table(results: dict) -> str:
    """Return what is measured as Markdown, a row for each change, the errors of each sampler in COLUMNS' order."""
    order = " / ".join(COLUMNS)
    lines = [["change", "changed by", *(f"{name}: {order}" for name in SAMPLERS)], ["---"] * (len(SAMPLERS) + 2)]
    for change, numbers in ((change, results["changes"].get(change)) for change in CHANGES):
        if numbers is None:
            continue
        moved = "" if numbers["changed by"] is None else f"{numbers['changed by']:.3f}"
        errors = (numbers["errors"][name] for name in SAMPLERS)
        lines.append([change, moved, *(" / ".join(f"{each[column]:.3f}" for column in COLUMNS) for each in errors)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def parse_args(argv: list[str] | None = None):
    parser = cli.Parser(description="Samplers of a base on what becomes of it.")
    add = parser.add_argument
    add("--rows", default="", help="regular expression: measure only changes whose names match, and the control")
    add("--captions", type=cli.positive(int), default=32, help="to calibrate on")
    add("--num_prompts", type=cli.positive(int), default=32, help="held-out captions to measure on")
    add("--num_plans", type=cli.positive(int), help="to try; as many as cost what drawing did by default")
    add("--steps", type=cli.positive(int), default=300, help="of a LoRA's training; the fine-tune has thrice")
    add("--output_dir", default="output/carry_over")
    return parser.parse(argv)


def main(argv: list[str] | None = None):
    args = parse_args(argv)
    cli.set_up_logging()
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    protocol = {name: getattr(args, name) for name in ("captions", "num_prompts", "num_plans", "steps")}
    results = {"protocol": protocol, "samplers": {}, "changes": {}}
    if (folder / "results.json").exists():
        results = json.loads((folder / "results.json").read_text())
        if results["protocol"] != protocol:
            raise InputError(f"--output_dir {folder}: its rows were measured otherwise; give another folder")
    for change, call in CHANGES.items():
        if change in results["changes"] or not re.search(args.rows, change) and change != UNCHANGED:
            continue
        base = ask_base(args, load(change, folder, args.steps), call)
        if change == UNCHANGED:
            results["samplers"] = {name: base.calibrate(calls) for name, calls in SAMPLERS.items()}
            replace_file(folder / "ends.pt", functools.partial(torch.save, base.ends))
        own_ends = torch.load(folder / "ends.pt", weights_only=True)
        moved = grids.relative_error(own_ends, base.ends) if own_ends.shape == base.ends.shape else None
        results["changes"][change] = {"changed by": moved, "errors": measure(base, results["samplers"])}
        replace_text(folder / "results.json", json.dumps(results, indent=1) + "\n")
        replace_text(folder / "table.md", make_table(results))
        logger.info(f"{change}: {json.dumps(results['changes'][change])}")
    print(f"{folder}: {len(results['changes'])} of {len(CHANGES)} changes")


if __name__ == "__main__":
    cli.run(main)
