"""--pipeline_images: pictures beside the prompt, asked, encoded once, trained with and drawn with."""

import inspect
import json

import diffusers
import numpy as np
import pytest
import torch
from conftest import REFUSED, run_train
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from test_families import FAMILIES, load, stock_walk

from glance.ask import pipeline as ask
from glance.ask.guidance import ask_single_branch
from glance.ask.prompts import free_components, remember_prompts
from glance.ask.schedule import ask_timestep_table
from glance.ask.velocity import PipelineVelocity
from glance.files.recipe import PHASES, WEIGHT_NAME, read_recipe


pytestmark = pytest.mark.families

# class: (tiny pipeline whose parts it takes, arguments that are pictures, further arguments)
KINDS = {
    "FluxKontextPipeline": ("flux", ["image"], {"max_area": 1024, "_auto_resize": False}),
    "Flux2Pipeline": ("flux2", ["image"], {}),
    "Flux2KleinPipeline": ("flux2_klein", ["image"], {}),
    "StableDiffusion3Img2ImgPipeline": ("sd3", ["image"], {}),
    "ZImageImg2ImgPipeline": ("z_image", ["image"], {}),
}


def picture(seed: int, side: int, path) -> str:
    pixels = np.random.RandomState(seed).randint(0, 255, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


@pytest.fixture
def make(tmp_path):
    """make(name of a class): its folder, its size, the call's further arguments and two pictures' files."""

    def call(name: str) -> tuple:
        base, arguments, extra = KINDS[name]
        build, size, own = FAMILIES[base]
        kind = getattr(diffusers, name)
        parts = load(build(tmp_path / "parts")).components
        needed = set(inspect.signature(kind.__init__).parameters)
        kind(**{key: part for key, part in parts.items() if key in needed}).save_pretrained(tmp_path / name)
        accepted = ask.arguments_of(kind)
        extra = {key: value for key, value in (own | extra).items() if key in accepted}
        side = 64 if "Flux2" in name else size  # which takes no smaller one
        files = [picture(seed, side, tmp_path / f"{seed}.png") for seed in (1, 2)]
        return tmp_path / name, size, extra, arguments, files

    return call


@pytest.mark.parametrize("name", KINDS)
def test_it_is_asked_trained_and_drawn(name, make, pair, infer, tmp_path):
    base, size, extra, arguments, files = make(name)

    pipe = load(base)
    pictures = {argument: Image.open(files[0]) for argument in arguments}
    call = ask.whole_walk(pipe, ask.call_arguments(pipe, "a red ring", size, size, None, extra | pictures))
    off = ask_single_branch(pipe, **call)
    table = ask_timestep_table(pipe, 10, **call)
    steps = stock_walk(pipe, 10, call, off)[2::4]

    def error() -> float:
        with torch.no_grad():
            found = [model(sample, sigma / 1000) for _, sigma, _, sample in steps]
        return max((mine - theirs[0]).abs().max().item() for mine, theirs in zip(found, steps))

    remember_prompts(pipe)
    model = PipelineVelocity(pipe, table, **call | off)
    assert error() <= 1e-5
    free_components(pipe, **call | off)
    assert error() <= 1e-5

    images = dict.fromkeys(arguments, files[0])
    flags = {"resolution": size, "pipeline_kwargs": json.dumps(extra), "learning_rate": 1e-2, "max_train_steps": 5}
    flags |= {"instance_prompt": "a red ring", "loss": "trajectory", "num_base_steps": 10, "num_trajectories": 1}
    flags |= {"num_inference_steps": 4, "pipeline_images": json.dumps(images)}
    output = run_train({"pretrained_model_name_or_path": base, "output_dir": tmp_path / "output"}, flags)
    recipe = read_recipe(output / "slow" / WEIGHT_NAME)
    assert recipe.pipeline_images == arguments and files[0] not in recipe.to_json()
    assert "so there are no lines of plain diffusers" in (output / "README.md").read_text()
    for phase in PHASES:
        moved = [
            value.abs().max() for key, value in load_file(output / phase / WEIGHT_NAME).items() if "lora_B" in key
        ]
        assert sum(value > 1e-4 for value in moved) > 0.75 * len(moved)

    drawn = [
        np.asarray(Image.open(infer(base, lora=output, pipeline_images=json.dumps(dict.fromkeys(arguments, file)))))
        for file in files
    ]
    strength = "strength" in ask.arguments_of(type(pipe))
    assert drawn[0].shape[:2] == (size, size) and drawn[0].std() > 0
    assert strength or not np.array_equal(*drawn)
    with pytest.raises(REFUSED, match="it was trained with a picture as image; give one by --pipeline_images"):
        infer(base, lora=output)


def test_the_flow_loss_learns_an_image_from_another(make, pair, tmp_path):
    """A picture of the instance is the target, the one beside the prompt the source."""
    base, size, extra, arguments, files = make("FluxKontextPipeline")
    flags = {"pretrained_model_name_or_path": base, "instance_image": pair, "resolution": size, "max_train_steps": 5}
    flags |= {"pipeline_kwargs": json.dumps(extra), "learning_rate": 1e-3}
    learned = []
    for number, file in enumerate([*files, files[0]]):
        given = {"output_dir": tmp_path / str(number), "pipeline_images": json.dumps(dict.fromkeys(arguments, file))}
        learned.append(load_file(run_train(flags, given) / "slow" / WEIGHT_NAME))
    names = [name for name in learned[0] if "lora_B" in name]
    assert all(torch.equal(learned[0][name], learned[2][name]) for name in names)
    assert not all(torch.equal(learned[0][name], learned[1][name]) for name in names)


def test_a_run_goes_on_with_the_same_picture_alone(make, tmp_path):
    base, size, extra, arguments, files = make("FluxKontextPipeline")
    flags = {"pretrained_model_name_or_path": base, "resolution": size, "max_train_steps": 4, "phase": "slow"}
    flags |= {"pipeline_kwargs": json.dumps(extra), "instance_prompt": "a red ring", "num_base_steps": 10}
    flags |= {"num_inference_steps": 4, "output_dir": tmp_path / "output", "checkpointing_steps": 2}
    pictures = [json.dumps(dict.fromkeys(arguments, file)) for file in files]
    output = run_train(flags, {"pipeline_images": pictures[0]})
    moved = json.dumps(dict.fromkeys(arguments, str((tmp_path / "1.png").rename(tmp_path / "moved.png"))))
    again = {"output_dir": tmp_path / "again", "resume_from_checkpoint": output / "checkpoint-2"}
    resumed = run_train(flags, again | {"pipeline_images": moved})
    whole, found = (load_file(folder / WEIGHT_NAME) for folder in (output, resumed))
    assert all(torch.equal(whole[name], found[name]) for name in whole)
    with pytest.raises(REFUSED, match="its image or captions are not this run's"):
        run_train(flags, again | {"output_dir": tmp_path / "other", "pipeline_images": pictures[1]})
    assert DiffusionPipeline.load_config(base)["_class_name"] == "FluxKontextPipeline"
