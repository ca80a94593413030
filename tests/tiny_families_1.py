"""Tiny but real pipelines of nine flow-matching families, random weights, built and saved without any download.

As in tiny_pipelines.py, `make_<name>(directory, seed=0)` saves one that `DiffusionPipeline.from_pretrained` loads.
"""

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    ChromaPipeline,
    ChromaTransformer2DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    LuminaNextDiT2DModel,
    LuminaPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tiny_pipelines import (
    END,
    LATENT_CHANNELS,
    PAD,
    SPECIAL_TOKENS,
    VOCAB_SIZE,
    _flux2_vae,
    _flux_scheduler,
    _qwen_vae,
    _save,
    _t5,
    _text_config,
    _tokenizer,
    _vae,
    _vae8,
    _without_zeros,
)
from transformers import (
    Gemma2Config,
    Gemma2Model,
    GemmaConfig,
    GemmaModel,
    GlmConfig,
    GlmModel,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLModel,
    UMT5Config,
    UMT5EncoderModel,
)


# Qwen3's chat template without tools and history; the content is text or a list of {"type": "text", "text": ...}.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def make_z_image(directory, seed=0, **overrides):
    """Save a `ZImagePipeline` (VAE factor 2, doubled batch above guidance 0); size a multiple of 4."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = {
            "in_channels": LATENT_CHANNELS,
            "dim": 32,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 16,
            "axes_dims": [4, 6, 6],
            "axes_lens": [1024, 64, 64],
        }
        pipe = ZImagePipeline(
            transformer=_without_zeros(ZImageTransformer2DModel(**{**config, **overrides})),
            vae=_vae(scaling_factor=0.3611, shift_factor=0.1159),
            text_encoder=_qwen3(num_hidden_layers=2).model,
            tokenizer=_chat_tokenizer(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        )
    return _save(pipe, directory)


def make_chroma(directory, seed=0, **overrides):
    """Save a `ChromaPipeline` (VAE factor 2, two calls above guidance 1); size a multiple of 4."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = {
            "in_channels": 4 * LATENT_CHANNELS,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "axes_dims_rope": (4, 6, 6),
            "approximator_num_channels": 16,
            "approximator_hidden_dim": 32,
            "approximator_layers": 1,
        }
        pipe = ChromaPipeline(
            transformer=_without_zeros(ChromaTransformer2DModel(**{**config, **overrides})),
            vae=_vae(scaling_factor=0.3611, shift_factor=0.1159),
            text_encoder=_t5(),
            tokenizer=_tokenizer("$A <|end|>", max_length=512),
            scheduler=FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True,
                base_shift=0.5,
                max_shift=1.15,
                base_image_seq_len=256,
                max_image_seq_len=4096,
            ),
        )
    return _save(pipe, directory)


def make_aura_flow(directory, seed=0, **overrides):
    """Save an `AuraFlowPipeline` (VAE factor 2, doubled batch); size a multiple of 4, at most 64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = {
            "sample_size": 16,
            "in_channels": LATENT_CHANNELS,
            "out_channels": LATENT_CHANNELS,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "caption_projection_dim": 32,
            "pos_embed_max_size": 256,
        }
        text_config = UMT5Config(
            vocab_size=VOCAB_SIZE,
            d_model=32,
            d_kv=16,
            d_ff=64,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            pad_token_id=PAD,
            eos_token_id=END,
        )
        pipe = AuraFlowPipeline(
            transformer=_lively(_without_zeros(AuraFlowTransformer2DModel(**{**config, **overrides}))),
            vae=_vae(scaling_factor=0.13025, shift_factor=None),
            text_encoder=UMT5EncoderModel(text_config).eval(),
            tokenizer=_tokenizer("$A <|end|>", max_length=512),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
        )
    return _save(pipe, directory)


def make_lumina2(directory, seed=0, **overrides):
    """Save a `Lumina2Pipeline` (VAE factor 8, fixed; two calls); size a multiple of 16."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = {
            "sample_size": 4,
            "in_channels": LATENT_CHANNELS,
            "hidden_size": 32,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 32,
            "axes_dim_rope": (4, 6, 6),
            "axes_lens": (300, 64, 64),
            "cap_feat_dim": 16,
        }
        pipe = Lumina2Pipeline(
            transformer=_without_zeros(Lumina2Transformer2DModel(**{**config, **overrides})),
            vae=_vae8(scaling_factor=0.3611, shift_factor=0.1159),
            text_encoder=Gemma2Model(Gemma2Config(**_text_config(), head_dim=8, query_pre_attn_scalar=8)).eval(),
            tokenizer=_tokenizer("<|start|> $A", max_length=256),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        )
    return _save(pipe, directory)


def make_lumina(directory, seed=0, **overrides):
    """Save a `LuminaPipeline` (VAE factor 8, fixed; doubled batch); size a multiple of 16."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = {
            "sample_size": 4,
            "in_channels": LATENT_CHANNELS,
            "hidden_size": 32,
            "num_layers": 2,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 32,
            "cross_attention_dim": 16,
        }
        transformer = LuminaNextDiT2DModel(**{**config, **overrides})
        torch.nn.init.normal_(transformer.pad_token, std=0.02)  # diffusers leaves whatever memory held
        pipe = LuminaPipeline(
            transformer=_without_zeros(transformer),
            vae=_vae8(scaling_factor=0.13025, shift_factor=None),
            text_encoder=GemmaModel(GemmaConfig(**_text_config(), head_dim=8)).eval(),
            tokenizer=_tokenizer("<|start|> $A", max_length=256),
            scheduler=FlowMatchEulerDiscreteScheduler(),
        )
    return _save(pipe, directory)


def make_cogview4(directory, seed=0, **overrides):
    """Save a `CogView4Pipeline` (VAE factor 2, two calls); size a multiple of 16."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = {
            "in_channels": LATENT_CHANNELS,
            "out_channels": LATENT_CHANNELS,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "text_embed_dim": 16,
            "time_embed_dim": 16,
            "condition_dim": 8,
            "pos_embed_max_size": 32,
            "sample_size": 16,
            "rope_axes_dim": (32, 32),
        }
        pipe = CogView4Pipeline(
            transformer=_without_zeros(CogView4Transformer2DModel(**{**config, **overrides})),
            vae=_vae(scaling_factor=1.0, shift_factor=0.0),
            text_encoder=GlmModel(GlmConfig(**_text_config(), head_dim=8)).eval(),
            tokenizer=_tokenizer("<|start|> $A", max_length=1024),
            scheduler=FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True,
                base_shift=0.25,
                max_shift=0.75,
                base_image_seq_len=256,
                time_shift_type="linear",
            ),
        )
    return _save(pipe, directory)


def make_krea2(directory, seed=0, **overrides):
    """Save a `Krea2Pipeline` (VAE factor 4, two calls above guidance 0); size a multiple of 8."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = {
            "in_channels": 4 * LATENT_CHANNELS,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 64,
            "timestep_embed_dim": 32,
            "text_hidden_dim": 16,
            "num_text_layers": 2,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 1,
            "text_intermediate_size": 32,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": (4, 6, 6),
        }
        vae = _qwen_vae()
        text = _text_config() | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
        vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 16}
        text_config = Qwen3VLConfig(
            text_config=text | {"head_dim": 8},
            vision_config=vision | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
            vision_start_token_id=SPECIAL_TOKENS.index("<|vision_start|>"),
            vision_end_token_id=SPECIAL_TOKENS.index("<|vision_end|>"),
            image_token_id=SPECIAL_TOKENS.index("<|image_pad|>"),
            video_token_id=SPECIAL_TOKENS.index("<|video_pad|>"),
        )
        pipe = Krea2Pipeline(
            transformer=_without_zeros(Krea2Transformer2DModel(**{**config, **overrides})),
            vae=vae,
            text_encoder=Qwen3VLModel(text_config).eval(),
            tokenizer=_chat_tokenizer(),
            scheduler=FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True,
                base_shift=0.5,
                max_shift=1.15,
                base_image_seq_len=256,
                max_image_seq_len=6400,
            ),
            text_encoder_select_layers=(1, 2),
        )
    return _save(pipe, directory)


def make_flux2(directory, seed=0, **overrides):
    """Save a `Flux2Pipeline` (VAE factor 2, embedded guidance); size a multiple of 4.

    The pipeline's default `text_encoder_out_layers` go up to 30, so the text encoder has as many. The published
    tokenizer is a `PixtralProcessor`, which needs torchvision; a text prompt passes a plain tokenizer alike.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text = _text_config(num_hidden_layers=30) | {"model_type": "mistral", "head_dim": 8}
        vision = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
        vision |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 8, "head_dim": 8}
        text_config = Mistral3Config(
            text_config=text, vision_config=vision, image_token_index=SPECIAL_TOKENS.index("<|image_pad|>")
        )
        pipe = Flux2Pipeline(
            transformer=_flux2_transformer(**overrides),
            vae=_flux2_vae(),
            text_encoder=Mistral3ForConditionalGeneration(text_config).eval(),
            tokenizer=_chat_tokenizer(),
            scheduler=_flux_scheduler(),
        )
    return _save(pipe, directory)


def make_flux2_klein(directory, seed=0, **overrides):
    """Save a `Flux2KleinPipeline`, the base one (VAE factor 2, two calls above guidance 1); size a multiple of 4.

    The pipeline's default `text_encoder_out_layers` go up to 27, so the text encoder has as many.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = Flux2KleinPipeline(
            transformer=_flux2_transformer(guidance_embeds=False, **overrides),
            vae=_flux2_vae(),
            text_encoder=_qwen3(num_hidden_layers=27),
            tokenizer=_chat_tokenizer(),
            scheduler=_flux_scheduler(),
            is_distilled=False,
        )
    return _save(pipe, directory)


def _lively(transformer):
    """Triple the weights of blocks and modulation: at this width a gate times what it lets pass is so small that
    neither the prompt nor a LoRA would move the output."""
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if parameter.ndim == 2 and ("blocks." in name or "modulation" in name):
                parameter *= 3
    return transformer


def _flux2_transformer(**overrides):
    config = {
        "in_channels": 4 * LATENT_CHANNELS,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 3 * 16,
        "timestep_guidance_channels": 32,
        "axes_dims_rope": (4, 4, 4, 4),
    }
    return _lively(_without_zeros(Flux2Transformer2DModel(**{**config, **overrides})))


def _qwen3(**overrides):
    return Qwen3ForCausalLM(Qwen3Config(**_text_config(**overrides), head_dim=8)).eval()


def _chat_tokenizer():
    """Knows the words of the longest template, so that a 512 token prompt still has room for the user's words."""
    unbuilt = Krea2Pipeline(scheduler=None, vae=None, text_encoder=None, tokenizer=None, transformer=None)
    words = unbuilt.prompt_template_encode_prefix.replace("<|im_start|>", "").split("<|im_end|>")
    tokenizer = _tokenizer("$A", max_length=1024, corpus=words)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


FAMILIES = {
    "z_image": (make_z_image, 32, {"pipeline_kwargs": {}}),
    "chroma": (make_chroma, 32, {"pipeline_kwargs": {}}),
    "aura_flow": (make_aura_flow, 32, {"pipeline_kwargs": {}}),
    "lumina2": (make_lumina2, 32, {"pipeline_kwargs": {}}),
    "cogview4": (make_cogview4, 32, {"pipeline_kwargs": {}}),
    "krea2": (make_krea2, 32, {"pipeline_kwargs": {}}),
    "flux2": (make_flux2, 32, {"pipeline_kwargs": {}}),
    "flux2_klein": (make_flux2_klein, 32, {"pipeline_kwargs": {}}),
    "lumina": (make_lumina, 32, {"pipeline_kwargs": {}}),
}
