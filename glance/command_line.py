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
import time
import warnings
from pathlib import Path

from glance import foreign_flags
from glance.config_file import check_text, mistake, read_settings, read_text, setting_names


USAGE = "%(prog)s [--config FILE] [--flag VALUE ...]"  # the groups below it tell more than sixty flags in a row
FLAG = re.compile(r"--?[A-Za-z][\w.-]*(=|\Z)")
# A wrong guess at one of these would replace what is learned or drawn.
NEVER_SUGGESTED = (
    *("instance_image", "instance_prompt", "instance_data_dir", "data_backend_config", "prompts_file", "prompt"),
    *("dataset_name", "dataset_index", "image_column", "caption_column"),
)
SWITCH_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


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


def as_text(value) -> str:
    """Return a config file's value as the command line has it; raise ValueError where it is no text or number."""
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str):
        raise ValueError(f"holds {type(value).__name__}; write a text or a number, in quotes where it has brackets")
    return value


class Switch(argparse.Action):
    """A flag that stands alone, or before true or false as in configs; --no-NAME, if declared too, is its contrary.

    It is what action="store_true" means here.
    """

    def __init__(self, option_strings, dest, default=False, **kwargs):
        super().__init__(option_strings, dest, nargs="?", const="true", default=default, **kwargs)

    def __call__(self, parser, namespace, value, option_string=None):
        on = SWITCH_WORDS.get(value.lower())
        if on is None:  # not repeated, as it may be a word of an unquoted caption
            raise argparse.ArgumentError(self, "it stands alone, or takes true or false; quote values with spaces")
        setattr(namespace, self.dest, on != option_string.startswith("--no-"))


class HelpFormatter(argparse.HelpFormatter):
    """A formatter that adds the default of flags that take a value and have one."""

    def _get_help_string(self, action):
        silent = isinstance(action, Switch) or action.default in (None, argparse.SUPPRESS, {})
        return action.help if silent else f"{action.help} (default: %(default)s)"

    def _get_default_metavar_for_optional(self, action):
        return action.dest.rpartition("_")[2].upper()

    def _format_action_invocation(self, action):
        if isinstance(action, Switch):
            return ", ".join(action.option_strings)
        return super()._format_action_invocation(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with `--config FILE`; the command line wins, a wrong argument is an ArgumentError.

    `foreign` is what to say of flags of other programs, by name.
    """

    def __init__(self, foreign: dict[str, str] = foreign_flags.TOKENS, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, usage=USAGE, **kwargs)
        self.register("action", "store_true", Switch)
        self.foreign = foreign
        self.add_argument("--config", help="a YAML or JSON file of these settings; the command line wins")

    def error(self, message):
        raise mistake(f"{' '.join(message.split())[:500]}; see --help")

    def parse(self, argv: list[str] | None = None) -> argparse.Namespace:
        """Return the flags' values: those of `argv`, sys.argv's by default, before those of the config file.

        Raise ArgumentError; one names all that is unknown.
        """
        argv = sys.argv[1:] if argv is None else argv
        if {"-h", "--help"} & set(argv):
            self.print_help()
            self.exit()
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        finder.add_argument("--config")
        path = finder.parse_known_args(argv)[0].config
        settings = read_settings(path) if path else {}
        self._check_known(argv, path, settings)
        args, unknown = super().parse_known_args((self._arguments_in(path, settings) if path else []) + argv)
        if unknown:
            raise mistake(f"{len(unknown)} words belong to no flag; quote values that have spaces")
        for name, value in vars(args).items():
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str):
                    check_text(text, f"--{name}")
        return args

    def typed(self, argv: list[str] | None = None) -> argparse.Namespace:
        """Return the values of `argv` alone, sys.argv's by default, without the config file's."""
        return super().parse_known_args(sys.argv[1:] if argv is None else argv)[0]

    def _check_known(self, argv: list[str], path: str | None, settings: dict) -> None:
        """Raise ArgumentError where there are flags, or keys of the config file, that this parser does not have."""
        flags = [word.partition("=")[0] for word in argv if FLAG.match(word)]  # never a value
        unknown = {flag: flag.lstrip("-") for flag in flags if flag not in self._option_string_actions}
        message = self._unknown("flag", unknown)
        keys = {str(key).lstrip("-"): value for key, value in settings.items() if self._action(key) is None}
        names = {repr(name[:100]): name for key, value in keys.items() for name in setting_names(key, value)}
        if names:
            message = f"--config {path}: {self._unknown('key', names)}" + (f"; {message}" if message else "")
        if message:
            raise mistake(message)

    def _action(self, key) -> argparse.Action | None:
        """Return the flag that a config file's key stands for, None where there is none."""
        flag = "--" + str(key).lstrip("-")
        return None if flag in ("--config", "--help") else self._option_string_actions.get(flag)

    def _unknown(self, kind: str, names: dict[str, str]) -> str:
        """Return what to say of unknown flags or keys, `names` by how they are written: alike answers together."""
        answers = {}
        for written, name in names.items():
            answers.setdefault(self._answer(name), []).append(written)
        parts = [", ".join(written) + (f": {answer}" if answer else "") for answer, written in answers.items()]
        see = "" if all(answers) else f"; see {self.prog} --help"
        return f"unknown {kind}{'s' if len(names) > 1 else ''} {'; '.join(parts)}{see}" if names else ""

    def _answer(self, name: str) -> str:
        """Return what to do about a flag that this parser lacks, "" where that is not known."""
        if name in self.foreign:
            return self.foreign[name]
        if f"--{name}" in self._option_string_actions:
            return "it belongs to the top level of the file, inside no other key"
        flags = [flag for flag in self._option_string_actions if flag.lstrip("-") not in NEVER_SUGGESTED]
        close = difflib.get_close_matches(f"--{name}", flags, n=1, cutoff=0.8)
        return f"did you mean {close[0].lstrip('-')!r}?" if close else ""

    def _arguments_in(self, path: str, settings: dict) -> list[str]:
        """Return a config file's settings as the command line has them; raise ArgumentError where one has no such."""
        arguments, given = [], set()
        for key, value in settings.items():
            action = self._action(key)
            if action.dest in given:
                raise mistake(f"--config {path}: {key} is there twice, once by another name; keep one")
            given.add(action.dest)
            try:
                arguments += self._arguments_of("--" + str(key).lstrip("-"), action, value)
            except ValueError as error:
                raise mistake(f"--config {path}: {key} {error}") from None
        return arguments

    def _arguments_of(self, flag: str, action: argparse.Action, value) -> list[str]:
        """Return the command line's words for this value of a config file; raise ValueError where there are none."""
        if value is None:
            return []
        if isinstance(action, Switch):
            if str(value).lower() not in SWITCH_WORDS:
                raise ValueError(f"is {value!r}; it takes true or false")
            return [f"{flag}={value}"]
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


def calls(text: str) -> int | str:
    """Return a number of model calls of a picture, 4 to 100, or "auto"; raise ArgumentTypeError otherwise."""
    if text.strip() == "auto" or text.strip().isdecimal() and 4 <= int(text) <= 100:
        return "auto" if text.strip() == "auto" else int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor a number from 4 to 100")


def memory(text: str) -> int:
    """Return the bytes of "16GB" (1e9 each) or "16GiB" (2**30 each); an argparse type."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(G|Gi|M|Mi)B?", text.strip(), re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no memory such as 16GB")
    units = {"g": 10**9, "gi": 2**30, "m": 10**6, "mi": 2**20}
    return int(float(match[1]) * units[match[2].lower()])


def finite(text: str) -> float:
    """Return a finite number; an argparse type."""
    if not math.isfinite(float(text)):
        raise argparse.ArgumentTypeError(f"{text} is not finite")
    return float(text)


def below_one(text: str) -> float:
    """Return a number from 0 to just below 1; an argparse type."""
    if not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to below 1")
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


def file_and_scale(text: str) -> tuple[str, float]:
    """Return (file, scale) of FILE[:SCALE], a scale of 1 where there is none; an argparse type."""
    file, colon, scale = text.rpartition(":")
    try:
        scale = float(scale)
    except ValueError:  # a colon of another meaning, as behind a drive's letter
        return text, 1.0
    if not colon:
        return text, 1.0
    if not file or not math.isfinite(scale):
        raise argparse.ArgumentTypeError(f"{text!r} is neither FILE nor FILE:SCALE with a finite number")
    return file, scale


def seed(text: str) -> int:
    """Return a seed for torch.Generator.manual_seed, with room for a few after it; an argparse type."""
    if abs(int(text)) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text} is too large; seeds have 63 bits")
    return int(text)


def json_object(text: str) -> dict:
    """Return a JSON object of arguments that have no flag of their own; an argparse type."""
    example = """write a JSON object such as '{"max_sequence_length": 256}'"""
    try:
        value = json.loads(text)
    except RecursionError:
        raise argparse.ArgumentTypeError("it is nested too deeply") from None
    except ValueError as error:  # argparse would put the whole text in its place
        raise argparse.ArgumentTypeError(f"not valid JSON ({error}); {example}, in quotes for the shell") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"found {type(value).__name__}; {example}")
    if "guidance_scale" in value:  # else training would hear this one, and inference the flag's
        raise argparse.ArgumentTypeError("guidance_scale has a flag of its own; give --guidance_scale")
    return value


class Prompt(str):
    """A prompt with pictures' `files` of its own, as --pipeline_images has them."""

    files: dict = {}
    pictures: dict | None = None  # once they are read


def read_prompts(path: str | None) -> list[str]:
    """Return the lines of a --prompts_file that are not blank, [] without one; of a .jsonl file Prompts. Raise
    ArgumentError for no line, or one that is no prompt."""
    if not path:
        return []
    # Of what str.splitlines takes for ends of lines, some are part of a prompt, as U+2028.
    lines = [
        check_text(line, f"--prompts_file {path}") for line in read_text(path, "--prompts_file ", 10**6).split("\n")
    ]
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise mistake(f"--prompts_file {path}: it holds no prompt; write one a line")
    if Path(path).suffix.lower() == ".jsonl":
        return [_prompt_of(line, Path(path), number) for number, line in enumerate(prompts, 1)]
    return prompts


def _prompt_of(line: str, path: Path, number: int) -> Prompt:
    """Return the prompt of a line of JSON, {"prompt": "...", "image": "a.png"}, whose files lie beside `path`."""
    name = f"--prompts_file {path}, prompt {number}"
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise mistake(f"{name}: no JSON ({error}); write one object a line") from None
    text = entry.get("prompt") if isinstance(entry, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise mistake(f"""{name}: {line[:60]!r} holds no prompt; write {{"prompt": "...", "image": "a.png"}}""")
    prompt = Prompt(check_text(text, name).strip())
    beside = {key: value for key, value in entry.items() if key != "prompt"}

    def file_of(value):
        if isinstance(value, list):
            return [file_of(part) for part in value]
        return str(path.parent / value) if isinstance(value, str) else value

    prompt.files = {key: file_of(value) for key, value in beside.items()}
    return prompt


def load_arguments(args: argparse.Namespace) -> dict:
    """Return which files of the base are meant, and where they lie, as arguments of diffusers' from_pretrained."""
    return {key: value for key in ("revision", "variant", "cache_dir") if (value := getattr(args, key))}


def show_own_logs(level: int = logging.INFO, name: str = "") -> None:
    """Show our own messages from `level` on, after a name where there is one, and the warnings of the libraries."""
    form = logging.Formatter(f"%(asctime)s - %(levelname)s - {name}%(message)s", "%H:%M:%S")
    logging.basicConfig()
    for handler in logging.getLogger().handlers:
        if type(handler) is logging.StreamHandler:  # the one that was just made, or earlier
            handler.setFormatter(form)
    for own in ("glance", "__main__"):
        logging.getLogger(own).setLevel(level)


def set_up_logging(speaks: bool = True, name: str = "") -> None:
    """Show our own messages, where this process `speaks`, and only the errors of the libraries: a pipeline repeats its
    advice at every step. `name` tells the processes apart where several speak."""
    import diffusers
    import transformers

    show_own_logs(logging.INFO if speaks else logging.ERROR, name)
    for library in (diffusers, transformers):
        library.logging.set_verbosity_error()
        if not is_first_process():
            library.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=UserWarning, module="peft")


def is_first_process() -> bool:
    """Return whether this is the first of the processes that a launcher started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


TIME_TO_SPEAK = 10  # seconds; the launcher ends them earlier, when the first one has ended


def say_error(error: Exception) -> None:
    """Write the error in one line, as argparse would.

    Of several processes the first one writes it; all leave it to torch's launcher, which ends with it. The launcher
    ends the others as soon as one has ended, so that the others give the first one time to write.
    """
    line = f"{Path(sys.argv[0]).name}: error: {error}"
    launcher_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if launcher_file:  # as torch.distributed.elastic's `record` does, but without a traceback
        Path(launcher_file).write_text(json.dumps({"message": line, "timestamp": int(time.time())}), encoding="utf-8")
    if is_first_process() or not launcher_file:
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
    else:
        time.sleep(TIME_TO_SPEAK)


def run(main) -> None:
    """Call main(); end with one line and exit code 2 for what the user can mend, with 1 for a run that diverged or
    whose memory ran out."""
    from glance_utils import InputError

    try:
        main()
    except (InputError, argparse.ArgumentError, FloatingPointError, MemoryError) as error:
        say_error(error)
        sys.exit(1 if isinstance(error, FloatingPointError | MemoryError) else 2)
