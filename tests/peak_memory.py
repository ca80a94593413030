"""Host memory at its peak, measured in a process of its own; each prints its numbers as JSON, in bytes.

python tests/peak_memory.py load PIPELINE QUANTIZATION      loading a transformer
accelerate launch ... tests/peak_memory.py share PIPELINE...   loading under FSDP, each process for itself
python tests/peak_memory.py step PIPELINE none|checkpointing   a training step of a FLUX of 90 M parameters
"""

import contextlib
import json
import sys
import threading
from pathlib import Path


sys.path[:0] = [str(Path(__file__).parent.parent)]

import torch  # noqa: E402
from accelerate import Accelerator, init_empty_weights  # noqa: E402
from diffusers import FluxTransformer2DModel  # noqa: E402
from peft import LoraConfig  # noqa: E402

from glance import base as load_base  # noqa: E402
from glance.adapters import lora_layers  # noqa: E402
from glance.ask import pipeline as ask  # noqa: E402
from glance.ask.prompts import remember_prompts  # noqa: E402
from glance.ask.velocity import PipelineVelocity  # noqa: E402
from glance.training import distribution, estimate  # noqa: E402


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


def step(pipeline: str, checkpointing: str) -> dict:
    checkpointing = checkpointing == "checkpointing"
    pipe = ask.load_pipeline(pipeline)
    with init_empty_weights():
        pipe.transformer = small_flux()
    call = ask.call_arguments(pipe, "a red ring", 96, 96, None, {})
    remember_prompts(pipe)
    layers = lora_layers(pipe.transformer)
    found = estimate.estimate(pipe, layers, 16, call, [checkpointing])
    with watched() as samples:
        transformer = pipe.transformer = small_flux().requires_grad_(False)
        transformer.add_adapter(LoraConfig(r=16, target_modules=layers), "glance")
        if checkpointing:
            load_base.enable_gradient_checkpointing(transformer)
        optimizer = torch.optim.AdamW([parameter for parameter in transformer.parameters() if parameter.requires_grad])
        model = PipelineVelocity(pipe, **call)
        for _ in range(2):
            model(torch.randn(1, 576, 16), 0.5).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return {"estimated": found.peak("none", checkpointing), "measured": max(samples)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({"load": load, "share": share, "step": step}[sys.argv[1]](*sys.argv[2:])))
