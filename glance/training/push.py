"""How does a run get onto the hub? The repository is made before anything is loaded; at the end goes what is of use.

That is what the model card speaks of, and nothing else that lies in the folder.
"""

import logging
import shlex
from pathlib import Path

from huggingface_hub import create_repo, upload_folder
from huggingface_hub.errors import HFValidationError

from glance.ask.pipeline import first_line
from glance.training.draw_command import executable
from glance.training.model_card import Written
from glance_utils import InputError


logger = logging.getLogger(__name__)


def create_hub_repo(args) -> str:
    """Return the repository to push to, made before anything is loaded; raise InputError where it cannot be."""
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    try:
        return create_repo(name, exist_ok=True).repo_id
    except HFValidationError as error:
        raise InputError(f"--push_to_hub: {first_line(error)}; give another name, as --hub_model_id") from error
    except Exception as error:  # no login, no network: each of another kind
        raise InputError(f"--push_to_hub {name}: {first_line(error)}; log in with `hf auth login`") from error


def push_to_hub(output_dir: Path, repo_id: str | None, written: Written) -> None:
    """Upload what the run has made, if there is a repository; raise InputError, which says how to do it without
    training again, where the hub refuses it."""
    if repo_id is None:
        return
    files = [name for name in written.files if (output_dir / name).is_file()]
    try:
        upload_folder(repo_id=repo_id, folder_path=output_dir, allow_patterns=files)
    except Exception as error:  # as above
        included = [word for name in files for word in ("--include", name)]
        command = f"{executable('hf')} {shlex.join(['upload', repo_id, str(output_dir), '.', *included])}"
        raise InputError(
            f"--push_to_hub {repo_id}: {first_line(error)}; nothing is lost, all of it is in {output_dir}, and this "
            f"pushes it: {command}"
        ) from error
    logger.info(f"Pushed to {repo_id}")
