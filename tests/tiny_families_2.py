"""Tiny but real pipelines of further flow-matching families, random weights, built and saved without any download.

As in tiny_pipelines.py: `make_<name>(directory, seed=0)` saves what `DiffusionPipeline.from_pretrained` loads.
"""

import torch
from diffusers import (
    AdaptiveProjectedMixGuidance,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanImage,
    AutoencoderKLWan,
    BriaFibo2Pipeline,
    BriaFibo2Transformer2DModel,
    BriaFiboPipeline,
    BriaPipeline,
    BriaTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
    OvisImagePipeline,
    OvisImageTransformer2DModel,
    PRXPipeline,
    PRXPixelPipeline,
    PRXTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    UniPCMultistepScheduler,
)
from diffusers.models.transformers.transformer_bria_fibo import BriaFiboTransformer2DModel
from tiny_pipelines import (
    END,
    LATENT_CHANNELS,
    PAD,
    SPECIAL_TOKENS,
    START,
    VOCAB_SIZE,
    _flux_scheduler,
    _qwen_tokenizer,
    _qwen_vl,
    _save,
    _t5,
    _text_config,
    _tokenizer,
    _vae,
    _without_zeros,
)
from transformers import (
    ByT5Tokenizer,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLTextConfig,
    Qwen3VLTextModel,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5GemmaConfig,
)
from transformers.models.t5gemma.configuration_t5gemma import T5GemmaModuleConfig
from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_bria(directory, seed=0):
    """Save a `BriaPipeline` (VAE factor 2, doubled batch); height and width must be multiples of 4."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = BriaTransformer2DModel(
            in_channels=4 * LATENT_CHANNELS,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=[4, 6, 6],
        )
        pipe = BriaPipeline(
            transformer=_without_zeros(transformer),
            vae=_vae(scaling_factor=0.13025, shift_factor=None),
            text_encoder=_t5(),
            tokenizer=_tokenizer("$A <|end|>", max_length=512),
            scheduler=_flux_scheduler(),
        )
    return _save(pipe, directory)


def make_bria_fibo(directory, seed=0):
    """Save a `BriaFiboPipeline` (VAE factor 16, doubled batch); height and width must be multiples of 16."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = BriaFiboTransformer2DModel(
            in_channels=LATENT_CHANNELS,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=8,
            text_encoder_dim=4,
            axes_dims_rope=[4, 6, 6],
        )
        text_encoder = SmolLM3Config(
            vocab_size=128001,  # the pipeline feeds its beginning-of-text id, 128000, for an empty prompt
            hidden_size=4,
            intermediate_size=16,
            num_hidden_layers=3,
            num_attention_heads=1,
            num_key_value_heads=1,
            pad_token_id=PAD,
            bos_token_id=START,
            eos_token_id=END,
            tie_word_embeddings=True,
        )
        pipe = BriaFiboPipeline(
            transformer=_without_zeros(transformer),
            vae=_wan_vae(),
            text_encoder=SmolLM3ForCausalLM(text_encoder).eval(),
            tokenizer=_tokenizer("$A", max_length=4096),
            scheduler=_flux_scheduler(),
        )
    return _save(pipe, directory)


def make_ovis(directory, seed=0):
    """Save an `OvisImagePipeline` (VAE factor 2, two calls); height and width must be multiples of 4."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = OvisImageTransformer2DModel(
            in_channels=4 * LATENT_CHANNELS,
            out_channels=4 * LATENT_CHANNELS,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 6, 6),
        )
        # Learns the system prompt's words, so that the template's beginning is the 28 tokens that the pipeline drops.
        unbuilt = OvisImagePipeline(scheduler=None, vae=None, text_encoder=None, tokenizer=None, transformer=None)
        tokenizer = _tokenizer("$A", max_length=512, corpus=["user\n", unbuilt.system_prompt, "assistant\n"])
        tokenizer.chat_template = CHAT_TEMPLATE
        pipe = OvisImagePipeline(
            transformer=_without_zeros(transformer),
            vae=_vae(scaling_factor=0.3611, shift_factor=0.1159),
            text_encoder=_qwen3(),
            tokenizer=tokenizer,
            scheduler=_flux_scheduler(),
        )
    return _save(pipe, directory)


def make_hidream(directory, seed=0):
    """Save a `HiDreamImagePipeline` (VAE factor 1, doubled batch, UniPC); it draws 128x128 pixels whatever is asked.

    The pipeline scales every size to (128 x VAE factor) squared, so its latents have at least 128 x 128 elements.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = HiDreamImageTransformer2DModel(
            patch_size=8,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            caption_channels=[32, 16],
            text_emb_dim=32,
            num_routed_experts=2,
            num_activated_experts=1,
            axes_dims_rope=(4, 6, 6),
            max_resolution=(128, 128),
            llama_layers=[0, 1],
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",),
            up_block_types=("UpDecoderBlock2D",),
            block_out_channels=(8,),
            layers_per_block=1,
            latent_channels=LATENT_CHANNELS,
            norm_num_groups=4,
            sample_size=128,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        llama = LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            pad_token_id=PAD,
            bos_token_id=START,
            eos_token_id=END,
            attn_implementation="eager",
        )
        clip = "<|start|> $A <|end|>"
        pipe = HiDreamImagePipeline(
            transformer=_without_zeros(transformer),
            vae=vae,
            text_encoder=_long_clip(),
            tokenizer=_tokenizer(clip, max_length=248),
            text_encoder_2=_long_clip(),
            tokenizer_2=_tokenizer(clip, max_length=218),
            text_encoder_3=_t5(),
            tokenizer_3=_tokenizer("$A <|end|>", max_length=512),
            text_encoder_4=LlamaForCausalLM(llama).eval(),
            tokenizer_4=_tokenizer("<|start|> $A", max_length=512),
            scheduler=UniPCMultistepScheduler(
                use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0, solver_order=2
            ),
        )
    return _save(pipe, directory)


def make_sana(directory, seed=0):
    """Save a `SanaPipeline` (VAE factor 32, doubled batch, DPM-Solver++); height and width must be multiples of 32.

    With the pipeline's default resolution binning it draws 512x512; other sizes need use_resolution_binning=False.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = SanaTransformer2DModel(
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=16,
            cross_attention_dim=32,
            caption_channels=16,
            sample_size=16,
        )
        pipe = SanaPipeline(
            transformer=_without_zeros(transformer),
            vae=_dc_vae(),
            text_encoder=_gemma(),
            tokenizer=_tokenizer("<|start|> $A", max_length=2048),
            scheduler=DPMSolverMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=2
            ),
        )
    return _save(pipe, directory)


def make_prx(directory, seed=0):
    """Save a `PRXPipeline` (VAE factor 8, doubled batch); height and width must be multiples of 16.

    With the pipeline's default resolution binning it draws 256x256; other sizes need use_resolution_binning=False.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(4, 4, 8, 8),
            layers_per_block=1,
            latent_channels=LATENT_CHANNELS,
            norm_num_groups=4,
            sample_size=256,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        encoder = T5GemmaModuleConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            dropout_rate=0.0,
            pad_token_id=PAD,
            bos_token_id=START,
            eos_token_id=END,
        )
        pipe = PRXPipeline(
            transformer=_without_zeros(_prx_transformer(in_channels=LATENT_CHANNELS, patch_size=2)),
            vae=vae,
            text_encoder=T5GemmaEncoder(encoder).eval(),
            tokenizer=_tokenizer("<|start|> $A", max_length=64),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            default_sample_size=256,
        )
    path = _save(pipe, directory)
    # Published checkpoints hold the whole encoder-decoder's configuration, of which diffusers takes the encoder's.
    T5GemmaConfig(encoder=encoder, decoder=encoder, vocab_size=VOCAB_SIZE).save_pretrained(path / "text_encoder")
    return path


def make_prx_pixel(directory, seed=0):
    """Save a `PRXPixelPipeline` (no VAE, doubled batch, noise twice as strong); size a multiple of 8.

    With the pipeline's default resolution binning it draws 1024x1024; other sizes need use_resolution_binning=False.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = _prx_transformer(in_channels=3, patch_size=8, bottleneck_size=16, resolution_embeds=True)
        pipe = PRXPixelPipeline(
            transformer=_without_zeros(transformer),
            text_encoder=Qwen3VLTextModel(Qwen3VLTextConfig(**_qwen3_vl_text(2))).eval(),
            tokenizer=_tokenizer("$A", max_length=1024),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            prompt_max_tokens=64,
        )
    return _save(pipe, directory)


def make_hunyuan_image(directory, seed=0):
    """Save a `HunyuanImagePipeline` (VAE factor 4, two calls by a guider); height and width must be multiples of 4.

    Without the second text embedder, whose width of 2048 cannot be chosen: 4 million parameters.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = HunyuanImageTransformer2DModel(
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            text_embed_dim=16,
            rope_axes_dim=(8, 8),
        )
        vae = AutoencoderKLHunyuanImage(
            in_channels=3,
            out_channels=3,
            latent_channels=LATENT_CHANNELS,
            block_out_channels=(32, 32, 32),
            layers_per_block=1,
            spatial_compression_ratio=4,
            sample_size=64,
            scaling_factor=0.75289,
        )
        byt5 = T5Config(
            vocab_size=384, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
        )
        pipe = HunyuanImagePipeline(
            transformer=_without_zeros(transformer),
            vae=vae,
            text_encoder=_qwen_vl(),
            tokenizer=_qwen_tokenizer(),
            text_encoder_2=T5EncoderModel(byt5).eval(),
            tokenizer_2=ByT5Tokenizer(),
            guider=AdaptiveProjectedMixGuidance(),
            ocr_guider=AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=38),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        )
    return _save(pipe, directory)


def make_bria_fibo2(directory, seed=0):
    """Save a `BriaFibo2Pipeline` (VAE factor 2, two calls); height and width must be multiples of 4.

    The text encoder has the 36 layers that the pipeline reads. A Qwen3VLProcessor needs torchvision for its videos;
    for prompts alone a tokenizer in its place does the same.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = BriaFibo2Transformer2DModel(
            in_channels=LATENT_CHANNELS,
            dim=32,
            n_layers=5,
            n_refiner_layers=1,
            n_heads=2,
            cap_feat_dim=3 * 16,
            injection_layer_ids=(0, 1, 2, 3, 4),
            perceiver_num_layers=1,
            min_num_gist_tokens=4,
            max_num_gist_tokens=8,
            gist_step=2,
            axes_dims=(4, 6, 6),
            axes_lens=(32, 64, 64),
        )
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
        vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 16}
        config = Qwen3VLConfig(
            text_config=_qwen3_vl_text(36),
            vision_config=vision | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
            vision_start_token_id=SPECIAL_TOKENS.index("<|vision_start|>"),
            vision_end_token_id=SPECIAL_TOKENS.index("<|vision_end|>"),
            image_token_id=SPECIAL_TOKENS.index("<|image_pad|>"),
            video_token_id=SPECIAL_TOKENS.index("<|video_pad|>"),
        )
        pipe = BriaFibo2Pipeline(
            transformer=_without_zeros(transformer),
            vae=vae,
            text_encoder=Qwen3VLForConditionalGeneration(config).eval(),
            processor=_tokenizer("$A", max_length=4096),
            scheduler=_flux_scheduler(),
        )
    return _save(pipe, directory)


def _wan_vae():
    """Wan 2.2's layout: factor 8 by convolutions, 2 by patches."""
    return AutoencoderKLWan(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[-0.3, 0.1, 0.2, -0.1],
        latents_std=[1.5, 0.8, 1.2, 2.0],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        scale_factor_temporal=4,
    )


def _qwen3():
    config = Qwen3Config(
        **_text_config(head_dim=8),
    )
    return Qwen3Model(config).eval()


def _prx_transformer(**config):
    return PRXTransformer2DModel(
        **config, context_in_dim=16, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=2, axes_dim=[8, 8]
    )


def _dc_vae():
    return AutoencoderDC(
        latent_channels=LATENT_CHANNELS,
        attention_head_dim=4,
        encoder_block_types=["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
        decoder_block_types=["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
        encoder_block_out_channels=(4, 4, 8, 8, 8, 8),
        decoder_block_out_channels=(4, 4, 8, 8, 8, 8),
        encoder_layers_per_block=(1, 1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1, 1),
        encoder_qkv_multiscales=((), (), (), (5,), (5,), (5,)),
        decoder_qkv_multiscales=((), (), (), (5,), (5,), (5,)),
        upsample_block_type="interpolate",
        downsample_block_type="Conv",
        scaling_factor=0.41407,
    )


def _gemma():
    config = Gemma2Config(
        **_text_config(head_dim=8),
    )
    return Gemma2Model(config).eval()


def _long_clip():
    config = CLIPTextConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=248,
        pad_token_id=PAD,
        bos_token_id=START,
        eos_token_id=END,
    )
    return CLIPTextModelWithProjection(config).eval()


def _qwen3_vl_text(num_layers):
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000000.0, "mrope_section": [2, 1, 1]},
        "pad_token_id": PAD,
        "bos_token_id": START,
        "eos_token_id": END,
    }


FAMILIES = {
    "bria": (make_bria, 32, {"pipeline_kwargs": {}}),
    "bria_fibo": (make_bria_fibo, 64, {"pipeline_kwargs": {}}),
    "bria_fibo2": (make_bria_fibo2, 32, {"pipeline_kwargs": {}}),
    "ovis": (make_ovis, 32, {"pipeline_kwargs": {}}),
    "hidream": (make_hidream, 128, {"pipeline_kwargs": {}}),
    "sana": (make_sana, 64, {"pipeline_kwargs": {"use_resolution_binning": False}}),
    "prx": (make_prx, 64, {"pipeline_kwargs": {"use_resolution_binning": False}}),
    "prx_pixel": (make_prx_pixel, 64, {"pipeline_kwargs": {"use_resolution_binning": False}}),
    "hunyuan_image": (make_hunyuan_image, 32, {"pipeline_kwargs": {}}),
}
