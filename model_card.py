"""What is written beside the LoRAs: the model card; and the upload of it all to the hub."""

import json
import logging
from pathlib import Path

from huggingface_hub import create_repo, upload_folder

from glance_utils import InputError, first_line


logger = logging.getLogger(__name__)


def write_model_card(args, directory: Path, recipes: list[dict], caption: str) -> None:
    """README.md in the output folder: what was trained, how to use it, the pictures."""
    rows = "\n".join(
        f"| {recipe['phase']} | {', '.join(f'{timestep:.4f}' for timestep in recipe['timesteps'])} |"
        for recipe in recipes
    )
    pictures = [f"![{name}](./{name})" for name in ("instance.png", "glance.png") if (directory / name).exists()]
    settings = json.dumps(
        {key: value for key, value in recipes[0].items() if key not in ("phase", "timesteps")}, indent=2
    )
    (directory / "README.md").write_text(
        f"""---
library_name: diffusers
base_model: {args.pretrained_model_name_or_path}
tags: [text-to-image, diffusers, lora, glance, flow-matching]
---

# Glance LoRA for {args.pretrained_model_name_or_path}

Slow- and Fast-LoRA ([Glance](https://arxiv.org/abs/2512.02899)) learned from one image: the first steps run with the
slow one, the last with the fast one, {sum(len(recipe["timesteps"]) for recipe in recipes)} steps in all.

{" ".join(pictures)}

Left: the training image, "{caption}". Right, where both phases were trained: the same caption with both LoRAs.

| phase | timesteps (0..1000) |
|---|---|
{rows}

```json
{settings}
```

    python infer_glance.py --pretrained_model_name_or_path {args.pretrained_model_name_or_path} --lora . --prompt "..."
""",
        encoding="utf-8",
    )


def create_hub_repo(args) -> str:
    """The repository to push to, made before training; InputError where it cannot be."""
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    try:
        return create_repo(name, exist_ok=True).repo_id
    except Exception as error:  # no login, no network, a name that is not one: each of another kind
        raise InputError(f"--push_to_hub {name}: {first_line(error)}; log in with `hf auth login`") from error


def push_to_hub(args, output_dir: Path, repo_id: str) -> None:
    upload_folder(repo_id=repo_id, folder_path=output_dir, ignore_patterns=["checkpoint-*", f"{args.logging_dir}/*"])
    logger.info(f"Pushed to {repo_id}")
