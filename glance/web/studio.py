"""What does the page draw with, and how does it draw one picture and the base's beside it? No page is made here.

All positions of the dial stand in one pipeline: the base is loaded once, the LoRAs of each position are adapters of
their own. What is drawn is, to the bit, what infer_glance.py draws with the same flags.
"""

import contextlib
import csv
import dataclasses
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from diffusers import DiffusionPipeline

import infer_glance
from glance.ask import pipeline as ask
from glance.ask.guidance import count_model_calls
from glance.ask.mixed import count_calls
from glance.ask.prompt_lengths import PromptLengths
from glance.ask.prompts import prompts_remembered
from glance.command_line import Settings
from glance.drawing import Column, Counter, Drawn, check_size, columns_of, draw_column
from glance.files.faults import CALLS
from glance.files.further_loras import find_base_loras, find_styles, with_base_loras
from glance.files.recipe import Recipe
from glance.files.sampler import read_sampler
from glance.shared_flags import MAX_SIDE
from glance.training import out_of_memory
from glance.training.inference_steps import compared_steps, schedule_of_loras
from glance_utils import InputError, Schedule


logger = logging.getLogger(__name__)

BESIDE = ("the base, all its steps", "the base, as many calls", "the same steps without LoRAs")


class Choice(NamedTuple):
    """A position of the dial: a pair of LoRAs, or a sampler alone."""

    number: int  # among all of them
    source: str  # folder, file or hub id, as given
    args: Settings  # infer_glance.py's
    paths: dict[str, Path]  # of the LoRAs by phase; {} of a sampler
    recipe: Recipe
    files: Schedule | None  # as the files say
    extra: dict  # of the pipeline's call, beside prompt, size and guidance
    schedule: Schedule | None = None  # completed by the pipeline, once that is there
    calls: int = 0  # of the model, a picture; known then too

    @property
    def steps(self) -> int:
        """Return the number of steps."""
        return len(self.schedule.timesteps)

    @property
    def swap(self) -> int:
        """Return after how many steps the fast LoRA takes over."""
        return len(self.schedule.phases["slow"])

    @property
    def size(self) -> tuple[int | None, int | None]:
        """Return (height, width), in pixels."""
        return self.args.height or self.recipe.height, self.args.width or self.recipe.width

    @property
    def folder(self) -> Path:
        """Return the folder in which the files lie, if they do not come from the hub."""
        path = Path(self.source).resolve()
        return path if path.is_dir() else path.parent

    @property
    def name(self) -> str:
        """Return the name of that folder, or of the repository on the hub."""
        return self.folder.name if Path(self.source).exists() else Path(self.source).name

    def curve(self) -> list[dict[str, str]]:
        """Return the rows of the calls.csv that lies beside the files, [] where there is none."""
        with contextlib.suppress(OSError, UnicodeDecodeError, csv.Error):
            with (self.folder / CALLS).open(encoding="utf-8", newline="") as file:
                return list(csv.DictReader(file))
        return []

    def error(self) -> float | None:
        """Return the error to the base's full run that was found in training, None where the files do not say it."""
        with contextlib.suppress(InputError):
            return read_sampler(self.args.sampler or self.folder).error
        return None


class Studio(NamedTuple):
    """The pipeline that draws, and all positions of the dial, fewest calls first."""

    pipe: DiffusionPipeline
    choices: list[Choice]
    counter: Counter
    lengths: PromptLengths
    kept: dict  # the base's newest picture, under all that it depends on


class Request(NamedTuple):
    """What is to be drawn."""

    prompt: str
    seed: int
    height: int | None  # pixels
    width: int | None
    scales: dict[str, float]  # strength of the LoRAs, by phase
    swap: int | None  # steps of the slow LoRA; as trained by default
    beside: str  # one of BESIDE


def read_choices(settings: Settings) -> list[Choice]:
    """Return the positions of the dial as their files say; no weights are read.

    Raise InputError as infer_glance.py does, and where they are not all of the same base.
    """
    choices = []
    for number, args in enumerate(settings.choices):
        source = args.lora or args.sampler or args.slow_lora
        args, paths, recipe, schedule = infer_glance.read_files(infer_glance.complete(args))
        extra = infer_glance.further_arguments(args, recipe, schedule)
        choices.append(Choice(number, source, args, paths, recipe, schedule, extra))
    first, *others = (with_base_loras(base_of(choice), find_base_loras(choice.args)) for choice in choices)
    for choice, base in zip(choices[1:], others):
        if base != first:
            raise InputError(
                f"{choice.source} is of {base}, {choices[0].source} of {first}; a page has one base: start another "
                "page, or name it as --pretrained_model_name_or_path"
            )
    return choices


def base_of(choice: Choice) -> str:
    """Return the base's folder or hub id."""
    return choice.args.pretrained_model_name_or_path


def open_studio(choices: list[Choice]) -> Studio:
    """Load the base with the LoRAs of all choices; raise InputError where one does not fit or cannot be drawn."""
    first = choices[0]
    args, device = first.args, infer_glance.begin(first.args).device

    def call_of(pipe, choice=first) -> dict:
        return infer_glance.call_arguments(choice.args, choice.recipe, pipe, args.prompts[0], choice.extra)

    loras = {name: choice.paths[phase] for choice in choices for name, phase in adapters(choice).items()}
    loras |= find_styles(args)
    with out_of_memory.in_inference(args, "loading the base"):
        decoding = infer_glance.check_early(args, loras, call_of, device)
        pipe = infer_glance.load_pipeline(args, loras, device, decoding)
    opened = []
    for choice in choices:
        call = call_of(pipe, choice)
        ask.dry_step(pipe, **call)
        schedule = schedule_of_loras(choice.args, pipe, choice.recipe, choice.files, call)
        calls = count_calls(schedule.branches) if schedule.branches else len(schedule.timesteps)
        calls *= count_model_calls(pipe, **call | schedule.guidance)
        opened.append(choice._replace(schedule=schedule, calls=calls))
    lengths = PromptLengths(pipe, logger.warning)
    lengths.watch(pipe)
    opened.sort(key=lambda choice: choice.calls)
    return Studio(pipe, opened, Counter(pipe), lengths, {})


def adapters(choice: Choice) -> dict[str, str]:
    """Return the names of a choice's adapters, each with its phase; {} without LoRAs."""
    return {f"{phase}-{choice.number}": phase for phase in choice.paths}


def swapped(choice: Choice, schedule: Schedule, swap: int | None) -> Schedule:
    """Return the schedule whose first `swap` steps, as trained by default, are those of the choice's slow adapter.

    Raise InputError where none or all were.
    """
    if not choice.paths:
        return schedule
    steps = schedule.timesteps
    swap = len(schedule.phases["slow"]) if swap is None else swap
    if not 0 < swap < len(steps):
        raise InputError(f"the LoRAs swap after step {swap}; give 1 to {len(steps) - 1} of {len(steps)} steps")
    return dataclasses.replace(schedule, phases=dict(zip(adapters(choice), (steps[:swap], steps[swap:]))))


def draw(studio: Studio, choice: Choice, request: Request, say: Callable[[str], None]) -> Iterator[Drawn]:
    """Yield Glance's picture, then the one beside it; say(line) tells what is to be known of them.

    Raise InputError for a request that cannot be drawn, FloatingPointError and MemoryError as infer_glance.py does.
    """
    pipe, recipe = studio.pipe, choice.recipe
    if not request.prompt.strip():
        raise InputError("the prompt is empty; write what to draw")
    for side, pixels in (("width", request.width), ("height", request.height)):
        if pixels is not None and not 0 < pixels <= MAX_SIDE:
            raise InputError(f"the {side} is {pixels}; give 1 to {MAX_SIDE} pixels")
    scales = {name: request.scales[phase] for name, phase in adapters(choice).items()}
    args = choice.args.replace(height=request.height, width=request.width, lora_scale=scales)
    studio.lengths.reported.clear()
    studio.lengths.unknown_to.clear()
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings_said(say))
        stack.enter_context(out_of_memory.in_inference(args, "drawing"))
        infer_glance.size_of(args, recipe)  # which warns of another than was trained
        stack.enter_context(prompts_remembered(pipe))
        call = infer_glance.call_arguments(args, recipe, pipe, request.prompt.strip(), choice.extra)
        ask.dry_step(pipe, **call)
        schedule = schedule_of_loras(args, pipe, recipe, choice.files, call)
        base_steps = compared_steps(args, pipe, schedule, recipe.num_base_steps, call)
        schedule = swapped(choice, schedule, request.swap)
        columns = list(columns_of(args, pipe, schedule, base_steps, call, request.seed))
        beside = column_beside(columns, len(base_steps), request.beside)
        glance = draw_column(pipe, studio.counter, columns[-1])
        check_size(pipe, call, glance.image)
        yield glance
        of_base = columns.index(beside) < len(base_steps)  # then it is the same at each position of the dial
        key = beside.label, request.seed, repr(call), None if of_base else choice.number
        if key not in studio.kept:
            studio.kept.clear()
            studio.kept[key] = draw_column(pipe, studio.counter, beside)
        yield studio.kept[key]


def column_beside(columns: list[Column], base: int, beside: str) -> Column:
    """Return the column that is meant by one of BESIDE; the first `base` of them are the base's.

    Raise InputError where there is none.
    """
    if beside == BESIDE[0]:
        return columns[0]
    if beside == BESIDE[1]:
        if base > 1:
            return columns[1]
        raise InputError(f"{BESIDE[1]}: this base ships its own steps and draws in no others; compare with another")
    if len(columns) > base + 1:
        return columns[-2]
    raise InputError(f"{BESIDE[2]}: a sampler draws without LoRAs itself; compare with another")


@contextlib.contextmanager
def warnings_said(say: Callable[[str], None]):
    """Call say(line) for each warning that our own code logs inside."""
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: say(record.getMessage())
    loggers = [logging.getLogger(name) for name in ("glance", infer_glance.__name__)]
    for own in loggers:
        own.addHandler(handler)
    try:
        yield
    finally:
        for own in loggers:
            own.removeHandler(handler)
