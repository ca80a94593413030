"""Tiny pipelines of text-to-image families that hand the prompt to a language model, most in a chat template.

Each `make_<name>(directory, seed=0)` saves what `DiffusionPipeline.from_pretrained` loads; FAMILIES says at what size
it is tried and with which `--pipeline_kwargs`.

`chat_processor` stands in for Qwen2-VL's and Qwen3-VL's processors, whose video half needs torchvision, as a plain
tokenizer does for a PixtralProcessor; what the pipelines ask of a processor for text alone they do alike.
"""

import re

import diffusers
import tiny_parts as parts
import transformers
from tiny_parts import AXES, CHANNELS, HEADS, LATENT_CHANNELS, PACKED_CHANNELS, parts_of, tiny_pipeline
from tiny_pipelines import FLUX, qwen_tokenizer


# Qwen3's chat template without tools and history; the content is text or a list of {"type": "text", "text": ...}.
QWEN3_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
TEXT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ONE_PART_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] if message['content'] is string else message['content'][0]['text'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DREAMLITE_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"
)
VISION_VOCAB_SIZE = 64  # GLM-Image's image tokens


def qwen3_tokenizer():
    """Knows the words of the longest template, so that a 512 token prompt still has room for the user's words."""
    prefix = parts.unbuilt(diffusers.Krea2Pipeline).prompt_template_encode_prefix
    words = prefix.replace("<|im_start|>", "").split("<|im_end|>")
    return parts.tokenizer("$A", 1024, corpus=words, chat_template=QWEN3_TEMPLATE)


def chat_tokenizer():
    return parts.tokenizer("$A", 1024, chat_template=ONE_PART_TEMPLATE)


def chat_processor():
    image_processor = transformers.CLIPImageProcessorPil()
    template = {"chat_template": ONE_PART_TEMPLATE, "patch_size": 14}
    return transformers.LlavaProcessor(image_processor, chat_tokenizer(), **template)


@tiny_pipeline
def make_z_image(**overrides):
    """VAE factor 2, doubled batch above guidance 0; size a multiple of 4."""
    sizes = {"dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 16}
    config = {**sizes, "in_channels": LATENT_CHANNELS, "axes_dims": list(AXES), "axes_lens": [1024, 64, 64]}
    return diffusers.ZImagePipeline(
        transformer=parts.transformer(diffusers.ZImageTransformer2DModel, **config | overrides),
        vae=parts.kl_vae(),
        text_encoder=parts.qwen3(transformers.Qwen3ForCausalLM).model,
        tokenizer=qwen3_tokenizer(),
        scheduler=parts.scheduler(shift=6.0),
    )


@tiny_pipeline
def make_z_image_omni():
    """VAE factor 2, doubled batch; size a multiple of 4. SigLIP looks at images to edit, of which text has none."""
    others = parts_of(make_z_image, siglip_feat_dim=16)
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    siglip = parts.model(transformers.Siglip2VisionModel, **vision, num_patches=16, patch_size=4)
    processor = transformers.Siglip2ImageProcessorPil()
    return diffusers.ZImageOmniPipeline(**others, siglip=siglip, siglip_processor=processor)


@tiny_pipeline
def make_krea2():
    """VAE factor 4, two calls above guidance 0; size a multiple of 8."""
    config = {**HEADS, "in_channels": PACKED_CHANNELS, "num_layers": 2, "num_key_value_heads": 1}
    config |= {"intermediate_size": 64, "timestep_embed_dim": 32, "axes_dims_rope": AXES}
    text = {"text_hidden_dim": 16, "num_text_layers": 2, "text_num_attention_heads": 2}
    text |= {"text_num_key_value_heads": 1, "text_intermediate_size": 32}
    text |= {"num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1}
    return diffusers.Krea2Pipeline(
        transformer=parts.transformer(diffusers.Krea2Transformer2DModel, **config, **text),
        vae=parts.qwen_vae(),
        text_encoder=parts.qwen3_vl(transformers.Qwen3VLModel, **parts.rope()),
        tokenizer=qwen3_tokenizer(),
        scheduler=parts.shifting_scheduler(max_image_seq_len=6400),
        text_encoder_select_layers=(1, 2),
    )


def flux2_transformer(**overrides):
    config = {**FLUX, "joint_attention_dim": 3 * 16, "timestep_guidance_channels": 32, "axes_dims_rope": (4, 4, 4, 4)}
    return parts.lively(parts.transformer(diffusers.Flux2Transformer2DModel, **config, **overrides))


@tiny_pipeline
def make_flux2():
    """VAE factor 2, embedded guidance; size a multiple of 4.

    The pipeline's default `text_encoder_out_layers` go up to 30, so the text encoder has as many.
    """
    vision = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 8, "head_dim": 8}
    text = parts.text_config(num_hidden_layers=30, model_type="mistral", head_dim=8)
    return diffusers.Flux2Pipeline(
        transformer=flux2_transformer(),
        vae=parts.flux2_vae(),
        text_encoder=parts.model(
            transformers.Mistral3ForConditionalGeneration,
            text_config=text,
            vision_config=vision,
            image_token_index=parts.IMAGE,
        ),
        tokenizer=qwen3_tokenizer(),
        scheduler=parts.flux_scheduler(),
    )


@tiny_pipeline
def make_flux2_klein():
    """The base one (VAE factor 2, two calls above guidance 1); size a multiple of 4.

    The pipeline's default `text_encoder_out_layers` go up to 27, so the text encoder has as many.
    """
    return diffusers.Flux2KleinPipeline(
        transformer=flux2_transformer(guidance_embeds=False),
        vae=parts.flux2_vae(),
        text_encoder=parts.qwen3(transformers.Qwen3ForCausalLM, num_hidden_layers=27),
        tokenizer=qwen3_tokenizer(),
        scheduler=parts.flux_scheduler(),
        is_distilled=False,
    )


@tiny_pipeline
def make_flux2_klein_kv():
    """The parts of FLUX.2 Klein, no guidance; size a multiple of 4."""
    return diffusers.Flux2KleinKVPipeline(**parts_of(make_flux2_klein))


@tiny_pipeline
def make_bria_fibo2():
    """VAE factor 2, two calls; size a multiple of 4. The text encoder has the 36 layers that the pipeline reads."""
    sizes = {"dim": 32, "n_layers": 5, "n_refiner_layers": 1, "n_heads": 2, "cap_feat_dim": 3 * 16}
    config = {**sizes, "in_channels": LATENT_CHANNELS, "axes_dims": AXES, "axes_lens": (32, 64, 64)}
    gist = {"perceiver_num_layers": 1, "min_num_gist_tokens": 4, "max_num_gist_tokens": 8, "gist_step": 2}
    config |= {"injection_layer_ids": (0, 1, 2, 3, 4)}
    return diffusers.BriaFibo2Pipeline(
        transformer=parts.without_zeros(diffusers.BriaFibo2Transformer2DModel(**config, **gist)),
        vae=parts.flux2_vae(),
        text_encoder=parts.qwen3_vl(num_hidden_layers=36, **parts.rope((2, 1, 1), rope_theta=5000000.0)),
        processor=parts.tokenizer("$A", 4096),
        scheduler=parts.flux_scheduler(),
    )


@tiny_pipeline
def make_ovis():
    """VAE factor 2, two calls; size a multiple of 4.

    The tokenizer knows the system prompt's words, so that the template's beginning is the 28 tokens that the pipeline
    drops.
    """
    config = {**FLUX, "out_channels": PACKED_CHANNELS, "joint_attention_dim": 16}
    words = ["user\n", parts.unbuilt(diffusers.OvisImagePipeline).system_prompt, "assistant\n"]
    return diffusers.OvisImagePipeline(
        transformer=parts.transformer(diffusers.OvisImageTransformer2DModel, **config),
        vae=parts.kl_vae(),
        text_encoder=parts.qwen3(transformers.Qwen3Model),
        tokenizer=parts.tokenizer("$A", 512, corpus=words, chat_template=TEXT_TEMPLATE),
        scheduler=parts.flux_scheduler(),
    )


@tiny_pipeline
def make_hunyuan_image():
    """VAE factor 4, two calls by a guider; size a multiple of 4.

    Without the second text embedder, whose width of 2048 cannot be chosen: 4 million parameters.
    """
    layers = {"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1}
    config = {**CHANNELS, **HEADS, **layers, "text_embed_dim": 16, "rope_axes_dim": (8, 8)}
    vae = diffusers.AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(32, 32, 32),
        layers_per_block=1,
        spatial_compression_ratio=4,
        sample_size=64,
        scaling_factor=0.75289,
    )
    return diffusers.HunyuanImagePipeline(
        transformer=parts.without_zeros(diffusers.HunyuanImageTransformer2DModel(**config)),
        vae=vae,
        text_encoder=parts.qwen_vl(),
        tokenizer=qwen_tokenizer(),
        text_encoder_2=parts.byt5(),
        tokenizer_2=transformers.ByT5Tokenizer(),
        guider=diffusers.AdaptiveProjectedMixGuidance(),
        ocr_guider=diffusers.AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=38),
        scheduler=parts.scheduler(shift=5.0),
    )


@tiny_pipeline
def make_nucleus():
    """VAE factor 4, one dense and one mixture block; size a multiple of 8."""
    config = {"in_channels": PACKED_CHANNELS, "out_channels": LATENT_CHANNELS, **HEADS, "num_layers": 5}
    config |= {"num_key_value_heads": 1, "joint_attention_dim": 16, "axes_dims_rope": AXES, "mlp_ratio": 6.0}
    experts = {"num_experts": 4, "moe_intermediate_dim": 16, "capacity_factors": 2.0}
    transformer = diffusers.NucleusMoEImageTransformer2DModel(**config, **experts)
    for name, parameter in transformer.named_parameters():
        if ".experts." in name:  # made by torch.empty
            parameter.data.normal_(std=0.1)
    return diffusers.NucleusMoEImagePipeline(
        transformer=parts.without_zeros(transformer),
        vae=parts.qwen_vae(),
        text_encoder=parts.qwen3_vl(num_hidden_layers=9),
        processor=chat_processor(),
        scheduler=parts.qwen_scheduler(),
    )


@tiny_pipeline
def make_longcat():
    """VAE factor 2, its latents have 16 channels; size a multiple of 4.

    Call it with `enable_prompt_rewrite=False`: otherwise its text encoder writes another prompt.
    """
    config = {**FLUX, "in_channels": 64, "joint_attention_dim": 16, "pooled_projection_dim": 16}
    return diffusers.LongCatImagePipeline(
        transformer=parts.transformer(diffusers.LongCatImageTransformer2DModel, **config),
        vae=parts.narrow_kl_vae(blocks=2, latent_channels=16),
        text_encoder=parts.qwen_vl(),
        tokenizer=parts.tokenizer("$A", 1024),
        text_processor=chat_processor(),
        scheduler=parts.shifting_scheduler(),
    )


@tiny_pipeline
def make_kandinsky5():
    """VAE factor 8; 1024x1024 is the smallest of its seven sizes."""
    config = {"in_visual_dim": LATENT_CHANNELS, "out_visual_dim": LATENT_CHANNELS, "axes_dims": AXES}
    config |= {"in_text_dim": 16, "in_text_dim2": 16, "time_dim": 16, "model_dim": 16, "ff_dim": 32}
    config |= {"num_text_blocks": 1, "num_visual_blocks": 1}
    return diffusers.Kandinsky5T2IPipeline(
        transformer=parts.transformer(diffusers.Kandinsky5Transformer3DModel, **config),
        vae=parts.narrow_kl_vae(blocks=4),
        text_encoder=parts.qwen_vl(),
        tokenizer=chat_processor(),
        text_encoder_2=parts.clip(transformers.CLIPTextModel),
        tokenizer_2=parts.clip_tokenizer(),
        scheduler=parts.scheduler(shift=3.0),
    )


@tiny_pipeline
def make_qwen21():
    """VAE factor 16, RGBA; size a multiple of 32."""
    config = {**CHANNELS, **HEADS, "num_layers": 2, "context_in_dim": 16, "axes_dims_rope": AXES}
    vae = {"base_dim": 8, "decoder_base_dim": 8, "dim_mult": [1, 1, 1, 1, 1], "num_res_blocks": 1}
    vae |= {"z_dim": LATENT_CHANNELS, **parts.LATENT_STATISTICS}
    return diffusers.QwenImage21Pipeline(
        transformer=parts.transformer(diffusers.QwenImage21Transformer2DModel, **config),
        vae=diffusers.AutoencoderKLQwenImage21(**vae),
        text_encoder=parts.qwen3_vl(),
        processor=chat_processor(),
        scheduler=parts.qwen_scheduler(),
    )


@tiny_pipeline
def make_ideogram4():
    """VAE factor 2, a second transformer for guidance; size a multiple of 4."""
    config = {"in_channels": PACKED_CHANNELS, **HEADS, "num_layers": 2, "intermediate_size": 64}
    config |= {"adaln_dim": 16, "llm_features_dim": 13 * 8, "mrope_section": (4, 2, 2)}
    return diffusers.Ideogram4Pipeline(
        transformer=parts.transformer(diffusers.Ideogram4Transformer2DModel, **config),
        unconditional_transformer=parts.transformer(diffusers.Ideogram4Transformer2DModel, **config),
        vae=parts.flux2_vae(),
        text_encoder=parts.qwen3_vl(transformers.Qwen3VLModel, hidden_size=8, num_hidden_layers=36),
        tokenizer=chat_tokenizer(),
        scheduler=parts.scheduler(),
    )


@tiny_pipeline
def make_glm():
    """VAE factor 8, a language model writes image tokens first; size a multiple of 32.

    That model always writes 16 x 16 tokens of a preview besides the image's own: its end token is one that it cannot
    write, so it writes as many as it is asked for.
    """
    config = {**CHANNELS, **HEADS, "num_layers": 2, "text_embed_dim": 32, "time_embed_dim": 32, "condition_dim": 8}
    vae = parts.narrow_kl_vae(blocks=4, scaling_factor=0.18215, shift_factor=None, **parts.LATENT_STATISTICS)
    text = parts.text_config(
        num_hidden_layers=1, **parts.rope(rope_theta=10000.0), vision_vocab_size=VISION_VOCAB_SIZE
    )
    del text["bos_token_id"]
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "image_size": 64}
    tokenizer = chat_tokenizer()
    names = {"image_token": "<|image_pad|>", "grid_bos_token": "<|vision_start|>", "grid_eos_token": "<|vision_end|>"}
    tokenizer._set_model_specific_special_tokens(names)
    images = transformers.GlmImageImageProcessorPil()
    return diffusers.GlmImagePipeline(
        transformer=parts.transformer(
            diffusers.GlmImageTransformer2DModel, **config, prior_vq_quantizer_codebook_size=VISION_VOCAB_SIZE
        ),
        vae=vae,
        text_encoder=parts.t5(),
        tokenizer=transformers.ByT5Tokenizer(),
        vision_language_encoder=parts.model(
            transformers.GlmImageForConditionalGeneration,
            text_config=text | {"eos_token_id": VISION_VOCAB_SIZE},
            vision_config=vision,
            vq_config={"embed_dim": 8, "num_embeddings": VISION_VOCAB_SIZE, "latent_channels": 16},
            image_token_id=parts.IMAGE,
            image_start_token_id=parts.START,
            image_end_token_id=VISION_VOCAB_SIZE,
        ),
        processor=transformers.GlmImageProcessor(images, tokenizer, chat_template=ONE_PART_TEMPLATE),
        scheduler=parts.glm_scheduler(),
    )


@tiny_pipeline
def make_dreamlite():
    """A U-Net, VAE factor 2; size a multiple of 8."""
    widths = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    vae = diffusers.AutoencoderTiny(**widths, **blocks, latent_channels=LATENT_CHANNELS)
    unet = parts.transformer(
        diffusers.DreamLiteUNetModel,
        **CHANNELS,
        down_block_types=("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
        up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=8,
        use_linear_projection=True,
        addition_embed_type="time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16,
    )
    words = [part for part in re.split(r"<\|im_\w+\|>", DREAMLITE_TEMPLATE) if part]
    return diffusers.DreamLitePipeline(
        unet=unet,
        vae=vae,
        text_encoder=parts.qwen3_vl(),
        tokenizer=parts.tokenizer("$A", 1024, corpus=words),
        processor=chat_processor(),
        scheduler=parts.shifting_scheduler(max_shift=1.16),
    )


@tiny_pipeline
def make_dreamlite_mobile():
    """The parts of DreamLite, no guidance; size a multiple of 8."""
    return diffusers.DreamLiteMobilePipeline(**parts_of(make_dreamlite))


# name: (make, height and width, --pipeline_kwargs)
FAMILIES = {
    "z_image": (make_z_image, 32, {}),
    "z_image_omni": (make_z_image_omni, 32, {}),
    "krea2": (make_krea2, 32, {}),
    "flux2": (make_flux2, 32, {}),
    "flux2_klein": (make_flux2_klein, 32, {}),
    "flux2_klein_kv": (make_flux2_klein_kv, 32, {}),
    "bria_fibo2": (make_bria_fibo2, 32, {}),
    "ovis": (make_ovis, 32, {}),
    "hunyuan_image": (make_hunyuan_image, 32, {}),
    "nucleus": (make_nucleus, 32, {}),
    "longcat": (make_longcat, 32, {"enable_prompt_rewrite": False}),
    "kandinsky5": (make_kandinsky5, 1024, {}),
    "qwen21": (make_qwen21, 64, {"use_kv_cache": False}),
    "ideogram4": (make_ideogram4, 32, {"max_sequence_length": 64, "guidance_scale": 7.0, "guidance_schedule": None}),
    "glm": (make_glm, 64, {}),
    "dreamlite": (make_dreamlite, 32, {}),
    "dreamlite_mobile": (make_dreamlite_mobile, 32, {}),
}
