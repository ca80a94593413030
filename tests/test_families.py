"""Every flow-matching text-to-image family of diffusers: a tiny pipeline of its real classes, asked and trained.

    python -m pytest -n 2 -m "families or long" && python tests/family_table.py

asks and trains every family; `make test` asks all of them and trains some. Each result goes to output/families;
tests/family_table.py makes the table in docs/families.md of them.
"""

import dataclasses
import inspect
import json
import re
import shutil
from contextlib import nullcontext

import diffusers
import numpy as np
import pytest
import torch
from conftest import ROOT, everyday, picture_distance, run_train
from diffusers import DiffusionPipeline, WanPipeline
from diffusers.image_processor import VaeImageProcessor
from lifetimes import watch
from PIL import Image
from safetensors.torch import load_file
from tiny_chat_families import chat_processor
from tiny_families import FAMILIES

from glance import command_line as cli
from glance.ask import latents as ask_latents
from glance.ask import pipeline as ask
from glance.ask.components import denoiser_name
from glance.ask.guidance import _made_up_step, ask_single_branch
from glance.ask.schedule import ask_timestep_table, ask_timesteps
from glance.ask.velocity import PipelineVelocity
from glance.files.recipe import WEIGHT_NAME, read_recipe, schedule_of
from glance.training.inference_steps import base_inference
from glance_utils import PHASES, FixedSigmaScheduler, InputError, denoiser, model_timesteps, timesteps_to_sigmas


pytestmark = pytest.mark.families

RESULTS = ROOT / "output" / "families"
STEPS = 20  # of the stock pipeline
# One of each kind: how they guide, what their transformer gets, which way their time runs, who reads the prompt.
TRAINED = {"cogview4", "kandinsky5", "ernie", "wan", "prx", "prx_pixel", "glm", "flux2", "ideogram4", "hidream"}
TRAINED |= {"omnigen", "nucleus", "hunyuan_image", "dreamlite", "mochi", "z_image", "wan22"}


def load(folder) -> DiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stock_walk(pipe, steps, call, off) -> list[tuple]:
    """(velocity, 1000 * sigma, told timestep, sample) of each step of the stock pipeline."""
    seen, step = [], pipe.scheduler.step

    def spy(model_output, timestep, sample, *args, **kwargs):
        sigma, sign = 1000 * float(pipe.scheduler.sigmas[len(seen)]), 1
        if pipe.scheduler.config.get("invert_sigmas"):
            sigma, sign = 1000 - sigma, -1
        seen.append((sign * model_output, sigma, float(timestep), sample.clone()))
        return step(model_output, timestep, sample, *args, **kwargs)

    stock = {key: value for key, value in off.items() if key != "guiders"}
    with ask.guiders_off(pipe) if "guiders" in off else nullcontext(), ask.replaced(pipe.scheduler, "step", spy):
        pipe(**call | stock, num_inference_steps=steps, generator=torch.Generator().manual_seed(0))
    return seen


def without_loras(pipe, call, folder) -> Image.Image:
    """What infer_glance.py would draw of this call if the pair in the folder did not act."""
    schedule = schedule_of({phase: read_recipe(folder / phase / WEIGHT_NAME) for phase in PHASES})
    schedule = dataclasses.replace(schedule, timestep_table=ask_timestep_table(pipe, 50, **call))
    with base_inference(pipe, schedule) as steps, ask.plain_call(pipe, call | steps) as arguments:
        output = pipe(**arguments, generator=torch.Generator().manual_seed(0), output_type="pil", return_dict=False)
    return ask.first_frames(output)[0]


def guidance_kind(pipe, call, off) -> str:
    """How guidance works by default, as the transformer's calls show it."""
    batches, _ = _made_up_step(pipe, None, **call)
    if off == {} and batches == [1]:
        return "embedded" if denoiser(pipe).config.get("guidance_embeds") else "none"
    kind = "two calls" if len(batches) == 2 else "batch of two"
    return f"{kind}, off by {', '.join(f'{key}={value}' for key, value in off.items()) or 'itself'}"


# class: (whose parts it is made of, a phrase of the one-line error)
REFUSED = {
    "StableDiffusion3PAGPipeline": ("sd3", "guidance cannot be switched off"),
    "SanaPAGPipeline": ("sana", "guidance cannot be switched off"),
    "FluxImg2ImgPipeline": ("flux", "takes image"),
    "FluxInpaintPipeline": ("flux", "takes image and mask_image: see --pipeline_images"),
    "FluxFillPipeline": ("flux", "takes image and mask_image: see --pipeline_images"),
    "FluxControlPipeline": ("flux", "takes control_image"),
    "FluxKontextInpaintPipeline": ("flux", "takes image"),
    "StableDiffusion3Img2ImgPipeline": ("sd3", "takes image"),
    "StableDiffusion3InpaintPipeline": ("sd3", "takes image"),
    "QwenImageImg2ImgPipeline": ("qwen", "takes image"),
    "QwenImageEditPipeline": ("qwen", "takes image"),
    "QwenImageEditPlusPipeline": ("qwen", "takes image"),
    "QwenImageLayeredPipeline": ("qwen", "takes image"),
    "ChromaImg2ImgPipeline": ("chroma", "takes image"),
    "CogView4ControlPipeline": ("cogview4", "takes control_image"),
    "ZImageImg2ImgPipeline": ("z_image", "takes image"),
    "Flux2KleinInpaintPipeline": ("flux2_klein", "takes image"),
    "LongCatImageEditPipeline": ("longcat", "takes image"),
    "BriaFiboEditPipeline": ("bria_fibo", "edit JSON"),
    "WanImageToVideoPipeline": ("wan", "takes image"),
    "WanVideoToVideoPipeline": ("wan", "takes video"),
    "LTXI2VLongMultiPromptPipeline": ("ltx", "never called scheduler.step"),
}


def refuse(capsys, base, pair, output, match, **settings) -> None:
    """The command line ends with exit code 2 and one line, and nothing is written."""
    defaults = {"pretrained_model_name_or_path": base, "instance_image": pair, "output_dir": output}
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        cli.run(lambda: run_train(defaults, settings))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
    assert exit.value.code == 2 and re.search(match, line) and not output.exists()


def as_flags(extra: dict) -> dict:
    """Further arguments of a pipeline's call as the command line takes them."""
    own = {key: value for key, value in extra.items() if key == "guidance_scale"}
    rest = {key: value for key, value in extra.items() if key not in own}
    return own | ({"pipeline_kwargs": json.dumps(rest)} if rest else {})


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_more_than_a_prompt_is_refused(name, pair, tmp_path, capsys):
    base, match = REFUSED[name]
    make, size, pipeline_kwargs = FAMILIES[base]
    parts, pipeline_class = load(make(tmp_path / "parts")).components, getattr(diffusers, name)
    needed = {key for key in inspect.signature(pipeline_class.__init__).parameters if key != "self"}
    parts |= {"processor": chat_processor()}
    pipeline_class(**{key: part for key, part in parts.items() if key in needed}).save_pretrained(tmp_path / name)
    extra = {
        key: value
        for key, value in pipeline_kwargs.items()
        if key in inspect.signature(pipeline_class.__call__).parameters
    }
    refuse(capsys, tmp_path / name, pair, tmp_path / "output", match, resolution=size, **as_flags(extra))


@pytest.mark.parametrize("scheduler", ["SCMScheduler", "FlowMapEulerDiscreteScheduler", "EulerDiscreteScheduler"])
def test_another_scheduler_is_refused_before_anything_is_loaded(scheduler, pair, tmp_path, capsys):
    """SanaSprint's, AnyFlow's, and Stable Diffusion's; only the index and the scheduler are there."""
    getattr(diffusers, scheduler)().save_pretrained(tmp_path / "base" / "scheduler")
    index = {"_class_name": "SanaSprintPipeline", "_diffusers_version": diffusers.__version__}
    index |= {"transformer": ["diffusers", "SanaTransformer2DModel"], "scheduler": ["diffusers", scheduler]}
    (tmp_path / "base" / "model_index.json").write_text(json.dumps(index))
    refuse(capsys, tmp_path / "base", pair, tmp_path / "output", f"{scheduler} is not a flow-matching scheduler")


def test_a_model_without_a_timestep_is_refused(pair, tmp_path, capsys):
    """Cosmos 3's transformer packs text, picture and sound into one sequence."""
    index = {"_class_name": "Cosmos3OmniPipeline", "_diffusers_version": diffusers.__version__}
    index |= {"transformer": ["diffusers", "Cosmos3OmniTransformer"], "vae": ["diffusers", "AutoencoderKLWan"]}
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model_index.json").write_text(
        json.dumps(index | {"scheduler": ["diffusers", "UniPCMultistepScheduler"]})
    )
    refuse(capsys, tmp_path / "base", pair, tmp_path / "output", "has no transformer that takes a timestep")


def test_a_pipeline_that_changes_models_is_refused(pair, tmp_path, capsys):
    """Wan 2.2's larger form has one transformer for the high noise levels and one for the low ones."""
    parts = load(FAMILIES["wan"][0](tmp_path / "wan")).components
    parts |= {"transformer_2": parts["transformer"], "boundary_ratio": 0.875}
    WanPipeline(**parts).save_pretrained(tmp_path / "two")
    extra = {"pipeline_kwargs": json.dumps({"num_frames": 1})}
    match = "at timestep 8.. another model than its transformer acts"
    refuse(capsys, tmp_path / "two", pair, tmp_path / "output", match, **extra)


def test_less_than_the_velocity_is_told(train, tmp_path, caplog):
    """PRX's pixel model predicts the image, and its pipeline divides by 0.05 where sigma is less."""
    make, size, pipeline_kwargs = FAMILIES["prx_pixel"]
    settings = {"pipeline_kwargs": json.dumps(pipeline_kwargs), "resolution": size, "max_train_steps": 1}
    for timesteps, expected in (
        ("1000,900;800,25", ["at timestep 25.0 this pipeline takes only 0.50"]),
        ("900,50", []),
    ):
        caplog.clear()
        train(make(tmp_path / "pixel"), flow_custom_timesteps=timesteps, **settings)
        told = [record.getMessage() for record in caplog.records if "of the velocity" in record.getMessage()]
        assert len(told) == len(expected) and all(part in line for part, line in zip(expected, told))


def test_an_average_velocity_is_refused(train, tmp_path):
    """HunyuanImage's distilled form is told where each step ends; nothing else would notice."""
    base = FAMILIES["hunyuan_image"][0](tmp_path / "meanflow")
    config = json.loads((base / "transformer" / "config.json").read_text())
    (base / "transformer" / "config.json").write_text(json.dumps(config | {"use_meanflow": True}))
    with pytest.raises(InputError, match="timestep_r, where a step ends"):
        train(base)


def test_noise_beyond_a_rectified_flow_is_refused(pipelines):
    """Cosmos's pipelines start at sigma 80."""
    pipe = load(pipelines["sd3"])
    call = ask.call_arguments(pipe, "a red ring", 32, 32, None, {})

    class Wide(type(pipe.scheduler)):
        def set_timesteps(self, *args, **kwargs):
            super().set_timesteps(*args, **kwargs)
            self.sigmas, self.timesteps = 80 * self.sigmas, 80 * self.timesteps

    pipe.scheduler = Wide.from_config(pipe.scheduler.config)
    with pytest.raises(InputError, match="visit timestep 80000 .* a rectified flow"):
        ask_timesteps(pipe, 50, **call)


@pytest.mark.parametrize("name", FAMILIES)
def test_it_answers(name, pair, tmp_path):
    """The schedule, the layout and the velocity are the stock pipeline's."""
    make, size, extra = FAMILIES[name]
    pipe = load(make(tmp_path / name))
    call = ask.call_arguments(pipe, "a red ring", size, size, None, extra)
    off = ask_single_branch(pipe, **call)
    table = ask_timestep_table(pipe, STEPS, **call)
    walked = ask_timesteps(pipe, STEPS, **call)
    stock = stock_walk(pipe, STEPS, call, {})
    np.testing.assert_allclose(walked, [sigma for _, sigma, _, _ in stock], atol=1)  # some round what they tell
    sigmas = timesteps_to_sigmas(walked)
    fixed = FixedSigmaScheduler(sigmas, model_timesteps(table, sigmas), like=pipe.scheduler)
    fixed.set_timesteps()
    np.testing.assert_allclose(fixed.timesteps, [timestep for _, _, timestep, _ in stock], atol=1e-3)

    assert ask_latents.ask_size(pipe, **call) == (size, size)
    layout = ask_latents.ask_layout(pipe, **call)
    pixels = VaeImageProcessor(do_resize=False).preprocess(Image.open(pair).convert("RGB").resize((size, size)))
    latents = ask_latents.encode_image(pipe, pixels, layout, **call)
    encoded = ask_latents._vae_latents(pipe, pixels, layout)
    round_trip = (ask_latents._decode_input(pipe, lambda sample: latents, **call) - encoded).abs().max().item()
    assert round_trip <= 1e-5

    model, error = PipelineVelocity(pipe, table, **call | off), 0.0
    for velocity, sigma, timestep, sample in stock_walk(pipe, STEPS, call, off)[3::8]:
        timestep = timestep if abs(timestep - sigma) < 1 else sigma  # some round what they tell
        found = model(sample, timestep / 1000)
        assert found.requires_grad
        error = max(error, (found - velocity).abs().max().item())
    assert error <= 1e-5

    RESULTS.mkdir(parents=True, exist_ok=True)
    result = {
        "pipeline": type(pipe).__name__,
        "scheduler": type(pipe.scheduler).__name__,
        "guidance": guidance_kind(pipe, call, off),
        "vae": type(pipe.vae).__name__ if getattr(pipe, "vae", None) is not None else "none",
        "pipeline_kwargs": extra,
        "round_trip": round_trip,
        "velocity_error": error,
        "diffusers": diffusers.__version__,
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")


@pytest.mark.parametrize("name", everyday(FAMILIES, TRAINED))
def test_it_is_trained_and_drawn(name, pair, infer, tmp_path, monkeypatch):
    """By the command line."""
    make, size, extra = FAMILIES[name]
    base = make(tmp_path / name)
    pipe = load(base)
    call = ask.call_arguments(pipe, "a red ring", size, size, None, extra)
    defaults = {"pretrained_model_name_or_path": base, "instance_image": pair, "output_dir": tmp_path / "output"}
    defaults |= as_flags(extra)
    moments = watch(monkeypatch.setattr)
    settings = {"resolution": size, "max_train_steps": 6, "learning_rate": 1e-2, "no-gradient_checkpointing": None}
    output = run_train(defaults, settings)
    assert moments["reading"] | moments["training"] <= {"base", "vae"} and moments["decoding"] <= {"vae"}
    lora = [item for phase in PHASES for item in load_file(output / phase / WEIGHT_NAME).items()]
    assert all(key.startswith(f"{denoiser_name(pipe.config)}.") for key, _ in lora)
    moved = [value.abs().max() > 1e-4 for key, value in lora if "lora_B" in key]
    assert len(moved) >= 4 and sum(moved) > 0.75 * len(moved)  # not experts that were not chosen
    preview = np.asarray(Image.open(output / "glance.png"))
    picture = np.asarray(Image.open(infer(base, lora=output)))
    plain = np.asarray(without_loras(pipe, call | {"prompt": "a blue ring"}, output))
    for image in (preview, picture):
        assert image.shape[:2] == (size, size) and image.std() > 0
    assert not np.array_equal(picture, plain)

    # By the lines of the model card, where they are of several kinds
    if name in ("cogview4", "kandinsky5", "ernie", "wan"):
        card = (output / "README.md").read_text()
        monkeypatch.chdir(tmp_path)
        exec(compile(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], "the card", "exec"), {})
        assert picture_distance(output / "glance.png", "out.png") <= 1
    elif name == "prx":
        assert "PRXPipeline of diffusers loads no LoRAs" in (output / "README.md").read_text()
    shutil.rmtree(tmp_path)
