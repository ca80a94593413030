"""The command line of both scripts: one-line errors, and a --config file whose keys are the flags."""

import argparse
import difflib
import json
import logging
import math
import sys
import tempfile
import warnings
from pathlib import Path

import diffusers
import transformers
import yaml

from glance_utils import InputError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with `--config FILE`; the command line wins, a wrong argument is an InputError."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs)
        self.add_argument("--config", help="YAML or JSON file with these settings, leading dashes or not")

    def error(self, message):
        raise InputError(message)

    def parse(self, argv: list[str] | None = None) -> argparse.Namespace:
        argv = sys.argv[1:] if argv is None else argv
        config = super().parse_known_args(argv)[0].config
        return super().parse_args((self._arguments_in(config) if config else []) + argv)

    def _arguments_in(self, path: str) -> list[str]:
        try:
            text = Path(path).read_text(encoding="utf-8-sig")
            settings = json.loads(text) if path.endswith(".json") else yaml.safe_load(text)
        except OSError as error:
            raise InputError(f"--config {path}: {error.strerror}") from None
        except (ValueError, yaml.YAMLError) as error:
            raise InputError(f"--config {path}: not valid YAML or JSON ({' '.join(str(error).split())})") from None
        if not isinstance(settings, dict):
            raise InputError(f"--config {path}: found {type(settings).__name__}; write one 'flag: value' a line")
        arguments = []
        for key, value in settings.items():
            flag = "--" + str(key).lstrip("-")
            action = self._option_string_actions.get(flag)
            if action is None or flag == "--config":
                close = difflib.get_close_matches(flag, self._option_string_actions, n=1)
                hint = f"; did you mean {close[0].lstrip('-')!r}?" if close else f"; see {self.prog} --help"
                raise InputError(f"--config {path}: unknown key {key!r}{hint}")
            if action.nargs == 0:  # a switch
                if not isinstance(value, bool):
                    raise InputError(f"--config {path}: {key} is {value!r}; it takes true or false")
                off = "--no-" + flag.removeprefix("--")
                arguments += [flag] if value else [off] if off in self._option_string_actions else []
            elif isinstance(value, list) and isinstance(action, argparse._AppendAction):
                arguments += [f"{flag}={item}" for item in value]
            elif isinstance(value, list):
                arguments.append(f"{flag}={','.join(map(str, value))}")
            elif value is False and "no" in (action.choices or ()):  # YAML reads a bare no as false
                arguments.append(f"{flag}=no")
            elif value is not None:
                arguments.append(f"{flag}={json.dumps(value) if isinstance(value, dict) else value}")
        return arguments


def positive(kind: type):
    """An argparse type: a finite number above 0."""

    def convert(text: str):
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    convert.__name__ = kind.__name__
    return convert


def one_or_two(text: str) -> dict[str, float]:
    """An argparse type: one number for both phases or SLOW,FAST, as {"slow": ..., "fast": ...}."""
    values = [float(value) for value in text.split(",")]
    if len(values) > 2 or not all(map(math.isfinite, values)):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor SLOW,FAST")
    return {"slow": values[0], "fast": values[-1]}


def seed(text: str) -> int:
    """An argparse type: what torch.Generator.manual_seed takes, with room for a few more."""
    if abs(int(text)) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text} is too large; seeds have 63 bits")
    return int(text)


def json_object(text: str) -> dict:
    """An argparse type: a JSON object."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object such as '{{\"max_sequence_length\": 256}}'")
    return value


def check_writable(directory: str | Path, name: str) -> None:
    """Raise InputError where the folder cannot be created or written to; nothing is left behind."""
    path = Path(directory).absolute()
    try:
        with tempfile.TemporaryFile(dir=next(parent for parent in (path, *path.parents) if parent.exists())):
            pass
    except OSError as error:
        raise InputError(f"{name} {directory}: cannot be written ({error.strerror})") from None


def set_up_logging() -> None:
    """Our own messages, and only the errors of the libraries: a pipeline repeats its advice at every step."""
    logging.basicConfig(format="%(asctime)s - %(levelname)s - %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    for library in (diffusers, transformers):
        library.logging.set_verbosity_error()
        library.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=UserWarning, module="peft")


def run(main) -> None:
    """Call main(); what the user can mend ends in one line and exit code 2, a run that diverged in one line and 1."""
    try:
        main()
    except (InputError, FloatingPointError) as error:
        sys.stderr.write(f"{Path(sys.argv[0]).name}: error: {error}\n")
        sys.exit(2 if isinstance(error, InputError) else 1)
