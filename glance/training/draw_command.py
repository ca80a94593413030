"""Which command draws with what a run wrote? A run's last line, and the model card's.

Text alone, nothing is run; a flag that inference must repeat after training is added to draw_flags.
"""

import json
import shlex
import shutil
import sys
from pathlib import Path

from glance import command_line as cli
from glance.command_line import Settings
from glance.shared_flags import DTYPES
from glance_utils import PHASES


SCRIPT = Path(__file__).parents[2] / "infer_glance.py"


def lora_flags(folder: Path | str, phases: list[str]) -> dict[str, str]:
    """Return infer_glance.py's flags for the LoRAs in `folder`; of one phase, FOLDER stands for the other's, and of
    none its sampler is drawn with."""
    if not phases:
        return {"sampler": str(folder)}
    if len(phases) == 2:
        return {"lora": str(folder)}
    return {f"{phase}_lora": str(folder) if phase in phases else "FOLDER" for phase in PHASES}


def draw_command(args: Settings, folder: Path | str, phases: list[str]) -> str:
    """Return the command that draws with the LoRAs in `folder`, for a shell in this directory; one line.

    The prompt is for the reader to fill in: captions do not belong in what a run prints.
    """
    values = {"cache_dir": args.cache_dir}
    words = [executable("python"), near(SCRIPT), draw_flags(args, folder, phases, values), '--prompt "..."']
    return " ".join(words)


def draw_flags(args: Settings, folder: Path | str, phases: list[str], further: dict | None = None) -> str:
    """Return infer_glance.py's flags for the LoRAs in `folder` but for the prompt, quoted, with those of `further`.

    The base is left out, as the LoRA files name it; what they do not say is given as it was for training.
    """
    values = lora_flags(folder, phases) | {"revision": args.revision, "variant": args.variant} | (further or {})
    values["dtype"] = DTYPES.get(args.mixed_precision)
    own = next((prompt for prompt in cli.read_prompts(args.prompts_file) if prompt == args.instance_prompt), "")
    files = args.pipeline_images | getattr(own, "files", {})
    values["pipeline_images"] = json.dumps(files) if files else None
    values["quantization"] = args.quantization if args.quantization != "none" else None
    words = [joined(name, value) for name, value in values.items() if value]
    return " ".join(words + (["--enable_group_offload"] if args.enable_group_offload else []))


def joined(name: str, value: str) -> str:
    """Return a flag and its value, which argparse would take for another flag if it began with a dash."""
    return f"--{name}{'=' if value.startswith('-') else ' '}{shlex.quote(value)}"


def near(path: Path) -> str:
    """Return the path from this directory where it lies below, quoted."""
    return shlex.quote(str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path))


def executable(name: str) -> str:
    """Return the name where the shell means by it what lies beside this Python, else where that lies: a virtual
    environment may not be active."""
    in_path, this = shutil.which(name), Path(sys.executable)
    if in_path and Path(in_path).parent == this.parent:
        return name
    return near(this if name == "python" else this.with_name(name))
