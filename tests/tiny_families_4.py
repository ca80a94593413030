"""Tiny pipelines whose model is no transformer or counts time the other way, and single frames of video ones.

As in tiny_pipelines.py, `make_<name>(directory, seed=0)` saves one that `DiffusionPipeline.from_pretrained` loads.
"""

from types import SimpleNamespace

import torch
from diffusers import (
    AdaptiveProjectedGuidance,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLLTXVideo,
    AutoencoderKLMagvit,
    AutoencoderKLMochi,
    ClassifierFreeGuidance,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    DreamLiteMobilePipeline,
    EasyAnimatePipeline,
    EasyAnimateTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinKVPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
    LTXConditionPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    MochiPipeline,
    MochiTransformer3DModel,
    MotifVideoPipeline,
    MotifVideoTransformer3DModel,
    OmniGenPipeline,
    OmniGenTransformer2DModel,
    SanaVideoPipeline,
    SanaVideoTransformer3DModel,
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    ZImageOmniPipeline,
)
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from diffusers.pipelines.omnigen import pipeline_omnigen, processor_omnigen
from tiny_families_1 import make_flux2_klein, make_z_image
from tiny_families_2 import _gemma, _wan_vae
from tiny_families_3 import _chat_tokenizer, _umt5, _wan21_vae, make_dreamlite, make_kandinsky5, make_wan
from tiny_pipelines import (
    LATENT_CHANNELS,
    PAD,
    SPECIAL_TOKENS,
    VOCAB_SIZE,
    _clip,
    _qwen_vl,
    _save,
    _t5,
    _text_config,
    _tokenizer,
    _vae8,
    _without_zeros,
)
from transformers import (
    ByT5Tokenizer,
    CLIPTextModel,
    LlamaConfig,
    LlamaModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Siglip2ImageProcessorPil,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    T5Config,
    T5EncoderModel,
)
from transformers.models.t5gemma2.configuration_t5gemma2 import T5Gemma2EncoderConfig
from transformers.models.t5gemma2.modeling_t5gemma2 import T5Gemma2Encoder


if not hasattr(processor_omnigen, "transforms"):
    # Without torchvision there is no processor; it needs that for images to edit, not for text.
    nothing = SimpleNamespace(Compose=list, Lambda=callable, ToTensor=object, Normalize=lambda **statistics: None)
    processor_omnigen.transforms = nothing
    pipeline_omnigen.OmniGenMultiModalProcessor = processor_omnigen.OmniGenMultiModalProcessor


def make_omnigen(directory, seed=0):
    """Save an `OmniGenPipeline` (VAE factor 8, doubled batch, time from 0 at noise to 1); size a multiple of 16."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = OmniGenTransformer2DModel(
            in_channels=LATENT_CHANNELS,
            hidden_size=32,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=64,
            num_layers=2,
            pad_token_id=PAD,
            vocab_size=VOCAB_SIZE,
            max_position_embeddings=1024,
            original_max_position_embeddings=1024,
            rope_scaling={"short_factor": [1.0] * 8, "long_factor": [1.0] * 8},
            pos_embed_max_size=32,
            time_step_dim=32,
        )
        pipe = OmniGenPipeline(
            transformer=_without_zeros(transformer),
            vae=_vae8(scaling_factor=0.13025, shift_factor=None),
            tokenizer=_tokenizer("<|start|> $A", max_length=1024),
            scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True, num_train_timesteps=1),
        )
    return _save(pipe, directory)


def make_mochi(directory, seed=0):
    """Save a `MochiPipeline` (VAE factor 8, time from 0 at noise to 1000); size a multiple of 16, `num_frames=1`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = MochiTransformer3DModel(
            patch_size=2,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            pooled_projection_dim=16,
            in_channels=12,
            text_embed_dim=32,
            time_embed_dim=4,
            max_sequence_length=256,
        )
        vae = AutoencoderKLMochi(
            latent_channels=12,
            encoder_block_out_channels=(32, 32, 32, 32),
            decoder_block_out_channels=(32, 32, 32, 32),
            layers_per_block=(1, 1, 1, 1, 1),
        )
        pipe = MochiPipeline(
            transformer=_without_zeros(transformer),
            vae=vae,
            text_encoder=_t5(),
            tokenizer=_tokenizer("$A <|end|>", max_length=256),
            scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        )
    return _save(pipe, directory)


def make_ltx(directory, seed=0):
    """Save an `LTXPipeline` (VAE factor 8, packed); height and width must be multiples of 32, `num_frames=1`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = LTXVideoTransformer3DModel(
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            num_attention_heads=2,
            attention_head_dim=16,
            cross_attention_dim=32,
            num_layers=2,
            caption_channels=32,
        )
        vae = AutoencoderKLLTXVideo(
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
        pipe = LTXPipeline(
            transformer=_without_zeros(transformer),
            vae=vae,
            text_encoder=_t5(),
            tokenizer=_tokenizer("$A <|end|>", max_length=128),
            scheduler=FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True,
                base_shift=0.95,
                max_shift=2.05,
                base_image_seq_len=1024,
                max_image_seq_len=4096,
                shift_terminal=0.1,
            ),
        )
    return _save(pipe, directory)


def make_dreamlite_mobile(directory, seed=0):
    """Save a `DreamLiteMobilePipeline` (the same parts, no guidance); height and width must be multiples of 8."""
    return _save(DreamLiteMobilePipeline(**_loaded(make_dreamlite, directory, seed).components), directory)


def make_flux2_klein_kv(directory, seed=0):
    """Save a `Flux2KleinKVPipeline` (the same parts, no guidance); height and width must be multiples of 4."""
    return _save(Flux2KleinKVPipeline(**_loaded(make_flux2_klein, directory, seed).components), directory)


def make_z_image_omni(directory, seed=0):
    """Save a `ZImageOmniPipeline` (VAE factor 2, doubled batch); height and width must be multiples of 4.

    SigLIP looks at the images to edit, of which text alone has none.
    """
    parts = _loaded(make_z_image, directory, seed, siglip_feat_dim=16).components
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        siglip = Siglip2VisionModel(Siglip2VisionConfig(**vision, num_patches=16, patch_size=4)).eval()
    pipe = ZImageOmniPipeline(**parts, siglip=siglip, siglip_processor=Siglip2ImageProcessorPil())
    return _save(pipe, directory)


def make_hunyuan_video(directory, seed=0):
    """Save a `HunyuanVideoPipeline` (VAE factor 8, embedded guidance); size a multiple of 16, `num_frames=1`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = HunyuanVideoTransformer3DModel(
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            text_embed_dim=16,
            pooled_projection_dim=16,
            rope_axes_dim=(4, 6, 6),
        )
        pipe = HunyuanVideoPipeline(
            transformer=_without_zeros(transformer),
            vae=_hunyuan_video_vae(),
            text_encoder=LlamaModel(LlamaConfig(**_text_config(num_hidden_layers=4))).eval(),
            tokenizer=_tokenizer("<|start|> $A", max_length=1024, corpus=[DEFAULT_PROMPT_TEMPLATE["template"]]),
            text_encoder_2=_clip(CLIPTextModel),
            tokenizer_2=_tokenizer("<|start|> $A <|end|>", max_length=77),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        )
    return _save(pipe, directory)


def make_hunyuan_video15(directory, seed=0):
    """Save a `HunyuanVideo15Pipeline` (VAE factor 4, two calls by a guider); size a multiple of 4, `num_frames=1`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = HunyuanVideo15Transformer3DModel(
            in_channels=2 * LATENT_CHANNELS + 1,
            out_channels=LATENT_CHANNELS,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=1,
            num_refiner_layers=1,
            text_embed_dim=16,
            text_embed_2_dim=16,
            image_embed_dim=16,
            rope_axes_dim=(4, 6, 6),
            target_size=64,
            task_type="t2v",
        )
        vae = AutoencoderKLHunyuanVideo15(
            latent_channels=LATENT_CHANNELS,
            block_out_channels=(32, 32, 32),
            layers_per_block=1,
            spatial_compression_ratio=4,
            temporal_compression_ratio=4,
        )
        byt5 = T5Config(
            vocab_size=384, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
        )
        pipe = HunyuanVideo15Pipeline(
            transformer=_without_zeros(transformer),
            vae=vae,
            text_encoder=_qwen_vl().model.language_model,
            tokenizer=_chat_tokenizer(),
            text_encoder_2=T5EncoderModel(byt5).eval(),
            tokenizer_2=ByT5Tokenizer(),
            guider=ClassifierFreeGuidance(guidance_scale=6.0),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        )
    return _save(pipe, directory)


def make_skyreels(directory, seed=0):
    """Save a `SkyReelsV2Pipeline` (VAE factor 4, two calls, UniPC); size a multiple of 16, `num_frames=1`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = SkyReelsV2Transformer3DModel(
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            text_dim=16,
            freq_dim=32,
            ffn_dim=64,
            rope_max_seq_len=32,
        )
        pipe = SkyReelsV2Pipeline(
            transformer=_without_zeros(transformer),
            vae=_wan21_vae(),
            text_encoder=_umt5(),
            tokenizer=_tokenizer("$A <|end|>", max_length=512),
            scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0),
        )
    return _save(pipe, directory)


def make_skyreels_forcing(directory, seed=0):
    """Save a `SkyReelsV2DiffusionForcingPipeline` (the same parts, a scheduler for each frame); `num_frames=1`."""
    return _save(SkyReelsV2DiffusionForcingPipeline(**_loaded(make_skyreels, directory, seed).components), directory)


def make_ltx_condition(directory, seed=0):
    """Save an `LTXConditionPipeline` (the same parts, no dynamic shift); `num_frames=1`."""
    parts = _loaded(make_ltx, directory, seed).components | {"scheduler": FlowMatchEulerDiscreteScheduler()}
    return _save(LTXConditionPipeline(**parts), directory)


def make_wan22(directory, seed=0):
    """Save a `WanPipeline` as Wan 2.2's 5B is (VAE factor 16, a timestep for each token); `num_frames=1`."""
    parts = _loaded(make_wan, directory, seed).components
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts["vae"] = _wan_vae()
    parts["scheduler"] = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    return _save(WanPipeline(**parts, expand_timesteps=True), directory)


def make_sana_video(directory, seed=0):
    """Save a `SanaVideoPipeline` (VAE factor 8 told, 4 real, doubled batch); size a multiple of 32, `frames=1`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = SanaVideoTransformer3DModel(
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=16,
            cross_attention_dim=32,
            caption_channels=16,
            rope_max_seq_len=32,
        )
        pipe = SanaVideoPipeline(
            transformer=_without_zeros(transformer),
            vae=_wan21_vae(),
            text_encoder=_gemma(),
            tokenizer=_tokenizer("<|start|> $A", max_length=2048),
            scheduler=DPMSolverMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0, solver_order=2
            ),
        )
    return _save(pipe, directory)


def make_easyanimate(directory, seed=0):
    """Save an `EasyAnimatePipeline` (VAE factor 4, doubled batch); size a multiple of 16, `num_frames=1`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = EasyAnimateTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            patch_size=2,
            num_layers=2,
            mmdit_layers=1,
            time_embed_dim=16,
            text_embed_dim=16,
        )
        vae = AutoencoderKLMagvit(
            latent_channels=LATENT_CHANNELS,
            block_out_channels=(8, 8, 8),
            down_block_types=("SpatialDownBlock3D", "SpatialTemporalDownBlock3D", "SpatialTemporalDownBlock3D"),
            up_block_types=("SpatialUpBlock3D", "SpatialTemporalUpBlock3D", "SpatialTemporalUpBlock3D"),
            layers_per_block=1,
            norm_num_groups=4,
        )
        pipe = EasyAnimatePipeline(
            transformer=_without_zeros(transformer),
            vae=vae,
            text_encoder=_qwen2_vl(),
            tokenizer=_chat_tokenizer(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        )
    return _save(pipe, directory)


def make_motif_video(directory, seed=0):
    """Save a `MotifVideoPipeline` (VAE factor 4, two calls by a guider); size a multiple of 8, `num_frames=1`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = MotifVideoTransformer3DModel(
            in_channels=2 * LATENT_CHANNELS + 1,
            out_channels=LATENT_CHANNELS,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=1,
            num_single_layers=1,
            text_embed_dim=16,
            rope_axes_dim=(4, 6, 6),
        )
        vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        text_config = T5Gemma2EncoderConfig(
            text_config=_text_config(head_dim=8, dropout_rate=0.0),
            vision_config=vision | {"image_size": 16, "patch_size": 4},
            image_token_index=SPECIAL_TOKENS.index("<|image_pad|>"),
        )
        pipe = MotifVideoPipeline(
            transformer=_without_zeros(transformer),
            vae=_wan21_vae(),
            text_encoder=T5Gemma2Encoder(text_config).eval(),
            tokenizer=_tokenizer("$A <|end|>", max_length=512),
            guider=AdaptiveProjectedGuidance(guidance_scale=8.0),
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        )
    return _save(pipe, directory)


def make_kandinsky5_video(directory, seed=0):
    """Save a `Kandinsky5T2VPipeline` (VAE factor 8, two calls); size a multiple of 128, `num_frames=1`."""
    parts = _loaded(make_kandinsky5, directory, seed).components
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts["vae"] = _hunyuan_video_vae()
        transformer = Kandinsky5Transformer3DModel.from_config(parts["transformer"].config, visual_cond=True)
        parts["transformer"] = _without_zeros(transformer)
    return _save(Kandinsky5T2VPipeline(**parts), directory)


def _loaded(make, directory, seed, **overrides):
    return DiffusionPipeline.from_pretrained(make(directory, seed, **overrides))


def _hunyuan_video_vae():
    return AutoencoderKLHunyuanVideo(
        latent_channels=LATENT_CHANNELS,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )


def _qwen2_vl():
    text = _text_config() | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2}
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision)).eval()


FAMILIES = {
    "dreamlite_mobile": (make_dreamlite_mobile, 32, {}),
    "flux2_klein_kv": (make_flux2_klein_kv, 32, {}),
    "z_image_omni": (make_z_image_omni, 32, {}),
    "omnigen": (make_omnigen, 32, {}),
    "mochi": (make_mochi, 32, {"pipeline_kwargs": {"num_frames": 1}}),
    "ltx": (make_ltx, 32, {"pipeline_kwargs": {"num_frames": 1}}),
    "hunyuan_video": (make_hunyuan_video, 32, {"pipeline_kwargs": {"num_frames": 1}}),
    "hunyuan_video15": (make_hunyuan_video15, 32, {"pipeline_kwargs": {"num_frames": 1}}),
    "skyreels": (make_skyreels, 32, {"pipeline_kwargs": {"num_frames": 1}}),
    "skyreels_forcing": (make_skyreels_forcing, 32, {"pipeline_kwargs": {"num_frames": 1}}),
    "ltx_condition": (make_ltx_condition, 32, {"pipeline_kwargs": {"num_frames": 1}}),
    "wan22": (make_wan22, 64, {"pipeline_kwargs": {"num_frames": 1}}),
    "sana_video": (make_sana_video, 32, {"pipeline_kwargs": {"frames": 1, "use_resolution_binning": False}}),
    "easyanimate": (make_easyanimate, 32, {"pipeline_kwargs": {"num_frames": 1, "negative_prompt": ""}}),
    "motif_video": (make_motif_video, 32, {"pipeline_kwargs": {"num_frames": 1}}),
    "kandinsky5_video": (make_kandinsky5_video, 128, {"pipeline_kwargs": {"num_frames": 1}}),
}
