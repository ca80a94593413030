"""How are a config file and other texts that the user wrote read? As YAML 1.2 or JSON, as UTF-8, or not at all.

What cannot be used is an argparse.ArgumentError of one line, as on the command line (glance/command_line.py).
"""

import argparse
import json
import os
import re
import unicodedata
from pathlib import Path

import yaml


def mistake(message: str) -> argparse.ArgumentError:
    """Return the error for something that the user wrote and that cannot be used: a line that says how to mend it."""
    return argparse.ArgumentError(None, message)


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


def setting_names(key: str, value) -> list[str]:
    """Return the names of the settings that a config file's key holds: its own, or those inside of it."""
    if isinstance(value, dict):
        return [name for inner, held in value.items() for name in setting_names(str(inner), held)]
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return [name for item in value for name in setting_names(key, item)]
    return [key]
