"""Tiny pipelines of text-to-image families whose text encoders read the prompt as it stands.

Each `make_<name>(directory, seed=0)` saves what `DiffusionPipeline.from_pretrained` loads; FAMILIES says at what size
it is tried and with which `--pipeline_kwargs`.
"""

from types import SimpleNamespace

import diffusers
import tiny_parts as parts
import torch
import transformers
from tiny_parts import AXES, CHANNELS, HEADS, LATENT_CHANNELS, PACKED_CHANNELS, SDXL_SCALE, parts_of, tiny_pipeline
from tiny_pipelines import FLUX, make_flux


@tiny_pipeline
def make_kontext():
    """The parts of FLUX; without an image it draws from text. Call it with `max_area` height * width."""
    return diffusers.FluxKontextPipeline(**parts_of(make_flux))


@tiny_pipeline
def make_chroma():
    """VAE factor 2, two calls above guidance 1; size a multiple of 4."""
    approximator = {"approximator_num_channels": 16, "approximator_hidden_dim": 32, "approximator_layers": 1}
    config = {**FLUX, "joint_attention_dim": 32, **approximator}
    return diffusers.ChromaPipeline(
        transformer=parts.transformer(diffusers.ChromaTransformer2DModel, **config),
        vae=parts.kl_vae(),
        text_encoder=parts.t5(),
        tokenizer=parts.t5_tokenizer(),
        scheduler=parts.shifting_scheduler(),
    )


@tiny_pipeline
def make_aura_flow():
    """VAE factor 2, doubled batch; size a multiple of 4, at most 64."""
    sizes = {"sample_size": 16, "num_mmdit_layers": 1, "num_single_dit_layers": 1, "pos_embed_max_size": 256}
    config = {**CHANNELS, **HEADS, **sizes, "joint_attention_dim": 32, "caption_projection_dim": 32}
    return diffusers.AuraFlowPipeline(
        transformer=parts.lively(parts.transformer(diffusers.AuraFlowTransformer2DModel, **config)),
        vae=parts.kl_vae(**SDXL_SCALE),
        text_encoder=parts.umt5(width=32),
        tokenizer=parts.t5_tokenizer(),
        scheduler=parts.scheduler(shift=1.73),
    )


# Both generations of Lumina
LUMINA = {
    "sample_size": 4,
    "in_channels": LATENT_CHANNELS,
    "hidden_size": 32,
    "num_layers": 2,
    "num_attention_heads": 2,
    "num_kv_heads": 1,
    "multiple_of": 32,
}


@tiny_pipeline
def make_lumina2():
    """VAE factor 8, fixed; two calls; size a multiple of 16."""
    config = {**LUMINA, "num_refiner_layers": 1, "axes_dim_rope": AXES, "axes_lens": (300, 64, 64), "cap_feat_dim": 16}
    return diffusers.Lumina2Pipeline(
        transformer=parts.transformer(diffusers.Lumina2Transformer2DModel, **config),
        vae=parts.kl_vae8(),
        text_encoder=parts.gemma2(query_pre_attn_scalar=8),
        tokenizer=parts.tokenizer("<|start|> $A", 256),
        scheduler=parts.scheduler(shift=6.0),
    )


@tiny_pipeline
def make_lumina():
    """VAE factor 8, fixed; doubled batch; size a multiple of 16."""
    transformer = diffusers.LuminaNextDiT2DModel(**LUMINA, cross_attention_dim=16)
    torch.nn.init.normal_(transformer.pad_token, std=0.02)  # diffusers leaves whatever memory held
    return diffusers.LuminaPipeline(
        transformer=parts.without_zeros(transformer),
        vae=parts.kl_vae8(**SDXL_SCALE),
        text_encoder=parts.model(transformers.GemmaModel, **parts.text_config(head_dim=8)),
        tokenizer=parts.tokenizer("<|start|> $A", 256),
        scheduler=parts.scheduler(),
    )


@tiny_pipeline
def make_cogview4():
    """VAE factor 2, two calls; size a multiple of 16."""
    sizes = {"num_layers": 2, "pos_embed_max_size": 32, "sample_size": 16, "rope_axes_dim": (32, 32)}
    config = {**CHANNELS, **HEADS, **sizes, "text_embed_dim": 16, "time_embed_dim": 16, "condition_dim": 8}
    return diffusers.CogView4Pipeline(
        transformer=parts.transformer(diffusers.CogView4Transformer2DModel, **config),
        vae=parts.kl_vae(scaling_factor=1.0, shift_factor=0.0),
        text_encoder=parts.model(transformers.GlmModel, **parts.text_config(head_dim=8)),
        tokenizer=parts.tokenizer("<|start|> $A", 1024),
        scheduler=parts.glm_scheduler(),
    )


@tiny_pipeline
def make_bria():
    """VAE factor 2, doubled batch; size a multiple of 4."""
    return diffusers.BriaPipeline(
        transformer=parts.transformer(diffusers.BriaTransformer2DModel, **FLUX, joint_attention_dim=32),
        vae=parts.kl_vae(**SDXL_SCALE),
        text_encoder=parts.t5(),
        tokenizer=parts.t5_tokenizer(),
        scheduler=parts.flux_scheduler(),
    )


@tiny_pipeline
def make_bria_fibo():
    """VAE factor 16, doubled batch; size a multiple of 16.

    The pipeline feeds its beginning-of-text id, 128000, for an empty prompt, so the text encoder knows as many.
    """
    from diffusers.models.transformers.transformer_bria_fibo import BriaFiboTransformer2DModel

    config = {**FLUX, "in_channels": LATENT_CHANNELS, "joint_attention_dim": 8, "text_encoder_dim": 4}
    text = {"vocab_size": 128001, "hidden_size": 4, "intermediate_size": 16, "tie_word_embeddings": True}
    text |= {"num_hidden_layers": 3, "num_attention_heads": 1}
    return diffusers.BriaFiboPipeline(
        transformer=parts.transformer(BriaFiboTransformer2DModel, **config),
        vae=parts.wan22_vae(),
        text_encoder=parts.model(transformers.SmolLM3ForCausalLM, **parts.text_config(**text)),
        tokenizer=parts.tokenizer("$A", 4096),
        scheduler=parts.flux_scheduler(),
    )


@tiny_pipeline
def make_ernie():
    """Without prompt enhancer (VAE factor 2); size a multiple of 4."""
    config = {"in_channels": PACKED_CHANNELS, "out_channels": PACKED_CHANNELS, "num_attention_heads": 2}
    config |= {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "text_in_dim": 16, "rope_axes_dim": AXES}
    vision = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    return diffusers.ErnieImagePipeline(
        transformer=parts.transformer(diffusers.ErnieImageTransformer2DModel, **config),
        vae=parts.flux2_vae(),
        text_encoder=parts.model(
            transformers.Mistral3Model,
            text_config=transformers.Ministral3Config(**parts.text_config(head_dim=8)),
            vision_config=vision,
            image_token_index=parts.IMAGE,
        ),
        tokenizer=parts.tokenizer("<|start|> $A", 512),
        scheduler=parts.scheduler(shift=3.0),
    )


@tiny_pipeline
def make_hidream():
    """VAE factor 1, doubled batch, UniPC; it draws 128x128 pixels whatever is asked.

    The pipeline scales every size to (128 x VAE factor) squared, so its latents have at least 128 x 128 elements.
    """
    transformer = parts.transformer(
        diffusers.HiDreamImageTransformer2DModel,
        **CHANNELS,
        **HEADS,
        patch_size=8,
        num_layers=1,
        num_single_layers=1,
        caption_channels=[32, 16],
        text_emb_dim=32,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=AXES,
        max_resolution=(128, 128),
        llama_layers=[0, 1],
    )
    vae = parts.kl_vae(widths=(8,), sample_size=128)
    return diffusers.HiDreamImagePipeline(
        transformer=transformer,
        vae=vae,
        text_encoder=parts.clip(transformers.CLIPTextModelWithProjection, max_position_embeddings=248),
        tokenizer=parts.clip_tokenizer(248),
        text_encoder_2=parts.clip(transformers.CLIPTextModelWithProjection, max_position_embeddings=248),
        tokenizer_2=parts.clip_tokenizer(218),
        text_encoder_3=parts.t5(),
        tokenizer_3=parts.t5_tokenizer(),
        text_encoder_4=parts.model(transformers.LlamaForCausalLM, **parts.text_config(attn_implementation="eager")),
        tokenizer_4=parts.tokenizer("<|start|> $A", 512),
        scheduler=parts.multistep_scheduler(diffusers.UniPCMultistepScheduler, shift=3.0),
    )


@tiny_pipeline
def make_sana():
    """VAE factor 32, doubled batch, DPM-Solver++; size a multiple of 32.

    With the pipeline's default resolution binning it draws 512x512; other sizes need use_resolution_binning=False.
    """
    vae = {"latent_channels": LATENT_CHANNELS, "attention_head_dim": 4, "scaling_factor": 0.41407}
    for side in ("encoder", "decoder"):
        vae[f"{side}_block_types"] = ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3
        vae[f"{side}_block_out_channels"] = (4, 4, 8, 8, 8, 8)
        vae[f"{side}_layers_per_block"] = (1, 1, 1, 1, 1, 1)
        vae[f"{side}_qkv_multiscales"] = ((), (), (), (5,), (5,), (5,))
    return diffusers.SanaPipeline(
        transformer=parts.transformer(diffusers.SanaTransformer2DModel, **parts.SANA, sample_size=16),
        vae=diffusers.AutoencoderDC(**vae, upsample_block_type="interpolate", downsample_block_type="Conv"),
        text_encoder=parts.gemma2(),
        tokenizer=parts.tokenizer("<|start|> $A", 2048),
        scheduler=parts.multistep_scheduler(diffusers.DPMSolverMultistepScheduler, shift=3.0),
    )


# Both forms of PRX
PRX = {"context_in_dim": 16, "hidden_size": 32, "mlp_ratio": 2.0, "num_heads": 2, "depth": 2, "axes_dim": [8, 8]}


def make_prx(directory, seed=0):
    """VAE factor 8, doubled batch; size a multiple of 16.

    With the pipeline's default resolution binning it draws 256x256; other sizes need use_resolution_binning=False.
    """
    from transformers.models.t5gemma.configuration_t5gemma import T5GemmaModuleConfig
    from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

    encoder = T5GemmaModuleConfig(**parts.text_config(head_dim=8, dropout_rate=0.0))

    @tiny_pipeline
    def make():
        vae = parts.kl_vae(widths=(4, 4, 8, 8), sample_size=256)
        config = {**PRX, "in_channels": LATENT_CHANNELS, "patch_size": 2}
        return diffusers.PRXPipeline(
            transformer=parts.transformer(diffusers.PRXTransformer2DModel, **config),
            vae=vae,
            text_encoder=T5GemmaEncoder(encoder).eval(),
            tokenizer=parts.tokenizer("<|start|> $A", 64),
            scheduler=parts.scheduler(shift=3.0),
            default_sample_size=256,
        )

    folder = make(directory, seed)
    # Published checkpoints hold the whole encoder-decoder's configuration, of which diffusers takes the encoder's.
    whole = transformers.T5GemmaConfig(encoder=encoder, decoder=encoder, vocab_size=parts.VOCAB_SIZE)
    whole.save_pretrained(folder / "text_encoder")
    return folder


@tiny_pipeline
def make_prx_pixel():
    """No VAE, doubled batch, noise twice as strong; size a multiple of 8.

    With the pipeline's default resolution binning it draws 1024x1024; other sizes need use_resolution_binning=False.
    """
    config = {**PRX, "in_channels": 3, "patch_size": 8, "bottleneck_size": 16, "resolution_embeds": True}
    text = parts.qwen3_vl_text(**parts.rope((2, 1, 1), rope_theta=5000000.0))
    return diffusers.PRXPixelPipeline(
        transformer=parts.transformer(diffusers.PRXTransformer2DModel, **config),
        text_encoder=parts.model(transformers.Qwen3VLTextModel, **text),
        tokenizer=parts.tokenizer("$A", 1024),
        scheduler=parts.scheduler(shift=3.0),
        prompt_max_tokens=64,
    )


@tiny_pipeline
def make_omnigen():
    """VAE factor 8, doubled batch, time from 0 at noise to 1; size a multiple of 16."""
    from diffusers.pipelines.omnigen import pipeline_omnigen, processor_omnigen

    if not hasattr(processor_omnigen, "transforms"):
        # Without torchvision there is no processor; it needs that for images to edit, not for text.
        nothing = SimpleNamespace(Compose=list, Lambda=callable, ToTensor=object, Normalize=lambda **statistics: None)
        processor_omnigen.transforms = nothing
        pipeline_omnigen.OmniGenMultiModalProcessor = processor_omnigen.OmniGenMultiModalProcessor

    text = {"pad_token_id": parts.PAD, "vocab_size": parts.VOCAB_SIZE, "time_step_dim": 32}
    text |= {"max_position_embeddings": 1024, "original_max_position_embeddings": 1024}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    sizes |= {"in_channels": LATENT_CHANNELS, "num_layers": 2, "pos_embed_max_size": 32}
    factors = {"short_factor": [1.0] * 8, "long_factor": [1.0] * 8}
    return diffusers.OmniGenPipeline(
        transformer=parts.transformer(diffusers.OmniGenTransformer2DModel, **text, **sizes, rope_scaling=factors),
        vae=parts.kl_vae8(**SDXL_SCALE),
        tokenizer=parts.tokenizer("<|start|> $A", 1024),
        scheduler=parts.scheduler(invert_sigmas=True, num_train_timesteps=1),
    )


# name: (make, height and width, --pipeline_kwargs)
FAMILIES = {
    "kontext": (make_kontext, 32, {"max_area": 1024}),
    "chroma": (make_chroma, 32, {}),
    "aura_flow": (make_aura_flow, 32, {}),
    "lumina2": (make_lumina2, 32, {}),
    "lumina": (make_lumina, 32, {}),
    "cogview4": (make_cogview4, 32, {}),
    "bria": (make_bria, 32, {}),
    "bria_fibo": (make_bria_fibo, 64, {}),
    "ernie": (make_ernie, 32, {}),
    "hidream": (make_hidream, 128, {}),
    "sana": (make_sana, 64, {"use_resolution_binning": False}),
    "prx": (make_prx, 64, {"use_resolution_binning": False}),
    "prx_pixel": (make_prx_pixel, 64, {"use_resolution_binning": False}),
    "omnigen": (make_omnigen, 32, {}),
}
