"""Tiny pipelines of the classes that take pictures beside the prompt, made of the parts of the tiny families.

`make(name, folder)` saves one of KINDS and returns the folder; `call_of(name)` says how it is called.
"""

import inspect
from dataclasses import dataclass, field
from pathlib import Path

import diffusers
import tiny_parts as parts
import torch
import transformers
from tiny_families import FAMILIES
from tiny_parts import LATENT_CHANNELS, PACKED_CHANNELS, parts_of


@dataclass(frozen=True)
class Kind:
    """What the tiny pipeline of a class is made of, and how it is called."""

    base: str  # the family whose parts it takes
    pictures: tuple = ("image",)  # the call's arguments that are pictures
    more: dict = field(default_factory=dict)  # further arguments of the call
    config: dict = field(default_factory=dict)  # entries of the transformer's config that are others
    parts: dict = field(default_factory=dict)  # name: makes another part of those that there are
    init: dict = field(default_factory=dict)  # further settings of the pipeline
    size: int | None = None  # height and width; the family's own where None


def of_its_config(model_class, **config):
    """Makes a model with what the transformer's config says and this one takes: a ControlNet, or another form."""

    def build(others):
        own = dict(others["transformer"].config) | config
        accepted = set(inspect.signature(model_class.__init__).parameters)
        return parts.without_zeros(model_class(**{key: value for key, value in own.items() if key in accepted}))

    return build


def clip_vision(others):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return parts.model(transformers.CLIPVisionModel, **sizes, image_size=32, patch_size=8)


def clip_images(others):
    return transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def qwen3_vl_of_large_patches(others):
    """A token of its sees 2x2 latents, as Qwen-Image 2.1 takes for granted."""
    config = others["text_encoder"].config
    config.vision_config.patch_size = 16
    return parts.without_zeros(type(others["text_encoder"])(config))


def siglip_vision(others):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return parts.model(transformers.SiglipVisionModel, **sizes, image_size=16, patch_size=4)


def siglip_images(others):
    return transformers.SiglipImageProcessorPil(size={"height": 16, "width": 16})


def vision_processor(others):
    """Stands in for Qwen2-VL's and Qwen3-VL's processors, whose video half needs torchvision."""
    tokenizer = others.get("tokenizer") or others["processor"]
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    tokenizer._set_model_specific_special_tokens({"image_token": "<|image_pad|>"})
    vision = others["text_encoder"].config.vision_config
    sizes = {"patch_size": vision.patch_size, "merge_size": vision.spatial_merge_size, "min_pixels": 256}
    most = 1024**2 if vision.patch_size == 16 else 4096
    images = transformers.Qwen2VLImageProcessorPil(**sizes, max_pixels=most)
    return transformers.PaddleOCRVLProcessor(images, tokenizer, chat_template=tokenizer.chat_template)


def small_qwen_vae(others):
    """Factor 16: what the edit pipelines encode has a million pixels, whatever it was."""
    sizes = {"base_dim": 2, "z_dim": LATENT_CHANNELS, "dim_mult": [1, 1, 1, 1, 1], "num_res_blocks": 1}
    return diffusers.AutoencoderKLQwenImage(**sizes, temperal_downsample=[False] * 4, **parts.LATENT_STATISTICS)


def lively_transformer(others):
    return parts.lively(others["transformer"])


def small_longcat_vae(others):
    """Factor 16, for the same reason."""
    return parts.narrow_kl_vae(blocks=5, latent_channels=16)


def wide_sd3_vae(others):
    """Of 16 channels: the pipeline takes a transformer of another number for one that is told the mask."""
    return parts.kl_vae(latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609)


QWEN_EDIT = {"processor": vision_processor, "vae": small_qwen_vae, "transformer": lively_transformer}
CLIP_VISION = {"image_encoder": clip_vision, "image_processor": clip_images}
SIGLIP_VISION = {"image_encoder": siglip_vision, "feature_extractor": siglip_images}
FLUX_CONTROLNET = {"controlnet": of_its_config(diffusers.FluxControlNetModel)}
FILL = {"in_channels": 3 * PACKED_CHANNELS, "out_channels": PACKED_CHANNELS}
CONTROL = {"in_channels": 2 * PACKED_CHANNELS, "out_channels": PACKED_CHANNELS}
VACE = {"vace_layers": [0, 1], "vace_in_channels": 2 * LATENT_CHANNELS + 16}
WAN_I2V = {"in_channels": 2 * LATENT_CHANNELS + 2, "image_dim": 16}
MASKED = ("image", "mask_image")
KONTEXT = {"max_area": 1024, "_auto_resize": False}
FRAMES = {"num_frames": 5}

GROUPS = {
    "edit, reference": {
        "FluxKontextPipeline": Kind("flux", more=KONTEXT),
        "Flux2Pipeline": Kind("flux2", size=64),
        "Flux2KleinPipeline": Kind("flux2_klein", size=64),
        "QwenImageEditPipeline": Kind("qwen", parts=QWEN_EDIT, size=64),
        "QwenImageEditPlusPipeline": Kind("qwen", parts=QWEN_EDIT, size=64),
        "QwenImage21Pipeline": Kind(
            "qwen21", parts={"text_encoder": qwen3_vl_of_large_patches, "processor": vision_processor}
        ),
        "LongCatImageEditPipeline": Kind(
            "longcat", parts={"text_processor": vision_processor, "vae": small_longcat_vae}, size=1024
        ),
        "Kandinsky5I2IPipeline": Kind(
            "kandinsky5", config={"visual_cond": True}, parts={"tokenizer": vision_processor}
        ),
        "BriaFibo2Pipeline": Kind("bria_fibo2"),
    },
    "image to image": {
        "FluxImg2ImgPipeline": Kind("flux"),
        "StableDiffusion3Img2ImgPipeline": Kind("sd3"),
        "QwenImageImg2ImgPipeline": Kind("qwen"),
        "ChromaImg2ImgPipeline": Kind("chroma"),
        "ZImageImg2ImgPipeline": Kind("z_image"),
    },
    "control": {
        "FluxControlPipeline": Kind("flux", ("control_image",), config=CONTROL),
        "FluxControlImg2ImgPipeline": Kind("flux", ("image", "control_image"), config=CONTROL),
        "FluxControlNetPipeline": Kind("flux", ("control_image",), parts=FLUX_CONTROLNET),
        "FluxControlNetImg2ImgPipeline": Kind("flux", ("image", "control_image"), parts=FLUX_CONTROLNET),
        "StableDiffusion3ControlNetPipeline": Kind(
            "sd3", ("control_image",), parts={"controlnet": of_its_config(diffusers.SD3ControlNetModel)}
        ),
        "QwenImageControlNetPipeline": Kind(
            "qwen", ("control_image",), parts={"controlnet": of_its_config(diffusers.QwenImageControlNetModel)}
        ),
        "CogView4ControlPipeline": Kind("cogview4", ("control_image",), config={"in_channels": 2 * LATENT_CHANNELS}),
    },
    "fill, inpaint": {
        "FluxFillPipeline": Kind("flux", MASKED, config=FILL),
        "FluxInpaintPipeline": Kind("flux", MASKED),
        "FluxKontextInpaintPipeline": Kind("flux", MASKED, KONTEXT),
        "FluxControlInpaintPipeline": Kind("flux", (*MASKED, "control_image"), config=CONTROL),
        "FluxControlNetInpaintPipeline": Kind("flux", (*MASKED, "control_image"), parts=FLUX_CONTROLNET),
        "Flux2KleinInpaintPipeline": Kind("flux2_klein", MASKED, size=64),
        "StableDiffusion3InpaintPipeline": Kind(
            "sd3", MASKED, config={"in_channels": 16, "out_channels": 16}, parts={"vae": wide_sd3_vae}
        ),
        "StableDiffusion3ControlNetInpaintingPipeline": Kind(
            "sd3",
            ("control_image", "control_mask"),
            parts={"controlnet": of_its_config(diffusers.SD3ControlNetModel, extra_conditioning_channels=1)},
        ),
        "QwenImageInpaintPipeline": Kind("qwen", MASKED),
        "QwenImageEditInpaintPipeline": Kind("qwen", MASKED, parts=QWEN_EDIT, size=64),
        "QwenImageControlNetInpaintPipeline": Kind(
            "qwen",
            ("control_image", "control_mask"),
            parts={"controlnet": of_its_config(diffusers.QwenImageControlNetModel, extra_condition_channels=4)},
        ),
        "ZImageInpaintPipeline": Kind("z_image", MASKED),
    },
    "image to video": {
        "WanImageToVideoPipeline": Kind("wan", more=FRAMES, config=WAN_I2V, parts=CLIP_VISION),
        "WanImageToVideoPipeline of 2.2": Kind("wan22", more=FRAMES, init={"expand_timesteps": True}),
        "SkyReelsV2ImageToVideoPipeline": Kind("skyreels", more=FRAMES, config=WAN_I2V, parts=CLIP_VISION),
        "LTXImageToVideoPipeline": Kind("ltx", more={"num_frames": 9}),
        "LTXConditionPipeline": Kind("ltx_condition", more={"num_frames": 9, "image_cond_noise_scale": 0.0}),
        "HunyuanVideo15ImageToVideoPipeline": Kind(
            "hunyuan_video15", more=FRAMES, config={"task_type": "i2v"}, parts=SIGLIP_VISION
        ),
        "HunyuanSkyreelsImageToVideoPipeline": Kind(
            "hunyuan_video", more=FRAMES, config={"in_channels": 2 * LATENT_CHANNELS}
        ),
        "Kandinsky5I2VPipeline": Kind("kandinsky5_video", more={"num_frames": 17}),
        "SanaImageToVideoPipeline": Kind("sana_video", more={"frames": 5}),
    },
    "video to video": {
        "WanVideoToVideoPipeline": Kind("wan", ("video",)),
        "WanVACEPipeline": Kind(
            "wan",
            ("video", "mask"),
            FRAMES,
            parts={"transformer": of_its_config(diffusers.WanVACETransformer3DModel, **VACE)},
        ),
        "LucyEditPipeline": Kind("wan22", ("video",), config={"in_channels": 2 * LATENT_CHANNELS}),
    },
}
KINDS = {name: kind for group in GROUPS.values() for name, kind in group.items()}


def make(name: str, folder) -> Path:
    kind, target = KINDS[name], class_of(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = parts_of(FAMILIES[kind.base][0])
        if kind.config:
            found["transformer"] = of_its_config(type(found["transformer"]), **kind.config)(found)
        for part, build in kind.parts.items():
            found[part] = build(found)
        needed = set(inspect.signature(target.__init__).parameters)
        needed = {key: part for key, part in found.items() if key in needed}
        target(**needed, **kind.init).save_pretrained(folder)
    return Path(folder)


def class_of(name: str) -> type:
    return getattr(diffusers, name.split()[0])


def call_of(name: str) -> tuple[int, dict]:
    """(height and width, further arguments of the call)."""
    kind = KINDS[name]
    _, size, own = FAMILIES[kind.base]
    accepted = inspect.signature(class_of(name).__call__).parameters
    return kind.size or size, {key: value for key, value in (own | kind.more).items() if key in accepted}
