"""Less memory and more speed: quantized and offloaded bases, checkpointing, compiled blocks, fused LoRAs."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import REFUSED, ROOT, long, picture_distance
from diffusers import DiffusionPipeline
from peak_memory import small_flux
from PIL import Image
from safetensors.torch import load_file
from test_families import FAMILIES

import train_glance_lora
from glance import base as load_base
from glance import drawing
from glance.adapters import fused_adapters
from glance.ask import pipeline as ask
from glance.ask import velocity as ask_velocity
from glance.ask.guidance import ask_single_branch
from glance.ask.velocity import PipelineVelocity, takes_timesteps
from glance.files.lora import load_lora
from glance.files.recipe import WEIGHT_NAME, read_recipe
from glance.training import prepare
from glance_utils import PHASES, InputError, activate_adapter, glance_inference


pytestmark = pytest.mark.slow


CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def lora(folder) -> dict[str, torch.Tensor]:
    return {
        f"{phase} {name}": value for phase in PHASES for name, value in load_file(folder / phase / WEIGHT_NAME).items()
    }


def picture(path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(float)


def first_step(train, **settings) -> dict[str, torch.Tensor]:
    """The gradients of the first optimizer step of the slow phase, by name of the parameter, float32."""
    gradients, clip = {}, train_glance_lora.Accelerator.clip_grad_norm_

    def keep(self, parameters, *args):
        if not gradients:
            gradients.update(
                enumerate(parameter.grad.clone() for parameter in parameters if parameter.grad is not None)
            )
        return clip(self, parameters, *args)

    with ask.replaced(train_glance_lora.Accelerator, "clip_grad_norm_", keep):
        train(phase="slow", max_train_steps=1, **settings)
    return gradients


def assert_same_direction(one: dict, other: dict, least: float):
    one, other = (torch.cat([value.flatten() for value in gradients.values()]) for gradients in (one, other))
    assert torch.cosine_similarity(one, other, 0) > least and 0.8 < one.norm() / other.norm() < 1.25


# --------------------------------------------------------------------------------------------------------------------
# The base in less memory


@pytest.mark.gpu
@pytest.mark.parametrize("base", ["flux", long("sd3"), long("qwen")])
@pytest.mark.parametrize("quantization, kind", [("nf4", "Linear4bit"), ("int8", "Linear8bitLt"), ("fp8", "Linear")])
def test_a_quantized_base_trains_and_draws(base, quantization, kind, train, infer, tmp_path, monkeypatch):
    seen, load = [], load_base.load_transformer

    def watched(*args, **kwargs):
        seen.append(load(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(load_base, "load_transformer", watched)
    output = train(base, quantization=quantization, learning_rate=1e-2, max_train_steps=3)
    moved = [value.abs().max() > 1e-4 for name, value in lora(output).items() if "lora_B" in name]
    assert sum(moved) > 0.75 * len(moved)
    drawn = picture(infer(base, lora=output, quantization=quantization))
    plain = picture(infer(base, lora=output, quantization=quantization, lora_scale=0, output=tmp_path / "plain.png"))
    assert drawn.std() > 0 and abs(drawn - plain).max() > 0
    assert abs(drawn - picture(output / "glance.png")).mean() < 40  # the preview: another caption, the same base
    assert len(seen) == 3
    for transformer in seen:
        weights = [layer.weight for layer in transformer.modules() if type(layer).__name__ == kind]
        stored = {"nf4": torch.uint8, "int8": torch.int8, "fp8": torch.float8_e4m3fn}[quantization]
        assert len(weights) >= 10 and stored in {weight.dtype for weight in weights}
        assert all(
            parameter.dtype == torch.float32 for parameter in transformer.parameters() if parameter.requires_grad
        )


@pytest.mark.gpu
@pytest.mark.parametrize("quantization, least", [("nf4", 0.97), ("int8", 0.995), ("fp8", 0.99)])
def test_a_quantized_base_gives_nearly_the_same_gradient(quantization, least, train, tmp_path):
    plain = first_step(train, output_dir=tmp_path / "plain")
    quantized = first_step(train, output_dir=tmp_path / "quantized", quantization=quantization)
    assert_same_direction(quantized, plain, least)


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{"enable_group_offload": True}, {"gradient_checkpointing": True}])
def test_offload_and_checkpointing_leave_the_gradient_as_it_is(settings, train, tmp_path):
    plain = first_step(train, output_dir=tmp_path / "plain")
    other = first_step(train, output_dir=tmp_path / "other", **settings)
    for index, gradient in plain.items():
        assert (gradient - other[index]).abs().max() <= 1e-5


@pytest.mark.gpu
def test_an_offloaded_pipeline_draws_the_same(trained, infer, tmp_path):
    wanted = infer(lora=trained())
    assert picture_distance(infer(lora=trained(), enable_group_offload=True, output=tmp_path / "b.png"), wanted) <= 1


def test_convolutions_between_fp8_layers_train(train, tmp_path):
    """Their weights are saved for the backward pass as they are, and would be in 8 bits by then."""
    make, size, pipeline_kwargs = FAMILIES["sana"]
    settings = {"resolution": size, "pipeline_kwargs": json.dumps(pipeline_kwargs), "phase": "slow"}
    train(str(make(tmp_path / "sana")), quantization="fp8", max_train_steps=1, mixed_precision="bf16", **settings)


def test_a_lora_keeps_its_precision_on_an_fp8_base(trained, pipelines):
    """peft puts an adapter into its layer's dtype, here 8 bits."""
    transformer = load_base.load_transformer(str(pipelines["flux"]), torch.bfloat16, CPU, "fp8")
    pipe = DiffusionPipeline.from_pretrained(pipelines["flux"], transformer=transformer, dtype=torch.bfloat16)
    path = trained() / "slow" / WEIGHT_NAME
    load_lora(pipe, path, "slow")
    loaded = {name: value for name, value in transformer.named_parameters() if ".lora_" in name}
    for name, value in load_file(path).items():
        name = name.removeprefix("transformer.").replace(".weight", ".slow.weight")
        assert (loaded[name].float() - value).abs().max() <= 2**-8 * value.abs().max(), name


@pytest.mark.processes
@pytest.mark.parametrize("quantization", ["none", "nf4", long("int8"), long("fp8")])
def test_loading_takes_a_shard_at_a_time(quantization, pipelines, tmp_path):
    """In a fresh process: the host's own memory while loading stays near the largest shard plus the loaded model."""
    shutil.copytree(pipelines["flux"], tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "transformer")
    small_flux().to(torch.bfloat16).save_pretrained(tmp_path / "transformer", max_shard_size="40MB")
    shards = [path.stat().st_size for path in (tmp_path / "transformer").glob("*.safetensors")]
    assert len(shards) >= 4
    found = peak_memory("load", tmp_path, quantization)
    assert found["peak"] <= 1.2 * (max(shards) + found["model"])


def peak_memory(*arguments) -> dict:
    """What tests/peak_memory.py measures, with an allocator that gives memory back at once."""
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "0",
        "MALLOC_TOP_PAD_": "0",
    }
    command = [sys.executable, ROOT / "tests" / "peak_memory.py", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.gpu
def test_checkpointing_frees_the_inputs_of_int8_layers(pipelines):
    """bitsandbytes keeps them as attributes, which checkpointing cannot see."""
    transformer = load_base.load_transformer(str(pipelines["flux"]), torch.float32, DEVICE, "int8")
    layer = next(layer for layer in transformer.modules() if type(layer).__name__ == "Linear8bitLt")
    output = layer(torch.randn(1, 4, layer.in_features, device=DEVICE, requires_grad=True))
    nodes, seen = [output.grad_fn], []
    while nodes:
        node = nodes.pop()
        seen.append(type(node).__name__)
        assert getattr(node, "A", None) is None and set(getattr(node, "tensors", ())) <= {None}
        nodes += [parent for parent, _ in node.next_functions if parent is not None]
    assert any("MatMul8bit" in name for name in seen)
    output.sum().backward()


def test_false_in_a_config_is_no(tmp_path):
    (tmp_path / "config.yaml").write_text("pretrained_model_name_or_path: x\ngradient_checkpointing: false\n")
    args = train_glance_lora.parse_args([f"--config={tmp_path / 'config.yaml'}"])
    assert args.gradient_checkpointing is False


def test_what_does_not_go_together_is_said(train, infer, trained):
    with pytest.raises(InputError, match="--enable_group_offload moves full weights.*nf4"):
        train(enable_group_offload=True, quantization="nf4")
    with pytest.raises(REFUSED, match="--no-gradient_checkpointing: with --enable_group_offload or"):
        train(quantization="fp8", **{"no-gradient_checkpointing": True})
    with pytest.raises(REFUSED, match="--fuse_lora changes weights in place, which --quantization int8 does not"):
        infer(lora=trained(), fuse_lora=True, quantization="int8")
    with pytest.raises(REFUSED, match="--enable_sequential_cpu_offload does not take --quantization nf4"):
        infer(lora=trained(), enable_sequential_cpu_offload=True, quantization="nf4")
    with pytest.raises(REFUSED, match="--enable_model_cpu_offload and --enable_group_offload exclude each other"):
        infer(lora=trained(), enable_model_cpu_offload=True, enable_group_offload=True)


# --------------------------------------------------------------------------------------------------------------------
# Several timesteps in a step


@pytest.mark.parametrize("base", ["flux", "sd3", "qwen"])
def test_all_timesteps_in_one_step_are_the_mean_over_single_steps(base, train, tmp_path):
    """One optimizer step over five timesteps, and over five accumulated ones, with the same noise."""
    settings = {"learning_rate": 1e-4, "max_grad_norm": 1e9}
    together = first_step(train, base=base, output_dir=tmp_path / "together", timesteps_per_step=5, **settings)
    single = first_step(train, base=base, output_dir=tmp_path / "single", gradient_accumulation_steps=5, **settings)
    for index, gradient in together.items():
        assert (gradient - single[index]).abs().max() <= 1e-5 * max(1, gradient.abs().max())


def test_pipelines_that_take_one_timestep_run_once_for_each(train, tmp_path, monkeypatch):
    ways = {}
    for name, answer in (("batch", True), ("each", False)):
        monkeypatch.setattr(prepare, "takes_timesteps", lambda *args, answer=answer, **kwargs: answer)
        ways[name] = first_step(train, output_dir=tmp_path / name, timesteps_per_step=3, train_batch_size=2)
    for index, gradient in ways["batch"].items():
        assert (gradient - ways["each"][index]).abs().max() <= 1e-5


TAKES = {"flux", "sd3", "qwen", "flux2", "z_image", "chroma"}


@pytest.mark.parametrize("name", sorted(TAKES))
def test_whether_a_batch_may_hold_several_timesteps_is_asked(name, tmp_path):
    """And where it may, the velocities are those of each timestep alone."""
    make, size, pipeline_kwargs = FAMILIES[name]
    pipe = DiffusionPipeline.from_pretrained(make(tmp_path))
    call = ask.call_arguments(pipe, "a red ring", size, size, None, pipeline_kwargs)
    call |= ask_single_branch(pipe, **call)
    assert takes_timesteps(pipe, **call)
    shapes = []
    with torch.no_grad():
        ask.run_pipeline(
            pipe, ask.Probe([1.0], lambda index, output, sample: shapes.append(sample.shape) or sample),
            num_inference_steps=1, **call,
        )  # fmt: skip
    noisy = torch.randn((2, *shapes[0][1:]), generator=torch.Generator().manual_seed(0))
    together = PipelineVelocity(pipe, takes_timesteps=True, **call)(noisy, [0.9, 0.2])
    alone = PipelineVelocity(pipe, **call)(noisy, [0.9, 0.2])
    assert (together - alone).abs().max() <= 1e-5
    assert (alone[0] - alone[1]).abs().max() > 1e-3


def test_a_pipeline_that_computes_with_its_timestep_is_recognised(pipelines):
    """As Wan's boundary does: `t >= boundary` of two timesteps is no yes or no."""
    pipe = DiffusionPipeline.from_pretrained(pipelines["sd3"])
    call = ask.call_arguments(pipe, "a red ring", 32, 32, 1.0, {})
    scale_noise = pipe.scheduler.scale_noise

    class Compares(ask.Probe):
        def set_timesteps(self, *args, **kwargs):
            super().set_timesteps(*args, **kwargs)
            self.timesteps = [timestep if timestep > 1 else timestep for timestep in self.timesteps]

    assert scale_noise and takes_timesteps(pipe, **call)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ask_velocity, "Probe", Compares)
        assert not takes_timesteps(pipe, **call)


def test_equal_timesteps_side_by_side_are_one_remembered_run(train, monkeypatch):
    """Three timesteps a step from rounds of five: the same one may end a round and begin the next."""
    monkeypatch.setattr(prepare, "takes_timesteps", lambda *args, **kwargs: False)
    train(phase="slow", timesteps_per_step=3, flow_timesteps_mode="random", max_train_steps=12)


# --------------------------------------------------------------------------------------------------------------------
# Compiled blocks, fused LoRAs


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.long
def test_compiled_training_is_the_same_and_compiles_once_for_both_phases(train, tmp_path, monkeypatch):
    compiled, train_phase = [], train_glance_lora.train_phase

    def watched(*args):
        train_phase(*args)
        compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    monkeypatch.setattr(train_glance_lora, "train_phase", watched)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    settings = {"learning_rate": 1e-3, "max_train_steps": 3, "num_base_steps": 20, "grid": "even"}
    plain = lora(train(output_dir=tmp_path / "plain", **settings))
    assert compiled == [0, 0]
    pictures = {"validation_prompt": "a blue disc", "validation_steps": 2}  # amid the steps, nothing is compiled again
    fast = lora(train(output_dir=tmp_path / "compiled", compile=True, **settings, **pictures))
    assert compiled[2:] == [2, 2]  # FLUX has two kinds of blocks
    for name, value in plain.items():
        difference = value - fast[name]
        if DEVICE == CPU:
            assert difference.abs().max() <= 1e-3, name
        else:  # AdamW steps by the gradient's sign, which other kernels turn where it is nearly 0
            assert difference.norm() <= 0.1 * value.norm(), name


@pytest.mark.slow
@pytest.mark.gpu
def test_the_hand_off_compiles_nothing(trained, infer, tmp_path, monkeypatch):
    """The second picture, with its two hand-offs, finds everything compiled; and so does the first one's own."""
    counted, activate = [], drawing.fused_adapters

    def watched(transformer):
        counted.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        return activate(transformer)

    monkeypatch.setattr(drawing, "fused_adapters", watched)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    wanted = picture(infer(lora=trained()))
    found = picture(
        infer(lora=trained(), compile=True, num_images=3, output=tmp_path / "compiled.png").with_stem("compiled-000")
    )
    total = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    blocks = 2  # a double and a single one, each compiled once: the first call of each phase would make it more
    assert counted[1:] == [total, total] and total == blocks
    assert abs(wanted - found).max() <= 1


@pytest.mark.parametrize("base", ["flux", "sd3", "qwen"])
def test_fused_loras_draw_the_same_and_leave_the_base_as_it_was(base, trained, pipelines):
    pipe = DiffusionPipeline.from_pretrained(pipelines[base])
    pipe.set_progress_bar_config(disable=True)
    schedule = {}
    for phase in PHASES:
        path = trained(base) / phase / WEIGHT_NAME
        schedule[phase] = read_recipe(path).timesteps
        load_lora(pipe, path, phase)
    before = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}

    def draw(activate=activate_adapter):
        pictures = []
        with glance_inference(pipe, schedule, {"fast": 0.5}, activate) as kwargs:
            for _ in range(2):
                generator = torch.Generator().manual_seed(0)
                pictures.append(
                    pipe("a ring", height=32, width=32, generator=generator, output_type="pt", **kwargs)[0]
                )
        return pictures

    one = draw()
    with fused_adapters(pipe.transformer) as activate:
        other = draw(activate)
    activate_adapter(pipe.transformer, None)
    generator = torch.Generator().manual_seed(0)
    plain = pipe("a ring", height=32, width=32, generator=generator, output_type="pt", num_inference_steps=10)[0]
    for unfused, fused in zip(one, other):
        assert (unfused - fused).abs().max() < 1e-4 < (unfused - plain).abs().max()
    for name, value in pipe.transformer.state_dict().items():
        assert torch.equal(value, before[name]), name
