"""Which layers that are adapted by default ComfyUI finds, for each family that it has.

The facts are those of Comfy-Org/ComfyUI. comfy/lora.py at commit 17358c8 maps the keys: every model has its own module
names under "diffusion_model."; these have diffusers' names under "transformer." too, which is the form that we write:

    FLUX (also Kontext, FLUX.2, Chroma, LongCat, Ovis), SD3, AuraFlow, Lumina 2 and Z-Image, Krea 2
                by the tables of comfy/utils.py at 09708ea
    Qwen-Image (also 2.1), HiDream, Kandinsky 5, ERNIE-Image
                by modules of the same names: comfy/ldm's qwen_image and hidream at a125cd8, qwen_image21 at 08f68f0,
                ernie at 7b30bf3, and kandinsky5 of comfyanonymous/ComfyUI at 0c84b76

HunyuanImage, Ideogram 4 and Wan have none. comfy/model_base.py at 094c74c says which model is a kind of which.
comfy/weight_adapter/lora.py at a125cd8 reads lora_A and lora_B, and takes alpha = rank where there is none.
"""

import re

import pytest
from test_families import FAMILIES

from glance.adapters import lora_layers
from glance.ask import pipeline as ask


ATTENTION = r"attn\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)"
FLUX = (
    rf"transformer_blocks\.\d+\.({ATTENTION}|norm1(_context)?\.linear|ff(_context)?\.(net\.0\.proj|net\.2|linear_in|linear_out))"
    r"|single_transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_qkv_mlp_proj|to_out)|proj_mlp|proj_out|norm\.linear)"
)
Z_IMAGE_LAYER = r"attention\.(to_[qkv]|to_out\.0)|feed_forward\.w[123]|adaLN_modulation\.0"
Z_IMAGE = rf"(layers|context_refiner|noise_refiner)\.\d+\.({Z_IMAGE_LAYER})"
KNOWN = {
    "flux": FLUX,
    "kontext": FLUX,
    "flux2": FLUX,
    "flux2_klein": FLUX,
    "chroma": FLUX,
    "longcat": FLUX,
    "ovis": rf"(?!.*\.ff)({FLUX})",  # its MLPs are gate_proj, up_proj and down_proj there, not the map's img_mlp.2
    "sd3": rf"transformer_blocks\.\d+\.({ATTENTION}|attn2\.(to_[qkv]|to_out\.0)|norm1(_context)?\.linear"
    r"|ff(_context)?\.net\.(0\.proj|2))",
    "aura_flow": rf"(joint|single)_transformer_blocks\.\d+\.({ATTENTION}|norm1(_context)?\.linear"
    r"|ff(_context)?\.(linear_[12]|out_projection))",
    "z_image": Z_IMAGE,
    "lumina2": Z_IMAGE,  # the map of its class, which is Z-Image's too
    "krea2": r"(transformer_blocks|text_fusion\.(layerwise|refiner)_blocks)\.\d+\."
    r"(attn\.(to_[qkv]|to_gate|to_out\.0)|ff\.(gate|up|down))",
    "qwen": rf"transformer_blocks\.\d+\.({ATTENTION}|(img|txt)_(mod\.1|mlp\.net\.(0\.proj|2)))",
    "qwen21": r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0)|img_mlp\.(gate_layer|proj|out))",
    "hidream": r"(double|single)_stream_blocks\.\d+\.block\.(attn1\.to_([qkv]|out)(_t)?|adaLN_modulation\.1"
    r"|ff_[it]\.((shared_experts|experts\.\d+)\.)?w[123])",
    "kandinsky5": r"(text|visual)_transformer_blocks\.\d+\.((self|cross)_attention\.(to_(query|key|value)|out_layer)"
    r"|feed_forward\.(in|out)_layer|(text|visual)_modulation\.out_layer)",
    "ernie": r"layers\.\d+\.(self_attention\.(to_[qkv]|to_out\.0)|mlp\.(gate_proj|up_proj|linear_fc2))",
}
NOT_FOUND = {"ovis": r"transformer_blocks\.\d+\.ff(_context)?\.net\.2", "lumina2": ".*"}


@pytest.mark.parametrize("name", KNOWN)
def test_every_default_layer_is_found_but_these(name, tmp_path):
    FAMILIES[name][0](tmp_path)
    layers = lora_layers(ask.load_pipeline(str(tmp_path)).transformer)
    assert len(layers) >= 4
    not_found = [layer for layer in layers if not re.fullmatch(KNOWN[name], layer)]
    assert not_found == [layer for layer in layers if re.fullmatch(NOT_FOUND.get(name, "(?!)"), layer)]
