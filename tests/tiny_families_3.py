"""Tiny pipelines of further flow-matching families, in the manner of tests/tiny_pipelines.py.

`_chat_processor` stands in for Qwen2-VL's and Qwen3-VL's processors, whose video half needs torchvision; what the
pipelines ask of a processor for text alone it does alike.
"""

import re

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage21,
    AutoencoderKLWan,
    AutoencoderTiny,
    DiffusionPipeline,
    DreamLitePipeline,
    DreamLiteUNetModel,
    ErnieImagePipeline,
    ErnieImageTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    GlmImagePipeline,
    GlmImageTransformer2DModel,
    Ideogram4Pipeline,
    Ideogram4Transformer2DModel,
    Kandinsky5T2IPipeline,
    Kandinsky5Transformer3DModel,
    LongCatImagePipeline,
    LongCatImageTransformer2DModel,
    NucleusMoEImagePipeline,
    NucleusMoEImageTransformer2DModel,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from tiny_pipelines import (
    END,
    LATENT_CHANNELS,
    PAD,
    SPECIAL_TOKENS,
    START,
    VOCAB_SIZE,
    _clip,
    _flux2_vae,
    _qwen_vae,
    _qwen_vl,
    _save,
    _t5,
    _text_config,
    _tokenizer,
    _without_zeros,
    make_flux,
)
from transformers import (
    ByT5Tokenizer,
    CLIPImageProcessorPil,
    CLIPTextModel,
    GlmImageConfig,
    GlmImageForConditionalGeneration,
    GlmImageImageProcessorPil,
    GlmImageProcessor,
    LlavaProcessor,
    Ministral3Config,
    Mistral3Config,
    Mistral3Model,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
    UMT5Config,
    UMT5EncoderModel,
)


VISION_VOCAB_SIZE = 64
DREAMLITE_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] if message['content'] is string else message['content'][0]['text'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_ernie(directory, seed=0, **overrides):
    """Save an `ErnieImagePipeline` without prompt enhancer (VAE factor 2); sizes are multiples of 4."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_layers": 2,
            "ffn_hidden_size": 64,
            "in_channels": 4 * LATENT_CHANNELS,
            "out_channels": 4 * LATENT_CHANNELS,
            "text_in_dim": 16,
            "rope_axes_dim": (4, 6, 6),
        }
        pipe = ErnieImagePipeline(
            transformer=_without_zeros(ErnieImageTransformer2DModel(**{**config, **overrides})),
            vae=_flux2_vae(),
            text_encoder=_mistral3(),
            tokenizer=_tokenizer("<|start|> $A", max_length=512),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        )
    return _save(pipe, directory)


def make_nucleus(directory, seed=0, **overrides):
    """Save a `NucleusMoEImagePipeline` (VAE factor 4, one dense and one mixture block); sizes are multiples of 8."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = {
            "in_channels": 4 * LATENT_CHANNELS,
            "out_channels": LATENT_CHANNELS,
            "num_layers": 5,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "joint_attention_dim": 16,
            "axes_dims_rope": (4, 6, 6),
            "mlp_ratio": 6.0,
            "num_experts": 4,
            "moe_intermediate_dim": 16,
            "capacity_factors": 2.0,
        }
        transformer = NucleusMoEImageTransformer2DModel(**{**config, **overrides})
        for name, parameter in transformer.named_parameters():
            if ".experts." in name:  # made by torch.empty
                parameter.data.normal_(std=0.1)
        pipe = NucleusMoEImagePipeline(
            transformer=_without_zeros(transformer),
            vae=_qwen_vae(),
            text_encoder=_qwen3_vl(num_layers=9),
            processor=_chat_processor(),
            scheduler=_dynamic_scheduler(),
        )
    return _save(pipe, directory)


def make_longcat(directory, seed=0, **overrides):
    """Save a `LongCatImagePipeline` (VAE factor 2, its latents have 16 channels); sizes are multiples of 4.

    Call it with `enable_prompt_rewrite=False`: otherwise its text encoder writes another prompt.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = {
            "in_channels": 64,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "pooled_projection_dim": 16,
            "axes_dims_rope": (4, 6, 6),
        }
        pipe = LongCatImagePipeline(
            transformer=_without_zeros(LongCatImageTransformer2DModel(**{**config, **overrides})),
            vae=_kl_vae(16, blocks=2, scaling_factor=0.3611, shift_factor=0.1159),
            text_encoder=_qwen_vl(),
            tokenizer=_tokenizer("$A", max_length=1024),
            text_processor=_chat_processor(),
            scheduler=_dynamic_scheduler(max_shift=1.15, max_image_seq_len=4096, shift_terminal=None),
        )
    return _save(pipe, directory)


def make_kandinsky5(directory, seed=0, **overrides):
    """Save a `Kandinsky5T2IPipeline` (VAE factor 8); 1024x1024 is the smallest of its seven sizes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = {
            "in_visual_dim": LATENT_CHANNELS,
            "out_visual_dim": LATENT_CHANNELS,
            "in_text_dim": 16,
            "in_text_dim2": 16,
            "time_dim": 16,
            "model_dim": 16,
            "ff_dim": 32,
            "num_text_blocks": 1,
            "num_visual_blocks": 1,
            "axes_dims": (4, 6, 6),
        }
        pipe = Kandinsky5T2IPipeline(
            transformer=_without_zeros(Kandinsky5Transformer3DModel(**{**config, **overrides})),
            vae=_kl_vae(LATENT_CHANNELS, blocks=4, scaling_factor=0.3611, shift_factor=0.1159),
            text_encoder=_qwen_vl(),
            tokenizer=_chat_processor(),
            text_encoder_2=_clip(CLIPTextModel),
            tokenizer_2=_tokenizer("<|start|> $A <|end|>", max_length=77),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        )
    return _save(pipe, directory)


def make_qwen21(directory, seed=0, **overrides):
    """Save a `QwenImage21Pipeline` (VAE factor 16, RGBA); sizes are multiples of 32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = {
            "in_channels": LATENT_CHANNELS,
            "out_channels": LATENT_CHANNELS,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "context_in_dim": 16,
            "axes_dims_rope": (4, 6, 6),
        }
        vae = AutoencoderKLQwenImage21(
            base_dim=8,
            decoder_base_dim=8,
            z_dim=LATENT_CHANNELS,
            dim_mult=[1, 1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[-0.3, 0.1, 0.2, -0.1],
            latents_std=[1.5, 0.8, 1.2, 2.0],
        )
        pipe = QwenImage21Pipeline(
            transformer=_without_zeros(QwenImage21Transformer2DModel(**{**config, **overrides})),
            vae=vae,
            text_encoder=_qwen3_vl(num_layers=2),
            processor=_chat_processor(),
            scheduler=_dynamic_scheduler(),
        )
    return _save(pipe, directory)


def make_ideogram4(directory, seed=0, **overrides):
    """Save an `Ideogram4Pipeline` (VAE factor 2, a second transformer for guidance); sizes are multiples of 4."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = {
            "in_channels": 4 * LATENT_CHANNELS,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "adaln_dim": 16,
            "llm_features_dim": 13 * 8,
            "mrope_section": (4, 2, 2),
        }
        pipe = Ideogram4Pipeline(
            transformer=_without_zeros(Ideogram4Transformer2DModel(**{**config, **overrides})),
            unconditional_transformer=_without_zeros(Ideogram4Transformer2DModel(**{**config, **overrides})),
            vae=_flux2_vae(),
            text_encoder=_qwen3_vl(num_layers=36, hidden_size=8, model_class=Qwen3VLModel),
            tokenizer=_chat_tokenizer(),
            scheduler=FlowMatchEulerDiscreteScheduler(),
        )
    return _save(pipe, directory)


def make_glm(directory, seed=0, **overrides):
    """Save a `GlmImagePipeline` (VAE factor 8, a language model writes image tokens first); sizes are multiples of 32.

    Its language model always writes 16 x 16 tokens of a preview besides the image's own.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = {
            "in_channels": LATENT_CHANNELS,
            "out_channels": LATENT_CHANNELS,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "text_embed_dim": 32,
            "time_embed_dim": 32,
            "condition_dim": 8,
            "prior_vq_quantizer_codebook_size": VISION_VOCAB_SIZE,
        }
        vae = _kl_vae(LATENT_CHANNELS, blocks=4, latents_mean=[-0.3, 0.1, 0.2, -0.1], latents_std=[1.5, 0.8, 1.2, 2.0])
        pipe = GlmImagePipeline(
            transformer=_without_zeros(GlmImageTransformer2DModel(**{**config, **overrides})),
            vae=vae,
            text_encoder=_t5(),
            tokenizer=ByT5Tokenizer(),
            vision_language_encoder=_glm(),
            processor=_glm_processor(),
            scheduler=FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True,
                base_shift=0.25,
                max_shift=0.75,
                base_image_seq_len=256,
                time_shift_type="linear",
            ),
        )
    return _save(pipe, directory)


def make_dreamlite(directory, seed=0, **overrides):
    """Save a `DreamLitePipeline` (a U-Net, VAE factor 2); height and width must be multiples of 8."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = {
            "in_channels": LATENT_CHANNELS,
            "out_channels": LATENT_CHANNELS,
            "down_block_types": ("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
            "up_block_types": ("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "cross_attention_dim": 16,
            "attention_head_dim": 8,
            "use_linear_projection": True,
            "addition_embed_type": "time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 16,
        }
        channels = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
        vae = AutoencoderTiny(
            **channels, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), latent_channels=LATENT_CHANNELS
        )
        words = [part for part in re.split(r"<\|im_\w+\|>", DREAMLITE_TEMPLATE) if part]
        pipe = DreamLitePipeline(
            unet=_without_zeros(DreamLiteUNetModel(**{**config, **overrides})),
            vae=vae,
            text_encoder=_qwen3_vl(num_layers=2),
            tokenizer=_tokenizer("$A", max_length=1024, corpus=words),
            processor=_chat_processor(),
            scheduler=_dynamic_scheduler(max_shift=1.16, max_image_seq_len=4096, shift_terminal=None),
        )
    return _save(pipe, directory)


def make_kontext(directory, seed=0, **overrides):
    """Save a `FluxKontextPipeline`; without an image it draws from text. Call it with `max_area` height * width."""
    flux = DiffusionPipeline.from_pretrained(make_flux(directory, seed, **overrides))
    return _save(FluxKontextPipeline(**flux.components), directory)


def make_wan(directory, seed=0, **overrides):
    """Save a `WanPipeline` (Wan 2.1, VAE factor 4); height and width are
    multiples of 16. Call it with `num_frames=1`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = {
            "in_channels": LATENT_CHANNELS,
            "out_channels": LATENT_CHANNELS,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "text_dim": 16,
            "freq_dim": 32,
            "ffn_dim": 64,
            "rope_max_seq_len": 32,
        }
        pipe = WanPipeline(
            transformer=_without_zeros(WanTransformer3DModel(**{**config, **overrides})),
            vae=_wan21_vae(),
            text_encoder=_umt5(),
            tokenizer=_tokenizer("$A <|end|>", max_length=512),
            scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        )
    return _save(pipe, directory)


def _wan21_vae():
    return AutoencoderKLWan(
        base_dim=8,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[-0.3, 0.1, 0.2, -0.1],
        latents_std=[1.5, 0.8, 1.2, 2.0],
        scale_factor_temporal=2,
        scale_factor_spatial=4,
    )


def _dynamic_scheduler(**overrides):
    config = {
        "use_dynamic_shifting": True,
        "base_shift": 0.5,
        "max_shift": 0.9,
        "base_image_seq_len": 256,
        "max_image_seq_len": 8192,
        "shift_terminal": 0.02,
        "time_shift_type": "exponential",
    }
    return FlowMatchEulerDiscreteScheduler(**{**config, **overrides})


def _kl_vae(channels, blocks, **overrides):
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(4,) * blocks,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=2,
        sample_size=64,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        **overrides,
    )


def _qwen3_vl(num_layers, hidden_size=16, model_class=Qwen3VLForConditionalGeneration):
    text = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000000.0, "mrope_section": [1, 1, 2]},
        "pad_token_id": PAD,
        "bos_token_id": START,
        "eos_token_id": END,
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": hidden_size,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    config = Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        vision_start_token_id=SPECIAL_TOKENS.index("<|vision_start|>"),
        vision_end_token_id=SPECIAL_TOKENS.index("<|vision_end|>"),
        image_token_id=SPECIAL_TOKENS.index("<|image_pad|>"),
        video_token_id=SPECIAL_TOKENS.index("<|video_pad|>"),
    )
    return model_class(config).eval()


def _umt5():
    config = UMT5Config(
        vocab_size=VOCAB_SIZE,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        pad_token_id=PAD,
        eos_token_id=END,
    )
    return UMT5EncoderModel(config).eval()


def _mistral3():
    text = Ministral3Config(
        **_text_config(head_dim=8),
    )
    vision = {
        "model_type": "pixtral",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Mistral3Config(
        text_config=text, vision_config=vision, image_token_index=SPECIAL_TOKENS.index("<|image_pad|>")
    )
    return Mistral3Model(config).eval()


def _glm():
    """Its end token is one that it cannot write: it always writes as many as it is asked for."""
    text = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        "pad_token_id": PAD,
        "eos_token_id": VISION_VOCAB_SIZE,
        "vision_vocab_size": VISION_VOCAB_SIZE,
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "image_size": 64}
    config = GlmImageConfig(
        text_config=text,
        vision_config=vision,
        vq_config={"embed_dim": 8, "num_embeddings": VISION_VOCAB_SIZE, "latent_channels": 16},
        image_token_id=SPECIAL_TOKENS.index("<|image_pad|>"),
        image_start_token_id=START,
        image_end_token_id=VISION_VOCAB_SIZE,
    )
    return GlmImageForConditionalGeneration(config).eval()


def _glm_processor():
    tokenizer = _chat_tokenizer()
    names = {"image_token": "<|image_pad|>", "grid_bos_token": "<|vision_start|>", "grid_eos_token": "<|vision_end|>"}
    tokenizer._set_model_specific_special_tokens(names)
    return GlmImageProcessor(GlmImageImageProcessorPil(), tokenizer, chat_template=CHAT_TEMPLATE)


def _chat_tokenizer():
    tokenizer = _tokenizer("$A", max_length=1024)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _chat_processor():
    return LlavaProcessor(CLIPImageProcessorPil(), _chat_tokenizer(), chat_template=CHAT_TEMPLATE, patch_size=14)


FAMILIES = {
    "dreamlite": (make_dreamlite, 32, {}),
    "ernie": (make_ernie, 32, {}),
    "nucleus": (make_nucleus, 32, {}),
    "longcat": (make_longcat, 32, {"pipeline_kwargs": {"enable_prompt_rewrite": False}}),
    "qwen21": (make_qwen21, 64, {"pipeline_kwargs": {"use_kv_cache": False}}),
    "ideogram4": (
        make_ideogram4,
        32,
        {"pipeline_kwargs": {"max_sequence_length": 64, "guidance_scale": 7.0, "guidance_schedule": None}},
    ),
    "wan": (make_wan, 32, {"pipeline_kwargs": {"num_frames": 1}}),
    "kontext": (make_kontext, 32, {"pipeline_kwargs": {"max_area": 1024}}),
    "glm": (make_glm, 64, {}),
    "kandinsky5": (make_kandinsky5, 1024, {}),
}
