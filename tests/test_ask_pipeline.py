"""What is asked of a pipeline is what the stock pipeline does: schedule, layout, guidance, velocity."""

import json
import re
import shutil

import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    QwenImagePipeline,
)
from diffusers.image_processor import VaeImageProcessor
from peft import LoraConfig
from PIL import Image

from glance.adapters import lora_layers
from glance.ask import pipeline as ask
from glance.ask import prompts as ask_prompts
from glance.ask.guidance import ask_single_branch
from glance.ask.latents import ask_layout, decode, encode_image
from glance.ask.schedule import ask_timesteps
from glance.ask.velocity import PipelineVelocity, takes_timesteps
from glance_utils import InputError, flow_matching_loss


BASES = ("flux", "sd3", "qwen")
DTYPES = (torch.float32, torch.bfloat16)
SIZES = ((32, 32), (32, 64), (72, 40))
PROMPT = "a red ring"
# The last block's text output goes nowhere, so LoRA weights that only make it get no gradient.
UNREACHABLE = {
    "flux": r"$^",
    "sd3": r"transformer_blocks\.1\.attn\.add_q_proj",
    "qwen": r"transformer_blocks\.1\.(attn\.(add_q_proj|to_add_out)|txt_mlp\.net\.2)",
}


@pytest.fixture(params=BASES)
def base(request):
    return request.param


@pytest.fixture
def asked(pipelines):
    """asked(base, dtype, ...) -> (pipe, call), as train_glance_lora.py begins: the transformer has no weights."""

    def load(base, dtype=torch.float32, height=32, width=32, guidance_scale=None, **extra):
        pipe = ask.load_pipeline(str(pipelines[base]), dtype)
        ask_prompts.remember_prompts(pipe)
        return pipe, ask.call_arguments(pipe, PROMPT, height, width, guidance_scale, extra)

    return load


@pytest.fixture
def stock(pipelines):
    """stock(base, dtype) is a fresh pipeline, as diffusers loads it."""

    def load(base, dtype=torch.float32):
        pipe = DiffusionPipeline.from_pretrained(pipelines[base], dtype=dtype)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return load


@pytest.fixture
def ready(asked, pipelines):
    """ready(base, dtype, batch) -> (pipe, call), as training uses it: encoders freed, transformer loaded."""

    def load(base, dtype=torch.float32, batch=1, **extra):
        pipe, call = asked(base, dtype, **extra)
        call |= ask_single_branch(pipe, **call)
        ask.dry_step(pipe, **call, num_images_per_prompt=batch)
        ask_prompts.free_components(pipe)
        load_transformer(pipe, pipelines[base], dtype)
        return pipe, call

    return load


def load_transformer(pipe, folder, dtype=torch.float32):
    pipe.transformer = type(pipe.transformer).from_pretrained(folder, subfolder="transformer", dtype=dtype)
    pipe.transformer.requires_grad_(False)


def random_image(height, width, seed=0):
    return 2 * torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed)) - 1


def encoded(pipe, image):
    """The VAE's own latents of an image, in its own layout."""
    if isinstance(pipe, QwenImagePipeline):
        image = image[:, :, None]
    with torch.no_grad():
        return pipe.vae.encode(image).latent_dist.mode()


# --------------------------------------------------------------------------------------------------------------------
# Loading


def test_the_transformer_has_a_config_but_no_weights(base, asked, stock):
    pipe, _ = asked(base)
    assert type(pipe) is type(stock(base))
    assert all(parameter.is_meta for parameter in pipe.transformer.parameters())
    assert not any(parameter.is_meta for parameter in pipe.vae.parameters())
    own = {name: (value.shape, value.dtype) for name, value in pipe.transformer.named_parameters()}
    assert (
        own == {name: (value.shape, value.dtype) for name, value in stock(base).transformer.named_parameters()}
        and len(own) > 20
    )


def test_the_vae_stays_float32_and_the_rest_is_the_dtype_asked_for(base, asked):
    pipe, _ = asked(base, torch.bfloat16)
    for name, component in pipe.components.items():
        if isinstance(component, torch.nn.Module):
            dtypes = {parameter.dtype for parameter in component.parameters()}
            assert (torch.float32 if name == "vae" else torch.bfloat16) in dtypes, name
    assert {parameter.dtype for parameter in pipe.vae.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in pipe.transformer.parameters()} == {torch.bfloat16}


@pytest.fixture
def changed(pipelines, tmp_path):
    """changed(base, **entries) is a copy of a pipeline's folder with these entries of its model_index.json."""

    def copy(base, **entries):
        folder = shutil.copytree(pipelines[base], tmp_path / "changed")
        index = json.loads((folder / "model_index.json").read_text()) | entries
        index = {key: value for key, value in index.items() if value is not None}
        (folder / "model_index.json").write_text(json.dumps(index))
        return folder

    return copy


def test_a_folder_without_a_pipeline_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="not a diffusers pipeline") as error:
        ask.load_pipeline(str(tmp_path))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_hub_id_that_cannot_be_had_is_an_input_error():
    with pytest.raises(InputError, match="^nobody/nothing: neither a folder here nor in the cache, and HF_HUB_OFF"):
        ask.load_pipeline("nobody/nothing")


@pytest.fixture
def modular(tmp_path, monkeypatch):
    """modular(cached) is a modular pipeline alone, as FLUX.3 and Anima are: a folder, or a hub id that is cached."""

    def make(cached: bool) -> str:
        snapshot = tmp_path / "models--nobody--modular" / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        (snapshot / "modular_model_index.json").write_text(json.dumps({"_class_name": "FluxModularPipeline"}))
        if not cached:
            return str(snapshot)
        (snapshot.parent.parent / "refs").mkdir()
        (snapshot.parent.parent / "refs" / "main").write_text(snapshot.name)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        return "nobody/modular"

    return make


@pytest.mark.parametrize("cached", [False, True])
def test_a_modular_pipeline_is_called_so(cached, modular, train, infer, trained):
    base = modular(cached)
    message = f"^{base}: a modular pipeline .*; give the same model as a standard pipeline"
    with pytest.raises(InputError, match=message):
        train(base)
    with pytest.raises(InputError, match=message):
        train(base, dry_run=True)
    with pytest.raises(InputError, match=message):
        infer(base, lora=trained("flux"))


def test_a_modular_class_in_an_ordinary_index_is_called_so_too(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "QwenImageModularPipeline"}))
    with pytest.raises(InputError, match="a modular pipeline .*; give the same model as a standard pipeline"):
        ask.read_model_index(tmp_path)


def test_a_broken_model_index_is_an_input_error(tmp_path):
    (tmp_path / "model_index.json").write_text("{ not json")
    with pytest.raises(InputError, match="not a diffusers pipeline"):
        ask.load_pipeline(str(tmp_path))


@pytest.mark.parametrize("transformer", [None, [None, None]])
def test_a_pipeline_without_a_transformer_is_an_input_error(transformer, changed):
    folder = changed("flux", _class_name="StableDiffusionPipeline", transformer=transformer)
    with pytest.raises(InputError, match="StableDiffusionPipeline has no transformer"):
        ask.load_pipeline(str(folder))


def test_a_scheduler_without_flow_matching_is_an_input_error(changed):
    folder = changed("sd3", scheduler=["diffusers", "DDIMScheduler"])
    DDIMScheduler().save_pretrained(folder / "scheduler")
    with pytest.raises(InputError, match="DDIMScheduler is not a flow-matching scheduler"):
        ask.load_pipeline(str(folder))


def test_another_scheduler_with_flow_sigmas_is_asked_too(changed):
    folder = changed("sd3", scheduler=["diffusers", "DPMSolverMultistepScheduler"])
    DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    ).save_pretrained(folder / "scheduler")
    pipe = ask.load_pipeline(str(folder))
    ask_prompts.remember_prompts(pipe)
    found = ask_timesteps(pipe, 30, **ask.call_arguments(pipe, PROMPT, 32, 32, None, {}))
    assert found == walked(DiffusionPipeline.from_pretrained(folder), 30, 32, 32)


def test_arguments_the_pipeline_does_not_take_are_named(base, asked):
    pipe, call = asked(base)
    assert call == {"prompt": PROMPT, "height": 32, "width": 32}
    for name in ("guidance", "latents", "num_inference_steps", "sigmas", "height", "callback_on_step_end", "self"):
        with pytest.raises(InputError, match=f"{type(pipe).__name__} takes no '{name}' .*; it takes .*guidance_scale"):
            ask.call_arguments(pipe, PROMPT, 32, 32, None, {name: 1})
    own = {"max_sequence_length": 64}
    assert ask.call_arguments(pipe, PROMPT, 32, 32, 2.5, own) == call | own | {"guidance_scale": 2.5}


# --------------------------------------------------------------------------------------------------------------------
# The schedule


def walked(pipe, num_steps, height, width):
    """The timesteps of a stock run."""
    found = []

    def record(pipe, step, timestep, callback_kwargs):
        found.append(timestep.item())
        return callback_kwargs

    steps = {"num_inference_steps": num_steps, "callback_on_step_end": record, "output_type": "latent"}
    pipe(PROMPT, height=height, width=width, **steps)
    return found


@pytest.mark.parametrize("size", [(32, 32), (32, 64)])
def test_timesteps_are_those_of_a_stock_run(base, size, asked, stock):
    pipe, call = asked(base, height=size[0], width=size[1])
    found = ask_timesteps(pipe, 50, **call)
    assert len(found) == 50 and found[0] == 1000
    assert found == walked(stock(base), 50, *size)


def test_timesteps_do_not_depend_on_the_dtype(base, asked):
    (one, call), (other, _) = asked(base), asked(base, torch.bfloat16)
    assert ask_timesteps(one, 50, **call) == ask_timesteps(other, 50, **call)


# --------------------------------------------------------------------------------------------------------------------
# Guidance


@pytest.mark.parametrize(
    ("name", "guidance_scale", "extra", "off"),
    [
        ("flux", None, {}, {}),
        ("flux", 7.0, {}, {}),  # embedded: part of what the model is told
        ("flux", None, {"negative_prompt": ""}, {}),
        ("flux", None, {"negative_prompt": "", "true_cfg_scale": 3.0}, {"true_cfg_scale": 1.0}),
        ("sd3", None, {}, {"guidance_scale": 1.0}),
        ("sd3", 4.5, {"negative_prompt": "blur"}, {"guidance_scale": 1.0}),
        ("sd3", 1.0, {}, {}),
        ("qwen", None, {}, {}),
        ("qwen", None, {"negative_prompt": "blur"}, {"true_cfg_scale": 1.0}),
        ("qwen", None, {"negative_prompt": "blur", "true_cfg_scale": 1.0}, {}),
    ],
)
def test_classifier_free_guidance_is_recognised_and_switched_off(name, guidance_scale, extra, off, asked, pipelines):
    pipe, call = asked(name, guidance_scale=guidance_scale, **extra)
    assert ask_single_branch(pipe, **call) == off
    # and with it the real transformer is called once a step, on one sample, with the caller's embedded guidance
    load_transformer(pipe, pipelines[name])
    calls = []
    pipe.transformer.register_forward_pre_hook(lambda _, args, inputs: calls.append(inputs), with_kwargs=True)
    pipe(**call | off, num_inference_steps=2, output_type="latent")
    assert [len(inputs["hidden_states"]) for inputs in calls] == [1, 1]
    if name == "flux":
        assert calls[0]["guidance"].tolist() == [3.5 if guidance_scale is None else guidance_scale]


# --------------------------------------------------------------------------------------------------------------------
# The latents' layout


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_encoded_images_are_in_the_familys_own_layout(base, size, dtype, asked, stock):
    pipe, call = asked(base, dtype, *size)
    image = random_image(*size)
    latents = encode_image(pipe, image, ask_layout(pipe, **call), **call)
    z, config = encoded(stock(base), image), pipe.vae.config
    if base == "qwen":
        mean, std = (torch.tensor(value).view(1, -1, 1, 1, 1) for value in (config.latents_mean, config.latents_std))
        height, width = z.shape[-2:]
        expected = QwenImagePipeline._pack_latents((z - mean) / std, 1, z.shape[1], height, width)
    else:
        expected = (z - config.shift_factor) * config.scaling_factor
        if base == "flux":
            expected = FluxPipeline._pack_latents(expected, *z.shape)
    assert latents.dtype == torch.float32 and latents.shape == expected.shape
    assert latents.std() > 0.05
    assert (latents - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_round_trip_through_the_stock_decode_path(base, size, asked, stock, monkeypatch):
    pipe, call = asked(base, height=size[0], width=size[1])
    image = random_image(*size)
    layout = ask_layout(pipe, **call)
    latents = encode_image(pipe, image, layout, **call)

    unasked, decoded = stock(base), []
    own = unasked.vae.decode
    monkeypatch.setattr(unasked.vae, "decode", lambda z, *args, **kw: (decoded.append(z), own(z, *args, **kw))[1])
    # a velocity of zero: the pipeline decodes the latents that it is given
    monkeypatch.setattr(unasked.transformer, "forward", lambda hidden_states, **_: (torch.zeros_like(hidden_states),))
    picture = unasked(**call, latents=latents, num_inference_steps=2).images[0]
    assert (decoded[0] - encoded(unasked, image)).abs().max() <= 1e-5
    assert picture.size == (size[1], size[0])
    difference = np.asarray(picture).astype(int) - np.asarray(decode(pipe.vae, latents, layout))
    assert abs(difference).max() <= 1  # it divides and adds in another order


def test_a_quarter_of_a_million_latents_keep_their_places(base, asked):
    """As many as at 1024x1024; as one ramp they would not be exact in bfloat16."""
    size = 1024 if base == "qwen" else 512
    pipe, call = asked(base, torch.bfloat16, size, size)
    layout = ask_layout(pipe, **call)
    assert layout.source.numel() == 262_144
    assert torch.equal(layout.source.sort().values, torch.arange(262_144))
    z = torch.randn(layout.z_shape, generator=torch.Generator().manual_seed(0))
    latents = layout.latents_from(z)
    assert latents.shape == layout.latents_shape
    assert (latents.flatten()[layout.source] * layout.scale + layout.shift - z.flatten()).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["flux", "qwen"])
def test_a_size_the_pipeline_rounds_is_an_input_error(name, asked):
    pipe, call = asked(name, height=44, width=38)
    layout = ask_layout(pipe, **call)
    with pytest.raises(
        InputError, match=r"an image of 38x44 has latents \(1, .*choose a width and height that it keeps"
    ):
        encode_image(pipe, random_image(44, 38), layout, **call)


def test_a_layout_of_another_size_does_not_pass(base, asked):
    pipe, call = asked(base)
    layout = ask_layout(pipe, **call)
    with pytest.raises(InputError, match="an image of 64x32 has latents"):
        encode_image(pipe, random_image(32, 64), layout, **call)


def test_a_layout_that_does_not_fit_is_caught_before_training(base, asked):
    pipe, call = asked(base)
    layout = ask_layout(pipe, **call)
    layout.source = layout.source.roll(1)
    with pytest.raises(InputError, match="come back from its decode path .* off"):
        encode_image(pipe, random_image(32, 32), layout, **call)


class SquaringFlux(FluxPipeline):
    """Between its latents and vae.decode it does more than permute, scale and shift."""

    @staticmethod
    def _unpack_latents(latents, height, width, vae_scale_factor):
        return FluxPipeline._unpack_latents(latents, height, width, vae_scale_factor) ** 2


def test_a_decode_path_that_is_not_a_layout_is_an_input_error(asked):
    pipe, call = asked("flux")
    squaring = SquaringFlux(**pipe.components)
    with pytest.raises(InputError, match="SquaringFlux: between its latents .* more than permute, scale and shift"):
        ask_layout(squaring, **call)


# --------------------------------------------------------------------------------------------------------------------
# Without the transformer's weights, and with them


def test_the_questions_need_no_weights_and_the_answers_stay(base, asked, pipelines):
    pipe, call = asked(base)

    def answers():
        single = ask_single_branch(pipe, **call)
        return single, ask_timesteps(pipe, 50, **call), ask_timesteps(pipe, 50, **call | single)

    before, layout = answers(), ask_layout(pipe, **call)
    assert all(parameter.is_meta for parameter in pipe.transformer.parameters())
    load_transformer(pipe, pipelines[base])
    after = ask_layout(pipe, **call)
    assert after.latents_shape == layout.latents_shape and torch.equal(after.source, layout.source)
    ask_prompts.free_components(pipe)
    assert answers() == before


def test_freeing_leaves_only_the_transformer(base, asked):
    pipe, _ = asked(base)
    ask_prompts.free_components(pipe)
    models = [name for name, part in pipe.components.items() if issubclass(type(part), torch.nn.Module)]
    assert models == ["transformer"]
    assert pipe.tokenizer is not None and pipe.scheduler is not None


QUESTIONS = {
    "timesteps": lambda pipe, call: ask_timesteps(pipe, 50, **call),
    "single branch": lambda pipe, call: ask_single_branch(pipe, **call),
    "dry step": lambda pipe, call: ask.dry_step(pipe, **call),
    "layout": lambda pipe, call: ask_layout(pipe, **call),
    "image": lambda pipe, call: encode_image(pipe, random_image(32, 32), ask_layout(pipe, **call), **call),
    "takes_timesteps": lambda pipe, call: takes_timesteps(pipe, **call),
    "velocity": lambda pipe, call: PipelineVelocity(pipe, **call | ask_single_branch(pipe, **call))(
        torch.zeros(ask_layout(pipe, **call).latents_shape), 0.5
    ),
}


def state_of(pipe):
    """What a question may replace while it is asked: kept, the bound methods by being absent on the instance."""
    return {
        "scheduler": pipe.scheduler,
        "scheduler state": {name: repr(value) for name, value in vars(pipe.scheduler).items()},
        "config": dict(pipe.config),
        "forward": vars(pipe.transformer).get("forward", "the class's own"),
        "decode": vars(pipe.vae).get("decode", "the class's own"),
        "training": (pipe.transformer.training, pipe.vae.training),
        "rng": torch.get_rng_state().tolist(),
    }


@pytest.mark.parametrize("own", [False, True], ids=["class methods", "instance methods"])
def test_a_question_leaves_the_pipeline_as_it_was(base, own, asked, pipelines):
    pipe, call = asked(base)
    load_transformer(pipe, pipelines[base])
    if own:  # as accelerate's offloading hooks leave them
        pipe.transformer.forward, pipe.vae.decode = pipe.transformer.forward, pipe.vae.decode
    before = state_of(pipe)
    for name, question in QUESTIONS.items():
        question(pipe, call)
        assert state_of(pipe) == before, name
        assert pipe.scheduler is before["scheduler"], name


def test_a_question_that_fails_leaves_the_pipeline_as_it_was(base, asked):
    pipe, call = asked(base)
    before = state_of(pipe)
    with pytest.raises(ValueError, match="prompt"):
        ask_timesteps(pipe, 50, **call | {"prompt": 7})
    with pytest.raises(ValueError, match="prompt"):
        ask_layout(pipe, **call | {"prompt": 7})
    assert state_of(pipe) == before


def test_a_pipeline_call_without_no_grad_is_an_input_error(asked):
    class Bare(FluxPipeline):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    pipe, call = asked("flux")
    with pytest.raises(InputError, match="Bare.__call__ is not wrapped in torch.no_grad"):
        ask.dry_step(Bare(**pipe.components), **call)


# --------------------------------------------------------------------------------------------------------------------
# Prompts


def encoders(pipe):
    return [part for name, part in pipe.components.items() if name.startswith("text_encoder")]


def count_encodings(pipe):
    """A list that grows by one whenever a text encoder runs."""
    ran = []
    for encoder in encoders(pipe):
        encoder.register_forward_hook(lambda module, *_: ran.append(type(module).__name__))
    return ran


def test_a_prompt_is_encoded_once(base, asked):
    pipe, call = asked(base)
    call |= ask_single_branch(pipe, **call)
    pipe, _ = asked(base)  # one that has seen nothing
    ran = count_encodings(pipe)
    for _ in range(3):
        ask.dry_step(pipe, **call)
    ask_timesteps(pipe, 50, **call)
    ask_layout(pipe, **call)
    assert len(ran) == len(encoders(pipe))
    ask.dry_step(pipe, **call | {"prompt": "a blue ring"})
    assert len(ran) == 2 * len(encoders(pipe))


def test_what_is_remembered_is_what_the_pipeline_encodes(base, asked, stock):
    pipe, _ = asked(base)
    for prompt in (PROMPT, "a blue cross", PROMPT):
        arguments = {"prompt": prompt} | ({"prompt_2": None, "prompt_3": None} if base == "sd3" else {})
        arguments |= {"prompt_2": None} if base == "flux" else {}
        with torch.no_grad():
            expected = stock(base).encode_prompt(**arguments, num_images_per_prompt=2)
        for found, tensor in zip(pipe.encode_prompt(**arguments, num_images_per_prompt=2), expected, strict=True):
            assert found is tensor or torch.equal(found, tensor)  # None where a mask is not needed
            assert found is None or not found.requires_grad


def test_an_unseen_prompt_after_freeing_is_a_runtime_error(base, asked):
    pipe, call = asked(base)
    ask.dry_step(pipe, **call)
    ask_prompts.free_components(pipe)
    ask.dry_step(pipe, **call)
    with pytest.raises(RuntimeError, match="it was not encoded before the encoders were freed"):
        ask.dry_step(pipe, **call | {"prompt": "a blue ring"})


# --------------------------------------------------------------------------------------------------------------------
# The velocity


class Recorder(FlowMatchEulerDiscreteScheduler):
    """Stock Euler that keeps what the pipeline hands to `step`."""

    def step(self, model_output, timestep, sample, **kwargs):
        self.handed = model_output
        return super().step(model_output, timestep, sample, **kwargs)


def latents_shape(base, batch):
    """The layout at 32x32."""
    return {"flux": (batch, 64, 16), "sd3": (batch, 4, 16, 16), "qwen": (batch, 16, 16)}[base]


def noise_like(base, batch, seed=0):
    return torch.randn(latents_shape(base, batch), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_velocity_is_what_stock_hands_to_its_scheduler(base, dtype, batch, ready, stock):
    pipe, call = ready(base, dtype, batch)
    velocity, noisy = PipelineVelocity(pipe, **call), noise_like(base, batch)
    unasked = stock(base, dtype)
    unasked.scheduler = Recorder(shift=1.0)
    single = {"guidance_scale": 1.0} if base == "sd3" else {}
    found = []
    for sigma in (1.0, 0.9791915, 0.5629505, 0.02):
        unasked(
            PROMPT,
            height=32,
            width=32,
            sigmas=[sigma],
            num_inference_steps=1,
            num_images_per_prompt=batch,
            latents=noisy,
            output_type="latent",
            **single,
        )
        found.append(velocity(noisy, sigma))
        assert found[-1].dtype == dtype and found[-1].shape == noisy.shape
        assert torch.equal(found[-1], unasked.scheduler.handed), sigma
    assert all(not torch.equal(one, other) for one, other in zip(found, found[1:]))
    assert batch == 1 or not torch.equal(found[0][0], found[0][1])


def test_embedded_guidance_reaches_the_velocity(ready, stock):
    noisy, found = noise_like("flux", 1), []
    for scale in (3.5, 1.0):
        pipe, call = ready("flux", guidance_scale=scale)
        found.append(PipelineVelocity(pipe, **call)(noisy, 0.5))
        unasked = stock("flux")
        unasked.scheduler = Recorder(shift=1.0)
        steps = {"sigmas": [0.5], "num_inference_steps": 1, "latents": noisy, "output_type": "latent"}
        unasked(PROMPT, height=32, width=32, guidance_scale=scale, **steps)
        assert torch.equal(found[-1], unasked.scheduler.handed)
    assert not torch.equal(*found)


def test_the_velocity_of_a_batch_is_that_of_its_parts(base, ready):
    noisy = noise_like(base, 2)
    pipe, call = ready(base, batch=2)
    both = PipelineVelocity(pipe, **call)(noisy, 0.5)
    pipe, call = ready(base)
    parts = [PipelineVelocity(pipe, **call)(part[None], 0.5) for part in noisy]
    assert torch.allclose(both, torch.cat(parts), atol=1e-5)


def test_non_square_sizes_have_a_velocity(base, ready, stock):
    pipe, call = ready(base, height=32, width=64)
    shape = {"flux": (1, 128, 16), "sd3": (1, 4, 16, 32), "qwen": (1, 32, 16)}[base]
    noisy = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    unasked = stock(base)
    unasked.scheduler = Recorder(shift=1.0)
    unasked(**call, sigmas=[0.5], num_inference_steps=1, latents=noisy, output_type="latent")
    assert torch.equal(PipelineVelocity(pipe, **call)(noisy, 0.5), unasked.scheduler.handed)


def add_lora(transformer):
    """{name: parameter} of a LoRA as training adds it, lora_B at zero."""
    torch.manual_seed(0)
    layers = lora_layers(transformer)
    transformer.add_adapter(LoraConfig(r=2, target_modules=layers, init_lora_weights="gaussian"), "slow")
    return {name: value for name, value in transformer.named_parameters() if ".lora_" in name}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_reach_the_lora_and_nothing_else(base, dtype, asked, pipelines):
    pipe, call = asked(base, dtype)  # encoders and VAE stay, and with them weights that could get a gradient
    call |= ask_single_branch(pipe, **call)
    load_transformer(pipe, pipelines[base], dtype)
    lora = add_lora(pipe.transformer)
    velocity, noisy = PipelineVelocity(pipe, **call), noise_like(base, 1)
    gradients = []
    for _ in range(2):  # and once more: nothing of the first graph is kept
        flow_matching_loss(velocity(noisy, 0.5), torch.zeros_like(noisy), noisy).backward()
        gradients.append({name: value.grad.clone() for name, value in lora.items() if value.grad is not None})
        pipe.transformer.zero_grad()
    weights = [name for name in lora if "lora_B" in name]
    assert len(weights) >= 10
    for name in weights:
        gradient = gradients[0].get(name, torch.zeros(1))
        assert gradient.isfinite().all()
        assert gradient.any() != bool(re.search(UNREACHABLE[base], name)), name
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            touched = [name for name, value in part.named_parameters() if value.grad is not None]
            assert all(".lora_" in name for name in touched)


def test_the_gradient_is_that_of_the_velocity(base, ready):
    """Along a random direction of all lora_B, against a difference quotient."""
    pipe, call = ready(base)
    lora = {name: value for name, value in add_lora(pipe.transformer).items() if "lora_B" in name}
    velocity, noisy = PipelineVelocity(pipe, **call), noise_like(base, 1)
    generator = torch.Generator().manual_seed(1)
    direction = {name: torch.randn(value.shape, generator=generator) for name, value in lora.items()}

    def loss_at(step):
        with torch.no_grad():
            for name, value in lora.items():
                value.copy_(step * direction[name])
        return flow_matching_loss(velocity(noisy, 0.5), torch.zeros_like(noisy), noisy)

    loss_at(0.0).backward()
    slope = sum((value.grad * direction[name]).sum().item() for name, value in lora.items() if value.grad is not None)
    step = 1e-3
    with torch.no_grad():
        quotient = (loss_at(step).item() - loss_at(-step).item()) / (2 * step)
    assert abs(slope) > 1e-4
    assert quotient == pytest.approx(slope, rel=0.05)


def test_velocity_draws_nothing_from_the_global_generator(base, ready):
    pipe, call = ready(base)
    velocity, noisy = PipelineVelocity(pipe, **call), noise_like(base, 1)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = velocity(noisy, 0.5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(velocity(noisy, 0.5), one)  # nor does anything drawn reach the velocity


def test_a_picture_survives_its_latents(asked, pair):
    """Encoded and decoded by the questions, or by the VAE alone: the same picture."""
    pipe, call = asked("flux")
    pixels = VaeImageProcessor(do_resize=False).preprocess(Image.open(pair).resize((32, 32)))
    layout = ask_layout(pipe, **call)
    latents = encode_image(pipe, pixels, layout, **call)
    with torch.no_grad():
        own = pipe.vae.decode(encoded(pipe, pixels)).sample
    own = pipe.image_processor.postprocess(own, output_type="pil")[0]
    difference = np.asarray(own).astype(int) - np.asarray(decode(pipe.vae, latents, layout))
    assert abs(difference).max() <= 1
