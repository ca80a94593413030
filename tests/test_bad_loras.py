"""Bad LoRA files, recipes and arguments of infer_glance.py: one line that names what is wrong, and nothing written."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_errors import PHASES, Payload, assert_refused, fill, snapshot
from tiny_pipelines import make_flux

from glance.files.recipe import WEIGHT_NAME


pytestmark = pytest.mark.forged


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
        "base_model": (["flux"], "", LONG, "flux\nerror", "\x1b[31mflux", {"flux": CODE}),
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
        "guidance": ("none", True, ["fold"], LONG, CODE),
        "coefficients": (CODE, 3, [1.0], [[1.0, 0.0]], [["1", 0.0]] * 5, [[1.0]] * 5, [[1e9, 0.0]] * 5, {"0": [1, 0]}),
    }.items()
    for number, value in enumerate(values)
}


def write_bad_weights(root: Path, good: Path) -> None:
    """LoRA files whose tensors or header are wrong, each in root/weights NAME/slow."""

    def write(name: str, change=lambda weights: None, cut=lambda content: content, **header):
        weights, path = load_file(good), root / f"weights {name}" / "slow" / WEIGHT_NAME
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
    torch.save(Payload(root / "run"), root / "weights torch" / "slow" / WEIGHT_NAME)
    torch.save(Payload(root / "run"), root / "code.bin")


@pytest.fixture(scope="module")
def loras(trained, tmp_path_factory):
    """A folder of LoRA pairs, each wrong in its own way; "good" is right."""
    root = tmp_path_factory.mktemp("loras")
    good = root / "good"
    for phase in PHASES:
        (good / phase).mkdir(parents=True)
        shutil.copy(trained("flux") / phase / WEIGHT_NAME, good / phase)
        shutil.copytree(trained("sd3") / phase, root / "sd3" / phase)
    slow, fast = (good / phase / WEIGHT_NAME for phase in PHASES)

    def wrong(name, **changes):
        forge(slow, root / name / "slow" / WEIGHT_NAME, **changes)
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
    wrong("folded", guidance="fold")
    wrong("other arguments", pipeline_kwargs={"max_sequence_length": 8})
    wrong("one fitted", coefficients=[[1.0, 0.0]] * 5)
    wrong("arguments a list", pipeline_kwargs=[1])
    wrong("argument is ours", pipeline_kwargs={"latents": 1})
    wrong("another height", height=64)
    wrong("another base", base_model="somewhere/else")
    for phase in PHASES:
        forge(
            good / phase / WEIGHT_NAME,
            root / "fine-tuned" / phase / WEIGHT_NAME,
            base_model="nobody/another-model",
        )
    shutil.copytree(good / "slow", root / "unchained" / "slow")
    forge(fast, root / "unchained" / "fast" / WEIGHT_NAME, timesteps=[950, 900, 300])

    for name, content in {
        "truncated": slow.read_bytes()[:-100],
        "text": b"not a safetensors file",
        "empty": b"",
    }.items():
        (root / name / "slow").mkdir(parents=True)
        (root / name / "slow" / WEIGHT_NAME).write_bytes(content)
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
    "arguments of one": (
        pair_in("other arguments"),
        "slow has pipeline_kwargs {'max_sequence_length': 8}",
    ),
    "solver of one": (pair_in("one fitted"), "one was trained for the fitted solver, the other for Euler's"),
    "guidance of one folded in": (pair_in("folded"), "slow has guidance fold, fast has keep"),
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
    "unknown flag": ({"lora_scal": "1"}, "'lora_scale'"),
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
def test_inference(row, infer, loras, other_flux, pipelines, tmp_path, capsys):
    settings, word = INFERENCE[row]
    settings = fill({"lora": "{loras}/good"} | settings, loras=loras, tmp=tmp_path, sd3=pipelines["sd3"], **other_flux)
    if torch.cuda.is_available() and "offload" in row:
        pytest.skip("there is an accelerator")
    (tmp_path / "out.png").write_bytes(b"a picture")
    (tmp_path / "folder.png").mkdir()
    before = snapshot(tmp_path), snapshot(loras)
    assert_refused(capsys, word, infer, **settings)
    assert (snapshot(tmp_path), snapshot(loras)) == before


def test_the_good_pair_is_good(infer, loras):
    """Else the table above would prove little."""
    assert Image.open(infer(lora=loras / "good")).size == (32, 32)
