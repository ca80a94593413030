"""What a run can go on from: output_dir/checkpoint-N/training_state.pt, N counting the steps of all phases, and the
LoRAs of the phases that it finished."""

import contextlib
import hashlib
import io
import json
import re
import shutil
from pathlib import Path

import torch

from glance_utils import PHASES, WEIGHT_NAME, InputError, replace_file
from lora_files import read_recipe, shown


STATE_NAME = "training_state.pt"


def find_checkpoints(output_dir: str | Path) -> list[tuple[int, Path]]:
    """(N, folder) of every checkpoint, lowest N first; a folder without a state is none: its run was killed."""
    matches = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in Path(output_dir).glob("checkpoint-*")]
    return sorted((int(match[1]), path) for match, path in matches if match and (path / STATE_NAME).exists())


def is_resumable(folder: Path) -> bool:
    """Whether a phase that is trained into this folder has a checkpoint or a LoRA there."""
    return bool(find_checkpoints(folder)) or (folder / WEIGHT_NAME).exists()


def save_checkpoint(output_dir: str | Path, state: dict, step: int, limit: int | None) -> Path:
    """Write `state` beside and rename it, then drop the oldest checkpoints beyond `limit`; OSError if it cannot be."""
    folder, content = Path(output_dir) / f"checkpoint-{step}", io.BytesIO()
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
    """The state in the checkpoint folder `name`, or in the newest of `output_dir` where it is "latest".

    None where nothing is to be resumed, or where "latest" finds no checkpoint but a LoRA, perhaps a finished phase's.
    """
    if not name:
        return None
    path = Path(name)
    if name == "latest":
        checkpoints = find_checkpoints(output_dir)
        if not checkpoints and any((Path(output_dir) / phase / WEIGHT_NAME).exists() for phase in ("", *PHASES)):
            return None
        if not checkpoints:
            raise InputError(f"--resume_from_checkpoint latest: {output_dir} holds no checkpoint-N folder")
        path = checkpoints[-1][1]
    try:
        state = torch.load(path / STATE_NAME, map_location="cpu", weights_only=True)
        if state["settings"]["phase"] not in PHASES:
            raise ValueError("phase")
        if not {"lora", "optimizer", "lr_scheduler", "generator"} <= set(state) or type(state["step"]) is not int:
            raise KeyError("state")
        return state
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"--resume_from_checkpoint {path}: no {STATE_NAME} there; name a checkpoint-N") from None
    except Exception as error:  # a damaged file: zip, unpickling and key errors of several kinds
        kind = type(error).__name__
        raise InputError(f"--resume_from_checkpoint {path}: damaged ({kind}); name an older one") from None


def resume_settings(args, recipe: dict) -> dict:
    """What must be the same for a resumed run to equal the uninterrupted one."""
    names = ("seed", "lora_alpha", "lora_layers", "flow_timesteps_mode", "train_batch_size", "use_8bit_adam")
    names += ("gradient_accumulation_steps", "mixed_precision", "timesteps_per_step", "quantization", "learning_rate")
    names += ("lr_scheduler", "lr_warmup_steps", "adam_weight_decay", "max_grad_norm", "image_and_caption")
    names += ("num_trajectories", "segment_weights", "flow_weight", "solver")
    return recipe | {name: getattr(args, name) for name in names}


def with_run(args, recipe: dict) -> dict:
    """The recipe with a digest of all that the LoRA came from: a resumed run knows by it which phases it finished."""
    settings = json.dumps(resume_settings(args, recipe), sort_keys=True)
    return recipe | {"run": hashlib.sha256(settings.encode()).hexdigest()}


def is_finished(args, recipe: dict, folder: Path) -> bool:
    """Whether the phase's LoRA, of just these settings, is there."""
    try:
        return read_recipe(folder / WEIGHT_NAME)["run"] == with_run(args, recipe)["run"]
    except (InputError, KeyError):
        return False


def check_settings(saved: dict, now: dict) -> None:
    """InputError where a checkpoint was made with other settings than this run's."""
    for key, value in sorted(now.items(), key=lambda item: item[0] != "base_model"):  # another has another schedule
        if saved.get(key) != value:
            raise InputError(
                f"--resume_from_checkpoint: its {key} is {saved.get(key)}, this run's is {value}; use the same"
            )


def check_lora(lora: dict, transformer: torch.nn.Module, layers: list[str], rank: int) -> None:
    """InputError where a checkpoint's LoRA has not just the tensors that this run trains, or values that are no
    numbers. The settings may be right all the same: a checkpoint is a file that anyone may have written."""
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
        found = (tensor.dtype, *tensor.shape) if isinstance(tensor, torch.Tensor) else (type(tensor).__name__,)
        if found != (needed := (torch.float32, *shapes[name])):
            raise InputError(f"{of_checkpoint}'s {name} is {found}, this run's is {needed}; name an older checkpoint")
        if not tensor.isfinite().all():
            raise InputError(f"{of_checkpoint}'s {name} holds values that are not finite; name an older checkpoint")


def find_resume(args, recipes: dict[str, dict], folders: dict[str, Path], state: dict | None) -> tuple[set, dict]:
    """The phases that need no training, and by phase the checkpoint to begin from, {} or one; InputError where the
    checkpoint is not of this run."""
    name = args.resume_from_checkpoint
    finished = {phase for phase in recipes if name == "latest" and is_finished(args, recipes[phase], folders[phase])}
    if state is None:
        if name and not finished:
            raise InputError(f"--resume_from_checkpoint latest: {args.output_dir} holds no checkpoint-N folder")
        return finished, {}
    phase = state["settings"]["phase"]
    if phase not in recipes:
        raise InputError(f"--resume_from_checkpoint: it is of the {phase} phase, which --phase leaves out")
    check_settings(state["settings"], resume_settings(args, recipes[phase]))
    if phase == "fast" and "slow" in recipes:
        read_recipe(folders["slow"] / WEIGHT_NAME)  # must be there: it was finished before
        if not is_finished(args, recipes["slow"], folders["slow"]):
            raise InputError(f"--resume_from_checkpoint: the slow LoRA in {folders['slow']} is of another run")
        finished.add("slow")
    return finished, {phase: state}
