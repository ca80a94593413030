"""What is in memory when: the models that a run has no use for are gone, or off the accelerator, while others work.

tests/test_distribution.py looks at the same moments of runs of several processes.
"""

import functools
import gc
import weakref

import diffusers
import pytest
from accelerate.hooks import CpuOffload
from lifetimes import EXPECTED, watch
from transformers import T5EncoderModel

import infer_glance
from glance.training.validation import Validation
from glance_utils import denoiser


SHORT = {"max_train_steps": 2, "num_base_steps": 12, "num_inference_steps": 4}


@pytest.mark.gpu
@pytest.mark.parametrize(
    "base, settings",
    [
        ("flux", {"enable_group_offload": True, "validation_prompt": "a blue disc"}),
        ("qwen", {"loss": "trajectory", "timesteps_per_step": 2, "quantization": "fp8"}),
        ("sd3", {"instance_image": None, "instance_prompt": "a red ring", "flow_custom_timesteps": "900,500;300,100"}),
    ],
)
def test_encoders_are_gone_before_the_base_is_read_and_the_base_before_the_vae_decodes(
    base, settings, train, monkeypatch
):
    moments = watch(monkeypatch.setattr)
    output = train(base, **SHORT | settings)
    assert moments == EXPECTED and (output / "glance.png").exists()


def test_pictures_on_the_way_need_the_vae_and_no_encoder(train, monkeypatch):
    """And the last ones, which are drawn from the files, come after the base has gone."""
    moments, write, decoding = watch(monkeypatch.setattr), Validation.write_the_end, []

    def watched_end(self, *args):
        decoding.append(moments.pop("decoding"))
        return write(self, *args)

    monkeypatch.setattr(Validation, "write_the_end", watched_end)
    train(**SHORT, validation_prompt="a blue disc", validation_steps=1)
    assert decoding == [{"vae", "base"}] and moments == EXPECTED


@pytest.mark.gpu
@pytest.mark.parametrize(
    "base, model, settings",
    [
        ("flux", "FluxTransformer2DModel", {"compare": True}),
        ("sd3", "SD3Transformer2DModel", {"guidance": "fold"}),
        ("flux", "FluxTransformer2DModel", {"lora": None, "grid": "auto", "solver": "fitted", "num_base_steps": 12}),
    ],
)
def test_an_offloaded_model_has_the_accelerator_to_itself(base, model, settings, trained, infer, monkeypatch):
    """There is no accelerator here: what accelerate's hooks would have there is counted. Afterwards nothing is, and
    nothing of ours holds a model that inference loaded."""
    there, alone, models, lora = set(), [], [], trained(base)
    pre_forward, init_hook, load_pipeline = CpuOffload.pre_forward, CpuOffload.init_hook, infer_glance.load_pipeline
    kinds = {getattr(diffusers, model): "forward", diffusers.AutoencoderKL: "_decode", T5EncoderModel: "forward"}

    def watched_pre_forward(self, module, *args, **kwargs):
        if self.prev_module_hook is not None:
            there.discard(id(self.prev_module_hook.model))
        there.add(id(module))
        return pre_forward(self, module, *args, **kwargs)

    def watched_init_hook(self, module):
        there.discard(id(module))
        return init_hook(self, module)

    def watched_load(*args, **kwargs):
        pipe = load_pipeline(*args, **kwargs)
        models.extend(weakref.ref(part) for part in infer_glance.ask.freeable_components(pipe).values())
        models.append(weakref.ref(denoiser(pipe)))
        return pipe

    def watched(work):
        @functools.wraps(work)
        def call(self, *args, **kwargs):
            if hasattr(self, "_hf_hook"):  # else it is of the pipeline without weights, which is asked first
                alone.append((type(self).__name__, there == {id(self)}))
            return work(self, *args, **kwargs)

        return call

    monkeypatch.setattr(CpuOffload, "pre_forward", watched_pre_forward)
    monkeypatch.setattr(CpuOffload, "init_hook", watched_init_hook)
    monkeypatch.setattr(infer_glance, "load_pipeline", watched_load)
    for kind, name in kinds.items():
        monkeypatch.setattr(kind, name, watched(getattr(kind, name)))
    infer(base, **{"lora": lora, "enable_model_cpu_offload": True, "height": 32, "width": 32} | settings)
    assert set(alone) == {(kind.__name__, True) for kind in kinds} and not there
    gc.collect()
    assert len(models) > 3 and not [model for model in models if model() is not None]
