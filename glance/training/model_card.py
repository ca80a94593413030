"""What does the model card say? What the run wrote, on what it was trained, how to draw with it, and against what.

It says what this run did and what it measured, nothing that holds of others alone. The text may be changed freely; the
files' names are known to the hub and to README.
"""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

from glance.ask.mixed import count_calls
from glance.files.atomic import replace_text
from glance.files.comfyui import GRAPH, card_section
from glance.files.faults import CALLS
from glance.files.recipe import WEIGHT_NAME, Recipe, schedule_of
from glance.files.sampler import NAME, SCHEDULER, Sampler
from glance.training.calls_chart import CHART as CALLS_CHART
from glance.training.card_code import obstacle, python_lines
from glance.training.card_data import CARD, front_matter, hub_id
from glance.training.draw_command import draw_flags
from glance.training.endpoint import left_out
from glance.training.log import CHART
from glance.training.prepare import Prepared
from glance.training.validation import LastPicture
from glance_utils import PHASES, Schedule


PAPER = "[Glance](https://arxiv.org/abs/2512.02899)"
MEASURE = "the final latents' distance to the full run's, relative to their size"


@dataclass(frozen=True)
class Written:
    """What a run has made, as far as its card and its upload speak of it."""

    recipes: dict[str, Recipe]  # of the LoRAs, by phase; none where a sampler alone was found
    sampler: Sampler | None  # None where one phase alone was trained
    exported: list[str]  # files for ComfyUI
    validation: LastPicture | None
    place: str  # the repository where it is pushed, else the output folder
    drawn: bool = True  # whether there are pictures of the caption

    @property
    def pictures(self) -> list[str]:
        """Return the names of the caption's pictures: what was trained on or the base drew, then what a pair draws."""
        return ["instance.png", "glance.png"][: len(self.recipes)] if self.drawn else []

    @property
    def schedule(self) -> Schedule:
        """Return the steps of both phases, or of the one that was trained."""
        return self.sampler.schedule() if self.sampler else schedule_of(self.recipes)

    @property
    def any_recipe(self) -> Recipe | Sampler:
        """Return what says the base, the size and the call, which are alike for all."""
        return next(iter(self.recipes.values()), self.sampler)

    @property
    def curve(self) -> bool:
        """Return whether errors over numbers of model calls were measured: only --num_model_calls mixes branches."""
        return bool(self.schedule.branches)

    @property
    def files(self) -> list[str]:
        """Return the names of what is of use to others: no checkpoints, logs or trajectories."""
        names = [CARD, *self.pictures, *self.exported]
        names += [f"{phase}/{WEIGHT_NAME}" if self.sampler else WEIGHT_NAME for phase in self.recipes]
        names += [CHART] if self.recipes else []
        names += [NAME, f"{SCHEDULER}/scheduler_config.json"] if self.sampler else []
        names += [GRAPH] if self.sampler and self.recipes else []
        names += [CALLS, CALLS_CHART] if self.curve else []
        return names + ([self.validation.name] if self.validation else [])


def write_model_card(args, directory: Path, prepared: Prepared, written: Written) -> None:
    """Write README.md into the output folder."""
    kind, call = type(prepared.models.pipe), prepared.answers.preview_call
    data = front_matter(args, kind, call, written.pictures[1:], bool(written.recipes))
    parts = [f"---\n{data.to_yaml()}\n---", *introduction(args, prepared, written)]
    parts += ["## What was trained, and on what", *learned(args, prepared, written)]
    parts += ["## Steps", steps_table(written.schedule)]
    parts += ["## Drawing", *drawing(args, prepared, written)]
    parts += comfyui(written)
    parts += ["## The fair control", *controls(args, prepared, written)]
    parts += ["## Limits", limits(args, prepared, written, data.license is not None)]
    if written.recipes:
        parts += ["## Recipe", "As the header of each file has it, beside the steps:", recipe_of(written)]
    replace_text(directory / CARD, "\n\n".join(parts) + "\n")


def base_name(args) -> str:
    """Return the base's id on the hub, or its folder: as it was given, without where on this machine that is."""
    base = args.pretrained_model_name_or_path
    return base if hub_id(base) or not Path(base).is_absolute() else Path(base).name


def introduction(args, prepared: Prepared, written: Written) -> list[str]:
    """Return the title, what lies here, and the pictures."""
    steps, own = f"{len(written.schedule.timesteps)} steps", f"the base's {len(prepared.answers.timesteps)}"
    if called := written.schedule.branches:
        steps += f" with {count_calls(called)} model calls"
    title, name = "# Glance", base_name(args)
    if not written.recipes:
        text = (
            f"A sampler that draws in {steps} in place of {own} steps: at which of them, and how far each goes along "
        )
        text += f"the velocities. It is `{NAME}`, for `infer_glance.py` of {PAPER}; there is no LoRA."
        return [f"{title} sampler for {name}", text]
    if len(written.recipes) == 1:
        [phase] = written.recipes
        [other] = set(PHASES) - {phase}
        text = f"The {phase.capitalize()}-LoRA of a pair ({PAPER}), for {steps} of {own}; the others want a "
        text += f"{other.capitalize()}-LoRA that was trained on the same schedule."
        title += f" {phase.capitalize()}-LoRA for {name}"
    else:
        text = f"A Slow- and a Fast-LoRA ({PAPER}) that draw in {steps} in place of {own} steps: the slow one acts in "
        text += f"the first {len(written.recipes['slow'].timesteps)}, the fast one in the others."
        title += f" LoRAs for {name}"
    shown = " ".join(f"![{name}](./{name})" for name in written.pictures)
    first = "the image that was given" if prepared.answers.image_latents is not None else f"what {own} steps draw"
    place, rest = ("Left: ", "; right: with both LoRAs") if len(written.pictures) == 2 else ("Shown is ", "")
    return [title, text, shown, f'{place}{first}{rest}. Caption: "{prepared.captions[0]}".']


# --------------------------------------------------------------------------------------------------------------------
# What was trained


def learned(args, prepared: Prepared, written: Written) -> list[str]:
    """Return what was trained, on what, as paragraphs."""
    parts = [nothing_trained(args, prepared, written)] if not args.max_train_steps else []
    if args.max_train_steps:
        parts = [{"flow": by_flow, "trajectory": by_trajectory, "endpoint": by_endpoint}[args.loss](args, prepared)]
    if args.guidance == "fold":
        parts.append("The base drew with guidance, the LoRAs were trained without: they hold it.")
    if args.max_train_steps and args.quantization != "none":
        parts.append(f"The base was quantized to {args.quantization} meanwhile.")
    if added := written.any_recipe.base_loras:
        names = ", ".join(f"`{lora['file']}` at {lora['scale']:g}" for lora in added)
        parts.append(f"Part of the base was {names}, added to its weights; these are not among the files here.")
    if written.recipes:
        parts.append(f"![{CHART}](./{CHART})")
    return parts


def captions_of(prepared: Prepared) -> str:
    """Return how many captions there are, in words."""
    return "one caption" if len(prepared.captions) == 1 else f"each of {len(prepared.captions)} captions"


def trajectories_of(args, prepared: Prepared) -> str:
    """Return which trajectories the base drew, in words."""
    own = len(prepared.answers.timesteps)
    return f"{args.num_trajectories} of the base's own {own}-step trajectories of {captions_of(prepared)}"


def trained_words(args) -> str:
    """Return how long each LoRA was trained."""
    both = args.parallel_phases or len(args.custom_timesteps) == 2  # of which each half of the processes trains one
    which = "Each LoRA" if both else "The LoRA"
    return f"{which}: {args.max_train_steps} steps of rank {args.rank} at learning rate {args.learning_rate:g}"


def flow_words(prepared: Prepared) -> str:
    """Return what the flow loss learned from."""
    if prepared.answers.image_latents is not None:
        return "one image and its caption"
    return f"one image, which the base drew of the caption in {len(prepared.answers.timesteps)} steps, and the caption"


def by_flow(args, prepared: Prepared) -> str:
    """Return what the flow loss trained, as published."""
    return f"{trained_words(args)}, by the flow-matching loss, on {flow_words(prepared)}, and nothing else."


def by_trajectory(args, prepared: Prepared) -> str:
    """Return what the trajectory loss trained."""
    text = f"{trained_words(args)}, by the trajectory loss, on {trajectories_of(args, prepared)}: from a "
    text += "kept step to the next. "
    if args.flow_weight:
        return text + f"Beside it {args.flow_weight:g} times the flow-matching loss, on {flow_words(prepared)}."
    return text + "No image was learned."


def by_endpoint(args, prepared: Prepared) -> str:
    """Return what the endpoint loss trained, and what was left out of it."""
    captions, seeds = len(prepared.captions), args.num_trajectories
    off = left_out(captions, seeds)
    each = "each caption's"
    rows, columns = int(off.all(1).sum()), int(off.all(0).sum())
    loras = f"both LoRAs, of rank {args.rank}, and " if not args.train_coefficients_only else ""
    text = f"{args.max_train_steps} steps at learning rate {args.learning_rate:g} trained {loras}the weights of the "
    text += f"steps together, through all model calls, towards where {trajectories_of(args, prepared)} end."
    if rows:
        text += f" Left out, to measure on: {rows} of the captions."
    elif columns:
        text += f" Left out, to measure on: {columns} of {'these' if captions == 1 else each} {seeds}."
    return f"{text} No image was learned."


def nothing_trained(args, prepared: Prepared, written: Written) -> str:
    """Return what a sampler was found on."""
    if written.schedule.branches:
        return f"Nothing was trained. The calls and their weights were fitted to {trajectories_of(args, prepared)}."
    if written.sampler.captions:
        own = f"{len(prepared.answers.timesteps)}-step trajectories of {captions_of(prepared)}"
        return f"Nothing was trained. These steps and this solver measured best on the base's own {own}."
    return "Nothing was trained, and nothing measured: the steps are some of the base's own, by their places."


# --------------------------------------------------------------------------------------------------------------------
# How to draw


def steps_table(schedule: Schedule) -> str:
    """Return the steps as a table: where each is, whose it is, and how it goes."""
    rows = ["| step | phase | timestep, 0..1000 | goes along |", "|---|---|---|---|"]
    for index, (phase, timestep) in enumerate(zip(schedule.phase_of_steps, schedule.timesteps)):
        how = "the velocity (Euler)"
        if schedule.branches:
            how = f"{schedule.branches[index]} called; weights in the file"
        elif schedule.coefficients:
            a, c = schedule.coefficients[index]
            how = f"{a:.4f} of the velocity {c:+.4f} of the one before"
        rows.append(f"| {index + 1} | {phase} | {timestep:.4f} | {how} |")
    return "\n".join(rows)


def command(args, prepared: Prepared, written: Written, further: str) -> str:
    """Return infer_glance.py's command for the run's caption and seed, as a block of the card."""
    flags = draw_flags(args, written.place, [*written.recipes])
    prompt = shlex.quote(" ".join(prepared.captions[0].split()))  # on one line
    seed = f" --seed {args.seed}" if args.seed else ""
    return f"    python infer_glance.py {flags} --prompt {prompt}{seed} {further}"


def drawing(args, prepared: Prepared, written: Written) -> list[str]:
    """Return the command, and the lines of Python where there are any."""
    where = "" if args.push_to_hub else f" (this card lies in `{written.place}`)"
    parts = [f"In the folder of Glance's scripts{where}:", command(args, prepared, written, "--output out.png")]
    if len(written.recipes) == 1:
        return [*parts, "FOLDER is where the other LoRA of the pair lies."]
    loras = bool(written.recipes)
    if reason := obstacle(prepared, written.schedule, loras):
        return [*parts, f"{reason}, so there are no lines of plain diffusers for it."]
    lines = python_lines(
        args, prepared, written.schedule, written.any_recipe.base_loras, written.place if loras else None
    )
    alone = "" if "glance_utils" in lines else " alone"
    return [*parts, f"The same picture by diffusers{alone}; sigmas are from 0 to 1:", fenced(lines, "python")]


def fenced(text: str, language: str) -> str:
    """Return a block of code, which no caption in it ends."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def comfyui(written: Written) -> list[str]:
    """Return what there is to say of ComfyUI, as parts."""
    if len(written.recipes) == 2:
        return [card_section(written.recipes, written.exported).rstrip()]
    if written.recipes:
        return []
    return ["## ComfyUI", f"`comfyui/glance_nodes.py` of Glance is one node that draws it, from the path of `{NAME}`."]


# --------------------------------------------------------------------------------------------------------------------
# Against what to hold it, and what not to expect


def controls(args, prepared: Prepared, written: Written) -> list[str]:
    """Return what was measured without LoRAs and with them, and how to draw both."""
    parts = measured(args, prepared, written)
    if last := written.validation:
        alone = f"without LoRAs{', guided' if args.guidance == 'fold' else ''} {last.error_of_base:.4f}"
        parts += [f"On the validation prompts: {alone}, with {last.error:.4f}.", f"![{last.name}](./{last.name})"]
    if written.curve:
        parts += ["Over numbers of model calls:", f"![{CALLS_CHART}](./{CALLS_CHART})"]
    if parts:
        own = len(prepared.answers.timesteps)
        parts.insert(0, f"Errors: how far from the base's own {own} steps the final latents are, relative to these.")
    if len(written.recipes) == 1:
        return [*parts, "The control is the same steps without LoRAs: once there are both, `--compare` draws it."]
    against = "the base in all its steps and in as many model calls"
    against += ", the same steps without the LoRAs (the fair control) and with" if written.recipes else ", and this"
    draw = command(args, prepared, written, "--compare --output comparison.png")
    return [*parts, f"This draws {against}, with the error of each, of any prompt:", draw]


def measured(args, prepared: Prepared, written: Written) -> list[str]:
    """Return what the run measured beside the validation prompts, a paragraph or none."""
    error = None if written.sampler is None else written.sampler.error
    if error is None:
        return []
    if args.loss == "endpoint" and args.max_train_steps:
        off = "captions" if len(prepared.captions) >= 4 else "noises"
        before = "" if prepared.untrained_error is None else f"{prepared.untrained_error:.4f} before training, "
        text = f"On {off} that were not trained on: {before}{error:.4f} after."
        if written.recipes:
            text += (
                " (Without the LoRAs there still are the trained weights; `--max_train_steps 0` finds those before.)"
            )
        return [text]
    if written.schedule.branches:
        return [f"Fitted to one half of the trajectories, measured on the other, and the reverse: {error:.4f}."]
    if written.recipes:
        return [f"The same steps **without the LoRAs**: {error:.4f}, on a trajectory to which they were not fitted."]
    return [f"This sampler: {error:.4f}, on a trajectory to which it was not fitted."]


def limits(args, prepared: Prepared, written: Written, licensed: bool) -> str:
    """Return what holds of these files alone, as a list; `licensed`: the card names the base's licence."""
    recipe = written.any_recipe
    lines = [
        f"For {base_name(args)} ({recipe.pipeline}) at {recipe.width}x{recipe.height}: the steps are of that size."
    ]
    if written.recipes:
        lines.append("For these steps alone: the LoRAs know no others.")
    if args.guidance == "fold":
        lines.append("The LoRAs hold the guidance: its strength and a negative prompt have no effect.")
    if args.guidance == "mix":
        lines.append("The weights of the branches hold the strength of guidance: another one has no effect.")
    if len(prepared.captions) == 1:
        lines.append("One caption is all it has seen: what it does to others is to be compared.")
    if licensed:
        lines.append("The licence that this card names is the base's.")
    else:
        lines.append("The base's licence was not found beside it: look it up before you pass this on.")
    return "\n".join(f"- {line}" for line in lines)


def recipe_of(written: Written) -> str:
    """Return what the headers of the files say, but for the phase and the lists that the table of steps has."""
    entries = written.any_recipe.as_dict()
    left = {name: entries[name] for name in entries if name not in ("phase", "timesteps", "coefficients", "branches")}
    return fenced(json.dumps(left, indent=2), "json")
