"""Tiny pipelines of text-to-video families, which draw one frame: their arguments must ask for a single one.

Each `make_<name>(directory, seed=0)` saves what `DiffusionPipeline.from_pretrained` loads; FAMILIES says at what size
it is tried and with which `--pipeline_kwargs`.
"""

import diffusers
import tiny_parts as parts
import transformers
from tiny_chat_families import chat_tokenizer, make_kandinsky5
from tiny_parts import AXES, CHANNELS, HEADS, LATENT_CHANNELS, parts_of, tiny_pipeline


# Wan's transformer, which SkyReels has too
WAN = {**CHANNELS, **HEADS, "num_layers": 2, "text_dim": 16, "freq_dim": 32, "ffn_dim": 64, "rope_max_seq_len": 32}


@tiny_pipeline
def make_wan():
    """Wan 2.1 (VAE factor 4, UniPC); size a multiple of 16."""
    return diffusers.WanPipeline(
        transformer=parts.transformer(diffusers.WanTransformer3DModel, **WAN),
        vae=parts.wan21_vae(),
        text_encoder=parts.umt5(),
        tokenizer=parts.t5_tokenizer(),
        scheduler=parts.multistep_scheduler(diffusers.UniPCMultistepScheduler, shift=3.0),
    )


@tiny_pipeline
def make_wan22():
    """As Wan 2.2's 5B is (VAE factor 16, a timestep for each token); size a multiple of 32."""
    others = parts_of(make_wan)
    others["vae"] = parts.wan22_vae()
    others["scheduler"] = parts.multistep_scheduler(diffusers.UniPCMultistepScheduler, shift=5.0)
    return diffusers.WanPipeline(**others | {"expand_timesteps": True})


@tiny_pipeline
def make_skyreels():
    """VAE factor 4, two calls, UniPC; size a multiple of 16."""
    return diffusers.SkyReelsV2Pipeline(
        transformer=parts.transformer(diffusers.SkyReelsV2Transformer3DModel, **WAN),
        vae=parts.wan21_vae(),
        text_encoder=parts.umt5(),
        tokenizer=parts.t5_tokenizer(),
        scheduler=parts.multistep_scheduler(diffusers.UniPCMultistepScheduler, shift=8.0),
    )


@tiny_pipeline
def make_skyreels_forcing():
    """The parts of SkyReels, a scheduler for each frame."""
    return diffusers.SkyReelsV2DiffusionForcingPipeline(**parts_of(make_skyreels))


@tiny_pipeline
def make_mochi():
    """VAE factor 8, time from 0 at noise to 1000; size a multiple of 16."""
    config = {"in_channels": 12, "patch_size": 2, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}
    text = {"pooled_projection_dim": 16, "text_embed_dim": 32, "time_embed_dim": 4, "max_sequence_length": 256}
    transformer = diffusers.MochiTransformer3DModel(**config, **text)
    vae = diffusers.AutoencoderKLMochi(
        latent_channels=12,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )
    return diffusers.MochiPipeline(
        transformer=parts.without_zeros(transformer),
        vae=vae,
        text_encoder=parts.t5(),
        tokenizer=parts.t5_tokenizer(256),
        scheduler=parts.scheduler(invert_sigmas=True),
    )


@tiny_pipeline
def make_ltx():
    """VAE factor 8, packed; size a multiple of 32."""
    config = {**CHANNELS, **HEADS, "num_layers": 2, "cross_attention_dim": 32, "caption_channels": 32}
    transformer = parts.transformer(diffusers.LTXVideoTransformer3DModel, **config)
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=4,
    )
    vae.latents_mean.normal_(std=0.3)
    vae.latents_std.uniform_(0.5, 2.0)
    return diffusers.LTXPipeline(
        transformer=transformer,
        vae=vae,
        text_encoder=parts.t5(),
        tokenizer=parts.t5_tokenizer(128),
        scheduler=parts.shifting_scheduler(0.95, 2.05, base_image_seq_len=1024, shift_terminal=0.1),
    )


@tiny_pipeline
def make_ltx_condition():
    """The parts of LTX, no dynamic shift."""
    return diffusers.LTXConditionPipeline(**parts_of(make_ltx) | {"scheduler": parts.scheduler()})


@tiny_pipeline
def make_hunyuan_video():
    """VAE factor 8, embedded guidance; size a multiple of 16."""
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

    layers = {"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1}
    config = {**CHANNELS, **HEADS, **layers, "text_embed_dim": 16, "pooled_projection_dim": 16, "rope_axes_dim": AXES}
    return diffusers.HunyuanVideoPipeline(
        transformer=parts.transformer(diffusers.HunyuanVideoTransformer3DModel, **config),
        vae=parts.hunyuan_video_vae(),
        text_encoder=parts.model(transformers.LlamaModel, **parts.text_config(num_hidden_layers=4)),
        tokenizer=parts.tokenizer("<|start|> $A", 1024, corpus=[DEFAULT_PROMPT_TEMPLATE["template"]]),
        text_encoder_2=parts.clip(transformers.CLIPTextModel),
        tokenizer_2=parts.clip_tokenizer(),
        scheduler=parts.scheduler(shift=7.0),
    )


@tiny_pipeline
def make_hunyuan_video15():
    """VAE factor 4, two calls by a guider; size a multiple of 4."""
    config = {**CHANNELS, "in_channels": 2 * LATENT_CHANNELS + 1, **HEADS, "num_layers": 1, "num_refiner_layers": 1}
    text = {"text_embed_dim": 16, "text_embed_2_dim": 16, "image_embed_dim": 16}
    more = {"rope_axes_dim": AXES, "target_size": 64, "task_type": "t2v"}
    transformer = diffusers.HunyuanVideo15Transformer3DModel(**config, **text, **more)
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(32, 32, 32),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    )
    return diffusers.HunyuanVideo15Pipeline(
        transformer=parts.without_zeros(transformer),
        vae=vae,
        text_encoder=parts.qwen_vl().model.language_model,
        tokenizer=chat_tokenizer(),
        text_encoder_2=parts.byt5(),
        tokenizer_2=transformers.ByT5Tokenizer(),
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=6.0),
        scheduler=parts.scheduler(shift=5.0),
    )


@tiny_pipeline
def make_sana_video():
    """VAE factor 8 told, 4 real, doubled batch; size a multiple of 32."""
    return diffusers.SanaVideoPipeline(
        transformer=parts.transformer(diffusers.SanaVideoTransformer3DModel, **parts.SANA, rope_max_seq_len=32),
        vae=parts.wan21_vae(),
        text_encoder=parts.gemma2(),
        tokenizer=parts.tokenizer("<|start|> $A", 2048),
        scheduler=parts.multistep_scheduler(diffusers.DPMSolverMultistepScheduler, shift=8.0),
    )


@tiny_pipeline
def make_easyanimate():
    """VAE factor 4, doubled batch; size a multiple of 16."""
    config = {**CHANNELS, **HEADS, "patch_size": 2, "num_layers": 2, "mmdit_layers": 1}
    config |= {"time_embed_dim": 16, "text_embed_dim": 16}
    transformer = diffusers.EasyAnimateTransformer3DModel(**config)
    vae = diffusers.AutoencoderKLMagvit(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(8, 8, 8),
        down_block_types=("SpatialDownBlock3D", "SpatialTemporalDownBlock3D", "SpatialTemporalDownBlock3D"),
        up_block_types=("SpatialUpBlock3D", "SpatialTemporalUpBlock3D", "SpatialTemporalUpBlock3D"),
        layers_per_block=1,
        norm_num_groups=4,
    )
    return diffusers.EasyAnimatePipeline(
        transformer=parts.without_zeros(transformer),
        vae=vae,
        text_encoder=parts.model(
            transformers.Qwen2VLForConditionalGeneration,
            text_config=parts.text_config(**parts.rope()),
            vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2},
        ),
        tokenizer=chat_tokenizer(),
        scheduler=parts.scheduler(shift=5.0),
    )


@tiny_pipeline
def make_motif_video():
    """VAE factor 4, two calls by a guider; size a multiple of 8."""
    from transformers.models.t5gemma2.modeling_t5gemma2 import T5Gemma2Encoder

    config = {**CHANNELS, "in_channels": 2 * LATENT_CHANNELS + 1, **HEADS, "num_layers": 1, "num_single_layers": 1}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformer = parts.transformer(
        diffusers.MotifVideoTransformer3DModel, **config, text_embed_dim=16, rope_axes_dim=AXES
    )
    return diffusers.MotifVideoPipeline(
        transformer=transformer,
        vae=parts.wan21_vae(),
        text_encoder=parts.model(
            T5Gemma2Encoder,
            text_config=parts.text_config(head_dim=8, dropout_rate=0.0),
            vision_config=vision | {"image_size": 16, "patch_size": 4},
            image_token_index=parts.IMAGE,
        ),
        tokenizer=parts.t5_tokenizer(),
        guider=diffusers.AdaptiveProjectedGuidance(guidance_scale=8.0),
        scheduler=parts.scheduler(use_dynamic_shifting=True),
    )


@tiny_pipeline
def make_kandinsky5_video():
    """VAE factor 8, two calls; size a multiple of 128."""
    others = parts_of(make_kandinsky5)
    others["vae"] = parts.hunyuan_video_vae()
    config = others["transformer"].config
    transformer = diffusers.Kandinsky5Transformer3DModel.from_config(config, visual_cond=True)
    others["transformer"] = parts.without_zeros(transformer)
    return diffusers.Kandinsky5T2VPipeline(**others)


FRAME = {"num_frames": 1}
# name: (make, height and width, --pipeline_kwargs)
FAMILIES = {
    "wan": (make_wan, 32, FRAME),
    "wan22": (make_wan22, 64, FRAME),
    "skyreels": (make_skyreels, 32, FRAME),
    "skyreels_forcing": (make_skyreels_forcing, 32, FRAME),
    "mochi": (make_mochi, 32, FRAME),
    "ltx": (make_ltx, 32, FRAME),
    "ltx_condition": (make_ltx_condition, 32, FRAME),
    "hunyuan_video": (make_hunyuan_video, 32, FRAME),
    "hunyuan_video15": (make_hunyuan_video15, 32, FRAME),
    "sana_video": (make_sana_video, 32, {"frames": 1, "use_resolution_binning": False}),
    "easyanimate": (make_easyanimate, 32, {**FRAME, "negative_prompt": ""}),
    "motif_video": (make_motif_video, 32, FRAME),
    "kandinsky5_video": (make_kandinsky5_video, 128, FRAME),
}
