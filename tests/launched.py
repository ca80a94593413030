"""Run by test_distribution.py under `accelerate launch`: `launched.py RUNS.json` with [[[flag, ...], signal], ...].

Calls train_glance_lora's main() with one list of flags after the other. Where the signal is not 0, the last process
sends it to itself in the run's third step, the time since 1970 written to OUTPUT_DIR/signal.txt. Every process also
keeps the LoRA that it holds after each phase, as OUTPUT_DIR/PHASE-rank-N.pt, and as OUTPUT_DIR/seen-rank-N.txt the
(caption, seed, number of steps) of every picture that it let the base draw and tests/lifetimes.py's moments.
"""

import contextlib
import gc
import json
import os
import sys
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from accelerate.state import AcceleratorState, PartialState  # noqa: E402
from accelerate.utils import InitProcessGroupKwargs, parse_flag_from_env  # noqa: E402
from lifetimes import watch  # noqa: E402
from peft import get_peft_model_state_dict  # noqa: E402

import train_glance_lora  # noqa: E402
from glance.ask import sampler as grids  # noqa: E402
from glance.ask.velocity import PipelineVelocity  # noqa: E402
from glance.training import distribution, endpoint  # noqa: E402
from glance_utils import denoiser  # noqa: E402


moments, walks = watch(setattr), []
train_phase, train_endpoint = train_glance_lora.train_phase, endpoint.train_endpoint
forward, walk = PipelineVelocity.forward, grids.walk


def train_and_keep(args, accelerator, prepared, phase, *others):
    stopped = train_phase(args, accelerator, prepared, phase, *others)
    lora = get_peft_model_state_dict(denoiser(prepared.models.pipe), adapter_name=train_glance_lora.ADAPTER)
    torch.save(lora, Path(args.output_dir) / f"{phase.recipe.phase}-rank-{accelerator.process_index}.pt")
    return stopped


def train_and_keep_both(args, accelerator, prepared, *others):
    trained = train_endpoint(args, accelerator, prepared, *others)
    for phase in trained.phases:
        lora = get_peft_model_state_dict(denoiser(prepared.models.pipe), adapter_name=phase)
        torch.save(lora, Path(args.output_dir) / f"{phase}-rank-{accelerator.process_index}.pt")
    return trained


def watched_walk(pipe, timesteps, timestep_table, seed, coefficients=None, **call):
    walks.append((call["prompt"], seed, len(timesteps)))
    return walk(pipe, timesteps, timestep_table, seed, coefficients, **call)


def run(arguments: list[str], number: int) -> None:
    steps, last = 0, os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1)
    output_dir = Path(next(text for text in arguments if text.startswith("--output_dir=")).partition("=")[2])

    def counted(self, *rest, **call):
        nonlocal steps
        steps += 1
        if number and last and steps == 3:
            (output_dir / "signal.txt").write_text(str(time.time()))
            os.kill(os.getpid(), number)
        return forward(self, *rest, **call)

    PipelineVelocity.forward = counted
    AcceleratorState._reset_state()
    moments.clear()
    walks.clear()
    train_glance_lora.main(arguments)
    seen = {"walks": walks, "moments": {moment: sorted(names) for moment, names in moments.items()}}
    (output_dir / f"seen-rank-{os.environ['RANK']}.txt").write_text(json.dumps(seen))


train_glance_lora.train_phase, grids.walk = train_and_keep, watched_walk
endpoint.train_endpoint = train_and_keep_both
if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):  # accelerate knows of no backend for it on a CPU

    def with_gloo(*args, kwargs_handlers, **kwargs):
        others = [handler for handler in kwargs_handlers if not isinstance(handler, InitProcessGroupKwargs)]
        return Accelerator(*args, kwargs_handlers=[*others, InitProcessGroupKwargs("gloo")], **kwargs)

    train_glance_lora.Accelerator = with_gloo
PartialState.destroy_process_group = lambda self, group=None: None  # the processes meet only once
leave, distribution.leave = distribution.leave, lambda: None
gc.freeze()  # as conftest.py does
*runs, last_run = json.loads(Path(sys.argv[1]).read_text())
for arguments, number in runs:
    with contextlib.suppress(SystemExit) if number else contextlib.nullcontext():
        run(arguments, number)
    torch.distributed.barrier()  # the next may go on from what this one wrote
run(*last_run)
leave()
