"""Both scripts on a GPU that is none (pretended_gpu.py): whatever they compute together is on one device."""

import pytest
import torch
from conftest import long
from pretended_gpu import GPU, pretended_gpu
from test_train import lora

from glance import base as load_base
from glance_utils import PHASES


pytestmark = pytest.mark.slow


if torch.cuda.is_available():
    pytest.skip("there is a real one, for tests/test_gpu.py", allow_module_level=True)

SHORT = {"num_base_steps": 6, "num_inference_steps": 4, "num_trajectories": 1}


@pytest.fixture
def gpu(monkeypatch):
    with pretended_gpu(monkeypatch) as gpu:
        yield gpu


def test_it_refuses_what_a_gpu_refuses(gpu):
    there, here = torch.ones(2, device="cuda"), torch.ones(2)
    assert (there.device, (2 * there).device, here.to(there).device) == (GPU, GPU, GPU)
    assert torch.nn.Linear(2, 2).to("cuda")(there).device == GPU and there.cpu().device.type == "cpu"
    assert (there * torch.tensor(2.0)).device == GPU and there[torch.tensor([0])].device == GPU
    for wrong in (lambda: there + here, lambda: here * there.sum(), lambda: torch.nn.Linear(2, 2)(there)):
        with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
            wrong()
    with pytest.raises(TypeError, match="can't convert cuda:0"):
        there.numpy()
    product = torch.ones(2, device="cuda", requires_grad=True)
    (product * here.cuda()).sum().backward()
    assert product.grad.device == GPU and float(product.grad.sum()) == 2 and gpu.reads


@pytest.mark.parametrize(
    ("base", "settings"),
    [
        ("flux", {"enable_group_offload": True}),
        long("sd3", {"enable_group_offload": True, "loss": "trajectory", **SHORT}),
        ("sd3", {"loss": "trajectory", "timesteps_per_step": 2, "mixed_precision": "bf16", **SHORT}),
        long("sd3", {"loss": "trajectory", "guidance": "fold", "flow_weight": 0.5, "quantization": "fp8", **SHORT}),
        ("qwen", {"instance_image": None, "instance_prompt": "a red ring", "mixed_precision": "fp16"}),
        ("flux", {"quantization": "nf4", "use_8bit_adam": True, "gradient_checkpointing": True}),
        long("flux", {"quantization": "int8", "gradient_checkpointing": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_training_and_preview(base, settings, train, gpu):
    output = train(base, max_train_steps=2, **settings)
    assert gpu.reads and (output / "glance.png").exists()
    assert all(value.isfinite().all() for phase in PHASES for value in lora(output / phase).values())


def test_a_resumed_run(train, gpu):
    settings = {"max_train_steps": 3, "checkpointing_steps": 2, "mixed_precision": "fp16"}
    output = train(**settings)
    (output / "fast" / "pytorch_lora_weights.safetensors").unlink()
    train(resume_from_checkpoint="latest", **settings)
    assert lora(output / "fast")


@pytest.mark.parametrize(
    ("base", "settings"),
    [
        ("sd3", {"fuse_lora": True, "compare": True}),
        ("flux", {"enable_group_offload": True, "num_images": 2}),
        ("flux", {"enable_sequential_cpu_offload": True}),
        ("qwen", {"enable_model_cpu_offload": True, "quantization": "nf4", "dtype": "bfloat16"}),
        long("flux", {"enable_model_cpu_offload": True, "quantization": "int8", "num_images": 2}),
        long("flux", {"enable_model_cpu_offload": True, "quantization": "fp8", "dtype": "float16"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_inference(base, settings, trained, infer, monkeypatch):
    folder = trained(base)
    with pretended_gpu(monkeypatch) as gpu:
        infer(base, lora=folder, **settings)
        assert gpu.reads


def test_8_bit_layers_move_with_their_model(pipelines, gpu):
    """All of them: what stayed would hold memory, or be elsewhere than its inputs."""
    transformer = load_base.load_transformer(str(pipelines["flux"]), torch.float32, torch.device("cpu"), "int8")
    layer = next(layer for layer in transformer.modules() if type(layer).__name__ == "Linear8bitLt")
    inputs = torch.randn(3, layer.in_features)
    for device in ("cuda", "cpu", "cuda"):
        transformer.to(device)
        for owner in (layer.weight, layer.state):
            assert owner.CB is None or {owner.CB.device.type, owner.SCB.device.type} == {device}
        assert layer(inputs.to(device)).device.type == device
