"""Bad input: a one-line InputError that names what is wrong, exit code 2, and nothing written or overwritten."""

import contextlib
import io
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
from safetensors.torch import load_file, save_file

import infer_glance
import train_glance_lora
from glance import command_line as cli
from glance.files.recipe import WEIGHT_NAME
from glance_utils import InputError


pytestmark = pytest.mark.forged
PHASES = ("slow", "fast")
STATE = "training_state.pt"


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder, with the bytes of the files."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


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
        "twice.yaml": "rank: 4\nseed: 0\nrank: 5",
        "twice.json": '{"rank": 4, "rank": 4}',
        "twice below.yaml": "pipeline_kwargs: {true_cfg_scale: 1, true_cfg_scale: 2}",
        "twice below.json": '{"pipeline_kwargs": {"true_cfg_scale": 1, "true_cfg_scale": 2}}',
        "dashes.yaml": "rank: 4\n--rank: 4",
        "alias.json": '{"rank": 4, "--lora_rank": 5}',
        "list as key.yaml": "? [1]\n: 2",
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
    # what is learned
    "prompts with the flow loss": ({"prompts_file": "x.txt"}, "--prompts_file belongs to the trajectory loss"),
    "flow weight with the flow loss": ({"flow_weight": 0.5}, "--flow_weight belongs to the trajectory loss"),
    "weights with the flow loss": ({"segment_weights": "length"}, "--segment_weights belongs to the trajectory loss"),
    "seeds with the flow loss": ({"num_trajectories": 8}, "--num_trajectories belongs to the trajectory loss"),
    "list with the trajectory loss": (
        {"loss": "trajectory", "flow_custom_timesteps": "1000,900;500,100"},
        "the model's own schedule",
    ),
    "prompts missing": ({"loss": "trajectory", "prompts_file": "{bad}/nowhere.txt"}, "nowhere.txt: cannot be read"),
    "prompts empty": ({"loss": "trajectory", "prompts_file": "{bad}/empty.txt"}, "holds no prompt"),
    "prompts not UTF-8": ({"loss": "trajectory", "prompts_file": "{bad}/latin1.txt"}, "UTF-8"),
    "list for the fitted solver": (
        {"solver": "fitted", "flow_custom_timesteps": "1000,900;500,100"},
        "--solver fitted is fitted to steps of the model's own",
    ),
    "a single step": ({"num_inference_steps": 1}, "--num_inference_steps 1 leaves the fast phase no step"),
    "flow weight negative": ({"loss": "trajectory", "flow_weight": -1}, "--flow_weight"),
    "no such loss": ({"loss": "mse"}, "--loss"),
    "no such guidance": ({"guidance": "half"}, "--guidance"),
    "no such solver": ({"solver": "heun"}, "--solver"),
    "no trajectories": ({"loss": "trajectory", "num_trajectories": 0}, "--num_trajectories"),
    "flow weight not finite": ({"loss": "trajectory", "flow_weight": "nan"}, "--flow_weight"),
    # the config
    "unknown key": ({"config": "{bad}/unknown.yaml"}, "'rnak': did you mean 'rank'?"),
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
    "guidance has a flag": ({"pipeline_kwargs": '{"guidance_scale": 2}'}, "give --guidance_scale"),
    "argument of a wrong type": ({"pipeline_kwargs": '{"max_sequence_length": 9999}'}, "max_sequence_length"),
    # output and checkpoints
    "output below a file": ({"output_dir": "{bad}/file/output"}, "file/output"),
    "output is a file": ({"output_dir": "{bad}/file"}, "bad"),
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
for name, word in {
    **{"short": "its LoRA lacks ", "long": "'to_nothing.lora_A.weight', which this run", "listed": "of type list"},
    **{"narrow": "this run's is (torch.float32, ", "half": "(torch.float16, ", "word": "('str',)"},
    **{"nan": "not finite"},
}.items():
    TRAINING[f"checkpoint's LoRA {name}"] = ({"resume_from_checkpoint": "{" + name + "_checkpoint}"}, word)


# One flag or file each, wrong before any model is loaded.
for name, word in {
    **{f"{name}.yaml": "not valid YAML" for name in ("bomb", "deep", "tag", "digits", "two", "tabs")},
    **{"deep.json": "not valid", "digits.json": "not valid", "infinite.yaml": "inf", "date.yaml": "rank"},
    **{"number.json": "int", "null.json": "NoneType", "nan.json": "NaN", "null key.yaml": "None"},
    **{"long key.yaml": "unknown key", "list.json": "'1,2'", "large.yaml": "10000", "binary.yaml": "no text"},
    **{"twice.yaml": "'rank' is there twice", "twice.json": "'rank' is there twice", "list as key.yaml": "not valid"},
    **{"twice below.yaml": "'true_cfg_scale'", "twice below.json": "'true_cfg_scale'"},
    **{"dashes.yaml": "--rank is there twice", "alias.json": "--lora_rank is there twice"},
    **{"latin1.yaml": "UTF-8", "zero.yaml": "\\x00", "token.yaml": "HF_TOKEN"},
}.items():
    TRAINING[f"config {name}"] = ({"config": "{bad}/" + name, "rank": None, "output_dir": None}, word)
for name, word in {
    **{"number": "found int", "empty": "0 enabled", "folder": "image_dir", "huge": "resolution"},
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
    """{"checkpoint": one of the slow phase, "fast_checkpoint": one of the fast phase of a run of both, and others of
    the slow phase with another LoRA in them}"""
    output = tmp_path_factory.mktemp("checkpoints") / "output"
    base = {"pretrained_model_name_or_path": pipelines["flux"], "instance_image": pair, "output_dir": output}
    with contextlib.redirect_stdout(io.StringIO()):  # a test looks at what its own calls print
        run_train(base, {"checkpointing_steps": 3})
    places = {"checkpoint": output / "checkpoint-3", "fast_checkpoint": output / "checkpoint-8"}
    state = torch.load(places["checkpoint"] / STATE, weights_only=True)
    first, *_, last = state["lora"]
    others = {
        "short": {name: value for name, value in state["lora"].items() if name != last},
        "long": state["lora"] | {"to_nothing.lora_A.weight": torch.ones(4, 4)},
        "narrow": state["lora"] | {last: state["lora"][last][:, :-1]},
        "half": {name: value.half() for name, value in state["lora"].items()},
        "word": state["lora"] | {first: "x"},
        "nan": state["lora"] | {last: state["lora"][last] * float("nan")},
        "listed": list(state["lora"].values()),
    }
    for name, lora in others.items():
        places[f"{name}_checkpoint"] = output.parent / name
        places[f"{name}_checkpoint"].mkdir()
        torch.save(state | {"lora": lora}, places[f"{name}_checkpoint"] / STATE)
    return places


def fill(settings: dict, **places) -> dict:
    """Replace {name} in a row's values by a path; braces of JSON stay."""
    for name, path in places.items():
        settings = {
            key: value.replace("{" + name + "}", str(path)) if isinstance(value, str) else value
            for key, value in settings.items()
        }
    return settings


def check_message(message: str, word: str):
    assert word in message
    assert "\n" not in message and "\r" not in message and 20 < len(message) < 1000


def assert_one_line(error: pytest.ExceptionInfo, word: str):
    check_message(str(error.value), word)


def assert_refused(capsys, word: str, call, **settings):
    """As the script would: the reason is the last line, the exit code 2, and no traceback."""
    with pytest.raises(SystemExit) as end:
        cli.run(lambda: call(**settings))
    written = capsys.readouterr()
    assert end.value.code == 2 and "Traceback" not in written.err and written.out == ""
    check_message(written.err.splitlines()[-1].partition(": error: ")[2], word)


@pytest.mark.parametrize("row", TRAINING)
def test_training(row, train, bad, pipelines, request, tmp_path, capsys):
    settings, word = TRAINING[row]
    places = {"bad": bad, "flux": pipelines["flux"]}
    if "checkpoint}" in str(settings):
        places |= request.getfixturevalue("checkpoints")
    settings = {"overwrite_output_dir": True} | fill(settings, **places)
    for phase in PHASES:
        (tmp_path / "output" / phase).mkdir(parents=True)
        (tmp_path / "output" / phase / WEIGHT_NAME).write_bytes(b"a good LoRA")
    (tmp_path / "output" / "instance.png").write_bytes(b"a picture")
    before = snapshot(tmp_path), snapshot(bad)
    assert_refused(capsys, word, train, **settings)
    assert (snapshot(tmp_path), snapshot(bad)) == before

    shutil.rmtree(tmp_path / "output")
    assert_refused(capsys, word, train, **settings)
    assert (snapshot(tmp_path), snapshot(bad)) == ({}, before[1])


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
LAUNCHED = {
    "half a process a phase": ({}, {"parallel_phases": True}, "even number of processes, 1 launched"),
    "three processes, two phases": ({"WORLD_SIZE": "3"}, {"parallel_phases": True}, "even number of processes, 3"),
    "one phase in parallel": ({}, {"parallel_phases": True, "phase": "slow"}, "--parallel_phases trains both"),
    "one list in parallel": ({}, {"parallel_phases": True, "flow_custom_timesteps": "1000,900"}, "--parallel_phases"),
    "one checkpoint, two phases": ({}, {"parallel_phases": True, "resume_from_checkpoint": "x"}, "give latest"),
    "FSDP of one process": (FSDP, {}, "--num_processes"),
    "FSDP 1": (FSDP | {"FSDP_VERSION": "1"}, {}, "fsdp_version: 2"),
    "FSDP offloaded": (FSDP | {"FSDP_OFFLOAD_PARAMS": "true"}, {}, "fsdp_offload_params"),
    "FSDP in fp16": (FSDP, {"mixed_precision": "fp16"}, "--mixed_precision fp16"),
    "FSDP compiled": (FSDP, {"compile": True}, "--compile does not go with FSDP"),
    **{
        f"FSDP of {name}": (FSDP, {"quantization": name}, "--quantization does not go")
        for name in ("nf4", "int8", "fp8")
    },
}


@pytest.mark.parametrize("row", LAUNCHED)
def test_launches(row, train, tmp_path, monkeypatch, capsys):
    environment, settings, word = LAUNCHED[row]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert_refused(capsys, word, train, **settings)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_place_of_a_phases_folder(train, tmp_path):
    """Better said at once than after an hour of training."""
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "fast").write_text("a file")
    with pytest.raises(InputError) as error:
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
        (tmp_path / "output" / phase / WEIGHT_NAME).write_bytes(b"a good LoRA")
    with pytest.raises(FloatingPointError) as error:
        train(nan_base, flow_custom_timesteps="900;100", checkpointing_steps=1, overwrite_output_dir=True)
    assert_one_line(error, "step 1, timestep 900")
    assert "slow" in str(error.value) and "nan" in str(error.value)
    for phase in PHASES:
        folder = tmp_path / "output" / phase
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == {WEIGHT_NAME: b"a good LoRA"}
    assert not list((tmp_path / "output").glob("*checkpoint-*"))


def test_a_later_divergence_names_its_step(train):
    with pytest.raises(FloatingPointError) as error:
        train(learning_rate=1e30, max_grad_norm=1e30, phase="fast", max_train_steps=8)
    assert_one_line(error, "fast")
    assert "step 1," not in str(error.value)


# --------------------------------------------------------------------------------------------------------------------
# The command line


@pytest.mark.processes
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
    *before, line = done.stderr.splitlines()  # the libraries are silent too
    assert all(" - INFO - " in text for text in before) and len(before) < 9
    assert line.startswith(f"{script}: error: ") and word in line and done.stdout == ""
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
