"""What does a Space hold? The page's own code, the LoRAs and samplers, and the flags that it was exported with.

It runs as it lies there, `python app.py`, here or on the hub: all that it needs is copied into it, but for a base that
has a hub id, which is downloaded there, and for the packages of its requirements.txt.
"""

import json
import os
import shutil
from pathlib import Path

from glance.command_line import Settings
from glance.files import faults
from glance.files.further_loras import find_file
from glance.files.recipe import WEIGHT_NAME
from glance.files.sampler import NAME
from glance.web.studio import Choice, base_of
from glance_utils import InputError


ROOT = Path(__file__).parents[2]
CODE = ("glance_utils.py", "infer_glance.py", "LICENSE")  # beside the package
REQUIREMENTS = ("requirements.txt", "requirements-page.txt")
# Of the flags that were given, what is written anew or has no meaning there.
LEFT_OUT = {
    "lora",
    "slow_lora",
    "fast_lora",
    "slow_weight_name",
    "fast_weight_name",
    "sampler",
    "style_lora",
    "base_lora",
}
LEFT_OUT |= {"pretrained_model_name_or_path", "cache_dir", "config", "prompt", "prompts_file"}
LEFT_OUT |= {"port", "share", "export_space"}
APP = '''"""The page as a Space: python app.py. Its flags are in page.json, and any may be given here too."""

import os
import runpy
import sys
from pathlib import Path


os.chdir(Path(__file__).resolve().parent)
sys.argv[1:1] = ["--config", "page.json"]
runpy.run_module("glance.page", run_name="__main__")
'''
README = """---
title: Glance, {name}
emoji: ⚡
colorFrom: yellow
colorTo: red
sdk: gradio
sdk_version: {gradio}
python_version: "3.11"
app_file: app.py
{models}short_description: The base and Glance side by side
---

# Glance, {name}

The base as it is and with Glance, side by side. `python app.py` runs the page, here as on the hub; `page.json` has its
flags.

- Choose hardware that holds the base. It has to be there all the time: ZeroGPU, which lends a GPU by the call, is not
  supported.
- {where}
- One picture is drawn at a time; others wait.
"""


def export(settings: Settings, choices: list[Choice]) -> str:
    """Write the Space into settings.export_space, whole or not at all; return what to do with it.

    Raise InputError where the folder is there and not empty, or cannot be written.
    """
    folder = Path(settings.export_space)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"--export_space {folder}: it is there already; give a new folder")
    missing = [name for name in (*CODE, *REQUIREMENTS) if not (ROOT / name).is_file()]
    if missing:
        raise InputError(f"--export_space: {ROOT / missing[0]} is not there; export from a checkout of the repository")
    faults.check_writable(folder, "--export_space")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        unfinished.mkdir()
        write_space(unfinished, settings, choices)
        if folder.exists():
            folder.rmdir()
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return f"{folder}: python {folder / 'app.py'} runs it here, hf upload SPACE {folder} --repo-type space on the hub"


def write_space(folder: Path, settings: Settings, choices: list[Choice]) -> None:
    """Write all files of the Space into a folder that is there."""
    for name in CODE:
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "glance", folder / "glance", ignore=shutil.ignore_patterns("__pycache__"))
    given = {name: value for name, value in settings.given.items() if name not in LEFT_OUT}
    if scales := given.get("lora_scale"):
        given["lora_scale"] = f"{scales['slow']},{scales['fast']}"
    for choice in choices:
        place = Path("dial", str(choice.number), choice.name)
        copy_choice(choice, folder / place)
        given.setdefault("lora" if choice.paths else "sampler", []).append(place.as_posix())
    args = choices[0].args
    for flag in ("style_lora", "base_lora"):
        for number, (source, scale) in enumerate(getattr(args, flag)):
            name = f"{flag}-{number}.safetensors"
            shutil.copy(find_file(source, WEIGHT_NAME, args.cache_dir, f"no such file of --{flag}"), folder / name)
            given.setdefault(flag, []).append(f"{name}:{scale}")
    given["pretrained_model_name_or_path"], about = copy_base(base_of(choices[0]), folder)
    given |= {"prompt": settings.prompts} if settings.prompts else {}
    (folder / "page.json").write_text(json.dumps(given, indent=1) + "\n", encoding="utf-8")
    (folder / "app.py").write_text(APP, encoding="utf-8")
    lines = [line for name in REQUIREMENTS for line in (ROOT / name).read_text().splitlines() if "==" in line]
    versions = dict(line.split("==") for line in lines)  # the page's own come last
    text = "".join(f"{name}=={version}\n" for name, version in versions.items())
    (folder / "requirements.txt").write_text(text, encoding="utf-8")
    version = versions["gradio"]
    (folder / "README.md").write_text(README.format(gradio=version, **about), encoding="utf-8")


def copy_base(base: str, folder: Path) -> tuple[str, dict[str, str]]:
    """Copy a base that is a folder into the Space's; return what the base is there, and what README says of it."""
    if not os.path.isdir(base):
        where = f"The base is {base}, which it downloads. If that is gated, add your token as the secret `HF_TOKEN`."
        return base, {"name": base, "where": where, "models": f"models: [{base}]\n"}
    name = "/".join(Path(base).resolve().parts[-2:])  # by the last of these LoRAs know their base
    shutil.copytree(base, folder / "base" / name)
    return f"base/{name}", {"name": name, "where": f"The base lies in `base/{name}`.", "models": ""}


def copy_choice(choice: Choice, folder: Path) -> None:
    """Copy what a position of the dial is drawn with, and its curve, into a new folder."""
    folder.mkdir(parents=True)
    for phase, path in choice.paths.items():
        (folder / phase).mkdir()
        shutil.copy(path, folder / phase / WEIGHT_NAME)
    beside = choice.folder
    if not choice.paths:
        shutil.copy(beside / NAME if Path(choice.source).is_dir() else choice.source, folder / NAME)
    if (beside / faults.CALLS).is_file():
        shutil.copy(beside / faults.CALLS, folder)
