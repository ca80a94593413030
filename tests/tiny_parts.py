"""What tiny pipelines are made of: real classes of diffusers and transformers at the smallest sizes, random weights.

Nothing is downloaded. `tiny_pipeline` turns a function that makes a pipeline into one that saves it, seeded. diffusers
and transformers import a class when it is first named, so no list of classes stands here.
"""

import functools
from pathlib import Path

import diffusers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers


# Position is id. The end token must not be id 2: CLIP would then pool at the highest id (a legacy rule), not at it.
SPECIAL_TOKENS = ["<|pad|>", "<|start|>", "<|im_start|>", "<|end|>", "<|im_end|>"]
SPECIAL_TOKENS += ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
PAD, START, _, END, _, VISION_START, VISION_END, IMAGE, VIDEO = range(len(SPECIAL_TOKENS))
TOKEN_IDS = {"pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END}
VISION_TOKEN_IDS = {"vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END}
VISION_TOKEN_IDS |= {"image_token_id": IMAGE, "video_token_id": VIDEO}
VOCAB_SIZE = 512

LATENT_CHANNELS = 4
PACKED_CHANNELS = 4 * LATENT_CHANNELS  # 2 x 2 latents to a token
CHANNELS = {"in_channels": LATENT_CHANNELS, "out_channels": LATENT_CHANNELS}
HEADS = {"attention_head_dim": 16, "num_attention_heads": 2}
AXES = (4, 6, 6)  # of a head's 16 dimensions, those that turn with each of three coordinates
LATENT_STATISTICS = {"latents_mean": [-0.3, 0.1, 0.2, -0.1], "latents_std": [1.5, 0.8, 1.2, 2.0]}
SDXL_SCALE = {"scaling_factor": 0.13025, "shift_factor": None}
# Sana's transformer, for pictures and for video
SANA = {**CHANNELS, **HEADS, "num_layers": 2, "cross_attention_dim": 32, "caption_channels": 16}
SANA |= {"num_cross_attention_heads": 2, "cross_attention_head_dim": 16}


def tiny_pipeline(make):
    """Have `make(**overrides)`, which makes a pipeline, called as `make(directory, seed=0, **overrides)`.

    The pipeline is made of `seed`, whatever was drawn before, and saved; returned is the folder, which
    `DiffusionPipeline.from_pretrained` loads.
    """

    @functools.wraps(make)
    def make_and_save(directory, seed=0, **overrides) -> Path:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            make(**overrides).save_pretrained(directory)
        return Path(directory)

    return make_and_save


def parts_of(make, **overrides) -> dict:
    """The parts of another tiny pipeline, unsaved. What is made after them is drawn as if they were not there."""
    with torch.random.fork_rng(devices=[]):
        return make.__wrapped__(**overrides).components


# Transformers


def transformer(model_class, **config):
    return without_zeros(model_class(**config))


def without_zeros(model):
    """Give small noise to parameters that start at zero, which would make the output constant or cut off gradients."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return model


def lively(model):
    """Triple the weights of blocks and modulation: at this width a gate times what it lets pass is so small that
    neither the prompt nor a LoRA would move the output."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and ("blocks." in name or "modulation" in name):
                parameter *= 3
    return model


# VAEs


def kl_vae(widths=(8, 16), **config):
    """An `AutoencoderKL` with a block for each width, so of factor 2 ** (number of widths - 1)."""
    defaults = {"latent_channels": LATENT_CHANNELS, "norm_num_groups": 4, "sample_size": 64}
    defaults |= {"scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False}  # FLUX.1's
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        **defaults | {"use_post_quant_conv": config.get("use_quant_conv", False)} | config,
    )


def kl_vae8(**config):
    """The factor 8 that some pipelines take for granted."""
    return kl_vae((8, 8, 8, 16), use_quant_conv=True, **config)


def narrow_kl_vae(blocks, **config):
    return kl_vae((4,) * blocks, norm_num_groups=2, mid_block_add_attention=False, **config)


def flux2_vae():
    """The batch norm's statistics are those of trained latents: a mean and a variance for each channel."""
    vae = diffusers.AutoencoderKLFlux2(
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


def qwen_vae():
    sizes = {"base_dim": 8, "z_dim": LATENT_CHANNELS, "dim_mult": [1, 2, 2], "num_res_blocks": 1}
    return diffusers.AutoencoderKLQwenImage(**sizes, temperal_downsample=[False, True], **LATENT_STATISTICS)


def wan21_vae():
    return diffusers.AutoencoderKLWan(
        base_dim=8,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        scale_factor_temporal=2,
        scale_factor_spatial=4,
        **LATENT_STATISTICS,
    )


def wan22_vae():
    """Wan 2.2's layout: factor 8 by convolutions, 2 by patches."""
    return diffusers.AutoencoderKLWan(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        scale_factor_temporal=4,
        **LATENT_STATISTICS,
    )


def hunyuan_video_vae():
    return diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=LATENT_CHANNELS,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )


# Text encoders


def model(model_class, **config):
    """A model of transformers, from its class and the entries of its config."""
    return model_class(model_class.config_class(**config)).eval()


def text_config(**overrides) -> dict:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {"vocab_size": VOCAB_SIZE, **sizes, "num_key_value_heads": 1, **TOKEN_IDS, **overrides}


def vision_config(**overrides) -> dict:
    return {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 16, **overrides}


def rope(mrope_section=(1, 1, 2), **config) -> dict:
    """How the positions of text, rows and columns share a head's dimensions."""
    return {"rope_parameters": {"rope_type": "default", "mrope_section": list(mrope_section), **config}}


def clip(model_class, max_position_embeddings=77):
    config = text_config(projection_dim=16, max_position_embeddings=max_position_embeddings)
    del config["num_key_value_heads"]
    return model(model_class, **config)


def t5(width=32, model_class=None, **overrides):
    sizes = {"d_model": width, "d_kv": width // 2, "d_ff": 2 * width, "num_layers": 2, "num_heads": 2}
    tokens = {"vocab_size": VOCAB_SIZE, "pad_token_id": PAD, "eos_token_id": END}
    config = {**sizes, **tokens, "feed_forward_proj": "gated-gelu", **overrides}
    return model(model_class or transformers.T5EncoderModel, **config)


def byt5():
    """Reads bytes, for the letters that a picture shows."""
    return t5(width=16, vocab_size=384, num_layers=1, eos_token_id=1)


def umt5(width=16):
    return t5(width, transformers.UMT5EncoderModel)


def gemma2(**config):
    return model(transformers.Gemma2Model, **text_config(head_dim=8, **config))


def qwen3(model_class, **config):
    return model(model_class, **text_config(head_dim=8, **config))


def qwen_vl():
    return model(
        transformers.Qwen2_5_VLForConditionalGeneration,
        text_config=text_config(**rope(rope_theta=1000000.0)),
        vision_config=vision_config(),
        **VISION_TOKEN_IDS,
    )


def qwen3_vl_text(**overrides) -> dict:
    return text_config(head_dim=8, **{**rope(rope_theta=5000000.0), **overrides})


def qwen3_vl(model_class=None, hidden_size=16, **overrides):
    sizes = {"hidden_size": hidden_size, "intermediate_size": 2 * hidden_size}
    return model(
        model_class or transformers.Qwen3VLForConditionalGeneration,
        text_config=qwen3_vl_text(**sizes, **overrides),
        vision_config=vision_config(
            out_hidden_size=hidden_size, num_position_embeddings=16, deepstack_visual_indexes=[0]
        ),
        **VISION_TOKEN_IDS,
    )


# Tokenizers


def tokenizer(template, max_length, corpus=(), chat_template=None):
    """Byte-level BPE: one token per byte, but for the words of `corpus`."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        min_frequency=1,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<|start|>", START), ("<|end|>", END)]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        model_max_length=max_length,
        pad_token="<|pad|>",
        bos_token="<|start|>",
        eos_token="<|end|>",
        extra_special_tokens=[token for token in SPECIAL_TOKENS if token not in ("<|pad|>", "<|start|>", "<|end|>")],
    )
    if chat_template:
        fast.chat_template = chat_template
    return fast


def clip_tokenizer(max_length=77):
    return tokenizer("<|start|> $A <|end|>", max_length)


def t5_tokenizer(max_length=512):
    return tokenizer("$A <|end|>", max_length)


def unbuilt(pipeline_class):
    """A pipeline without its parts, for the prompt template that it carries."""
    return pipeline_class(scheduler=None, vae=None, text_encoder=None, tokenizer=None, transformer=None)


# Schedulers


def scheduler(**config):
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


def shifting_scheduler(base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096, **config):
    """One whose shift depends on the number of image tokens; the defaults are FLUX.1's."""
    ends = {"base_shift": base_shift, "max_shift": max_shift}
    ends |= {"base_image_seq_len": base_image_seq_len, "max_image_seq_len": max_image_seq_len}
    return scheduler(use_dynamic_shifting=True, **ends, **config)


def flux_scheduler():
    """FLUX.1-dev's, which others ship as well."""
    return shifting_scheduler(shift=3.0)


def qwen_scheduler():
    return shifting_scheduler(max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02)


def glm_scheduler():
    """CogView4's and GLM-Image's."""
    return scheduler(
        use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, base_image_seq_len=256, time_shift_type="linear"
    )


def multistep_scheduler(scheduler_class, shift):
    """A solver of a higher order that walks a rectified flow."""
    return scheduler_class(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, solver_order=2)
