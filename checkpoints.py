"""Checkpoints: output_dir/checkpoint-N/training_state.pt, N counting the steps of all phases."""

import os
import re
import shutil
import tempfile
from pathlib import Path

import torch

from glance_utils import PHASES, InputError


def find_checkpoints(output_dir: str | Path) -> list[tuple[int, Path]]:
    """(N, folder) of every checkpoint, oldest first."""
    matches = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in Path(output_dir).glob("checkpoint-*")]
    return sorted((int(match[1]), path) for match, path in matches if match)


def save_checkpoint(output_dir: str | Path, state: dict, step: int, limit: int | None) -> Path:
    """Write `state` beside and rename it, then drop the oldest checkpoints beyond `limit`."""
    folder = Path(output_dir) / f"checkpoint-{step}"
    temporary = Path(tempfile.mkdtemp(prefix=".checkpoint-", dir=output_dir))
    try:
        torch.save(state, temporary / "training_state.pt")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if limit:  # oldest by time: the folder may hold higher numbers of an earlier, longer run
        written = sorted((path for _, path in find_checkpoints(output_dir)), key=lambda path: path.stat().st_mtime_ns)
        for old in written[:-limit]:
            shutil.rmtree(old)
    return folder


def load_checkpoint(name: str, output_dir: str | Path) -> dict:
    """The state in the checkpoint folder `name`, or in the newest of `output_dir` where it is "latest"."""
    path = Path(name)
    if name == "latest":
        checkpoints = find_checkpoints(output_dir)
        if not checkpoints:
            raise InputError(f"--resume_from_checkpoint latest: {output_dir} holds no checkpoint-N folder")
        path = checkpoints[-1][1]
    try:
        state = torch.load(path / "training_state.pt", map_location="cpu", weights_only=True)
        if state["settings"]["phase"] not in PHASES:
            raise ValueError("phase")
        if not {"lora", "optimizer", "lr_scheduler", "generator"} <= set(state) or type(state["step"]) is not int:
            raise KeyError("state")
        return state
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"--resume_from_checkpoint {path}: no training_state.pt there; name a checkpoint-N") from None
    except Exception as error:  # a damaged file: zip, unpickling and key errors of several kinds
        kind = type(error).__name__
        raise InputError(f"--resume_from_checkpoint {path}: damaged ({kind}); name an older one") from None


def check_settings(saved: dict, now: dict) -> None:
    """InputError where a checkpoint was made with other settings than this run's."""
    for key, value in sorted(now.items(), key=lambda item: item[0] != "base_model"):  # another has another schedule
        if saved.get(key) != value:
            raise InputError(
                f"--resume_from_checkpoint: its {key} is {saved.get(key)}, this run's is {value}; use the same"
            )
