"""Tiny pipelines whose model is no transformer or counts time the other way, and single frames of video ones.

As in tiny_pipelines.py, `make_<name>(directory, seed=0)` saves one that `DiffusionPipeline.from_pretrained` loads.
"""

from types import SimpleNamespace

import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    AutoencoderKLMochi,
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    MochiPipeline,
    MochiTransformer3DModel,
    OmniGenPipeline,
    OmniGenTransformer2DModel,
)
from diffusers.pipelines.omnigen import pipeline_omnigen, processor_omnigen
from tiny_pipelines import (
    LATENT_CHANNELS,
    PAD,
    VOCAB_SIZE,
    _save,
    _t5,
    _tokenizer,
    _vae8,
    _without_zeros,
)


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


FAMILIES = {
    "omnigen": (make_omnigen, 32, {}),
    "mochi": (make_mochi, 32, {"pipeline_kwargs": {"num_frames": 1}}),
    "ltx": (make_ltx, 32, {"pipeline_kwargs": {"num_frames": 1}}),
}
