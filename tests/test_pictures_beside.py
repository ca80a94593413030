"""--pipeline_images: pictures beside the prompt, asked, encoded once, trained with and drawn with.

    python -m pytest -n 2 -m "families or long" && python tests/family_table.py

asks and trains every class; `make test` some of each kind.
"""

import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from conftest import REFUSED, ROOT, everyday, run_train
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from test_families import load, stock_walk
from tiny_with_pictures import GROUPS, KINDS, call_of, class_of
from tiny_with_pictures import make as make_tiny

from glance.ask import pipeline as ask
from glance.ask.guidance import ask_single_branch
from glance.ask.latents import ask_layout
from glance.ask.prompts import free_components, remember_prompts
from glance.ask.schedule import ask_timestep_table
from glance.ask.velocity import PipelineVelocity
from glance.files.pipeline_images import read_pipeline_images
from glance.files.recipe import PHASES, WEIGHT_NAME, read_recipe
from glance_utils import InputError


RESULTS = ROOT / "output" / "families" / "pictures"
# A reference, image to image, a ControlNet, sampled latents, a region that is filled, a first frame, frames.
TRAINED = {"FluxKontextPipeline", "ZImageImg2ImgPipeline", "StableDiffusion3ControlNetPipeline", "FluxFillPipeline"}
TRAINED |= {"QwenImageInpaintPipeline", "LTXImageToVideoPipeline", "WanVideoToVideoPipeline"}

ASKED = TRAINED | {"QwenImageEditPipeline", "QwenImage21Pipeline", "FluxControlPipeline", "Flux2KleinInpaintPipeline"}
ASKED |= {"CogView4ControlPipeline", "StableDiffusion3InpaintPipeline", "WanImageToVideoPipeline", "WanVACEPipeline"}
ASKED |= {"SanaImageToVideoPipeline", "Flux2Pipeline"}

# What of these is kept of a picture is mixed into the final latents, or left out of the loop.
MIXED_IN = {name for name in GROUPS["fill, inpaint"] if "Inpaint" in name and "ControlNetInpaint" not in name}
MIXED_IN |= {"FluxControlNetInpaintPipeline", "WanImageToVideoPipeline of 2.2", "LTXImageToVideoPipeline"}
MIXED_IN |= {"LTXConditionPipeline", "Kandinsky5I2VPipeline", "SanaImageToVideoPipeline"}


def learns_from_an_image(name: str) -> bool:
    """Whether the flow loss can be trained on one: latents of one frame, with a layout."""
    return name not in MIXED_IN and name not in GROUPS["image to video"] | GROUPS["video to video"]


def picture(seed: int, side: int, path) -> str:
    pixels = np.random.RandomState(seed).randint(0, 255, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


def pictures_for(name: str, folder, seed: int) -> dict:
    """--pipeline_images of the class: files of noise, for a mask one half, for a video five frames."""
    size, files = call_of(name)[0], {}
    for number, argument in enumerate(KINDS[name].pictures):
        paths = [folder / f"{seed}-{number}-{frame}.png" for frame in range(5)]
        for frame, path in enumerate(paths):
            picture(100 * seed + 10 * number + frame, size, path)
            if "mask" in argument:
                mask = Image.new("RGB", (size, size))
                mask.paste("white", (size // 2, 0, size, size))
                mask.save(path)
        is_video = KINDS[name].pictures[0] == "video"
        files[argument] = list(map(str, paths)) if is_video else str(paths[0])
    return files


@pytest.fixture
def make(tmp_path):
    """make(class): its folder, its size, the call's further arguments and --pipeline_images of two pictures."""

    def call(name: str) -> tuple:
        base = make_tiny(name, tmp_path / "base")
        return base, *call_of(name), [pictures_for(name, tmp_path, seed) for seed in (1, 2)]

    return call


@pytest.mark.families
@pytest.mark.parametrize("name", everyday(KINDS, ASKED))
def test_the_velocity_is_the_stock_pipelines(name, make):
    base, size, extra, (pictures, _) = make(name)
    pipe = load(base)
    arguments = ask.call_arguments(pipe, "a red ring", size, size, None, extra | read_pipeline_images(pictures))
    call = ask.whole_walk(pipe, arguments)
    remember_prompts(pipe)
    off = ask_single_branch(pipe, **call)
    table = ask_timestep_table(pipe, 10, **call)
    steps = stock_walk(pipe, 10, call, off)[2::4]
    model = PipelineVelocity(pipe, table, **call | off)

    def error() -> float:
        errors = []
        for velocity, sigma, told, sample in steps:
            sigma = told if abs(told - sigma) < 1 else sigma  # some round it
            with torch.no_grad():
                errors.append((model(sample, sigma / 1000, [0]) - velocity).abs().max().item())
        return max(errors)

    layout = True
    try:
        ask_layout(pipe, **call)
    except InputError:
        layout = False
    before = error()
    free_components(pipe, **call | off)
    after = error()
    assert max(before, after) <= 1e-5 and layout == (name not in MIXED_IN)
    result = {"name": name, "velocity_error": max(before, after), "flow": learns_from_an_image(name)}
    result |= {"diffusers": diffusers.__version__}
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result))


@pytest.mark.long
@pytest.mark.parametrize("name", filter(learns_from_an_image, KINDS))
def test_an_image_is_learned_from_it(name, make, pair, tmp_path):
    base, size, extra, (pictures, _) = make(name)
    flags = {"pretrained_model_name_or_path": base, "instance_image": pair, "resolution": size, "max_train_steps": 20}
    flags |= {"pipeline_kwargs": json.dumps(extra), "pipeline_images": json.dumps(pictures), "learning_rate": 1e-2}
    output = run_train(flags | {"output_dir": tmp_path / "output"}, {})
    rows = [line.split(",") for line in (output / "loss.csv").read_text().splitlines()[1:]]
    losses = [float(row[-1]) for row in rows if row[0] == "slow"]
    assert sum(losses[-5:]) < sum(losses[:5])


@pytest.mark.families
@pytest.mark.parametrize("name", everyday(KINDS, TRAINED))
def test_it_is_trained_and_drawn(name, make, infer, tmp_path):
    base, size, extra, pictures = make(name)
    flags = {"resolution": size, "pipeline_kwargs": json.dumps(extra), "learning_rate": 1e-3, "max_train_steps": 5}
    flags |= {"instance_prompt": "a red ring", "loss": "trajectory", "num_base_steps": 10, "num_trajectories": 1}
    flags |= {"num_inference_steps": 4, "pipeline_images": json.dumps(pictures[0])}
    output = run_train({"pretrained_model_name_or_path": base, "output_dir": tmp_path / "output"}, flags)
    recipe = read_recipe(output / "slow" / WEIGHT_NAME)
    assert recipe.pipeline_images == sorted(pictures[0]) and str(tmp_path) not in json.dumps(recipe.pipeline_images)
    assert "so there are no lines of plain diffusers" in (output / "README.md").read_text()
    for phase in PHASES:
        moved = [
            value.abs().max() for key, value in load_file(output / phase / WEIGHT_NAME).items() if "lora_B" in key
        ]
        assert sum(value > 1e-4 for value in moved) > 0.75 * len(moved)

    drawn = [np.asarray(Image.open(infer(base, lora=output, pipeline_images=json.dumps(given)))) for given in pictures]
    # At strength 1 nothing of a picture is left but in a region that is kept.
    is_whole = KINDS[name].pictures in (("image",), ("video",)) and "strength" in ask.arguments_of(class_of(name))
    assert drawn[0].std() > 0 and (is_whole or not np.array_equal(*drawn))
    with pytest.raises(REFUSED, match=f"it was trained with a picture as .*{KINDS[name].pictures[0]}"):
        infer(base, lora=output)


@pytest.mark.families
def test_a_trajectory_has_its_own_known_region(make, tmp_path):
    """With three trajectories of a caption the untrained base has the teacher's velocity at every point, so that what
    there is to learn is the solver's; with another seed's region it would have another."""
    base, size, extra, (pictures, _) = make("FluxInpaintPipeline")
    flags = {"resolution": size, "instance_prompt": "a red ring", "loss": "trajectory", "num_base_steps": 10}
    flags |= {"num_trajectories": 3, "train_batch_size": 3, "num_inference_steps": 10, "learning_rate": 1e-9}
    flags |= {"grid": "even", "max_train_steps": 2, "pipeline_images": json.dumps(pictures)}
    output = run_train({"pretrained_model_name_or_path": base, "output_dir": tmp_path / "output"}, flags)
    losses = [float(line.split(",")[-1]) for line in (output / "loss.csv").read_text().splitlines()[1:]]
    print(losses)
    assert losses and max(losses) < 1e-8
    assert not (output / "glance.png").exists() and "glance.png" not in (output / "README.md").read_text()


@pytest.mark.families
def test_the_flow_loss_learns_an_image_from_another(make, pair, tmp_path):
    """A picture of the instance is the target, the one beside the prompt the source."""
    base, size, extra, pictures = make("FluxKontextPipeline")
    flags = {"pretrained_model_name_or_path": base, "instance_image": pair, "resolution": size, "max_train_steps": 5}
    flags |= {"pipeline_kwargs": json.dumps(extra), "learning_rate": 1e-3}
    learned = []
    for number, images in enumerate([*pictures, pictures[0]]):
        given = {"output_dir": tmp_path / str(number), "pipeline_images": json.dumps(images)}
        learned.append(load_file(run_train(flags, given) / "slow" / WEIGHT_NAME))
    names = [name for name in learned[0] if "lora_B" in name]
    assert all(torch.equal(learned[0][name], learned[2][name]) for name in names)
    assert not all(torch.equal(learned[0][name], learned[1][name]) for name in names)


@pytest.mark.families
def test_a_run_goes_on_with_the_same_picture_alone(make, tmp_path):
    base, size, extra, pictures = make("FluxKontextPipeline")
    flags = {"pretrained_model_name_or_path": base, "resolution": size, "max_train_steps": 4, "phase": "slow"}
    flags |= {"pipeline_kwargs": json.dumps(extra), "instance_prompt": "a red ring", "num_base_steps": 10}
    flags |= {"num_inference_steps": 4, "output_dir": tmp_path / "output", "checkpointing_steps": 2}
    output = run_train(flags, {"pipeline_images": json.dumps(pictures[0])})
    moved = json.dumps({"image": str(Path(pictures[0]["image"]).rename(tmp_path / "moved.png"))})
    again = {"output_dir": tmp_path / "again", "resume_from_checkpoint": output / "checkpoint-2"}
    resumed = run_train(flags, again | {"pipeline_images": moved})
    whole, found = (load_file(folder / WEIGHT_NAME) for folder in (output, resumed))
    assert all(torch.equal(whole[name], found[name]) for name in whole)
    with pytest.raises(REFUSED, match="its image or captions are not this run's"):
        run_train(flags, again | {"output_dir": tmp_path / "other", "pipeline_images": json.dumps(pictures[1])})
    assert DiffusionPipeline.load_config(base)["_class_name"] == "FluxKontextPipeline"


# --------------------------------------------------------------------------------------------------------------------
# Prompts with pictures of their own


def as_jsonl(path, prompts: list[tuple[str, dict]]):
    path.write_text("".join(json.dumps({"prompt": text, **files}) + "\n" for text, files in prompts))
    return path


@pytest.mark.families
def test_prompts_of_a_file_have_their_own_pictures(make, infer, tmp_path, capsys):
    base, size, extra, (one, other) = make("FluxKontextPipeline")
    one, other = ({"image": Path(files["image"]).name} for files in (one, other))  # beside the file
    flags = {"pretrained_model_name_or_path": base, "resolution": size, "pipeline_kwargs": json.dumps(extra)}
    flags |= {"loss": "trajectory", "num_base_steps": 10, "num_trajectories": 1, "num_inference_steps": 4}
    flags |= {"learning_rate": 1e-3, "max_train_steps": 4, "instance_prompt": "make it red"}
    learned = []
    for name, second in (("two", other), ("again", other), ("one", one)):
        prompts = as_jsonl(tmp_path / f"{name}.jsonl", [("make it red", one), ("make it blue", second)])
        output = run_train(flags, {"output_dir": tmp_path / name, "prompts_file": prompts})
        learned.append(load_file(output / "slow" / WEIGHT_NAME))
    assert read_recipe(output / "slow" / WEIGHT_NAME).pipeline_images == ["image"]
    assert "--pipeline_images" in capsys.readouterr().out.splitlines()[-1]
    assert all(torch.equal(value, learned[1][name]) for name, value in learned[0].items())
    assert not all(torch.equal(value, learned[2][name]) for name, value in learned[0].items())

    drawn = infer(base, lora=output, prompts_file=prompts.with_name("two.jsonl"), prompt=None)
    for number, (text, files) in enumerate([("make it red", one), ("make it blue", other)]):
        given = json.dumps({"image": str(tmp_path / files["image"])})
        alone = infer(base, lora=output, prompt=text, pipeline_images=given, output=tmp_path / "alone.png")
        assert np.array_equal(
            np.asarray(Image.open(alone)), np.asarray(Image.open(drawn.with_stem(f"out-00{number}")))
        )


@pytest.mark.parametrize(
    "line, words",
    [
        ("a red ring", "prompt 1: no JSON"),
        ('["a red ring"]', "holds no prompt"),
        ('{"image": "a.png"}', "holds no prompt"),
        ('{"prompt": " "}', "holds no prompt"),
        ('{"prompt": 3}', "holds no prompt"),
        ('{"prompt": "a ring", "image": "a.png"}', r"image: .*a\.png: no such file"),
        ('{"prompt": "a ring", "image": 3}', "image is '3'"),
    ],
)
def test_a_line_that_is_no_prompt_is_refused(line, words, pipelines, infer, trained, tmp_path):
    (tmp_path / "prompts.jsonl").write_text(line + "\n")
    with pytest.raises(REFUSED, match=words) as error:
        infer(lora=trained(), prompt=None, prompts_file=tmp_path / "prompts.jsonl")
    assert "\n" not in str(error.value)


def test_mixed_branches_take_no_pictures_of_prompts(train, tmp_path):
    picture(1, 32, tmp_path / "a.png")
    prompts = as_jsonl(tmp_path / "prompts.jsonl", [("a ring", {"image": "a.png"}), ("a disc", {"image": "a.png"})])
    with pytest.raises(REFUSED, match="mixed branches go from noise and prompt alone"):
        train("sd3", instance_image=None, prompts_file=prompts, num_model_calls=4, max_train_steps=0)
