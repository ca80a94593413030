"""Tiny but real diffusers text-to-image pipelines with random weights, built and saved without any download.

`make_flux(directory)`, `make_sd3(directory)` and `make_qwen(directory)` save a pipeline that
`DiffusionPipeline.from_pretrained(directory)` loads; `seed` picks its weights and further keyword arguments
replace entries of its transformer's config (`make_flux(directory, guidance_embeds=False)`). The schedulers are those
of FLUX.1-dev, Stable Diffusion 3.5 and Qwen-Image.
"""

import re
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
)


# Position is id. The end token must not be id 2: CLIP would then pool at the highest id (a legacy rule), not at it.
SPECIAL_TOKENS = [
    "<|pad|>",
    "<|start|>",
    "<|im_start|>",
    "<|end|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
PAD, START, END = (SPECIAL_TOKENS.index(token) for token in ("<|pad|>", "<|start|>", "<|end|>"))
VOCAB_SIZE = 512
LATENT_CHANNELS = 4


def make_flux(directory, seed=0, **overrides) -> Path:
    """Save a `FluxPipeline` (VAE factor 2, embedded guidance); height and width must be multiples of 4."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = {
            "in_channels": 4 * LATENT_CHANNELS,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 16,
            "axes_dims_rope": (4, 6, 6),
            "guidance_embeds": True,
        }
        pipe = FluxPipeline(
            transformer=_without_zeros(FluxTransformer2DModel(**{**config, **overrides})),
            vae=_vae(scaling_factor=0.3611, shift_factor=0.1159),
            text_encoder=_clip(CLIPTextModel),
            tokenizer=_tokenizer("<|start|> $A <|end|>", max_length=77),
            text_encoder_2=_t5(),
            tokenizer_2=_tokenizer("$A <|end|>", max_length=512),
            scheduler=_flux_scheduler(),
        )
    return _save(pipe, directory)


def make_sd3(directory, seed=0, **overrides) -> Path:
    """Save a `StableDiffusion3Pipeline` (VAE factor 2); height and width must be multiples of 4, at most 128."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = {
            "sample_size": 32,
            "in_channels": LATENT_CHANNELS,
            "out_channels": LATENT_CHANNELS,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "caption_projection_dim": 32,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 32,
            "pos_embed_max_size": 32,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
        }
        pipe = StableDiffusion3Pipeline(
            transformer=_without_zeros(SD3Transformer2DModel(**{**config, **overrides})),
            vae=_vae(scaling_factor=1.5305, shift_factor=0.0609),
            text_encoder=_clip(CLIPTextModelWithProjection),
            tokenizer=_tokenizer("<|start|> $A <|end|>", max_length=77),
            text_encoder_2=_clip(CLIPTextModelWithProjection),
            tokenizer_2=_tokenizer("<|start|> $A <|end|>", max_length=77),
            text_encoder_3=_t5(),
            tokenizer_3=_tokenizer("$A <|end|>", max_length=512),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        )
    return _save(pipe, directory)


def make_qwen(directory, seed=0, **overrides) -> Path:
    """Save a `QwenImagePipeline` (VAE factor 4); height and width must be multiples of 8."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = {
            "in_channels": 4 * LATENT_CHANNELS,
            "out_channels": LATENT_CHANNELS,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "axes_dims_rope": (4, 6, 6),
        }
        vae = _qwen_vae()
        pipe = QwenImagePipeline(
            transformer=_without_zeros(QwenImageTransformer2DModel(**{**config, **overrides})),
            vae=vae,
            text_encoder=_qwen_vl(),
            tokenizer=_qwen_tokenizer(),
            scheduler=FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True,
                base_shift=0.5,
                max_shift=0.9,
                base_image_seq_len=256,
                max_image_seq_len=8192,
                shift_terminal=0.02,
                time_shift_type="exponential",
            ),
        )
    return _save(pipe, directory)


PIPELINES = {"flux": make_flux, "sd3": make_sd3, "qwen": make_qwen}


def _save(pipe, directory) -> Path:
    pipe.save_pretrained(directory)
    return Path(directory)


def _without_zeros(transformer):
    """Give small noise to parameters that start at zero, which would make the output constant or cut off gradients."""
    with torch.no_grad():
        for parameter in transformer.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return transformer


def _vae(scaling_factor, shift_factor):
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _vae8(scaling_factor, shift_factor):
    """An `AutoencoderKL` with the factor 8 that some pipelines take for granted."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 16),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
    )


def _flux2_vae():
    """The batch norm's statistics are those of trained latents: a mean and a variance for each channel."""
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=64,
    )
    vae.bn.running_mean.normal_(std=0.3)
    vae.bn.running_var.uniform_(0.5, 3.0)
    return vae


def _qwen_vae():
    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[-0.3, 0.1, 0.2, -0.1],
        latents_std=[1.5, 0.8, 1.2, 2.0],
    )


def _flux_scheduler():
    """FLUX.1-dev's, which others ship as well."""
    return FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )


def _text_config(**overrides):
    config = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "pad_token_id": PAD,
        "bos_token_id": START,
        "eos_token_id": END,
    }
    return config | overrides


def _clip(model_class):
    config = CLIPTextConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        pad_token_id=PAD,
        bos_token_id=START,
        eos_token_id=END,
    )
    return model_class(config).eval()


def _t5():
    config = T5Config(
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
    return T5EncoderModel(config).eval()


def _qwen_vl():
    text = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [1, 1, 2]},
        "pad_token_id": PAD,
        "bos_token_id": START,
        "eos_token_id": END,
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 16}
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        vision_start_token_id=SPECIAL_TOKENS.index("<|vision_start|>"),
        vision_end_token_id=SPECIAL_TOKENS.index("<|vision_end|>"),
        image_token_id=SPECIAL_TOKENS.index("<|image_pad|>"),
        video_token_id=SPECIAL_TOKENS.index("<|video_pad|>"),
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def _qwen_tokenizer():
    """Learn the words of the pipeline's prompt template, so that its prefix is the 34 tokens the pipeline drops."""
    unbuilt = QwenImagePipeline(scheduler=None, vae=None, text_encoder=None, tokenizer=None, transformer=None)
    words = re.split(r"<\|im_\w+\|>", unbuilt.prompt_template_encode)
    return _tokenizer("$A", max_length=1024 + unbuilt.prompt_template_encode_start_idx, corpus=words)


def _tokenizer(template, max_length, corpus=()):
    """Byte-level BPE: one token per byte, but for the words of `corpus`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        min_frequency=1,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<|start|>", START), ("<|end|>", END)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        pad_token="<|pad|>",
        bos_token="<|start|>",
        eos_token="<|end|>",
        extra_special_tokens=[token for token in SPECIAL_TOKENS if token not in ("<|pad|>", "<|start|>", "<|end|>")],
    )
