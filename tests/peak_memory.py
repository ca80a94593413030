"""Host memory at its peak: by torch's own count, or measured in a process of its own, which prints it as JSON.

python tests/peak_memory.py load PIPELINE QUANTIZATION      loading a transformer
accelerate launch ... tests/peak_memory.py share PIPELINE...   loading under FSDP, each process for itself
"""

import contextlib
import itertools
import json
import sys
import threading
from pathlib import Path


sys.path[:0] = [str(Path(__file__).parent.parent)]

import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from diffusers import FluxTransformer2DModel  # noqa: E402

from glance import base as load_base  # noqa: E402
from glance.training import distribution  # noqa: E402


def small_flux(**overrides) -> FluxTransformer2DModel:
    """90 M parameters; what it is called with is that of tests/tiny_pipelines.py's FLUX."""
    config = {"num_layers": 2, "num_single_layers": 4, "attention_head_dim": 64, "num_attention_heads": 12}
    config |= {"joint_attention_dim": 32, "pooled_projection_dim": 16, "axes_dims_rope": (16, 24, 24)}
    return FluxTransformer2DModel(**config | {"in_channels": 16, "guidance_embeds": True} | overrides)


def own_memory() -> int:
    """Without the pages of files that are mapped: those the system takes back when it wants."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


@contextlib.contextmanager
def watched():
    """A list that holds the process's own memory, every millisecond, beyond what it had at first."""
    before, samples, done = own_memory(), [0], threading.Event()

    def watch():
        while not done.wait(0.001):
            samples.append(own_memory() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()


@contextlib.contextmanager
def allocated():
    """A dict that afterwards holds "peak", the most bytes that torch's allocator gave out inside: its own count."""
    found = {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        yield found
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    found["peak"] = max(itertools.accumulate(sizes))


def load(pipeline: str, quantization: str) -> dict:
    with watched() as samples:
        transformer = load_base.load_transformer(pipeline, torch.bfloat16, torch.device("cpu"), quantization)
    model = sum(value.numel() * value.element_size() for value in transformer.state_dict().values())
    return {"peak": max(samples), "model": model}


def share(*pipelines: str) -> list[dict]:
    accelerator, found = Accelerator(), []
    for pipeline in pipelines:
        with watched() as samples:
            transformer = distribution.load_transformer(accelerator, pipeline, torch.bfloat16)
        sizes = [value.numel() * value.element_size() for value in transformer.parameters()]
        rows = [value.to_local() for value in transformer.parameters()]
        held = sum(value.numel() * value.element_size() for value in rows)
        found.append({"peak": max(samples), "model": sum(sizes), "held": held, "largest": max(sizes)})
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({"load": load, "share": share}[sys.argv[1]](*sys.argv[2:])))
