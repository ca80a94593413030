"""What can a run go on from? output_dir/checkpoint-N/training_state.pt, N counting the steps of all phases, and the
LoRAs of the phases that it finished.

A new flag is compared unless it is put into NOT_COMPARED, with the reason why it cannot change what a LoRA learns.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import re
import shutil
from pathlib import Path

import torch

from glance.files.atomic import replace_file
from glance.files.recipe import WEIGHT_NAME, Recipe, read_recipe, shown
from glance_utils import PHASES, InputError


logger = logging.getLogger(__name__)

STATE_NAME = "training_state.pt"
# All flags are compared, later ones too, when a run goes on from what another left, except these, which cannot
# change what a LoRA learns:
NOT_COMPARED = {
    # the base, known by its files or its commit (base.identify); pictures and captions, known by their content
    *(
        "pretrained_model_name_or_path",
        "base_lora",
        "revision",
        "instance_image",
        "instance_prompt",
        "instance_data_dir",
    ),
    *(
        "pipeline_images",
        "data_backend_config",
        "prompts_file",
        "dataset_name",
        "dataset_index",
        "image_column",
        "caption_column",
    ),
    # known by what they lead to in the recipe: its phase, timesteps, height and width
    *("phase", "flow_custom_timesteps", "custom_timesteps", "resolution", "height", "width", "aspect"),
    # counted in the total batch, which is compared
    "train_batch_size",
    # how the same numbers are computed: by rounding alone, as on another accelerator, do they come out otherwise
    *("gradient_checkpointing", "compile", "enable_group_offload", "parallel_phases"),
    # known by the flags that were chosen
    *("fit", "memory"),
    # where the base's files are kept
    "cache_dir",
    # what is drawn on the way: it has its own seeds and puts the adapter back, and no gradient comes of it
    *("validation_prompt", "num_validation_images", "validation_steps"),
    # where things are written, and what is written beside the LoRAs
    *("output_dir", "overwrite_output_dir", "logging_dir", "report_to", "push_to_hub", "hub_model_id"),
    *("export", "export_dtype"),
    *("checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint", "dry_run", "config"),
    *("model_type", "model_family", "cache_latents", "offload"),
}
# Further ones that what the base draws, before any LoRA, does not depend on.
NOT_DRAWN = {
    *("rank", "lora_alpha", "lora_layers", "max_train_steps", "timesteps_per_step", "gradient_accumulation_steps"),
    *("learning_rate", "lr_scheduler", "lr_warmup_steps", "adam_weight_decay", "max_grad_norm", "optimizer"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "lr_num_cycles", "lr_power", "lora_dropout"),
    *("flow_timesteps_mode", "flow_weight", "segment_weights", "train_coefficients_only"),
}


def find_checkpoints(output_dir: str | Path) -> list[tuple[int, Path]]:
    """Return (N, folder) of every checkpoint, lowest N first; a folder without a state is none: its run was killed."""
    matches = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in Path(output_dir).glob("checkpoint-*")]
    return sorted((int(match[1]), path) for match, path in matches if match and (path / STATE_NAME).exists())


def save_checkpoint(output_dir: str | Path, state: dict, step: int, limit: int | None) -> Path:
    """Write `state` to checkpoint-`step`, whole or not at all, and then drop the oldest checkpoints beyond `limit`.

    Return its folder; raise OSError where it cannot be written.
    """
    folder = Path(output_dir) / f"checkpoint-{step}"
    content = io.BytesIO()
    torch.save(state, content)  # into memory: of a full disk torch says neither that it is full nor that it is a disk
    folder.mkdir(exist_ok=True)
    try:
        replace_file(folder / STATE_NAME, lambda temporary: temporary.write_bytes(content.getbuffer()))
    except OSError:
        with contextlib.suppress(OSError):  # an older state is in it
            folder.rmdir()
        raise
    if limit:  # oldest by time: the folder may hold higher numbers of an earlier, longer run
        written = [path for _, path in find_checkpoints(output_dir)]
        for old in sorted(written, key=lambda path: (path / STATE_NAME).stat().st_mtime_ns)[:-limit]:
            shutil.rmtree(old)
    return folder


def load_checkpoint(name: str | None, output_dir: str | Path) -> dict | None:
    """Return the state in the checkpoint folder `name`, or in the newest of `output_dir` where it is "latest".

    Return None where nothing is to be resumed, or where "latest" finds no checkpoint. Raise InputError where a folder
    is named, or found, that holds no sound state.
    """
    if not name:
        return None
    path = Path(name)
    if name == "latest":
        checkpoints = find_checkpoints(output_dir)
        if not checkpoints:
            return None
        path = checkpoints[-1][1]
    try:
        state = torch.load(path / STATE_NAME, map_location="cpu", weights_only=True)
        state["settings"] = plain(state["settings"])
        if state["settings"]["phase"] not in PHASES:
            raise ValueError("phase")
        if not {"lora", "optimizer", "lr_scheduler", "generator"} <= set(state) or type(state["step"]) is not int:
            raise KeyError("state")
        if state.setdefault("losses", torch.zeros(0, 3)).shape[1:] != (3,):
            raise ValueError("losses")
        return state | {"folder": path.name}
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"--resume_from_checkpoint {path}: no {STATE_NAME} there; name a checkpoint-N") from None
    except Exception as error:  # a damaged file: zip, unpickling and key errors of several kinds
        kind = type(error).__name__
        raise InputError(f"--resume_from_checkpoint {path}: damaged ({kind}); name an older one") from None


def plain(settings: dict) -> dict:
    """Return the settings as JSON has them, 4.0 as 4: equal values are then written alike."""

    def number(text: str) -> int | float:
        return int(value) if (value := float(text)).is_integer() else value

    return json.loads(json.dumps(settings), parse_float=number)


def run_settings(args, recipe: Recipe | None, base: str, learned: str, processes: int) -> dict:
    """Return all that a LoRA comes from: what must be the same for a resumed run to equal the uninterrupted one.

    `base` is base.identify's with its LoRAs, `learned` a digest of image and captions. Processes share a batch, so
    that as many rows make the same run however they are shared out.
    """
    # A dropout's masks are drawn for a process's batch, and otherwise where they are compiled.
    compared = {"train_batch_size", "compile"} if args.lora_dropout else set()
    flags = {name: value for name, value in vars(args).items() if name not in NOT_COMPARED - compared}
    batch = {"total_batch_size": args.train_batch_size * processes}
    recipe = recipe.as_dict() if recipe else {}
    recipe.pop("base_loras", None)  # which `base` holds, wherever they lie
    return plain(flags | recipe | batch | {"base_model": base, "image_and_caption": learned})


def digest(settings: dict) -> str:
    """Return the SHA-256 of settings that JSON can hold."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def with_run(recipe: Recipe, settings: dict, asked: str | None = None) -> Recipe:
    """Return the recipe with a digest of the settings: a resumed run knows by it which phases it finished.

    `asked` is the digest of those that were asked for, by which a new run knows whose LoRA it would write over.
    """
    return dataclasses.replace(recipe, run=digest(settings), asked=asked)


def check_replaced(folders: dict[str, Path], asked: dict[str, str]) -> None:
    """Raise InputError where a run would write over a LoRA of other settings; `asked` are its phases' digests.

    It is said before the base is loaded: of two that ask for the same, the second writes the same again.
    """
    for phase, folder in folders.items():
        path = folder / WEIGHT_NAME
        if not path.exists():
            continue
        with contextlib.suppress(InputError):  # of another trainer, or damaged
            if read_recipe(path).asked == asked[phase]:
                continue
        raise InputError(
            f"--output_dir: {path} is of a run with other settings; name another folder, or give "
            "--overwrite_output_dir to write over it"
        )


def is_finished(recipe: Recipe, settings: dict, folder: Path) -> bool:
    """Return whether the phase's LoRA, of just these settings, is there."""
    try:
        return read_recipe(folder / WEIGHT_NAME).run == with_run(recipe, settings).run
    except InputError:
        return False


def unquoted(value) -> str:
    """Return `shown` without the quotes around a text."""
    return shown(value).strip("'")


def check_flags(saved: dict, now: dict) -> None:
    """Raise check_settings' errors for what is set before the base is loaded; `now` is run_settings without a recipe.

    What is left to the base is None in it, or auto; a grid is the recipe's.
    """
    set_before = {key: value for key, value in now.items() if value not in (None, "auto") and key != "grid"}
    check_settings({key: value for key, value in saved.items() if key in set_before}, set_before)


def check_settings(saved: dict, now: dict) -> None:
    """Raise InputError where a checkpoint was made with other settings than this run's."""
    for key in sorted(now.keys() ^ saved.keys()):
        raise InputError(
            f"--resume_from_checkpoint: another version wrote it, which compares other settings ({unquoted(key)}); go "
            "on with that one, or leave --resume_from_checkpoint out to start anew"
        )
    for key, value in sorted(now.items(), key=lambda item: item[0] != "base_model"):  # another has another schedule
        if saved[key] != value and key == "image_and_caption":  # digests, which say nothing to anybody
            raise InputError("--resume_from_checkpoint: its image or captions are not this run's; use the same")
        if saved[key] != value:
            raise InputError(
                f"--resume_from_checkpoint: its {key} is {unquoted(saved[key])}, this run's is {unquoted(value)}; use "
                "the same"
            )


def check_lora(lora: dict, transformer: torch.nn.Module, layers: list[str], rank: int) -> None:
    """Raise InputError where a checkpoint's LoRA is not just the tensors that this run trains, all of them finite.

    They are float32, (rank, in) and (out, rank) for each of `layers`. The settings may be right all the same: a
    checkpoint is a file that anyone may have written.
    """
    shapes = {}
    for layer in layers:
        module = transformer.get_submodule(layer)
        shapes[f"{layer}.lora_A.weight"] = (rank, module.in_features)
        shapes[f"{layer}.lora_B.weight"] = (module.out_features, rank)
    of_checkpoint = "--resume_from_checkpoint: its LoRA"
    if not isinstance(lora, dict):
        raise InputError(f"{of_checkpoint} is of type {type(lora).__name__}; name an older checkpoint")
    for name in sorted(shapes.keys() ^ lora.keys(), key=str):
        which = f"lacks {name}" if name in shapes else f"has {shown(name)}, which this run does not train"
        raise InputError(f"{of_checkpoint} {which}; name an older checkpoint")
    for name, tensor in lora.items():
        form = (tensor.dtype, *tensor.shape) if isinstance(tensor, torch.Tensor) else (type(tensor).__name__,)
        needed = (torch.float32, *shapes[name])
        if form != needed:
            raise InputError(f"{of_checkpoint}'s {name} is {form}, this run's is {needed}; name an older checkpoint")
        if not tensor.isfinite().all():
            raise InputError(f"{of_checkpoint}'s {name} holds values that are not finite; name an older checkpoint")


def find_resume(
    args, settings: dict[str, dict], recipes: dict[str, Recipe], folders: dict[str, Path], state: dict | None
) -> tuple[set, dict]:
    """Return the phases that need no training, and by phase the checkpoint to begin from, none or one.

    Raise InputError where the checkpoint, or the LoRAs that "latest" finds without one, are of another run.
    """
    latest = args.resume_from_checkpoint == "latest"
    finished = {phase for phase in recipes if latest and is_finished(recipes[phase], settings[phase], folders[phase])}
    if state is None:
        if latest:
            check_unfinished(args, {phase: folders[phase] for phase in recipes if phase not in finished}, finished)
        return finished, {}
    phase = state["settings"]["phase"]
    if phase not in recipes:
        raise InputError(f"--resume_from_checkpoint: it is of the {phase} phase, which --phase leaves out")
    check_settings(state["settings"], settings[phase])
    if phase == "fast" and "slow" in recipes:
        read_recipe(folders["slow"] / WEIGHT_NAME)  # must be there: it was finished before
        if not is_finished(recipes["slow"], settings["slow"], folders["slow"]):
            raise InputError(f"--resume_from_checkpoint: the slow LoRA in {folders['slow']} is of another run")
        finished.add("slow")
    return finished, {phase: state}


def check_unfinished(args, folders: dict[str, Path], finished: set) -> None:
    """Raise InputError where "latest" found no checkpoint of the phases in these folders, but another run's files.

    Otherwise they start anew, so that one command line serves a job that is restarted.
    """
    latest, output_dir = "--resume_from_checkpoint latest:", Path(args.output_dir)
    for phase, folder in folders.items():
        # Where a run with, or without, --parallel_phases would have put them.
        elsewhere = output_dir.parent if args.parallel_phases else output_dir / phase
        if find_checkpoints(elsewhere):
            remedy = "leave --parallel_phases out" if args.parallel_phases else "give --parallel_phases"
            raise InputError(f"{latest} {elsewhere} holds the checkpoints; {remedy}, as the run did that wrote them")
        if not finished and (folder / WEIGHT_NAME).exists() and not args.overwrite_output_dir:
            raise InputError(
                f"{latest} the LoRA in {folder} is of another run, with other settings; name another --output_dir, or "
                "give --overwrite_output_dir to write over it"
            )
    if folders and not finished:
        logger.info(f"{latest} {output_dir} holds nothing to go on from; starting anew")
