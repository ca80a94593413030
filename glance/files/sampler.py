"""What is a sampler on disk? sampler.json: which steps a base walks and how it goes along its velocities, no weights.

It is written beside the LoRAs, or alone by --max_train_steps 0. Like a LoRA file's recipe it is data from anyone,
checked before any of it is used; a new field is one line of Sampler, with its check and its default.
"""

import dataclasses
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from glance.files.atomic import replace_text
from glance.files.recipe import (
    NO_RECIPE,
    Recipe,
    are_timesteps,
    as_in_recipe,
    check_called,
    check_steps,
    checked,
    count,
    is_number,
    read_fields,
)
from glance_utils import PHASES, InputError, Schedule, check_timesteps


NAME = "sampler.json"
SCHEDULER = "scheduler"  # folder beside it: the same as a FixedSigmaScheduler, for any diffusers pipeline
LIMIT = 10**6  # bytes


def are_phases(value) -> bool:
    """Return whether it is the timesteps of both phases, which descend; raise InputError, a ValueError, where not."""
    whole = isinstance(value, dict) and tuple(value) == PHASES and all(map(are_timesteps, value.values()))
    return whole and bool(check_timesteps(sum(value.values(), [])))


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """All that it takes to draw so, and where it comes from. As JSON it has the fields in this order.

    A field that Recipe has too means what it means there, for both phases.
    """

    base_model: str = as_in_recipe("base_model")
    base_loras: list[dict] | None = as_in_recipe("base_loras", default=None)
    pipeline: str = as_in_recipe("pipeline")
    height: int = as_in_recipe("height")
    width: int = as_in_recipe("width")
    guidance_scale: float | None = as_in_recipe("guidance_scale")
    pipeline_kwargs: dict = as_in_recipe("pipeline_kwargs")
    pipeline_images: list[str] | None = as_in_recipe("pipeline_images", default=None)
    num_base_steps: int = as_in_recipe("num_base_steps")
    phases: dict[str, list[float]] = checked(are_phases)  # timesteps, 0..1000, descending, by phase
    coefficients: list[list[float]] | None = as_in_recipe("coefficients")
    branches: list[str] | None = as_in_recipe("branches", default=None)
    guidance: str = as_in_recipe("guidance")
    grid: str | None = as_in_recipe("grid")
    captions: int = checked(lambda value: value == 0 or count(10**6)(value))  # on which it was found; 0: on none
    error: float | None = checked(lambda value: value is None or is_number(value))  # to the full run, on another
    version: str = as_in_recipe("version")

    @classmethod
    def from_json(cls, text: str) -> "Sampler":
        """Return the sampler, every field checked; raise KeyError, TypeError, ValueError or RecursionError."""
        entries = json.loads(text)
        if not isinstance(entries, dict):
            raise TypeError("it holds no fields")
        sampler = cls(**read_fields(cls, entries))
        check_steps(len(sum(sampler.phases.values(), [])), sampler.coefficients, sampler.branches)
        check_called(sampler.branches)
        return sampler

    def schedule(self) -> Schedule:
        """Return its Schedule, as far as a file holds it: what the model is told is asked of the pipeline."""
        return Schedule(self.phases, coefficients=self.coefficients, branches=self.branches)

    def of_phase(self, phase: str) -> dict:
        """Return the coefficients and branches of the steps of this phase."""
        first = 0 if phase == "slow" else len(self.phases["slow"])
        places = slice(first, first + len(self.phases[phase]))
        lists = {"coefficients": self.coefficients, "branches": self.branches}
        return {name: entries and entries[places] for name, entries in lists.items()}

    def recipe(self) -> Recipe:
        """Return what inference takes of a LoRA's recipe: the base, the call and the number of the base's steps."""
        shared = {part.name for part in dataclasses.fields(self)} & {part.name for part in dataclasses.fields(Recipe)}
        return dataclasses.replace(
            NO_RECIPE, **{name: getattr(self, name) for name in shared - {"coefficients", "branches"}}
        )


def write_sampler(folder: Path, sampler: Sampler, scheduler=None) -> None:
    """Write sampler.json and, where one walks it, its FixedSigmaScheduler as diffusers saves one, each whole or not at
    all; one that an earlier run left is taken away where none does."""
    replace_text(folder / NAME, json.dumps(dataclasses.asdict(sampler), indent=1) + "\n")
    if scheduler is None:
        shutil.rmtree(folder / SCHEDULER, ignore_errors=True)
        return
    (folder / SCHEDULER).mkdir(exist_ok=True)
    replace_text(folder / SCHEDULER / scheduler.config_name, scheduler.to_json_string())


def read_sampler(source: str | Path) -> Sampler:
    """Return the sampler in a file, or in a folder that holds sampler.json; raise InputError where it is none."""
    path = Path(source, NAME) if os.path.isdir(source) else Path(source)
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(LIMIT + 1)
        if len(text) > LIMIT:
            raise ValueError("it is too long")
        return Sampler.from_json(text)
    except KeyError as error:
        reason = f"it has no {error}"
    except OSError as error:
        reason = error.strerror or str(error)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        reason = " ".join(str(error).split())[:300]
    raise InputError(f"--sampler {path}: {reason}; give a {NAME} that train_glance_lora.py wrote, or its folder")
