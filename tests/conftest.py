"""Shared by all tests: offline, tiny real pipelines on disk, both scripts called in this process."""

import argparse
import contextlib
import gc
import io
import os
import sys
from pathlib import Path

import numpy as np
import pytest


os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demo"), str(Path(__file__).parent)]

import torch  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from diffusers import DiffusionPipeline  # noqa: E402
from peft import LoraConfig  # noqa: E402
from PIL import Image  # noqa: E402
from tiny_pipelines import PIPELINES  # noqa: E402

import infer_glance  # noqa: E402
import train_glance_lora  # noqa: E402
from glance.files.recipe import WEIGHT_NAME  # noqa: E402
from glance_utils import InputError, denoiser  # noqa: E402


torch.set_num_threads(1)
REFUSED = (InputError, argparse.ArgumentError)  # what the user can mend, found late or on the command line
# Flags of run_train that decide themselves about gradient checkpointing.
DECIDED = {"gradient_checkpointing", "no-gradient_checkpointing", "enable_group_offload", "quantization", "config"}


@pytest.fixture(scope="module", autouse=True)
def libraries_frozen():
    """Whoever frees memory collects garbage: without the libraries' own million objects, in half of a run's time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory):
    """{"flux": folder, "sd3": folder, "qwen": folder}"""
    root = tmp_path_factory.mktemp("pipelines")
    return {name: make(root / name) for name, make in PIPELINES.items()}


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """An image, 40x50, with its caption beside it."""
    path = tmp_path_factory.mktemp("pair") / "glance.png"
    pixels = np.random.RandomState(0).randint(0, 255, (50, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    path.with_suffix(".txt").write_text("a red ring\n")
    return path


def own_size(height=1024, width=1024) -> tuple[int, int]:
    """A pipeline's own size, or the one near these, for load_pair without a pipeline."""
    return height // 16 * 16, width // 16 * 16


def picture_distance(one, other) -> int:
    """The largest difference between two pictures' pixels, in 255ths. Pictures that are computed in two ways may
    round apart by one."""
    one, other = (np.asarray(Image.open(picture)).astype(int) for picture in (one, other))
    assert one.shape == other.shape
    return np.abs(one - other).max()


def long(*values, **kwargs):
    """A parameter of a test that is left out by default (pytest.ini)."""
    return pytest.param(*values, marks=pytest.mark.long, **kwargs)


def everyday(names, kept: set) -> list:
    """Names as parameters, of which all but those kept are left out by default."""
    return [name if name in kept else long(name) for name in names]


def contents(folder: Path) -> dict[str, bytes]:
    """What the files in a folder hold, by name; the folder's own name, which the model card has in its commands, is a
    dot."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content.replace(str(folder).encode(), b".") for name, content in found.items()}


def flags(**settings) -> list[str]:
    """Keyword arguments as command-line arguments; True is a switch, a list repeats the flag."""
    arguments = []
    for name, value in settings.items():
        for item in value if isinstance(value, list) else [value]:
            arguments += [f"--{name}"] if item is True else [f"--{name}={item}"]
    return arguments


def run_train(defaults: dict, settings: dict) -> Path:
    """train_glance_lora.py's main with these flags (None takes a default away); returns the output folder.

    Without gradient checkpointing: to find out whether a step fits takes as long as all five.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    defaults = {"resolution": 32, "rank": 4, "max_train_steps": 5} | defaults
    if not (defaults | settings).keys() & DECIDED:
        defaults |= {"no-gradient_checkpointing": True}
    settings = {key: value for key, value in (defaults | settings).items() if value is not None}
    train_glance_lora.main(flags(**settings))
    return Path(settings["output_dir"])


@pytest.fixture
def train(pipelines, pair, tmp_path):
    """train(**flags) runs train_glance_lora.py's main with small defaults and returns the output folder."""

    def call(base="flux", **settings) -> Path:
        defaults = {
            "pretrained_model_name_or_path": pipelines.get(base, base),
            "instance_image": pair,
            "output_dir": tmp_path / "output",
        }
        return run_train(defaults, settings)

    return call


@pytest.fixture(scope="session")
def trained(pipelines, pair, tmp_path_factory):
    """trained(base) is a folder with LoRAs that change the base's pictures clearly; each base is trained once."""
    folders = {}

    def call(base="flux") -> Path:
        if base not in folders:
            defaults = {
                "pretrained_model_name_or_path": pipelines[base],
                "instance_image": pair,
                "output_dir": tmp_path_factory.mktemp("trained") / base,
                "learning_rate": 3e-2,
            }
            with contextlib.redirect_stdout(io.StringIO()):  # a test looks at what its own calls print
                folders[base] = run_train(defaults, {})
        return folders[base]

    return call


@pytest.fixture(scope="session")
def styles(pipelines, tmp_path_factory):
    """styles(base): two LoRAs as --style_lora and --base_lora take them, and a base that holds the first at 0.7, the
    second at 1."""
    made = {}

    def call(base: str) -> tuple[list[str], str]:
        if base not in made:
            root = tmp_path_factory.mktemp(base)
            pipe = DiffusionPipeline.from_pretrained(pipelines[base])
            generator = torch.Generator().manual_seed(0)
            for name, layer in (("one", "to_q"), ("two", "to_out.0")):
                denoiser(pipe).add_adapter(LoraConfig(r=2, target_modules=[layer]), name)
                for key, value in denoiser(pipe).named_parameters():
                    if f".{name}." in key:
                        value.data.normal_(0, 0.3, generator=generator)
                denoiser(pipe).save_lora_adapter(root / name, adapter_name=name)
            denoiser(pipe).set_adapters(["one", "two"], [0.7, 1.0])
            denoiser(pipe).fuse_lora()
            denoiser(pipe).unload_lora()
            pipe.save_pretrained(root / "fused")
            made[base] = [f"{root / 'one' / WEIGHT_NAME}:0.7", str(root / "two")], str(root / "fused")
        return made[base]

    return call


@pytest.fixture(scope="session")
def mixed_sampler(pipelines, tmp_path_factory):
    """The folder of a sampler of four mixed calls."""
    root = tmp_path_factory.mktemp("mixed")
    (root / "prompts.txt").write_text("a red ring\na blue square\n")
    found = {"num_model_calls": 4, "num_plans": 1, "num_trajectories": 1, "num_base_steps": 8, "max_train_steps": 0}
    where = {"pretrained_model_name_or_path": pipelines["sd3"], "prompts_file": root / "prompts.txt"}
    return run_train(where, found | {"output_dir": root / "sampler", "guidance_scale": 3, "rank": None})


@pytest.fixture
def infer(pipelines, tmp_path):
    """infer(**flags) runs infer_glance.py's main and returns the output path."""

    def call(base="flux", **settings) -> Path:
        AcceleratorState._reset_state(reset_partial_state=True)
        defaults = {
            "pretrained_model_name_or_path": pipelines.get(base, base),
            "prompt": "a blue ring",
            "output": tmp_path / "out.png",
        }
        settings = {key: value for key, value in (defaults | settings).items() if value is not None}
        infer_glance.main(flags(**settings))
        return Path(settings["output"])

    return call
