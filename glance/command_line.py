"""How is a script's command line read? With one-line errors, and a --config file whose keys are the flags.

What is wrong with what the user wrote is an argparse.ArgumentError here: glance_utils' InputError would import torch,
and a mistyped flag is answered before. `run` ends both in the same line. Only the standard library and yaml are
imported while this module is.
"""

import argparse
import difflib
import json
import logging
import math
import os
import re
import sys
import unicodedata
import warnings
from pathlib import Path

import yaml


USAGE = "%(prog)s [--config FILE] [--flag VALUE ...]"  # the groups below it tell more than sixty flags in a row
SWITCH_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def mistake(message: str) -> argparse.ArgumentError:
    """Return the error for something that the user wrote and that cannot be used: a line that says how to mend it."""
    return argparse.ArgumentError(None, message)


class Settings:
    """The flags' values, and those derived from them, as attributes; `vars` gives all of them.

    They are frozen: a function that changes some returns new settings, by `replace`.
    """

    def __init__(self, values: dict):
        vars(self).update(values)

    def __setattr__(self, name, value):
        raise AttributeError(f"settings are not written to ({name}); `replace` returns others")

    def __delattr__(self, name):
        setattr(self, name, None)

    def replace(self, **changes) -> "Settings":
        """Return the same settings but for these; TypeError where there are none of such a name."""
        if unknown := changes.keys() - vars(self).keys():
            raise TypeError(f"there is no setting {', '.join(sorted(unknown))}")
        return Settings(vars(self) | changes)


def check_unique(keys: list) -> None:
    """Raise ValueError where a key is there twice: the last would win unseen."""
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"the key {str(key)[:100]!r} is there twice; keep one")


def unique_pairs(pairs: list[tuple]) -> dict:
    """Return a JSON object's pairs as a dict; raise ValueError where a key is there twice."""
    check_unique([key for key, _ in pairs])
    return dict(pairs)


class PlainLoader(yaml.SafeLoader):
    """A loader of YAML 1.2, where all plain words are text but true, false, null and decimal, 0o or 0x numbers.

    PyYAML follows version 1.1, which reads no, 2024-01-01, 12:30:45 and 010 as other things than these texts.

    Each key is there once, and there are no aliases, by which a few lines could stand for gigabytes.
    """

    yaml_implicit_resolvers = {}
    yaml_constructors = {
        tag: yaml.SafeLoader.yaml_constructors[tag]
        for tag in (None, *(f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "str", "seq", "map")))
    }

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases such as *name are not read; write the value itself")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        if isinstance(node, yaml.MappingNode):
            check_unique([key.value for key, _ in node.value])
        return super().construct_mapping(node, deep)

    def construct_number(self, node) -> int | float:
        text = self.construct_scalar(node).lower()
        if node.tag.endswith("int"):
            return int(text, 0 if re.match("0[ox]", text) else 10)
        return float(re.sub(r"\.(inf|nan)", r"\1", text))


for kind, pattern in {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}.items():
    PlainLoader.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(rf"(?:{pattern})\Z"), [None])
for kind in ("int", "float"):
    PlainLoader.add_constructor(f"tag:yaml.org,2002:{kind}", PlainLoader.construct_number)


class TextLoader(PlainLoader):
    """A PlainLoader that leaves numbers, true and false as they are written."""


for kind in ("int", "float", "bool"):
    TextLoader.add_constructor(f"tag:yaml.org,2002:{kind}", TextLoader.construct_scalar)


def read_settings(path: str) -> dict:
    """Return a --config file's settings by key.

    A value is text as written (JSON's true and false are bool), None, a list of these, or a mapping, whose values have
    the types that YAML 1.2 or JSON gives them. Raise ArgumentError where the file holds anything else.
    """
    text = read_text(path, "--config ")
    try:
        if path.lower().endswith(".json"):
            pairs = {"object_pairs_hook": unique_pairs}
            typed = json.loads(text, **pairs)
            written = json.loads(text, **pairs, parse_int=str, parse_float=str, parse_constant=str)
        else:
            typed, written = yaml.load(text, PlainLoader), yaml.load(text, TextLoader)
    except (ValueError, LookupError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:500]
        raise mistake(f"--config {path}: not valid YAML or JSON ({reason})") from None
    if not isinstance(typed, dict):
        raise mistake(f"--config {path}: found {type(typed).__name__}; write one 'flag: value' a line")
    return {key: typed.get(key, text) if isinstance(text, dict) else text for key, text in written.items()}


def check_text(text: str, name: str, most: int = 10_000) -> str:
    """Return the text; raise ArgumentError where it has more than `most` characters, or control characters."""
    if len(text) > most:
        raise mistake(f"{name}: {len(text)} characters; at most {most} are read, so shorten it")
    for position, letter in enumerate(text):
        if unicodedata.category(letter) in ("Cc", "Cs") and letter not in "\t\n\r":
            raise mistake(f"{name}: {letter!r} at character {position} is no text; save it as UTF-8 text")
    return text


def read_text(path: str | Path, name: str = "", most: int = 10_000) -> str:
    """Return a file's text without its BOM; raise ArgumentError where it is not UTF-8 of at most `most` characters."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read(most + 1)
    except UnicodeDecodeError as error:
        raise mistake(f"{name}{path}: cannot be read as UTF-8 text ({error}); save it as UTF-8") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise mistake(f"{name}{path}: cannot be read ({reason}); name a text file") from None
    if len(text) > most:
        raise mistake(f"{name}{path}: more than {most} characters are no such text; name another file")
    return check_text(text, f"{name}{path}", most)


def read_caption(path: Path) -> str:
    """Return the caption in an image's text file; raise ArgumentError where there is none."""
    if not os.path.exists(path):
        raise mistake(f"{path}: no caption there; write one, or give --instance_prompt")
    return read_text(path, "caption ")


def as_text(value) -> str:
    """Return a config file's value as the command line has it; raise ValueError where it is no text or number."""
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str):
        raise ValueError(f"holds {type(value).__name__}; write a text or a number, in quotes where it has brackets")
    return value


class HelpFormatter(argparse.HelpFormatter):
    """A formatter that adds the default of flags that take a value and have one."""

    def _get_help_string(self, action):
        silent = action.nargs == 0 or action.default in (None, argparse.SUPPRESS, {})
        return action.help if silent else f"{action.help} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with `--config FILE`; the command line wins, a wrong argument is an ArgumentError."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, usage=USAGE, **kwargs)
        self.add_argument("--config", help="YAML or JSON file with these settings, leading dashes or not")

    def error(self, message):
        raise mistake(f"{' '.join(message.split())[:500]}; see --help")

    def parse(self, argv: list[str] | None = None) -> argparse.Namespace:
        """Return the flags' values: those of `argv`, sys.argv's by default, before those of the config file."""
        argv = sys.argv[1:] if argv is None else argv
        config = super().parse_known_args(argv)[0].config
        args, unknown = super().parse_known_args((self._arguments_in(config) if config else []) + argv)
        for flag in (word.partition("=")[0] for word in unknown if word.startswith("-")):  # never its value
            raise mistake(f"unknown flag {flag}{self._hint(flag)}")
        if unknown:
            raise mistake(f"{len(unknown)} words belong to no flag; quote values that have spaces")
        for name, value in vars(args).items():
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str):
                    check_text(text, f"--{name}")
        return args

    def _hint(self, flag: str) -> str:
        """Return the end of the error for an unknown flag: what may have been meant."""
        if "token" in flag:
            return "; tokens are read from HF_TOKEN or from the login of `hf auth login` alone"
        close = difflib.get_close_matches(flag, self._option_string_actions, n=1)
        return f"; did you mean {close[0].lstrip('-')!r}?" if close else f"; see {self.prog} --help"

    def _arguments_in(self, path: str) -> list[str]:
        """Return a config file's settings as the command line has them; raise ArgumentError for an unknown key."""
        arguments, given = [], set()
        for key, value in read_settings(path).items():
            flag = "--" + str(key).lstrip("-")
            action = self._option_string_actions.get(flag)
            if action is None or flag == "--config":
                raise mistake(f"--config {path}: unknown key {str(key)[:100]!r}{self._hint(flag)}")
            if action.dest in given:
                raise mistake(f"--config {path}: {key} is there twice, once by another name; keep one")
            given.add(action.dest)
            try:
                arguments += self._arguments_of(flag, action, value)
            except ValueError as error:
                raise mistake(f"--config {path}: {key} {error}") from None
        return arguments

    def _arguments_of(self, flag: str, action: argparse.Action, value) -> list[str]:
        """Return the command line's words for this value of a config file; raise ValueError where there are none."""
        if value is None:
            return []
        if action.nargs == 0:  # a switch
            on = SWITCH_WORDS.get(str(value).lower())
            if on is None:
                raise ValueError(f"is {value!r}; it takes true or false")
            off = "--no-" + flag.removeprefix("--")
            if on:
                return [flag]
            return [off] if off in self._option_string_actions else []
        if isinstance(value, dict) and action.type is json_object:
            return [f"{flag}={json.dumps(value)}"]
        items = [as_text(item) for item in (value if isinstance(value, list) else [value])]
        if isinstance(action, argparse._AppendAction):
            return [f"{flag}={item}" for item in items]
        if isinstance(value, list) and action.type is None:
            raise ValueError("is a list, and takes one text; put brackets that belong to it in quotes")
        return [f"{flag}={','.join(items)}"]


def positive(kind: type, most: float | None = None):
    """Return an argparse type: a finite number above 0, an int at most a million or `most`."""
    most = most or (10**6 if kind is int else sys.float_info.max)

    def convert(text: str):
        value = kind(text)
        if not 0 < value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most {most}")
        return value

    convert.__name__ = kind.__name__
    return convert


def finite(text: str) -> float:
    """Return a finite number; an argparse type."""
    if not math.isfinite(float(text)):
        raise argparse.ArgumentTypeError(f"{text} is not finite")
    return float(text)


def count(text: str) -> int:
    """Return a whole number from 0 to a million; an argparse type."""
    if not 0 <= int(text) <= 10**6:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and {10**6}")
    return int(text)


def comma_separated(text: str) -> str:
    """Return the text, which a config file may also give as a list; an argparse type."""
    return text


def one_or_two(text: str) -> dict[str, float]:
    """Return one number for both phases, or SLOW,FAST, as {"slow": ..., "fast": ...}; an argparse type."""
    values = [float(value) for value in text.split(",")]
    if len(values) > 2 or not all(map(math.isfinite, values)):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor SLOW,FAST")
    return {"slow": values[0], "fast": values[-1]}


def seed(text: str) -> int:
    """Return a seed for torch.Generator.manual_seed, with room for a few after it; an argparse type."""
    if abs(int(text)) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text} is too large; seeds have 63 bits")
    return int(text)


def json_object(text: str) -> dict:
    """Return a JSON object of arguments that have no flag of their own; an argparse type."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise argparse.ArgumentTypeError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object such as '{{\"max_sequence_length\": 256}}'")
    if "guidance_scale" in value:  # else training would hear this one, and inference the flag's
        raise argparse.ArgumentTypeError("guidance_scale has a flag of its own; give --guidance_scale")
    return value


def read_prompts(path: str | None) -> list[str]:
    """Return the lines of a --prompts_file that are not blank, [] without one; raise ArgumentError for no line."""
    if not path:
        return []
    # Of what str.splitlines takes for ends of lines, some are part of a prompt, as U+2028.
    lines = [
        check_text(line, f"--prompts_file {path}") for line in read_text(path, "--prompts_file ", 10**6).split("\n")
    ]
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise mistake(f"--prompts_file {path}: it holds no prompt; write one a line")
    return prompts


def load_arguments(args: argparse.Namespace) -> dict:
    """Return which files of the base are meant, as arguments of diffusers' from_pretrained."""
    return {key: value for key in ("revision", "variant") if (value := getattr(args, key))}


def set_up_logging() -> None:
    """Show our own messages, and only the errors of the libraries: a pipeline repeats its advice at every step."""
    import diffusers
    import transformers

    logging.basicConfig(format="%(asctime)s - %(levelname)s - %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    for library in (diffusers, transformers):
        library.logging.set_verbosity_error()
        library.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=UserWarning, module="peft")


def say_error(error: Exception) -> None:
    """Write the error in one line, as argparse would."""
    sys.stderr.write(f"{Path(sys.argv[0]).name}: error: {error}\n")


def run(main) -> None:
    """Call main(); end with one line and exit code 2 for what the user can mend, with 1 for a run that diverged or
    whose memory ran out."""
    from glance_utils import InputError

    try:
        main()
    except (InputError, argparse.ArgumentError, FloatingPointError, MemoryError) as error:
        say_error(error)
        sys.exit(1 if isinstance(error, FloatingPointError | MemoryError) else 2)
