"""Bad input: a one-line InputError that names what is wrong, exit code 2, and nothing written or overwritten."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, flags, run_train
from diffusers import DDPMScheduler
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_pipelines import make_flux

import command_line as cli
import glance_utils as glance
import infer_glance
import train_glance_lora


PHASES = ("slow", "fast")


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder, with the bytes of the files."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


def forge(source: Path, target: Path, **changes) -> Path:
    """A copy of a LoRA file with another recipe; None removes a key, recipe=None the whole of it."""
    with safe_open(source, framework="pt") as file:
        header = file.metadata()
    recipe = {**json.loads(header.pop("glance")), **changes}
    recipe = {key: value for key, value in recipe.items() if value is not None}
    if "recipe" not in changes:
        header["glance"] = json.dumps(recipe)
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file(load_file(source), target, metadata=header)
    return target


# --------------------------------------------------------------------------------------------------------------------
# Training


@pytest.fixture(scope="module")
def bad(tmp_path_factory, pipelines, pair):
    """A folder of things that cannot be used."""
    root = tmp_path_factory.mktemp("bad")
    for name in ("two", "none", "pair"):
        (root / name).mkdir()
    shutil.copy(pair, root / "two" / "a.png")
    shutil.copy(pair, root / "two" / "b.jpg")
    (root / "none" / "notes.txt").write_text("no image here")
    for name in ("uncaptioned", "empty", "latin1"):
        shutil.copy(pair, root / f"{name}.png")
    (root / "empty.txt").write_text(" \n")
    (root / "latin1.txt").write_bytes("Hündchen".encode("latin-1"))
    (root / "corrupt.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"x" * 500)
    (root / "truncated.png").write_bytes(pair.read_bytes()[:3000])
    (root / "text.png").write_text("this is not an image")
    for name in ("corrupt", "truncated", "text"):
        (root / f"{name}.txt").write_text("a caption")

    (root / "unknown.yaml").write_text("rnak: 4\n")
    (root / "list.yaml").write_text("- rank\n- 4\n")
    (root / "empty.yaml").write_text("")
    (root / "broken.yaml").write_text("rank: [4\nseed: {1: }}\n")
    (root / "broken.json").write_text('{"rank": 4,\n')
    (root / "word.yaml").write_text("rank: many\n")
    (root / "switch.yaml").write_text("gradient_checkpointing: 3\n")
    (root / "nested.yaml").write_text("rank: {value: 4}\n")
    (root / "itself.yaml").write_text(f"config: {root}/itself.yaml\n")
    (root / "backend.json").write_text('[{"resolution": 32}]')

    (root / "file").write_text("a regular file")
    (root / "nothing").mkdir()
    shutil.copytree(pipelines["flux"], root / "incomplete")
    shutil.rmtree(root / "incomplete" / "vae")
    shutil.copytree(pipelines["flux"], root / "broken-index")
    (root / "broken-index" / "model_index.json").write_text("{")
    (root / "unet").mkdir()
    index = {"_class_name": "DDPMPipeline", "_diffusers_version": "0.42.1", "unet": ["diffusers", "UNet2DModel"]}
    index["scheduler"] = ["diffusers", "DDPMScheduler"]
    (root / "unet" / "model_index.json").write_text(json.dumps(index))
    DDPMScheduler().save_pretrained(root / "unet" / "scheduler")
    (root / "checkpoint-9").mkdir()
    (root / "checkpoint-7").mkdir()
    torch.save({"weights": torch.ones(1)}, root / "checkpoint-7" / "training_state.pt")
    (root / "damaged" / "checkpoint-2").mkdir(parents=True)
    (root / "damaged" / "checkpoint-2" / "training_state.pt").write_bytes(b"not a checkpoint")
    return root


IMAGE = {"instance_image": None}  # take the default away
TRAINING = {
    # the image and its caption
    "no image source": (IMAGE, "--instance_image"),
    "two image sources": ({"instance_data_dir": "{bad}/pair"}, "instance_data_dir"),
    "image missing": ({"instance_image": "{bad}/nowhere.png"}, "nowhere.png"),
    "image is a folder": ({"instance_image": "{bad}/pair"}, "pair"),
    "two pairs in the folder": (IMAGE | {"instance_data_dir": "{bad}/two"}, "2 images"),
    "no image in the folder": (IMAGE | {"instance_data_dir": "{bad}/none"}, "0 images"),
    "image folder missing": (IMAGE | {"instance_data_dir": "{bad}/nowhere"}, "nowhere"),
    "caption missing": ({"instance_image": "{bad}/uncaptioned.png"}, "uncaptioned.txt"),
    "caption empty": ({"instance_image": "{bad}/empty.png"}, "caption is empty"),
    "prompt empty": ({"instance_prompt": " "}, "caption is empty"),
    "caption not UTF-8": ({"instance_image": "{bad}/latin1.png"}, "UTF-8"),
    "image corrupt": ({"instance_image": "{bad}/corrupt.png"}, "corrupt.png"),
    "image truncated": ({"instance_image": "{bad}/truncated.png"}, "truncated.png"),
    "image is text": ({"instance_image": "{bad}/text.png"}, "text.png"),
    "backend missing": (IMAGE | {"data_backend_config": "{bad}/nowhere.json"}, "nowhere.json"),
    "backend without a folder": (IMAGE | {"data_backend_config": "{bad}/backend.json"}, "image_dir"),
    "data set missing": (IMAGE | {"dataset_name": "{bad}/nowhere"}, "nowhere"),
    # the config
    "unknown key": ({"config": "{bad}/unknown.yaml"}, "'rnak'; did you mean 'rank'?"),
    "unknown flag": ({"rnak": 4}, "--rnak"),
    "config missing": ({"config": "{bad}/nowhere.yaml"}, "nowhere.yaml"),
    "config is a folder": ({"config": "{bad}/pair"}, "pair"),
    "config is a list": ({"config": "{bad}/list.yaml"}, "list"),
    "config is empty": ({"config": "{bad}/empty.yaml"}, "empty.yaml"),
    "config is broken YAML": ({"config": "{bad}/broken.yaml"}, "not valid YAML"),
    "config is broken JSON": ({"config": "{bad}/broken.json"}, "JSON"),
    "config is an image": ({"config": "{bad}/uncaptioned.png"}, "uncaptioned.png"),
    "word for a number": ({"config": "{bad}/word.yaml", "rank": None}, "'many'"),
    "number for a switch": ({"config": "{bad}/switch.yaml"}, "true or false"),
    "mapping for a number": ({"config": "{bad}/nested.yaml", "rank": None}, "rank"),
    "config in a config": ({"config": "{bad}/itself.yaml"}, "unknown key"),
    # the schedule
    "list empty": ({"flow_custom_timesteps": ""}, "empty"),
    "one list of two empty": ({"flow_custom_timesteps": "1000,900;"}, "empty"),
    "list mixed": ({"flow_custom_timesteps": "1000,0.9,0.8"}, "mixed"),
    "lists mixed": ({"flow_custom_timesteps": "1,0.9;800,700"}, "mixed"),
    "list ascending": ({"flow_custom_timesteps": "900,950,1000"}, "descending"),
    "list with a value twice": ({"flow_custom_timesteps": "1000,900,900"}, "descending"),
    "lists overlap": ({"flow_custom_timesteps": "1000,800;900,100"}, "descending"),
    "list above 1000": ({"flow_custom_timesteps": "1200,900"}, "out of range"),
    "list below 0": ({"flow_custom_timesteps": "900,-5"}, "out of range"),
    "list with nan": ({"flow_custom_timesteps": "1000,nan,900"}, "nan"),
    "list with inf": ({"flow_custom_timesteps": "inf,900"}, "inf"),
    "list of words": ({"flow_custom_timesteps": "high,low"}, "high"),
    "three lists": ({"flow_custom_timesteps": "1000;900;800"}, "3 lists"),
    "two lists, one phase": ({"flow_custom_timesteps": "1000,900;800,100", "phase": "slow"}, "--phase slow"),
    "one list, two phases": ({"flow_custom_timesteps": "1000,900", "phase": "both"}, "--phase both"),
    "too few base steps": ({"num_base_steps": 5}, "num_base_steps"),
    # the base
    "base missing": ({"pretrained_model_name_or_path": "{bad}/nowhere"}, "nowhere"),
    "base not on the hub": ({"pretrained_model_name_or_path": "nobody/nothing"}, "nobody/nothing"),
    "no base": ({"pretrained_model_name_or_path": None}, "--pretrained_model_name_or_path"),
    "base is no pipeline": ({"pretrained_model_name_or_path": "{bad}/nothing"}, "not a diffusers pipeline"),
    "base is a transformer": ({"pretrained_model_name_or_path": "{flux}/transformer"}, "not a diffusers pipeline"),
    "base is a file": ({"pretrained_model_name_or_path": "{bad}/file"}, "not a diffusers pipeline"),
    "base index broken": ({"pretrained_model_name_or_path": "{bad}/broken-index"}, "broken-index"),
    "base is no flow model": ({"pretrained_model_name_or_path": "{bad}/unet"}, "DDPMScheduler is not a flow-matching"),
    "base incomplete": ({"pretrained_model_name_or_path": "{bad}/incomplete"}, "incomplete"),
    # numbers and names
    "layers unknown": ({"lora_layers": "to_nothing"}, "to_nothing"),
    "rank 0": ({"rank": 0}, "rank"),
    "steps -1": ({"max_train_steps": -1}, "max_train_steps"),
    "learning rate nan": ({"learning_rate": "nan"}, "learning_rate"),
    "seed too large": ({"seed": 2**70}, "seed"),
    "precision unknown": ({"mixed_precision": "fp8"}, "fp8"),
    "hub out of reach": ({"push_to_hub": True}, "--push_to_hub output"),
    "tracker unknown": ({"report_to": "nobody"}, "nobody"),
    "tracker not installed": ({"report_to": "comet_ml"}, "pip install comet_ml"),
    "FLUX at 30 pixels": ({"resolution": 30}, "such as 28x28"),
    "SD3 at 30 pixels": ({"resolution": 30, "base": "sd3"}, "30"),
    "Qwen-Image at 36 pixels": ({"resolution": 36, "base": "qwen"}, "such as 32x32"),
    # further arguments of the pipeline
    "arguments not JSON": ({"pipeline_kwargs": "{"}, "pipeline_kwargs"),
    "arguments a list": ({"pipeline_kwargs": "[1]"}, "JSON object"),
    "argument unknown": ({"pipeline_kwargs": '{"colour": 1}'}, "'colour'"),
    "argument is ours": ({"pipeline_kwargs": '{"latents": 1}'}, "'latents'"),
    "argument is the batch": ({"pipeline_kwargs": '{"num_images_per_prompt": 2}'}, "'num_images_per_prompt'"),
    "argument is the callback": ({"pipeline_kwargs": '{"callback_on_step_end": 1}'}, "'callback_on_step_end'"),
    "argument has a flag": ({"pipeline_kwargs": '{"height": 64}'}, "'height'"),
    "argument of a wrong type": ({"pipeline_kwargs": '{"max_sequence_length": 9999}'}, "max_sequence_length"),
    # output and checkpoints
    "output below a file": ({"output_dir": "{bad}/file/output"}, "file/output"),
    "output is a file": ({"output_dir": "{bad}/file"}, "bad"),
    "nothing to resume": ({"resume_from_checkpoint": "latest"}, "latest"),
    "checkpoint without state": ({"resume_from_checkpoint": "{bad}/checkpoint-9"}, "checkpoint-9"),
    "checkpoint missing": ({"resume_from_checkpoint": "{bad}/checkpoint-8"}, "checkpoint-8"),
    "checkpoint damaged": ({"resume_from_checkpoint": "{bad}/damaged/checkpoint-2"}, "damaged"),
    "checkpoint of something else": ({"resume_from_checkpoint": "{bad}/checkpoint-7"}, "checkpoint-7"),
    "fast checkpoint, slow LoRA gone": ({"resume_from_checkpoint": "{fast_checkpoint}"}, "slow"),
    "checkpoint of another rank": ({"resume_from_checkpoint": "{checkpoint}", "rank": 2}, "rank"),
    "checkpoint of another seed": ({"resume_from_checkpoint": "{checkpoint}", "seed": 2}, "seed"),
    "checkpoint of another phase": ({"resume_from_checkpoint": "{checkpoint}", "phase": "fast"}, "slow"),
}


@pytest.fixture(scope="module")
def checkpoints(pipelines, pair, tmp_path_factory):
    """{"checkpoint": one of the slow phase, "fast_checkpoint": one of the fast phase of a run of both}"""
    output = tmp_path_factory.mktemp("checkpoints") / "output"
    base = {"pretrained_model_name_or_path": pipelines["flux"], "instance_image": pair, "output_dir": output}
    run_train(base, {"checkpointing_steps": 3})
    return {"checkpoint": output / "checkpoint-3", "fast_checkpoint": output / "checkpoint-8"}


def fill(settings: dict, **places) -> dict:
    """Replace {name} in a row's values by a path; braces of JSON stay."""
    for name, path in places.items():
        settings = {
            key: value.replace("{" + name + "}", str(path)) if isinstance(value, str) else value
            for key, value in settings.items()
        }
    return settings


def assert_one_line(error: pytest.ExceptionInfo, word: str):
    message = str(error.value)
    assert word in message
    assert "\n" not in message and "\r" not in message and 20 < len(message) < 1000


@pytest.mark.parametrize("row", TRAINING)
def test_training(row, train, bad, pipelines, request, tmp_path):
    settings, word = TRAINING[row]
    places = {"bad": bad, "flux": pipelines["flux"]}
    if "checkpoint}" in str(settings):
        places |= request.getfixturevalue("checkpoints")
    settings = fill(settings, **places)
    for phase in PHASES:
        (tmp_path / "output" / phase).mkdir(parents=True)
        (tmp_path / "output" / phase / glance.WEIGHT_NAME).write_bytes(b"a good LoRA")
    (tmp_path / "output" / "instance.png").write_bytes(b"a picture")
    before = snapshot(tmp_path), snapshot(bad)
    with pytest.raises(glance.InputError) as error:
        train(**settings)
    assert_one_line(error, word)
    assert (snapshot(tmp_path), snapshot(bad)) == before

    shutil.rmtree(tmp_path / "output")
    with pytest.raises(glance.InputError):
        train(**settings)
    assert (snapshot(tmp_path), snapshot(bad)) == ({}, before[1])


def test_a_file_in_the_place_of_a_phases_folder(train, tmp_path):
    """Better said at once than after an hour of training."""
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "fast").write_text("a file")
    with pytest.raises(glance.InputError) as error:
        train()
    assert_one_line(error, "fast")
    assert snapshot(tmp_path) == {"output": None, "output/fast": b"a file"}


# --------------------------------------------------------------------------------------------------------------------
# A run that diverges


@pytest.fixture(scope="module")
def nan_base(pipelines, tmp_path_factory):
    """FLUX with a NaN in its transformer's weights."""
    base = tmp_path_factory.mktemp("nan") / "flux"
    shutil.copytree(pipelines["flux"], base)
    path = base / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["proj_out.weight"][0, 0] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    return base


def test_a_loss_that_is_not_finite_ends_the_run(train, nan_base, tmp_path):
    for phase in PHASES:
        (tmp_path / "output" / phase).mkdir(parents=True)
        (tmp_path / "output" / phase / glance.WEIGHT_NAME).write_bytes(b"a good LoRA")
    with pytest.raises(FloatingPointError) as error:
        train(nan_base, flow_custom_timesteps="900;100", checkpointing_steps=1)
    assert_one_line(error, "step 1, timestep 900")
    assert "slow" in str(error.value) and "nan" in str(error.value)
    for phase in PHASES:
        folder = tmp_path / "output" / phase
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == {glance.WEIGHT_NAME: b"a good LoRA"}
    assert not list((tmp_path / "output").glob("*checkpoint-*"))


def test_a_later_divergence_names_its_step(train):
    with pytest.raises(FloatingPointError) as error:
        train(learning_rate=1e30, max_grad_norm=1e30, phase="fast", max_train_steps=8)
    assert_one_line(error, "fast")
    assert "step 1," not in str(error.value)


# --------------------------------------------------------------------------------------------------------------------
# Inference


@pytest.fixture(scope="module")
def loras(trained, tmp_path_factory):
    """A folder of LoRA pairs, each wrong in its own way; "good" is right."""
    root = tmp_path_factory.mktemp("loras")
    good = root / "good"
    for phase in PHASES:
        (good / phase).mkdir(parents=True)
        shutil.copy(trained("flux") / phase / glance.WEIGHT_NAME, good / phase)
        shutil.copytree(trained("sd3") / phase, root / "sd3" / phase)
    slow, fast = (good / phase / glance.WEIGHT_NAME for phase in PHASES)

    def wrong(name, **changes):
        forge(slow, root / name / "slow" / glance.WEIGHT_NAME, **changes)
        shutil.copytree(good / "fast", root / name / "fast")

    wrong("no recipe", recipe=None)
    wrong("phase x", phase="x")
    wrong("no phase", phase=None)
    wrong("ascending", timesteps=[900, 950, 1000])
    wrong("strings", timesteps=["high", "low"])
    wrong("no timesteps", timesteps=[])
    wrong("a number", timesteps=5)
    wrong("height -1", height=-1)
    wrong("huge width", width=10**9)
    wrong("height a string", height="32")
    wrong("base a number", base_model=5)
    wrong("no guidance key", guidance_scale=None)
    wrong("guidance a string", guidance_scale="high")
    wrong("no base steps", num_base_steps=None)
    wrong("base steps -1", num_base_steps=-1)
    wrong("arguments a list", pipeline_kwargs=[1])
    wrong("argument is ours", pipeline_kwargs={"latents": 1})
    wrong("another height", height=64)
    wrong("alpha")
    weights = load_file(slow)
    layer = next(name for name in weights if "lora_A" in name).removesuffix(".lora_A.weight")
    for phase in PHASES:  # as other trainers write them: no recipe, alpha beside the matrices
        path = root / "alpha" / phase / glance.WEIGHT_NAME
        save_file(load_file(good / phase / glance.WEIGHT_NAME) | {f"{layer}.alpha": torch.tensor(4.0)}, path)
    wrong("another base", base_model="somewhere/else")
    for phase in PHASES:
        forge(
            good / phase / glance.WEIGHT_NAME,
            root / "fine-tuned" / phase / glance.WEIGHT_NAME,
            base_model="nobody/another-model",
        )
    shutil.copytree(good / "slow", root / "unchained" / "slow")
    forge(fast, root / "unchained" / "fast" / glance.WEIGHT_NAME, timesteps=[950, 900, 300])

    for name, content in {
        "truncated": slow.read_bytes()[:-100],
        "text": b"not a safetensors file",
        "empty": b"",
    }.items():
        (root / name / "slow").mkdir(parents=True)
        (root / name / "slow" / glance.WEIGHT_NAME).write_bytes(content)
        shutil.copytree(good / "fast", root / name / "fast")
    shutil.copytree(good / "slow", root / "only-slow" / "slow")
    (root / "latin1.txt").write_bytes("Hündchen".encode("latin-1"))
    (root / "empty.txt").write_text("\n \n")
    (root / "file").write_text("a regular file")
    return root


def pair_in(name: str) -> dict:
    return {"lora": "{loras}/" + name}


NO_LORA = {"lora": None}
INFERENCE = {
    "no prompt": ({"prompt": None}, "--prompt"),
    "prompt empty": ({"prompt": " "}, "--prompt"),
    "prompts file missing": ({"prompt": None, "prompts_file": "{loras}/nowhere.txt"}, "nowhere.txt"),
    "prompts file not UTF-8": ({"prompt": None, "prompts_file": "{loras}/latin1.txt"}, "UTF-8"),
    "prompts file empty": ({"prompt": None, "prompts_file": "{loras}/empty.txt"}, "--prompt"),
    "no LoRA": (NO_LORA, "--lora"),
    "only slow": (NO_LORA | {"slow_lora": "{loras}/good/slow"}, "--fast_lora"),
    "only fast": (NO_LORA | {"fast_lora": "{loras}/good/fast"}, "--slow_lora"),
    "folder and pair": ({"slow_lora": "{loras}/good/slow", "fast_lora": "{loras}/good/fast"}, "--lora"),
    "LoRA missing": (pair_in("nowhere"), "nowhere"),
    "fast LoRA missing": (pair_in("only-slow"), "fast"),
    "LoRA truncated": (pair_in("truncated"), "truncated"),
    "LoRA is text": (pair_in("text"), "safetensors"),
    "LoRA is empty": (pair_in("empty"), "safetensors"),
    "one with a recipe, one without": (pair_in("no recipe"), "no recipe"),
    "LoRA with alpha": (pair_in("alpha"), ".alpha"),
    "weight name missing": ({"slow_weight_name": "other.safetensors"}, "other.safetensors"),
    "LoRA not on the hub": ({"lora": "nobody/nothing"}, "nobody/nothing"),
    "one list": ({"flow_custom_timesteps": "1000,900"}, "one list"),
    "lists ascending": ({"flow_custom_timesteps": "1000,900;950,100"}, "descending"),
    "scale of three": ({"lora_scale": "1,2,3"}, "'1,2,3'"),
    "scale nan": ({"lora_scale": "nan"}, "'nan'"),
    "recipe: phase x": (pair_in("phase x"), "'x'"),
    "recipe: no phase": (pair_in("no phase"), "phase"),
    "recipe: timesteps ascending": (pair_in("ascending"), "descending"),
    "recipe: timesteps strings": (pair_in("strings"), "high"),
    "recipe: no timesteps": (pair_in("no timesteps"), "empty"),
    "recipe: timesteps a number": (pair_in("a number"), "recipe"),
    "recipe: height -1": (pair_in("height -1"), "height -1"),
    "recipe: width huge": (pair_in("huge width"), "width"),
    "recipe: height a string": (pair_in("height a string"), "height"),
    "recipe: base a number": (pair_in("base a number"), "base_model"),
    "recipe: no guidance": (pair_in("no guidance key"), "guidance_scale"),
    "recipe: guidance a string": (pair_in("guidance a string"), "guidance_scale"),
    "recipe: no base steps": (pair_in("no base steps") | {"compare": True}, "num_base_steps"),
    "recipe: base steps -1": (pair_in("base steps -1") | {"compare": True}, "num_base_steps"),
    "recipe: arguments a list": (pair_in("arguments a list"), "pipeline_kwargs"),
    "recipe: argument is ours": (pair_in("argument is ours"), "latents"),
    "swapped": (NO_LORA | {"slow_lora": "{loras}/good/fast", "fast_lora": "{loras}/good/slow"}, "trained as the fast"),
    "unchained": (pair_in("unchained"), "does not chain"),
    "pair of two heights": (pair_in("another height"), "height"),
    "pair of two bases": (pair_in("another base"), "base_model"),
    "another base by name": (pair_in("fine-tuned"), "nobody/another-model"),
    "another architecture": (pair_in("sd3"), "StableDiffusion3Pipeline"),
    "another architecture, allowed": (pair_in("sd3") | {"allow_base_mismatch": True}, "StableDiffusion3Pipeline"),
    "same name, other widths": ({"base": "{wide}"}, "width"),
    "same name, fewer blocks": ({"base": "{short}"}, "transformer_blocks"),
    "base missing": ({"base": "{loras}/flux"}, "not a diffusers pipeline"),
    "no base": ({"pretrained_model_name_or_path": None}, "--pretrained_model_name_or_path"),
    "output below a file": ({"output": "{loras}/file/out.png"}, "file"),
    "output is no picture": ({"output": "{tmp}/out.xyz"}, "out.xyz"),
    "output has no extension": ({"output": "{tmp}/out"}, "out"),
    "output of a kind Pillow only reads": ({"output": "{tmp}/out.psd"}, "out.psd"),
    "output is a folder": ({"output": "{tmp}/folder.png"}, "folder.png"),
    "argument unknown": ({"pipeline_kwargs": '{"colour": 1}'}, "'colour'"),
    "argument is ours": ({"pipeline_kwargs": '{"sigmas": [1]}'}, "'sigmas'"),
    "no images": ({"num_images": 0}, "num_images"),
    "seed too large": ({"seed": 2**70}, "seed"),
    "height 30": ({"base": "{sd3}", "lora": "{loras}/sd3", "height": 30}, "30"),
    "sequential offload without an accelerator": (
        {"enable_sequential_cpu_offload": True},
        "enable_sequential_cpu_offload",
    ),
}


@pytest.fixture(scope="module")
def other_flux(tmp_path_factory):
    """Bases named flux as the good one, with wider layers and with other blocks."""
    root = tmp_path_factory.mktemp("other")
    return {
        "wide": make_flux(root / "wide" / "flux", num_attention_heads=4),
        "short": make_flux(root / "short" / "flux", num_layers=0, num_single_layers=1),
    }


@pytest.mark.parametrize("row", INFERENCE)
def test_inference(row, infer, loras, other_flux, pipelines, tmp_path):
    settings, word = INFERENCE[row]
    settings = fill({"lora": "{loras}/good"} | settings, loras=loras, tmp=tmp_path, sd3=pipelines["sd3"], **other_flux)
    if torch.cuda.is_available() and "offload" in row:
        pytest.skip("there is an accelerator")
    (tmp_path / "out.png").write_bytes(b"a picture")
    (tmp_path / "folder.png").mkdir()
    before = snapshot(tmp_path), snapshot(loras)
    with pytest.raises(glance.InputError) as error:
        infer(**settings)
    assert_one_line(error, word)
    assert (snapshot(tmp_path), snapshot(loras)) == before


def test_the_good_pair_is_good(infer, loras):
    """Else the table above would prove little."""
    assert Image.open(infer(lora=loras / "good")).size == (32, 32)


# --------------------------------------------------------------------------------------------------------------------
# The command line


@pytest.mark.parametrize(
    "script, arguments, word",
    [
        ("train_glance_lora.py", {"pretrained_model_name_or_path": "{bad}/nothing"}, "not a diffusers pipeline"),
        ("infer_glance.py", {"prompt": "a dog", "lora": "{bad}/nowhere"}, "no such slow LoRA"),
    ],
)
def test_exit_code_and_last_line(script, arguments, word, bad, pair, pipelines, tmp_path):
    if script.startswith("train"):
        arguments = arguments | {"instance_image": pair, "output_dir": tmp_path / "output"}
    else:
        arguments = {"pretrained_model_name_or_path": pipelines["flux"], "output": tmp_path / "out.png"} | arguments
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *flags(**fill(arguments, bad=bad))],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"{script}: error: ") and word in last
    assert "Traceback" not in done.stderr and done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_a_diverged_run_ends_with_exit_code_1(nan_base, pair, tmp_path, monkeypatch, capsys):
    arguments = flags(
        pretrained_model_name_or_path=nan_base,
        instance_image=pair,
        output_dir=tmp_path / "output",
        resolution=32,
        rank=4,
    )
    monkeypatch.setattr(sys, "argv", ["somewhere/train_glance_lora.py", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.run(train_glance_lora.main)
    assert end.value.code == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("train_glance_lora.py: error: ") and "timestep" in last


@pytest.mark.parametrize("module", [train_glance_lora, infer_glance])
def test_help_lists_every_flag(module, capsys):
    with pytest.raises(SystemExit) as end:
        module.parse_args(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "--pretrained_model_name_or_path" in text and "--pipeline_kwargs" in text
