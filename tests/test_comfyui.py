"""Every layer that is adapted by default has a place in ComfyUI's own key maps, for the families that it maps by name.

The facts are those of comfy/lora.py and comfy/utils.py (Comfy-Org/ComfyUI, commits 17358c8 and 09708ea): it strips
"transformer." and looks the diffusers name up. It reads lora_A/lora_B and takes alpha = rank where there is none.
"""

import re

import pytest
from test_families import FAMILIES

import ask_pipeline as ask
import glance_utils as glance


ATTENTION = r"attn\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)"
FLUX = (
    rf"transformer_blocks\.\d+\.({ATTENTION}|norm1(_context)?\.linear|ff(_context)?\.(net\.0\.proj|net\.2|linear_in|linear_out))"
    r"|single_transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_qkv_mlp_proj|to_out)|proj_mlp|proj_out|norm\.linear)"
)
Z_IMAGE_LAYER = r"attention\.(to_[qkv]|to_out\.0)|feed_forward\.w[123]|adaLN_modulation\.0"
KNOWN = {
    "flux": FLUX,
    "flux2": FLUX,
    "flux2_klein": FLUX,
    "chroma": FLUX,
    "sd3": rf"transformer_blocks\.\d+\.({ATTENTION}|attn2\.(to_[qkv]|to_out\.0)|norm1(_context)?\.linear"
    r"|ff(_context)?\.net\.(0\.proj|2))",
    "aura_flow": rf"(joint|single)_transformer_blocks\.\d+\.({ATTENTION}|norm1(_context)?\.linear"
    r"|ff(_context)?\.(linear_[12]|out_projection))",
    "z_image": rf"(layers|context_refiner|noise_refiner)\.\d+\.({Z_IMAGE_LAYER})",
    "krea2": r"(transformer_blocks|text_fusion\.(layerwise|refiner)_blocks)\.\d+\."
    r"(attn\.(to_[qkv]|to_gate|to_out\.0)|ff\.(gate|up|down))",
}


@pytest.mark.parametrize("name", KNOWN)
def test_every_default_layer_is_known(name, tmp_path):
    FAMILIES[name][0](tmp_path)
    layers = glance.lora_layers(ask.load_pipeline(str(tmp_path)).transformer)
    assert len(layers) >= 4
    assert [layer for layer in layers if not re.fullmatch(KNOWN[name], layer)] == []
