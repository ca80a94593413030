"""infer_glance.py --pipeline_class and --pipeline_images: a pair in diffusers' other pipelines of the same weights."""

import diffusers
import numpy as np
import pytest
import torch
from conftest import REFUSED, picture_distance
from diffusers import DiffusionPipeline, FluxControlNetModel
from PIL import Image

from glance.files.lora import load_lora
from glance.files.recipe import PHASES, WEIGHT_NAME, read_recipe, schedule_of
from glance_utils import denoiser, glance_inference


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """{"image": file, "mask_image": file}: a picture of noise and a mask of its left half."""
    root = tmp_path_factory.mktemp("pictures")
    Image.fromarray(np.random.RandomState(1).randint(0, 255, (32, 32, 3), dtype=np.uint8)).save(root / "image.png")
    mask = Image.new("RGB", (32, 32))
    mask.paste("white", (0, 0, 16, 32))
    mask.save(root / "mask.png")
    return {"image": str(root / "image.png"), "mask_image": str(root / "mask.png")}


@pytest.fixture(scope="module")
def controlnet(pipelines, tmp_path_factory):
    """The folder of a ControlNet for the tiny FLUX, whose output is not zero."""
    config = DiffusionPipeline.from_pretrained(pipelines["flux"]).transformer.config
    kept = {"num_layers": 1, "num_single_layers": 1, "in_channels": config.in_channels}
    kept |= {name: config[name] for name in ("attention_head_dim", "num_attention_heads", "joint_attention_dim")}
    kept |= {name: config[name] for name in ("pooled_projection_dim", "axes_dims_rope")}
    torch.manual_seed(0)
    model = FluxControlNetModel(**kept)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("controlnet")
    model.save_pretrained(folder)
    return folder


def as_json(files: dict) -> str:
    return str(files).replace("'", '"')


@pytest.mark.parametrize(
    "base, name, wanted, options",
    [
        ("flux", "FluxImg2ImgPipeline", ["image"], {"strength": 0.6}),
        ("flux", "FluxInpaintPipeline", ["image", "mask_image"], {"strength": 0.8}),
        ("sd3", "StableDiffusion3Img2ImgPipeline", ["image"], {"strength": 0.6}),
        ("qwen", "QwenImageImg2ImgPipeline", ["image"], {"strength": 0.6}),
        ("flux", "FluxControlNetPipeline", ["control_image"], {"controlnet_conditioning_scale": 0.9}),
    ],
)
def test_it_draws_what_the_class_draws_by_hand(
    base, name, wanted, options, pipelines, pictures, controlnet, trained, infer, tmp_path
):
    files = {argument: pictures.get(argument, pictures["image"]) for argument in wanted}
    flags = {"lora": trained(base), "pipeline_class": name, "pipeline_images": as_json(files), "compare": True}
    flags |= {"controlnet": controlnet} if "Control" in name else {}
    flags |= {"pipeline_kwargs": as_json(options)}
    compared = Image.open(infer(base, **flags, output=tmp_path / "compared.png"))
    assert compared.width > 4 * 32  # in four columns
    drawn = infer(base, **flags | {"compare": None})

    parts = {"controlnet": FluxControlNetModel.from_pretrained(controlnet)} if "Control" in name else {}
    pipe = getattr(diffusers, name).from_pretrained(pipelines[base], **parts)
    recipes = {phase: read_recipe(trained(base) / phase / WEIGHT_NAME) for phase in PHASES}
    for phase in recipes:
        load_lora(pipe, trained(base) / phase / WEIGHT_NAME, phase)
    options |= recipes["slow"].pipeline_kwargs | {argument: Image.open(file) for argument, file in files.items()}
    options |= {"height": 32, "width": 32, "guidance_scale": recipes["slow"].guidance_scale}
    steps = []
    denoiser(pipe).register_forward_hook(lambda *args: steps.append(1))
    with glance_inference(pipe, schedule_of(recipes)) as kwargs:
        call = {name: value for name, value in (options | kwargs).items() if value is not None}
        pipe("a blue ring", **call, generator=torch.Generator().manual_seed(0)).images[0].save(tmp_path / "wanted.png")
    assert picture_distance(drawn, tmp_path / "wanted.png") <= 1
    begun = round(10 * options.get("strength", 1.0))
    assert len(steps) in (begun, 2 * begun)
    without = infer(base, lora=trained(base), output=tmp_path / "without.png")
    assert picture_distance(drawn, without) > 1


def test_what_cannot_be_drawn_is_refused(pictures, trained, infer, tmp_path):
    image = as_json({"image": pictures["image"]})
    (tmp_path / "text.png").write_text("no picture")
    for flags, message in {
        (
            "FluxImg2Img",
            image,
        ): "--pipeline_class FluxImg2Img: diffusers .* has no such pipeline; give the name of one",
        ("AutoencoderKL", image): "has no such pipeline",
        ("WanImageToVideoPipeline", image): "cannot be loaded",
        ("FluxImg2ImgPipeline", "{}"): "FluxImg2ImgPipeline refuses the call",
        ("FluxImg2ImgPipeline", as_json({"image": "none.png"})): "image: none.png: no such file; give a picture",
        ("FluxImg2ImgPipeline", as_json({"image": str(tmp_path / "text.png")})): "text.png: not a readable image",
        ("FluxImg2ImgPipeline", '{"image": 3}'): "image is '3'; give a file, or a list of some",
        ("FluxImg2ImgPipeline", as_json({"mask_image": pictures["image"]})): "takes no 'mask_image'",
    }.items():
        given = dict(zip(("pipeline_class", "pipeline_images"), flags))
        with pytest.raises(REFUSED, match=message) as error:
            infer(lora=trained(), **given)
        assert "\n" not in str(error.value) and not (tmp_path / "out.png").exists()
    with pytest.raises(
        REFUSED, match="--pipeline_class is for LoRAs or a --sampler; leave it or --num_inference_steps"
    ):
        infer(num_inference_steps=4, pipeline_class="FluxImg2ImgPipeline", pipeline_images=image)
    with pytest.raises(REFUSED, match="cannot be loaded .*no file named config.json"):
        infer(lora=trained(), pipeline_class="FluxControlNetPipeline", controlnet=tmp_path)


def test_mixed_branches_are_not_drawn_from_a_picture(mixed_sampler, pictures, infer):
    with pytest.raises(REFUSED, match="call mixed branches, which go from noise and prompt alone"):
        infer("sd3", sampler=mixed_sampler, pipeline_images=as_json({"image": pictures["image"]}))
