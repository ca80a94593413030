"""How are losses logged? By accelerate's trackers, each of which raises its own kinds of exception: one line where one
cannot begin, and no run is lost to one that fails later."""

import contextlib
import logging
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from glance.ask.pipeline import first_line
from glance_utils import InputError


logger = logging.getLogger(__name__)


def begin(args, accelerator) -> None:
    """Begin what --report_to names; raise InputError where it cannot: no login, no network, a file in its way."""
    if args.report_to == "none":
        return
    config = {key: value for key, value in vars(args).items() if isinstance(value, int | float | str)}
    config.pop("instance_prompt", None)  # prompts do not belong in logs
    try:
        accelerator.init_trackers("glance", config=config)
    except Exception as error:
        for tracker in accelerator.trackers:  # of several, some may have begun
            with contextlib.suppress(Exception):
                tracker.finish()
        accelerator.trackers = []
        raise InputError(
            f"--report_to {args.report_to}: it cannot begin ({type(error).__name__}: {first_line(error)}); mend that, "
            "log in to it, or leave --report_to out"
        ) from None


@contextlib.contextmanager
def begun(args, accelerator):
    """Begin them, and take their new folder in output_dir away again where what follows does not come to training."""
    output_dir, logs = Path(args.output_dir).absolute(), Path(args.output_dir, args.logging_dir).absolute()
    is_new = accelerator.is_main_process and output_dir in logs.parents and not logs.exists()  # output_dir is locked
    try:
        begin(args, accelerator)
        yield
    except BaseException:
        end(accelerator)
        if is_new:
            shutil.rmtree(logs, ignore_errors=True)
        raise


@contextlib.contextmanager
def forgiven(accelerator):
    """Go on without trackers, and say so, where one of them fails: what is trained does not depend on them."""
    try:
        yield
    except Exception as error:
        accelerator.trackers = []
        logger.warning(f"--report_to: nothing more is logged ({type(error).__name__}: {first_line(error)})")


def log(accelerator, values: dict, step: int) -> None:
    """Log the values by their names; warn and go on without where that fails."""
    with forgiven(accelerator):
        accelerator.log(values, step=step)


def log_picture(accelerator, name: str, picture: Image.Image, step: int) -> None:
    """Show the picture in TensorBoard and wandb; the other trackers have the file beside the LoRAs."""
    with forgiven(accelerator):
        for tracker in accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({name: np.asarray(picture)[None]}, step, dataformats="NHWC")
            if tracker.name == "wandb":
                tracker.log_images({name: [picture]}, step)


def memory(accelerator) -> dict[str, float]:
    """Return the most that torch held on the accelerator in this stage, in GB, by its name in a log; {} on a CPU."""
    if accelerator.device.type == "cpu":
        return {}
    return {"peak_memory_gb": torch.accelerator.max_memory_allocated(accelerator.device) / 1e9}


def end(accelerator) -> None:
    """Let them write what they have, and end them."""
    with forgiven(accelerator):
        for tracker in accelerator.trackers:
            tracker.finish()
    accelerator.trackers = []
