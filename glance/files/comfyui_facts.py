"""What is known of ComfyUI's models? Tables of facts, no code: a new family is an entry of FAMILIES.

Nodes are those of ComfyUI 0.33.0. Files have the names of its templates where it has one, else usual ones: a graph is
opened with whichever the reader has.
"""

# By the class of the diffusers pipeline:
#   unet, vae, encoders   the files of the base, in ComfyUI's folders; the text encoders' loader and its inputs
#   latent                the node of an empty latent
#   told                  whether the model is told a guidance (FluxGuidance), the pipeline's guidance_scale
#   guidance, off_at      the argument of classifier-free guidance, None for none, and up to where it guides nothing:
#                         ComfyUI's cfg begins at 1, so it is the argument + 1 - off_at
#   default               the argument's own, where the recipe has none
#   asked_by_negative     guides only where a negative prompt is given
#   t5                    inputs of T5TokenizerOptions, with which it pads as diffusers does; None: no T5, or alike
#   differs               what it cannot draw alike, where it guides
FLUX_ENCODERS = ("DualCLIPLoader", {"clip_name1": "clip_l.safetensors", "clip_name2": "t5xxl_fp16.safetensors"})
SD3_CLIPS = {"clip_name1": "clip_l.safetensors", "clip_name2": "clip_g.safetensors"}
GUIDED = {"told": False, "guidance": "guidance_scale", "off_at": 1, "asked_by_negative": False, "t5": None}
FLUX2 = {"vae": "flux2-vae.safetensors", "latent": "EmptyFlux2LatentImage"}
NORM = "diffusers rescales its guidance to the norm of each packed token, stock nodes do not; --guidance fold is exact"
FAMILIES = {
    "FluxPipeline": GUIDED
    | {
        "architecture": "flux-1-dev",
        "unet": "flux1-dev.safetensors",
        "vae": "ae.safetensors",
        "encoders": (FLUX_ENCODERS[0], FLUX_ENCODERS[1] | {"type": "flux"}),
        "latent": "EmptySD3LatentImage",
        "told": True,
        "guidance": "true_cfg_scale",
        "default": 1.0,
        "asked_by_negative": True,
        "t5": {"min_padding": 0, "min_length": 512},
    },
    "StableDiffusion3Pipeline": GUIDED
    | {
        "architecture": "stable-diffusion-3.5-large",
        "unet": "sd3.5_large.safetensors",
        "vae": "sd3.5_vae.safetensors",
        "encoders": ("TripleCLIPLoader", SD3_CLIPS | {"clip_name3": "t5xxl_fp16.safetensors"}),
        "latent": "EmptySD3LatentImage",
        "default": 7.0,
        "t5": {"min_padding": 0, "min_length": 256},
    },
    "QwenImagePipeline": GUIDED
    | {
        "architecture": "qwen-image",
        "unet": "qwen_image_bf16.safetensors",
        "vae": "qwen_image_vae.safetensors",
        "encoders": ("CLIPLoader", {"clip_name": "qwen_2.5_vl_7b.safetensors", "type": "qwen_image"}),
        "latent": "EmptySD3LatentImage",
        "guidance": "true_cfg_scale",
        "default": 4.0,
        "asked_by_negative": True,
        "differs": NORM,
    },
    "ZImagePipeline": GUIDED
    | {
        "architecture": "z-image",
        "unet": "z_image_bf16.safetensors",
        "vae": "ae.safetensors",
        "encoders": ("CLIPLoader", {"clip_name": "qwen_3_4b.safetensors", "type": "lumina2"}),
        "latent": "EmptySD3LatentImage",
        "off_at": 0,
        "default": 5.0,
    },
    "Flux2Pipeline": FLUX2
    | GUIDED
    | {
        "architecture": "flux-2-dev",
        "unet": "flux2-dev.safetensors",
        "encoders": ("CLIPLoader", {"clip_name": "mistral_3_small_flux2_bf16.safetensors", "type": "flux2"}),
        "told": True,
        "guidance": None,
    },
    "Flux2KleinPipeline": FLUX2
    | GUIDED
    | {
        "architecture": "flux-2-klein",
        "unet": "flux-2-klein-base-4b.safetensors",
        "encoders": ("CLIPLoader", {"clip_name": "qwen_3_4b.safetensors", "type": "flux2"}),
        "default": 4.0,
    },
    "ChromaPipeline": GUIDED
    | {
        "architecture": "chroma",
        "unet": "Chroma1-HD.safetensors",
        "vae": "ae.safetensors",
        "encoders": ("CLIPLoader", {"clip_name": "t5xxl_fp16.safetensors", "type": "chroma"}),
        "latent": "EmptySD3LatentImage",
        "default": 5.0,
        "t5": {"min_padding": 1, "min_length": 0},  # diffusers masks all of the padding but its first token
    },
    "Krea2Pipeline": GUIDED
    | {
        "architecture": "krea-2",
        "unet": "krea2_bf16.safetensors",
        "vae": "qwen_image_vae.safetensors",
        "encoders": ("CLIPLoader", {"clip_name": "qwen3vl_4b.safetensors", "type": "krea2"}),
        "latent": "EmptySD3LatentImage",
        "off_at": 0,
        "default": 4.5,
    },
}

# By pipeline, the names of ComfyUI's layers where it does not know diffusers': regular expressions, in this order.
RENAMES = {
    "WanPipeline": [
        (r"^transformer(_2)?\.", "diffusion_model."),
        (r"\.attn1\.", ".self_attn."),
        (r"\.attn2\.", ".cross_attn."),
        (r"\.to_out\.0\.", ".o."),
        (r"\.to_([qkv])\.", r".\1."),
        (r"\.add_([kv])_proj\.", r".\1_img."),
        (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
        (r"\.ffn\.net\.2\.", ".ffn.2."),
    ],
}
RENAMES["WanImageToVideoPipeline"] = RENAMES["WanPipeline"]
# Pipelines whose q, k and v ComfyUI has in one matrix, without names for the three.
ONE_MATRIX = ("Lumina2Pipeline", "HunyuanImagePipeline", "Ideogram4Pipeline")
