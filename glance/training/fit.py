"""Which settings fit the device? The fastest that does is chosen, alike on all processes; what was given is kept.

The order in which memory is saved is LADDER's; how much is needed is estimate.py's business.
"""

import logging
from dataclasses import asdict

import torch

from glance import command_line as cli
from glance.ask.pipeline import find_denoiser
from glance.command_line import Settings
from glance.encoders import KEPT_FREE, free_memory
from glance.files.checkpoints import load_checkpoint
from glance.training import distribution
from glance.training.estimate import Choice, Estimate, readable
from glance.training.prepare import DTYPES, ask_call, estimate_run, needs_drawing
from glance.training.weightless import estimable, load_without_weights
from glance_utils import InputError


logger = logging.getLogger(__name__)

# From the fastest to the smallest: each setting that saves memory, on top of those before it.
LADDER = (
    Choice(),
    Choice(gradient_checkpointing=True),
    Choice(gradient_checkpointing=True, optimizer="adamw8bit"),
    Choice("int8", gradient_checkpointing=True, optimizer="adamw8bit"),
    Choice("nf4", gradient_checkpointing=True, optimizer="adamw8bit"),
    Choice(gradient_checkpointing=True, optimizer="adamw8bit", enable_group_offload=True),
)
COMPARED = ("quantization", "optimizer")  # of a Choice, what decides what a LoRA learns: resumed runs keep it


def memory_name(args, device: torch.device, memory: int) -> str:
    """Return what the memory is that a run may use: "16 GB", or "cuda, 15.1 GB free"."""
    return f"{memory / 1e9:.4g} GB" if args.memory else f"{device.type}, {memory / 1e9:.3g} GB free"


def fits(size: int, memory: int) -> bool:
    """Return whether so many bytes fit into the memory, with a tenth to spare."""
    return size <= (1 - KEPT_FREE) * memory


def as_choice(args) -> Choice:
    """Return what of the settings is a Choice; what nobody gave is None."""
    return Choice(**{name: getattr(args, name) for name in asdict(Choice())})


def as_flags(choice: Choice) -> str:
    """Return the choice as flags of the command line."""
    flags = [f"--{name}" for name, value in asdict(choice).items() if value is True]
    if choice.optimizer != "adamw":
        flags.append("--use_8bit_adam" if choice.optimizer == "adamw8bit" else f"--optimizer {choice.optimizer}")
    if choice.quantization != "none":
        flags.insert(0, f"--quantization {choice.quantization}")
    return " ".join(flags) or "no flag that saves memory"


def candidates(given: Choice, checkpoints: bool, processes: int = 1) -> list[Choice]:
    """Return the choices, the fastest first, that keep what is given, which is all but None.

    `checkpoints` is whether the model has gradient checkpointing.
    """
    given = {name: value for name, value in asdict(given).items() if value is not None}
    found = []
    for choice in LADDER:
        choice = Choice(**asdict(choice) | given | ({} if checkpoints else {"gradient_checkpointing": False}))
        passing = choice.enable_group_offload or choice.quantization == "fp8"  # weights come and go
        possible = not (choice.enable_group_offload and (choice.quantization != "none" or processes > 1))
        possible &= choice.gradient_checkpointing or not (passing and checkpoints)  # else all would stay
        if possible and choice not in found:
            found.append(choice)
    return found


def first_fit(needed: Estimate, choices: list[Choice], memory: int) -> Choice | None:
    """Return the first of the choices that fits into so many bytes; None where none does."""
    return next((choice for choice in choices if fits(needed.peak(choice), memory)), None)


def estimate_settings(args, captions: list[str], size, draws: bool, checkpointing, warn) -> Estimate:
    """Return what the run needs, asked of the configs and the tokenizers alone; `size` is (height, width) in pixels.

    The longest caption counts. Raise InputError where it cannot be estimated.
    """
    path, dtype = args.pretrained_model_name_or_path, DTYPES[args.mixed_precision]
    pipe = load_without_weights(path, dtype, **cli.load_arguments(args))
    with estimable(pipe):
        call, single_call, layers = ask_call(args, pipe, max(captions, key=len), size, warn)
        return estimate_run(args, pipe, layers, call, single_call, size, draws, checkpointing)


def resolve(args: Settings, accelerator, frames, captions: list[str], size: tuple[int, int], halves=None) -> Settings:
    """Return the settings with every flag of a Choice decided that nobody gave, alike on all processes and `halves`.

    Without --fit that is gradient checkpointing alone. A resumed run goes on with what its checkpoint was made with.
    Raise InputError where --fit finds nothing that fits.
    """
    if None not in asdict(as_choice(args)).values():
        return args
    memory, saved = args.memory or free_memory(accelerator.device), {}
    checkpoint = load_checkpoint(args.resume_from_checkpoint, args.output_dir) if args.fit else None
    if checkpoint is not None:
        saved = {name: checkpoint["settings"].get(name) for name in COMPARED}
    found = distribution.gather_on_host((memory, saved))
    if halves is not None:
        found = sum(halves.exchange("fit", found), [])
    memory, saved = min(memory for memory, _ in found), next((saved for _, saved in found if saved), {})
    args = args.replace(**{name: value for name, value in saved.items() if getattr(args, name) is None})
    _, kind = find_denoiser(args.pretrained_model_name_or_path, **cli.load_arguments(args))
    checkpoints = kind._supports_gradient_checkpointing and args.max_train_steps > 0
    choices = candidates(as_choice(args), checkpoints, accelerator.num_processes)
    if len(choices) > 1:
        place = memory_name(args, accelerator.device, memory)
        choices = [decide(args, choices, memory, place, captions, size, needs_drawing(args, frames))]
    return args.replace(**asdict(choices[0]))


def decide(args, choices: list[Choice], memory: int, place: str, captions: list[str], size, draws: bool) -> Choice:
    """Return the first of the choices that fits, and log why; without --fit the last where none does, or where
    nothing can be known. `place` says what the memory is.

    Raise InputError where --fit finds nothing that fits.
    """
    checkpointing = sorted({choice.gradient_checkpointing for choice in choices})
    try:
        needed = estimate_settings(args, captions, size, draws, checkpointing, warn=lambda message: None)
    except InputError as error:
        if args.fit:
            raise InputError(f"--fit auto: {error}; give --quantization and the like yourself") from error
        logger.info(f"Gradient checkpointing is on, to be safe: {error}")
        return choices[-1]
    choice = first_fit(needed, choices, memory)
    described = [f"{as_flags(choice)}: {readable(needed.peak(choice), 'B')}" for choice in choices]
    if choice is None and args.fit:
        raise InputError(
            f"--fit auto: nothing fits {place}, of which a tenth is left; the least is {described[-1]}; choose a "
            "smaller size or --rank, or --timesteps_per_step 1"
        )
    index = choices.index(choice or choices[-1])
    if args.fit or index:
        before = f"; next to it, {described[index - 1]}, too much" if index else ""
        logger.info(f"Chosen for {place}: {described[index]}{before}")
    return choices[index]
