"""What do the LoRAs draw of prompts that they were not trained on, and how near does it come to the base's full run?

Three pictures beside each other: the base in all its steps, the base in Glance's steps without LoRAs, Glance. The
error below a picture is the relative L2 distance of its final latents to the full run's.

Nothing here may change what is trained: noises have generators of their own, torch's random state and the adapter are
put back, and what goes wrong with a picture is one line. No model is kept; the base's latents are, on the CPU.
"""

import contextlib
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer
from PIL import Image
from tqdm.auto import tqdm

from glance.ask import latents as ask_latents
from glance.ask import mixed
from glance.ask import pipeline as ask
from glance.ask.pipeline import first_line, is_out_of_memory, replaced
from glance.ask.sampler import relative_error
from glance.files import pictures
from glance.files.lora_forms import read_lora
from glance.files.recipe import WEIGHT_NAME, Recipe
from glance.training import distribution, stages, trackers
from glance.training.phases import folders
from glance_utils import PHASES, InputError, Schedule, denoiser, switchable_adapters


logger = logging.getLogger(__name__)

FOLDER = "validation"  # in the output folder: a picture of each time, named by the training steps until then


@dataclass(frozen=True)
class LastPicture:
    """The newest picture of a run's validation prompts, and the mean errors of what is in it to the full runs."""

    name: str  # in the output folder
    error_of_base: float  # in Glance's steps without LoRAs
    error: float


def final_latents(pipe, schedule: Schedule, call: dict, seed: int, act, advance) -> torch.Tensor:
    """Return what the pipeline draws on the schedule, (1, ...) float32 on the CPU, as it leaves the loop.

    act(phase) is called where a phase of the schedule begins, advance() after each step.
    """
    phases = schedule.phase_of_steps

    def before_step(index: int) -> None:
        if index < len(phases) and (index == 0 or phases[index] != phases[index - 1]):
            act(phases[index])

    with contextlib.ExitStack() as stack:
        if schedule.branches is not None:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            calls = mixed.branch_calls(pipe, call, call | schedule.guidance)
            start = mixed.starting_latents(pipe, generator=torch.Generator().manual_seed(seed), **calls["prompt"])

            def begin(index: int) -> None:
                before_step(index)
                advance()

            return mixed.final_latents(pipe, schedule, calls, start, begin).cpu()
        stack.enter_context(replaced(pipe, "scheduler", schedule.scheduler(pipe.scheduler, before_step)))
        arguments = stack.enter_context(ask.plain_call(pipe, call))
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # few pictures are not worth compiling for
        arguments |= {"num_inference_steps": len(phases), "generator": torch.Generator().manual_seed(seed)}
        return ask_latents.loop_points(pipe, advance, **arguments)[-1]


@contextlib.contextmanager
def phase_in_training(transformer, adapter: str, phase: str, finished: dict[str, dict], strength: float):
    """Yield act(phase), which lets the LoRA of that phase act, or none where it was not trained.

    Both phases train in the one adapter. The values of a `finished` phase (read_lora's, by phase), or zeros, are put
    in the place of those in training and taken out again: another adapter would be moved and trained with the model,
    and peft's switches leave marks for which compiled blocks are compiled again. `strength` is the adapter's alpha /
    rank, which is in a finished LoRA's values.
    """
    weights = {
        f"{name}.{part}.weight": getattr(layer, part)[adapter].weight.data
        for name, layer in transformer.named_modules()
        if isinstance(layer, LoraLayer)
        for part in ("lora_A", "lora_B")
    }
    values = finished | {phase: {name: weight.to("cpu", copy=True) for name, weight in weights.items()}}

    def act(acting: str | None) -> None:
        for name, weight in weights.items():
            if acting not in values:
                weight.zero_()
                continue
            weight.copy_(values[acting][name])
            if acting in finished and name.endswith("lora_B.weight"):
                weight /= strength

    try:
        yield act
    finally:
        act(phase)


class Validation:
    """A run's validation pictures; where no prompt was given there are none."""

    def __init__(self, args, accelerator, prepared, adapter: str, output_dir: Path):
        """`adapter` is the one in which both phases are trained, `output_dir` is that of both."""
        self.args, self.accelerator, self.prepared = args, accelerator, prepared
        self.adapter, self.output_dir = adapter, output_dir
        images = range(args.num_validation_images)
        self.jobs = [(prompt, args.seed + image) for prompt in args.validation_prompt for image in images]
        self.last = None  # LastPicture
        self.base_latents = {}  # by job: of the full run, and of Glance's steps without LoRAs
        # A sharded base computes on all processes or on none.
        self.draws_here = bool(self.jobs) and (accelerator.is_main_process or distribution.is_sharded())

    def on_the_way(self, phase: str, step: int, total: int) -> None:
        """Draw with the LoRA in training, if that is due after this step of its phase; `total` counts both phases'.

        After the last step of all it is not: those pictures are drawn from the files.
        """
        where = folders(self.args)
        every, last = self.args.validation_steps, [*where][-1]
        due = every and step % every == 0 and (phase, step) != (last, self.args.max_train_steps)
        if not due or not self.draws_here:
            return
        pipe = self.prepared.models.pipe
        earlier = [name for name in where if PHASES.index(name) < PHASES.index(phase)]
        names = {name: name for name in earlier} | {phase: f"{phase} at step {step}"}
        stages.enter("validation")
        with self.apart():
            finished = {name: read_lora(pipe, where[name] / WEIGHT_NAME) for name in earlier}
            strength = self.args.lora_alpha / self.args.rank
            with phase_in_training(denoiser(pipe), self.adapter, phase, finished, strength) as act:
                drawn = self.draw(self.schedule(), act)
            self.write(drawn, self.schedule(), names, total)
        stages.enter(f"training {phase}")

    def at_the_end(self, recipes: dict[str, Recipe]) -> list[tuple[torch.Tensor, ...]]:
        """Return what `draw` does with the LoRAs of these phases, which are loaded under their names."""
        self.last = None  # that was of LoRAs on the way
        if not self.draws_here:
            return []
        stages.enter("validation")
        with self.apart(), switchable_adapters(denoiser(self.prepared.models.pipe), [*recipes]) as switch:
            return self.draw(self.schedule(recipes), lambda phase: switch(phase if phase in recipes else None, 1.0))
        return []

    def write_the_end(self, drawn: list, recipes: dict[str, Recipe]) -> None:
        """Write what `at_the_end` returned; the preview goes on after it."""
        with self.apart():
            names = {phase: phase for phase in recipes}
            self.write(drawn, self.schedule(recipes), names, len(recipes) * self.args.max_train_steps)
        if self.draws_here:
            stages.enter("preview")

    def schedule(self, recipes: dict[str, Recipe] | None = None) -> Schedule:
        """Return the steps of both phases, of which but one may be trained; `recipes` know what another half gave."""
        steps = self.prepared.steps
        phases = steps.whole | {phase: recipe.timesteps for phase, recipe in (recipes or {}).items()}
        answers = self.prepared.answers
        single = answers.single_arguments if steps.branches else {}
        return Schedule(phases, answers.timestep_table, steps.coefficients, single, steps.branches)

    def draw(self, schedule: Schedule, act) -> list[tuple[torch.Tensor, ...]]:
        """Return each job's three final latents, (1, ...) float32 on the CPU: the full run's, the base's, Glance's.

        act(phase) lets the LoRA of a phase act, act(None) none. The base draws but once, as it does not change.
        """
        pipe, answers = self.prepared.models.pipe, self.prepared.answers
        full = Schedule({"base": answers.timesteps}, answers.timestep_table)
        drawn, new = [], sum(job not in self.base_latents for job in self.jobs)
        few, hidden = len(schedule.timesteps), not self.accelerator.is_local_main_process
        total = few * len(self.jobs) + new * (few + len(answers.timesteps))
        with tqdm(total=total, desc="validation", delay=1, disable=hidden, leave=False) as progress:
            for job in self.jobs:
                prompt, seed = {"prompt": job[0]}, job[1]
                if job not in self.base_latents:
                    self.base_latents[job] = tuple(
                        final_latents(
                            pipe, steps, answers.call | prompt, seed, lambda phase: act(None), progress.update
                        )
                        for steps in (full, schedule)
                    )
                call = answers.preview_call | prompt
                glance = final_latents(pipe, schedule, call, seed, act, progress.update)
                drawn.append((*self.base_latents[job], glance))
        return drawn

    def write(self, drawn: list, schedule: Schedule, names: dict[str, str], total: int) -> None:
        """Decode what `draw` returned, write it as one labelled picture and log it, from the main process.

        `names` are labels, by phase, of the phases that have a LoRA.
        """
        if not drawn or not self.accelerator.is_main_process:
            return
        few = len(schedule.timesteps)
        label = f"Glance, {few} steps"
        if list(names.values()) != list(PHASES):
            label = ", then ".join(names.get(phase, "base") for phase, part in schedule.phases.items() if part)
        labels = (f"base, {len(self.prepared.answers.timesteps)} steps", f"base, the same {few} steps", label)
        rows, errors = [], []
        for number, ((prompt, _), latents) in enumerate(zip(self.jobs, drawn), 1):
            try:
                images = [self.decode(part) for part in latents]
            except FloatingPointError as error:
                logger.warning(f"validation picture {number} after {total} steps is left out: {error}")
                continue
            errors.append([relative_error(part, latents[0]) for part in latents])
            details = ["the full run", *(f"error {error:.4f} to the full run" for error in errors[-1][1:])]
            rows.append(pictures.draw_row(list(zip(labels, images, details)), prompt))
        if not rows:
            return
        picture, path = pictures.stack_rows(rows), self.output_dir / FOLDER / f"step_{total:04d}.png"
        _, base_error, error = (sum(column) / len(errors) for column in zip(*errors))
        path.parent.mkdir(parents=True, exist_ok=True)
        pictures.save_png(picture, path)
        self.last = LastPicture(f"{FOLDER}/{path.name}", base_error, error)
        logger.info(f"Saved {path}: {label}, error {error:.4f}; {labels[1]}, {base_error:.4f}")
        trackers.log(self.accelerator, {"validation/error": error, "validation/error_of_base": base_error}, total)
        trackers.log_picture(self.accelerator, "validation", picture, total)

    def decode(self, latents: torch.Tensor) -> Image.Image:
        """Return the picture of final latents; raise FloatingPointError where these or the pixels are not finite."""
        vae, layout = self.prepared.models.vae, self.prepared.answers.layout
        return ask_latents.decode_on(self.accelerator.device, vae, latents, layout)

    @contextlib.contextmanager
    def apart(self):
        """Keep what is done inside from what is trained: torch's random state is put back, and what goes wrong with
        the pictures is said in one line."""
        device = self.accelerator.device
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                yield
        except Exception as error:  # a NaN, a full disk, a LoRA file that has gone, no memory
            if not isinstance(error, FloatingPointError | OSError | InputError) and not is_out_of_memory(error):
                raise
            logger.warning(f"validation pictures are left out: {first_line(error)}")
