"""The three tiny pipelines that most tests run on: `make_flux(folder)`, `make_sd3(folder)`, `make_qwen(folder)`.

`seed` picks the weights; further keyword arguments replace entries of the transformer's config
(`make_flux(directory, guidance_embeds=False)`). The schedulers are those of FLUX.1-dev, Stable Diffusion 3.5 and
Qwen-Image.
"""

import re

import diffusers
import tiny_parts as parts
import transformers
from tiny_parts import AXES, CHANNELS, HEADS, LATENT_CHANNELS, PACKED_CHANNELS, tiny_pipeline


# FLUX.1's transformer, of which several families have a form of their own
FLUX = {**HEADS, "in_channels": PACKED_CHANNELS, "num_layers": 1, "num_single_layers": 1, "axes_dims_rope": AXES}


@tiny_pipeline
def make_flux(**overrides):
    """VAE factor 2, embedded guidance; height and width must be multiples of 4."""
    config = {**FLUX, "joint_attention_dim": 32, "pooled_projection_dim": 16, "guidance_embeds": True}
    return diffusers.FluxPipeline(
        transformer=parts.transformer(diffusers.FluxTransformer2DModel, **config | overrides),
        vae=parts.kl_vae(),
        text_encoder=parts.clip(transformers.CLIPTextModel),
        tokenizer=parts.clip_tokenizer(),
        text_encoder_2=parts.t5(),
        tokenizer_2=parts.t5_tokenizer(),
        scheduler=parts.flux_scheduler(),
    )


@tiny_pipeline
def make_sd3(**overrides):
    """VAE factor 2; height and width must be multiples of 4, at most 128."""
    text = {"caption_projection_dim": 32, "joint_attention_dim": 32, "pooled_projection_dim": 32}
    sizes = {"sample_size": 32, "num_layers": 2, "pos_embed_max_size": 32}
    config = {**CHANNELS, **HEADS, **text, **sizes, "dual_attention_layers": (0,), "qk_norm": "rms_norm"}
    return diffusers.StableDiffusion3Pipeline(
        transformer=parts.transformer(diffusers.SD3Transformer2DModel, **config | overrides),
        vae=parts.kl_vae(scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=parts.clip(transformers.CLIPTextModelWithProjection),
        tokenizer=parts.clip_tokenizer(),
        text_encoder_2=parts.clip(transformers.CLIPTextModelWithProjection),
        tokenizer_2=parts.clip_tokenizer(),
        text_encoder_3=parts.t5(),
        tokenizer_3=parts.t5_tokenizer(),
        scheduler=parts.scheduler(shift=3.0),
    )


@tiny_pipeline
def make_qwen(**overrides):
    """VAE factor 4; height and width must be multiples of 8."""
    config = {"in_channels": PACKED_CHANNELS, "out_channels": LATENT_CHANNELS, **HEADS, "num_layers": 2}
    config |= {"joint_attention_dim": 16, "axes_dims_rope": AXES}
    vae = parts.qwen_vae()
    return diffusers.QwenImagePipeline(
        transformer=parts.transformer(diffusers.QwenImageTransformer2DModel, **config | overrides),
        vae=vae,
        text_encoder=parts.qwen_vl(),
        tokenizer=qwen_tokenizer(),
        scheduler=parts.qwen_scheduler(),
    )


def qwen_tokenizer():
    """Knows the words of the pipeline's prompt template, so that its prefix is the 34 tokens the pipeline drops."""
    unbuilt = parts.unbuilt(diffusers.QwenImagePipeline)
    words = re.split(r"<\|im_\w+\|>", unbuilt.prompt_template_encode)
    return parts.tokenizer("$A", 1024 + unbuilt.prompt_template_encode_start_idx, corpus=words)


PIPELINES = {"flux": make_flux, "sd3": make_sd3, "qwen": make_qwen}
