"""What does the hub read of a model card? Its front matter: the base, the task, tags, a licence, the picture to show.

The hub lists what is pushed by it: as an adapter of the base, in its gallery, under its licence. What is not known is
left out, as the hub refuses a card with a wrong entry.
"""

import os
import re
from pathlib import Path

from diffusers import DiffusionPipeline
from huggingface_hub import ModelCardData, hf_hub_download, metadata_load
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from PIL import Image

from glance import command_line as cli
from glance.ask.pipeline import arguments_of, frames_argument
from glance.files.recipe import is_text


CARD = "README.md"


def hub_id(base: str) -> str | None:
    """Return the base's name where that is an id of the hub, which takes no other in a card; None of a folder."""
    try:
        validate_repo_id(base)
    except HFValidationError:
        return None
    return None if os.path.exists(base) else base


def base_card(args) -> dict:
    """Return the front matter of the base's own card, {} where none can be read: a folder's, or the hub's.

    The network is asked only by a run that pushes, which has needed it before; else the hub's cache is.
    """
    base, where = args.pretrained_model_name_or_path, cli.load_arguments(args)
    try:
        path = Path(base, CARD)
        if hub_id(base):
            places = {name: where.get(name) for name in ("revision", "cache_dir")}
            path = Path(hf_hub_download(base, CARD, **places, local_files_only=not args.push_to_hub))
        return metadata_load(path) or {}
    except Exception:  # not there, no network, no text, no YAML: each of another kind, and none of it is needed
        return {}


def licence_of(args) -> dict[str, str]:
    """Return `license`, and its name and link where it is one of its own, as the base's card has them; {} where it
    has none that could stand in another card."""
    card = base_card(args)
    found = {name: card[name] for name in ("license", "license_name", "license_link") if is_text(card.get(name))}
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", found.get("license", "")):
        return {}
    link, base = found.get("license_link", ""), hub_id(args.pretrained_model_name_or_path)
    if link and not re.match("https?://", link):  # a file beside the base's card
        found |= {"license_link": f"https://huggingface.co/{base}/blob/main/{link}"}
        if base is None:
            del found["license_link"]
    return found


def draws_video(kind: type[DiffusionPipeline], call: dict) -> bool:
    """Return whether a call of this pipeline draws more frames than one."""
    name = frames_argument(kind)
    return name is not None and call.get(name, arguments_of(kind)[name].default) != 1


def pipeline_tag(kind: type[DiffusionPipeline], call: dict) -> str:
    """Return the hub's name of what a call of this pipeline does, by what it is given and what it draws."""
    shown = any(isinstance(part, Image.Image) for value in call.values() for part in (value, *as_list(value)))
    return f"{'image' if shown else 'text'}-to-{'video' if draws_video(kind, call) else 'image'}"


def as_list(value) -> list:
    """Return the value if it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def front_matter(args, kind: type[DiffusionPipeline], call: dict, pictures: list[str], loras: bool) -> ModelCardData:
    """Return what the hub reads; `call` are the arguments of the pipeline's call as inference makes it, its prompt the
    caption, `pictures` what was drawn of that, `loras` whether there are any beside the sampler."""
    tag = pipeline_tag(kind, call)
    tags = [tag, "diffusers", "glance", "flow-matching"]
    further = licence_of(args)
    if loras:
        tags += ["lora", "template:sd-lora", "distillation"]
        further["instance_prompt"] = call["prompt"]
    if pictures:
        further["widget"] = [{"text": call["prompt"], "output": {"url": name}} for name in pictures]
    return ModelCardData(
        library_name="diffusers",
        base_model=hub_id(args.pretrained_model_name_or_path),
        # Of the hub's relations the one of files that are nothing without their base.
        base_model_relation="adapter" if hub_id(args.pretrained_model_name_or_path) else None,
        pipeline_tag=tag,
        tags=tags,
        **further,
    )
