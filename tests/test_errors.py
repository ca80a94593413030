"""Bad input: a one-line InputError that names what is wrong, exit code 2, and nothing written or overwritten."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, flags, run_train
from diffusers import DDPMScheduler
from PIL import Image, PngImagePlugin
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_pipelines import make_flux

import command_line as cli
import glance_utils as glance
import infer_glance
import train_glance_lora


PHASES = ("slow", "fast")
STATE = "training_state.pt"


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
    write_bad_texts(root)
    write_bad_images(root)

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
    write_bad_bases(root, pipelines["flux"])
    settings = {"phase": "slow"}
    for name, state in {"hollow": {}, "list": [1], "half": {"settings": settings}, "stepless": None}.items():
        (root / name).mkdir()
        parts = dict.fromkeys(("optimizer", "lr_scheduler", "lora", "generator"), {})
        torch.save(parts | {"settings": settings, "step": "x"} if state is None else state, root / name / STATE)
    (root / "code").mkdir()
    torch.save(Payload(root / "run"), root / "code" / STATE)
    (root / "damaged" / "checkpoint-2").mkdir(parents=True)
    (root / "damaged" / "checkpoint-2" / "training_state.pt").write_bytes(b"not a checkpoint")
    return root


def write_bad_texts(root: Path) -> None:
    """Config files and captions, each wrong in its own way."""
    bomb = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi"))
    configs = {
        "bomb.yaml": bomb,
        "deep.yaml": "rank: " + "[" * 2000,
        "deep.json": '{"rank":' + "[" * 9000,
        "tag.yaml": "rank: !!python/object/apply:os.system ['true']",
        "digits.yaml": "rank: " + "9" * 5000,
        "digits.json": '{"rank": ' + "9" * 5000 + "}",
        "infinite.yaml": "learning_rate: .inf",
        "date.yaml": "rank: 2020-01-01",
        "two.yaml": "rank: 4\n---\nrank: 5",
        "tabs.yaml": "rank:\n\t4",
        "number.json": "4",
        "null.json": "null",
        "nan.json": '{"learning_rate": NaN}',
        "null key.yaml": "null: 4",
        "list.json": '{"rank": [1, 2]}',
        "long key.yaml": "a" * 900 + ": 4",
        "zero.yaml": 'output_dir: "a\\0b"',
        "large.yaml": "# " + "x" * 20_000,
        "token.yaml": "hub_token: hf_secret",
        "binary.yaml": "rank: \x00\x01",
    }
    for name, text in configs.items():
        (root / name).write_text(text)
    (root / "latin1.yaml").write_bytes("instance_prompt: Hündchen".encode("latin-1"))
    backends = {"number": 5, "empty": [], "folder": [{"image_dir": 5}], "huge": {"image_dir": "x", "resolution": 1e9}}
    backends |= {"suffix": {"image_dir": "x", "caption_extension": 5}, "word": {"image_dir": "x", "resolution": "big"}}
    for name, backend in backends.items():
        (root / f"backend-{name}.json").write_text(json.dumps(backend))
    captions = {"megabyte": b"a" * 2**20, "binary": bytes(range(256)), "zeros": b"\0" * 10, "bell": b"a \x07 bell"}
    captions |= {"utf16": "a dog".encode("utf-16"), "utf16 without mark": "a dog".encode("utf-16-le")}
    captions |= {"escape": b"a \x1b[31mred\x1b[0m ring", "mark alone": "\ufeff".encode(), "lines": b"\r\n\r\n"}
    for name, text in captions.items():
        shutil.copy(root / "uncaptioned.png", root / f"caption {name}.png")
        (root / f"caption {name}.txt").write_bytes(text)
    shutil.copy(root / "uncaptioned.png", root / "caption folder.png")
    (root / "caption folder.txt").mkdir()


def write_bad_images(root: Path) -> None:
    images = root / "images"
    images.mkdir()
    Image.new("1", (30_000, 30_000)).save(images / "bomb.png")
    Image.new("L", (30_000, 1)).save(images / "wide.png")
    Image.new("L", (1, 30_000)).save(images / "high.png")
    Image.new("L", (1, 1)).save(images / "pixel.png")
    with Image.open(root / "uncaptioned.png") as good:
        good.save(images / "program.png", format="EPS")
        for suffix in ("jpg", "webp", "gif"):
            good.save(images / f"whole.{suffix}")
            content = (images / f"whole.{suffix}").read_bytes()
            (images / f"truncated.{suffix}").write_bytes(content[: len(content) // 2])
            (images / f"whole.{suffix}").unlink()
        text = PngImagePlugin.PngInfo()
        text.add_text("bomb", "x" * 20_000_000, zip=True)
        good.save(images / "text bomb.png", pnginfo=text)
        good.save(images / "good.png")
    content = (images / "good.png").read_bytes()
    (images / "good.png").unlink()
    (images / "checksum.png").write_bytes(content[:20] + b"\x01" + content[21:])
    (images / "head.png").write_bytes(content[:33])
    (images / "empty.png").write_bytes(b"")
    (images / "vector.png").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (images / "pickle.png").write_bytes(pickle.dumps(Payload(root / "run")))


def write_bad_bases(root: Path, flux: Path) -> None:
    """Copies of a good base: weights as pickles with code, a component's class from anywhere, broken files."""
    for name in ("outsider", "pickled", "pickled-encoder", "cut", "config-list", "index-list"):
        shutil.copytree(flux, root / name)
    index = json.loads((flux / "model_index.json").read_text())
    (root / "outsider" / "model_index.json").write_text(json.dumps(index | {"transformer": ["antigravity", "Flux"]}))
    for name, part, kind in (
        ("pickled", "transformer", "diffusion_pytorch_"),
        ("pickled-encoder", "text_encoder", ""),
    ):
        for path in (root / name / part).glob("*.safetensors"):
            path.unlink()
        weights = "diffusion_pytorch_model.bin" if kind else "pytorch_model.bin"
        torch.save(Payload(root / "run"), root / name / part / weights)
    for path in (root / "cut" / "transformer").glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-100])
    (root / "config-list" / "transformer" / "config.json").write_text("[1]")
    (root / "index-list" / "model_index.json").write_text("[1]")


class Payload:
    """Unpickled, it creates a file: code that a pickle carries."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


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
    "checkpoint with code": ({"resume_from_checkpoint": "{bad}/code"}, "damaged"),
    "checkpoint empty": ({"resume_from_checkpoint": "{bad}/hollow"}, "damaged"),
    "checkpoint half": ({"resume_from_checkpoint": "{bad}/half"}, "damaged"),
    "checkpoint is a list": ({"resume_from_checkpoint": "{bad}/list"}, "damaged"),
    "checkpoint of no step": ({"resume_from_checkpoint": "{bad}/stepless"}, "damaged"),
    "checkpoint is a file": ({"resume_from_checkpoint": "{bad}/file"}, "no training_state.pt"),
    "checkpoint is text": ({"resume_from_checkpoint": "x" * 400}, "damaged"),
    "checkpoint of another model": ({"resume_from_checkpoint": "{checkpoint}", "base": "sd3"}, "base_model"),
    "checkpoint of another phase": ({"resume_from_checkpoint": "{checkpoint}", "phase": "fast"}, "slow"),
}


# One flag or file each, wrong before any model is loaded.
for name, word in {
    **{f"{name}.yaml": "not valid YAML" for name in ("bomb", "deep", "tag", "digits", "two", "tabs")},
    **{"deep.json": "not valid", "digits.json": "not valid", "infinite.yaml": "inf", "date.yaml": "rank"},
    **{"number.json": "int", "null.json": "NoneType", "nan.json": "nan", "null key.yaml": "None"},
    **{"long key.yaml": "unknown key", "list.json": "'1,2'", "large.yaml": "10000", "binary.yaml": "no text"},
    **{"latin1.yaml": "UTF-8", "zero.yaml": "\\x00", "token.yaml": "HF_TOKEN"},
}.items():
    TRAINING[f"config {name}"] = ({"config": "{bad}/" + name, "rank": None, "output_dir": None}, word)
for name, word in {
    **{"number": "TypeError", "empty": "IndexError", "folder": "image_dir", "huge": "resolution"},
    **{"suffix": "caption_extension", "word": "resolution"},
}.items():
    TRAINING[f"backend {name}"] = (IMAGE | {"data_backend_config": "{bad}/backend-" + name + ".json"}, word)
for name, word in {
    **{"megabyte": "more than 10000", "binary": "UTF-8", "zeros": "\\x00", "bell": "\\x07", "utf16": "UTF-8"},
    **{"utf16 without mark": "\\x00", "escape": "\\x1b", "mark alone": "empty", "lines": "empty", "folder": "read"},
}.items():
    TRAINING[f"caption {name}"] = ({"instance_image": "{bad}/caption " + name + ".png"}, word)
for name, word in {
    **{"bomb.png": "900000000 pixels", "wide.png": "30000x1", "high.png": "1x30000", "pixel.png": "1x1"},
    **{"program.png": "identify", "text bomb.png": "too large", "checksum.png": "checksum", "head.png": "head"},
    **{"empty.png": "identify", "vector.png": "identify", "pickle.png": "identify", "truncated.jpg": "truncated"},
    **{"truncated.webp": "truncated.webp", "truncated.gif": "truncated.gif"},
}.items():
    TRAINING[f"image {name}"] = ({"instance_image": "{bad}/images/" + name, "instance_prompt": "x"}, word)
for name, value in {
    **{"rank": 10**9, "max_train_steps": 10**12, "train_batch_size": 10**9, "num_base_steps": 10**9, "height": 10**9},
    **{"guidance_scale": "nan", "adam_weight_decay": "inf", "lr_warmup_steps": -1, "lora_alpha": "inf"},
    **{"gradient_accumulation_steps": 1.5, "max_grad_norm": -1, "seed": "0x10", "lr_scheduler": "magic"},
    **{"quantization": "int2", "flow_timesteps_mode": "sorted", "phase": "medium", "model_type": "full"},
    **{"timesteps_per_step": 0, "checkpointing_steps": 0, "checkpoints_total_limit": "all", "resolution": "1e3"},
    **{"learning_rate": 0, "width": -8, "instance_prompt": "a\x00b", "pipeline_kwargs": '{"x":' + "[" * 9000},
    **{"output_dir": "x" * 300, "dataset_index": "first"},
}.items():
    TRAINING[f"{name} {str(value)[:9]!r}"] = ({name: value}, name.split("_")[0])
TRAINING |= {
    "prompt of a megabyte": ({"instance_prompt": "a" * 2**17}, "instance_prompt"),
    "prompt of half a letter": ({"instance_prompt": "\udcff"}, "instance_prompt"),
    "image's name too long": ({"instance_image": "x" * 300}, "no such image"),
    "data folder's name too long": (IMAGE | {"instance_data_dir": "x" * 300}, "x"),
    "a token": ({"hub_token": "hf_secret"}, "HF_TOKEN"),
    "base with code for a transformer": ({"base": "{bad}/outsider"}, "outsider"),
    "base's weights a pickle": ({"base": "{bad}/pickled"}, "pickled"),
    "base's encoder a pickle": ({"base": "{bad}/pickled-encoder"}, "pickled-encoder"),
    "base's transformer truncated": ({"base": "{bad}/cut"}, "cut"),
    "base's config a list": ({"base": "{bad}/config-list"}, "config-list"),
    "base's index a list": ({"base": "{bad}/index-list"}, "index-list"),
    "base's name too long": ({"base": "x" * 300}, "x"),
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


def nested(depth: int) -> list:
    value = []
    for _ in range(depth):
        value = [value]
    return value


# Every entry of a recipe with other types, huge and nested values; None is written as null by "null" below.
LONG, CODE = "x" * 100_000, "__import__('os').mkdir('run')"
FORGED = {
    f"{key} {number}": (key, value)
    for key, values in {
        "phase": (True, ["slow"], {"slow": 1}, LONG, CODE),
        "timesteps": (CODE, {"1000": 1}, [[1000]], [True], ["900"], [1e999], [10**400], list(range(10**4, 0, -1))),
        "base_model": (["flux"], "", LONG, "flux\nTraceback", "\x1b[31mflux", {"flux": CODE}),
        "pipeline": (7, ["FluxPipeline"], LONG, "Flux\rPipeline", CODE),
        "height": (True, 32.0, "32", [32], 10**400, 0, CODE),
        "width": (True, 32.5, 20_000, nested(50), -(10**9)),
        "guidance_scale": (True, [3.5], float("nan"), float("inf"), 1e300, CODE),
        "pipeline_kwargs": ("{}", 3, True, nested(50), CODE),
        "num_base_steps": (10**9, 50.0, "50", True, [50]),
        "loss": (5, [CODE], LONG),
        "max_train_steps": ("60", -1, 10**12, True),
        "rank": ("4", 0, 2.5, True, nested(50), 10**9),
        "version": (1, LONG, ["0.1"]),
    }.items()
    for number, value in enumerate(values)
}


def write_bad_weights(root: Path, good: Path) -> None:
    """LoRA files whose tensors or header are wrong, each in root/weights NAME/slow."""

    def write(name: str, change=lambda weights: None, cut=lambda content: content, **header):
        weights, path = load_file(good), root / f"weights {name}" / "slow" / glance.WEIGHT_NAME
        change(weights)
        with safe_open(good, framework="pt") as file:
            header = file.metadata() | header
        path.parent.mkdir(parents=True)
        save_file({key: value.contiguous() for key, value in weights.items()}, path, metadata=header)
        path.write_bytes(cut(path.read_bytes()))

    down = next(key for key in load_file(good) if "lora_A" in key)
    up = down.replace("lora_A", "lora_B")
    write("nan", lambda weights: weights[up].__setitem__((0, 0), float("nan")))
    write("inf", lambda weights: weights[down].__setitem__((0, 0), float("inf")))
    write("other rank", lambda weights: weights.update({up: weights[up][:, :2]}))
    write("no up", lambda weights: weights.pop(up))
    write("no down", lambda weights: weights.pop(down))
    write("one dimension", lambda weights: weights.update({down: weights[down].flatten()}))
    write("no dimension", lambda weights: weights.update({up: torch.tensor(1.0)}))
    write("rank 0", lambda weights: weights.update({down: weights[down][:0], up: weights[up][:, :0]}))
    write("integers", lambda weights: weights.update({up: weights[up].int()}))
    write("transposed", lambda weights: weights.update({up: weights[up].T}))
    write("whole layer", lambda weights: weights.update({down.split(".lora_A")[0]: torch.ones(2)}))
    write("unknown layer", lambda weights: weights.update({"transformer.nothing.lora_A.weight": torch.ones(4, 32)}))
    write("two lines", lambda weights: weights.update({"a\nb.lora_A.weight": torch.ones(4, 32)}))
    write("unknown part", lambda weights: weights.update({down.replace("lora_A", "lora_C"): torch.ones(4, 32)}))
    write("nothing", lambda weights: weights.clear())
    write("recipe a list", glance="[1]")
    write("recipe null", glance="null")
    write("recipe no JSON", glance=CODE)
    write("recipe deep", glance="[" * 100_000)
    write("config code", lora_adapter_metadata=json.dumps({"transformer.megatron_core": "antigravity"}))
    write("config rank", lora_adapter_metadata=json.dumps({"transformer.r": 10**9}))
    write("config alpha", lora_adapter_metadata='{"transformer.lora_alpha": NaN}')
    write("config unknown", lora_adapter_metadata='{"transformer.colour": "red"}')
    write("config a list", lora_adapter_metadata="[1]")
    write("header cut", cut=lambda content: content[:100])
    write("length cut", cut=lambda content: content[:5])
    write("header of 100 MB", cut=lambda content: (10**8).to_bytes(8, "little") + b"{" + content[9:])
    write("header endless", cut=lambda content: b"\xff" * 8 + content[8:])
    write("header binary", cut=lambda content: content[:8] + bytes(range(200)) + content[208:])
    write("more than said", cut=lambda content: content + b"x" * 100)
    write("pickle", cut=lambda content: pickle.dumps(Payload(root / "run")))
    write("torch", cut=lambda content: content)
    torch.save(Payload(root / "run"), root / "weights torch" / "slow" / glance.WEIGHT_NAME)
    torch.save(Payload(root / "run"), root / "code.bin")


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
    for name, (key, value) in FORGED.items():
        wrong(name, **{key: value})
    write_bad_weights(root, slow)
    for path in root.glob("weights */slow"):
        shutil.copytree(good / "fast", path.parent / "fast")
    (root / "latin1.txt").write_bytes("Hündchen".encode("latin-1"))
    (root / "large.txt").write_text("a dog\n" * 200_000)
    (root / "line.txt").write_text("a dog " * 2000)
    (root / "binary.txt").write_bytes(b"a dog\n\0\1\n")
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


INFERENCE |= {f"recipe: {name}": (pair_in(name), key) for name, (key, _) in FORGED.items()}
for name, word in {
    **{"nan": "finite", "inf": "finite", "other rank": "rank 4", "no up": "None", "no down": "None"},
    **{"one dimension": "shape", "no dimension": "shape", "rank 0": "shape", "integers": "finite"},
    **{"transposed": "width", "whole layer": "shape", "unknown layer": "nothing", "two lines": "\\n"},
    **{"unknown part": "lora_C", "nothing": "no LoRA", "recipe a list": "recipe", "recipe null": "recipe"},
    **{"recipe no JSON": "recipe", "recipe deep": "recipe", "config code": "megatron_core", "config rank": "'r'"},
    **{"config alpha": "lora_alpha", "config unknown": "colour", "config a list": "lora_adapter_metadata"},
    **dict.fromkeys(("header cut", "length cut", "header of 100 MB", "header endless"), "safetensors"),
    **dict.fromkeys(("header binary", "more than said", "pickle", "torch"), "safetensors"),
}.items():
    INFERENCE[f"weights: {name}"] = (pair_in(f"weights {name}"), word)
INFERENCE |= {
    "weight name of a pickle": ({"slow_weight_name": "../code.bin"}, "only .safetensors"),
    "LoRA a pickle": (
        NO_LORA | {"slow_lora": "{loras}/code.bin", "fast_lora": "{loras}/good/fast"},
        "only .safetensors",
    ),
    "LoRA's name too long": (pair_in("x" * 300), "xxx"),
    "prompts file of a megabyte": ({"prompt": None, "prompts_file": "{loras}/large.txt"}, "1000000"),
    "prompts file with an endless line": ({"prompt": None, "prompts_file": "{loras}/line.txt"}, "12000 characters"),
    "prompts file binary": ({"prompt": None, "prompts_file": "{loras}/binary.txt"}, "no text"),
    "prompts file a folder": ({"prompt": None, "prompts_file": "{loras}"}, "cannot be read"),
    "prompt of a megabyte": ({"prompt": "a" * 2**17}, "--prompt"),
    "prompt of half a letter": ({"prompt": "\udcff"}, "--prompt"),
    "height huge": ({"height": 10**9}, "height"),
    "guidance nan": ({"guidance_scale": "nan"}, "guidance_scale"),
    "images a billion": ({"num_images": 10**9}, "num_images"),
    "dtype unknown": ({"dtype": "float8"}, "float8"),
    "two offloads": ({"enable_model_cpu_offload": True, "enable_group_offload": True}, "exclude each other"),
    "a token": ({"token": "hf_secret"}, "HF_TOKEN"),
    "unknown flag": ({"promt": "a dog"}, "'prompt'"),
    "config missing": ({"config": "{loras}/nowhere.yaml"}, "nowhere.yaml"),
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
