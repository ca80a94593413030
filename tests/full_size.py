"""The large pipelines of the table of recommended settings, in configs alone: `make(name, folder)`.

Each is the tiny pipeline of its family with the sizes that its own files on the hub have; where nothing is said of a
model of diffusers, its class's defaults are those. No weights are made: what a run needs is estimated from configs.
"""

import json
from pathlib import Path

from tiny_chat_families import make_flux2, make_z_image
from tiny_pipelines import make_flux, make_qwen, make_sd3
from tiny_video_families import make_wan


KL_VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_L |= {"projection_dim": 768, "vocab_size": 49408}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
CLIP_G |= {"projection_dim": 1280, "vocab_size": 49408}
T5_XXL = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128}
MISTRAL_SMALL = {"hidden_size": 5120, "intermediate_size": 32768, "num_hidden_layers": 40, "num_attention_heads": 32}
MISTRAL_SMALL |= {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 131072}
PIXTRAL = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
PIXTRAL |= {"head_dim": 64, "image_size": 1540, "patch_size": 14}
QWEN_VL_7B = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
QWEN_VL_7B |= {"num_key_value_heads": 4, "vocab_size": 152064, "rope_parameters": {"mrope_section": [16, 24, 24]}}
QWEN_VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
QWEN3_4B = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32}
QWEN3_4B |= {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}
SD35_LARGE = {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "in_channels": 16}
SD35_LARGE |= {"out_channels": 16, "pos_embed_max_size": 192, "qk_norm": "rms_norm"}

# What to make, by the name of its file in configs/: its family's tiny pipeline, and the sizes by component.
SIZES = {
    "flux": (
        make_flux,
        {
            "transformer": {"guidance_embeds": True},
            "vae": KL_VAE,
            "text_encoder": CLIP_L,
            "text_encoder_2": T5_XXL,
        },
    ),
    "flux2": (
        make_flux2,
        {"transformer": {}, "vae": {}, "text_encoder": {"text_config": MISTRAL_SMALL, "vision_config": PIXTRAL}},
    ),
    "sd3": (
        make_sd3,
        {
            "transformer": SD35_LARGE,
            "vae": KL_VAE,
            "text_encoder": CLIP_L,
            "text_encoder_2": CLIP_G,
            "text_encoder_3": T5_XXL,
        },
    ),
    "qwen_image": (
        make_qwen,
        {
            "transformer": {},
            "vae": {},
            "text_encoder": {"text_config": QWEN_VL_7B, "vision_config": QWEN_VISION},
        },
    ),
    "z_image": (make_z_image, {"transformer": {}, "vae": KL_VAE, "text_encoder": QWEN3_4B}),
    "wan": (make_wan, {"transformer": {}, "vae": {}, "text_encoder": T5_XXL | {"vocab_size": 256384}}),
}


def merged(tiny: dict, sizes: dict) -> dict:
    """A config with these entries; those that are objects are merged in turn."""
    kept = {name: value for name, value in tiny.items() if name != "layer_types"}  # a list, one for each layer
    return kept | {
        name: merged(tiny[name], value) if isinstance(value, dict) and name in tiny else value
        for name, value in sizes.items()
    }


def make(name: str, folder: Path) -> Path:
    """Write the pipeline's configs and tokenizers into the folder, and return it."""
    make_tiny, components = SIZES[name]
    make_tiny(folder)
    for part, sizes in components.items():
        path = folder / part / "config.json"
        tiny = json.loads(path.read_text())
        if "_class_name" in tiny:  # a model of diffusers, whose defaults are large
            tiny = {key: value for key, value in tiny.items() if key.startswith("_")}
        path.write_text(json.dumps(merged(tiny, sizes)))
        for weights in (folder / part).glob("*.safetensors*"):
            weights.unlink()
    return folder
