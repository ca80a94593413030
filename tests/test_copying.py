"""What can be copied is copied into an empty folder, where nothing else of this project is, and run there."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT


# glance_utils.py alone: inference with two LoRAs, and the flow-matching loss.
INFERENCE = """
import sys

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig

from glance_utils import Schedule, add_noise, derive_timesteps, flow_matching_loss, glance_inference

pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
for phase in ("slow", "fast"):
    lora = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipe.transformer.add_adapter(lora, adapter_name=phase)

schedule = Schedule(derive_timesteps([1000 - 20 * step for step in range(50)]))
pictures = []
for scale in (1.0, 0.0):
    with glance_inference(pipe, schedule, {"slow": scale, "fast": scale}) as kwargs:
        generator = torch.Generator().manual_seed(0)
        pictures.append(pipe("a red ring", height=32, width=32, generator=generator, output_type="pt", **kwargs)[0])
assert pictures[0].isfinite().all() and not torch.equal(*pictures)

latents, noise = torch.randn(2, 16, 4), torch.randn(2, 16, 4)
velocity = (noise - latents).requires_grad_()
assert add_noise(latents, noise, 0.25).dtype == torch.float32
assert flow_matching_loss(velocity, latents, noise) == 0 and flow_matching_loss(velocity + 1, latents, noise) == 1
"""

# And glance/ask/: training on any pipeline, here one step of each given.
TRAINING = """
import sys

import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from peft import LoraConfig
from PIL import Image

from glance.ask.guidance import ask_single_branch
from glance.ask.latents import ask_layout, encode_image
from glance.ask.schedule import ask_timestep_table, ask_timesteps
from glance.ask.velocity import PipelineVelocity
from glance_utils import add_noise, derive_timesteps, flow_matching_loss, timesteps_to_sigmas

for path in sys.argv[1:]:
    pipe = DiffusionPipeline.from_pretrained(path)
    call = {"prompt": "a red ring", "height": 32, "width": 32}
    call |= ask_single_branch(pipe, **call)
    pixels = VaeImageProcessor().preprocess(Image.new("RGB", (32, 32), "red"))
    latents = encode_image(pipe, pixels, ask_layout(pipe, **call), **call)
    sigmas = timesteps_to_sigmas(derive_timesteps(ask_timesteps(pipe, 50, **call))["slow"])

    pipe.transformer.requires_grad_(False)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights="gaussian"))
    parameters = [parameter for parameter in pipe.transformer.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    model = PipelineVelocity(pipe, ask_timestep_table(pipe, 50, **call), **call)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    for _ in range(2):  # lora_A has a gradient as soon as lora_B is no longer zero
        loss = flow_matching_loss(model(add_noise(latents, noise, sigmas[-1]), sigmas[-1]), latents, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.isfinite() and parameters
    assert not any(torch.equal(old, new) for old, new in zip(before, parameters))
"""


SAY_FILES = """
for name, module in sys.modules.items():
    if name.split(".")[0] in ("glance", "glance_utils") and module.__file__:
        print(module.__file__)
"""


@pytest.mark.processes
@pytest.mark.parametrize(
    "parts, snippet, bases",
    [(["glance_utils.py"], INFERENCE, ["flux"]), (["glance_utils.py", "glance/ask"], TRAINING, ["flux", "qwen"])],
    ids=["inference", "training"],
)
def test_what_is_copied_runs_alone(parts, snippet, bases, pipelines, tmp_path):
    for part in parts:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        (tmp_path / part).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / part, tmp_path / part)
    (tmp_path / "snippet.py").write_text(snippet + SAY_FILES)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "snippet.py", *(str(pipelines[base]) for base in bases)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    files = [Path(line) for line in done.stdout.splitlines() if line.endswith(".py")]
    assert tmp_path / "glance_utils.py" in files and all(tmp_path in file.parents for file in files)
