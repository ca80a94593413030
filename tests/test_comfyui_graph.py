"""comfyui.json and the exported files, without ComfyUI: against its nodes' schemas as 0.33.0 has them.

tests/comfyui_nodes.json holds by node what INPUT_TYPES and RETURN_TYPES say: a type, the values of a list, the range
of a number, or FILE. tests/run_comfyui.py runs the graph in a checkout.
"""

import dataclasses
import inspect
import json
import re

import diffusers
import pytest
import torch
from conftest import ROOT, flags
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from glance.adapters import lora_layers
from glance.files.comfyui import GRAPH, card_section, cfg_of, file_names, graph_of, sigmas_text, write_graph
from glance.files.comfyui_export import FOLDER, main, renamed
from glance.files.comfyui_facts import FAMILIES, ONE_MATRIX
from glance.files.recipe import WEIGHT_NAME, Recipe, read_header, read_recipe
from glance.training import flags as training_flags
from glance_utils import PHASES, FixedSigmaScheduler, InputError


SCHEMAS = json.loads((ROOT / "tests/comfyui_nodes.json").read_text())["nodes"]
LISTS = {"slow": [1000.0, 974.557, 900.25], "fast": [864.572, 285.204, 31.544, 4.25]}
GIVEN = {"true_cfg_scale": 3.0, "negative_prompt": "dull"}


def pair(pipeline="FluxPipeline", lists=LISTS, **own) -> dict[str, Recipe]:
    shared = {"pipeline": pipeline, "base_model": "someone/A base", "height": 768, "width": 1024, "loss": "flow"}
    shared |= {"guidance_scale": 4.5, "pipeline_kwargs": {}, "num_base_steps": 50, "max_train_steps": 1, "rank": 4}
    return {
        phase: Recipe(phase=phase, timesteps=timesteps, version="0", **shared | own)
        for phase, timesteps in lists.items()
    }


def mixed_pair() -> dict[str, Recipe]:
    recipes = pair("StableDiffusion3Pipeline", guidance="mix")
    return {
        phase: dataclasses.replace(
            recipe, branches=["both"] * len(recipe.timesteps), coefficients=[[0.5] * 8] * len(recipe.timesteps)
        )
        for phase, recipe in recipes.items()
    }


def fits(value, kind) -> bool:
    if kind == "FILE":
        return isinstance(value, str) and value.endswith(".safetensors")
    if kind == "STRING":
        return isinstance(value, str)
    if kind[0] in ("INT", "FLOAT"):
        return type(value) in ((int,) if kind[0] == "INT" else (int, float)) and kind[1] <= value <= kind[2]
    return value in kind


@pytest.mark.parametrize("kwargs", [{}, GIVEN, {"max_sequence_length": 64}], ids=["own", "guided", "short"])
@pytest.mark.parametrize("guidance", ["keep", "fold"])
@pytest.mark.parametrize("pipeline", FAMILIES)
def test_links_and_values_fit_the_schemas(pipeline, guidance, kwargs):
    graph = graph_of(pair(pipeline, guidance=guidance, pipeline_kwargs=kwargs), "a red ring", 3)
    used = set()
    for number, node in graph.items():
        schema = SCHEMAS[node["class_type"]]
        assert node["inputs"].keys() == schema["required"].keys(), node
        for name, kind in schema["required"].items():
            value = node["inputs"][name]
            if isinstance(value, list):
                source, output = value
                assert int(source) < int(number), "the graph is walked in order"
                assert SCHEMAS[graph[source]["class_type"]]["outputs"][output] == kind, (name, node)
                used.add(source)
            else:
                assert fits(value, kind), (name, value)
    assert set(graph) - used == {number for number, node in graph.items() if node["class_type"] == "SaveImage"}


def of_kind(graph: dict, kind: str) -> list[dict]:
    return [node["inputs"] | {"number": number} for number, node in graph.items() if node["class_type"] == kind]


@pytest.mark.parametrize("pipeline", FAMILIES)
def test_the_second_half_goes_on_from_the_first_one_without_noise(pipeline):
    recipes = pair(pipeline)
    graph = graph_of(recipes, "a red ring", 3)
    slow, fast = of_kind(graph, "SamplerCustomAdvanced")
    assert fast["latent_image"] == [slow["number"], 0]  # `output`; 1 is `denoised_output`
    [split], [noise], [none] = (of_kind(graph, kind) for kind in ("SplitSigmas", "RandomNoise", "DisableNoise"))
    assert slow["noise"] == [noise["number"], 0] and noise["noise_seed"] == 3 and fast["noise"] == [none["number"], 0]
    assert (slow["sigmas"], fast["sigmas"]) == ([split["number"], 0], [split["number"], 1]) and split["step"] == 3
    for walk, phase in ((slow, "slow"), (fast, "fast")):
        lora = graph[graph[walk["guider"][0]]["inputs"]["model"][0]]
        assert lora["inputs"]["lora_name"] == file_names(recipes)[phase] and lora["inputs"]["strength_model"] == 1
        assert graph[lora["inputs"]["model"][0]]["class_type"] == "UNETLoader"  # each from the base, not in a chain
    [size] = of_kind(graph, FAMILIES[pipeline]["latent"])
    assert (size["height"], size["width"]) == (768, 1024) and slow["latent_image"] == [size["number"], 0]


@settings(max_examples=40)
@given(st.sets(st.integers(1, 999_999), min_size=2, max_size=12))
def test_manual_sigmas_reads_the_schedulers_own_sigmas(thousandths):
    timesteps = [1000.0, *sorted((number / 1000 for number in thousandths), reverse=True)]
    text = sigmas_text(pair(lists={"slow": timesteps[:1], "fast": timesteps[1:]}))
    read = torch.FloatTensor([float(part) for part in re.findall(r"[-+]?(?:\d*\.*\d+)", text)])  # as the node does
    scheduler = FixedSigmaScheduler([timestep / 1000 for timestep in timesteps])
    scheduler.set_timesteps()
    assert read.shape == scheduler.sigmas.shape and "e" not in text
    assert torch.allclose(read, scheduler.sigmas, rtol=0, atol=6e-10)
    large = scheduler.sigmas > 2**-7  # nine digits are all of float32's there
    assert torch.equal(read[large], scheduler.sigmas[large]) and read[-1] == 0


@pytest.mark.parametrize(
    ("pipeline", "own", "cfg"),
    [
        ("FluxPipeline", {}, 1),
        ("FluxPipeline", {"pipeline_kwargs": GIVEN}, 3),
        ("FluxPipeline", {"pipeline_kwargs": {"true_cfg_scale": 3.0}}, 1),  # no negative prompt: diffusers guides not
        ("StableDiffusion3Pipeline", {}, 4.5),
        ("StableDiffusion3Pipeline", {"guidance_scale": 1.0}, 1),
        ("StableDiffusion3Pipeline", {"guidance": "fold"}, 1),
        ("QwenImagePipeline", {"guidance_scale": None}, 1),
        ("QwenImagePipeline", {"pipeline_kwargs": {"negative_prompt": " "}}, 4),
        ("ZImagePipeline", {}, 5.5),
        ("ZImagePipeline", {"guidance_scale": 0.0}, 1),
        ("Krea2Pipeline", {"guidance_scale": None}, 5.5),
        ("Flux2Pipeline", {}, 1),
        ("WanPipeline", {}, None),
    ],
)
def test_cfg_counts_from_one(pipeline, own, cfg):
    recipes = pair(pipeline, **own)
    assert cfg_of(recipes["slow"]) == cfg
    graph = graph_of(recipes, "a red ring")
    assert (graph is None) == (cfg is None)
    guiders = [] if graph is None else of_kind(graph, "CFGGuider")
    assert [guider["cfg"] for guider in guiders] == ([cfg] * 2 if cfg not in (1, None) else [])
    taken = {None: "7steps", 1: "7calls"}.get(cfg, "14calls")
    assert file_names(recipes)["fast"] == f"A-base-glance-{taken}-fast.safetensors"


@pytest.mark.parametrize("pipeline", FAMILIES)
def test_the_facts_are_the_pipelines_own(pipeline):
    family, parameters = FAMILIES[pipeline], inspect.signature(getattr(diffusers, pipeline).__call__).parameters
    if family["guidance"] is not None:
        assert parameters[family["guidance"]].default == family["default"]
    if family["t5"] and family["t5"]["min_length"]:
        assert parameters["max_sequence_length"].default == family["t5"]["min_length"]
    source = inspect.getsource(getattr(diffusers, pipeline))
    if family["guidance"] == "guidance_scale":
        assert f"return self._guidance_scale > {family['off_at']}" in source
    elif family["guidance"]:
        assert "true_cfg_scale > 1 and has_neg_prompt" in source
    assert ("torch.norm(comb_pred" in source) == ("differs" in family)


def test_no_graph_is_written_that_would_draw_something_else(tmp_path):
    for recipes in (mixed_pair(), pair(lists=LISTS | {"slow": [990.0, 900.0]})):
        (tmp_path / GRAPH).write_text("{}")  # an earlier run's
        write_graph(tmp_path, recipes, "a red ring")
        assert not (tmp_path / GRAPH).exists()
        text = card_section(recipes, [])
        assert "there is no comfyui.json; comfyui/glance_nodes.py draws it" in text and "ManualSigmas" not in text
    assert file_names(mixed_pair())["slow"] == "A-base-glance-14calls-slow.safetensors"


def test_the_card_says_what_differs():
    kept, qwen = pair("ZImagePipeline"), pair("QwenImagePipeline", pipeline_kwargs=GIVEN)
    fitted = {
        phase: dataclasses.replace(recipe, coefficients=[[1.0, 0.0]] * len(recipe.timesteps))
        for phase, recipe in pair().items()
    }
    assert "cfg 5.5" in card_section(kept, []) and "guidance_scale + 1" in card_section(kept, [])
    assert "norm of each packed token" in card_section(qwen, [])
    assert "norm" not in card_section(pair("QwenImagePipeline", pipeline_kwargs=GIVEN, guidance="fold"), [])
    assert "fitted solver has no stock node" in card_section(fitted, []) and "fitted" not in card_section(pair(), [])
    assert sigmas_text(kept) in card_section(kept, []) and "after 3" in card_section(kept, [])


def test_a_run_writes_the_graph_and_the_export_is_the_pair(train, capsys):
    folder = train(export="comfyui", export_dtype="bfloat16", max_train_steps=1)
    paths = {phase: folder / phase / WEIGHT_NAME for phase in PHASES}
    recipes = {phase: read_recipe(path) for phase, path in paths.items()}
    graph = json.loads((folder / GRAPH).read_text())
    assert graph == graph_of(recipes, "a red ring") and sigmas_text(recipes) in (folder / "README.md").read_text()
    written = [folder / FOLDER / f"flux-glance-10calls-{phase}.safetensors" for phase in PHASES]
    for phase, path in zip(PHASES, written):
        assert read_recipe(path) == recipes[phase]
        ours, exported = load_file(paths[phase]), load_file(path)
        assert ours.keys() == exported.keys()
        assert all(torch.equal(exported[name], value.bfloat16()) for name, value in ours.items())
        header = read_header(path)
        assert header["modelspec.architecture"] == "flux-1-dev/lora" and header["modelspec.resolution"] == "32x32"
        assert header["ss_network_dim"] == header["ss_network_alpha"] == "4"
    capsys.readouterr()
    main([str(folder)])
    assert capsys.readouterr().out.split() == [str(path) for path in written]
    assert all(torch.equal(load_file(written[0])[name], value) for name, value in load_file(paths["slow"]).items())


@pytest.mark.parametrize("name", ["phase", "max_train_steps"])
def test_an_export_without_a_pair_is_refused(name):
    settings = {"phase": {"phase": "slow"}, "max_train_steps": {"max_train_steps": 0}}[name]
    with pytest.raises(Exception, match="--export"):
        base = {"pretrained_model_name_or_path": "base", "instance_prompt": "a ring", "loss": "trajectory"}
        training_flags.parse(flags(export="comfyui", **base, **settings))


def test_wan_gets_comfyuis_names():
    """Those of comfy/ldm/wan/model.py at 0.33.0."""
    sizes = {"num_attention_heads": 1, "attention_head_dim": 12, "num_layers": 2, "ffn_dim": 16, "text_dim": 8}
    model = diffusers.WanTransformer3DModel(**sizes, freq_dim=8, added_kv_proj_dim=12, image_dim=8)
    for layer in lora_layers(model, "to_q,to_k,to_v,to_out.0,add_k_proj,add_v_proj,ffn.net.0.proj,ffn.net.2"):
        name = renamed(f"transformer.{layer}.lora_A.weight", "WanImageToVideoPipeline")
        assert re.fullmatch(
            r"diffusion_model\.blocks\.\d\.((self|cross)_attn\.[qkvo]|cross_attn\.[kv]_img|ffn\.[02])\.lora_A\.weight",
            name,
        ), (layer, name)


@pytest.mark.parametrize("pipeline", ONE_MATRIX)
def test_one_matrix_for_q_k_and_v_is_said(pipeline):
    with pytest.raises(InputError, match=f"q, k and v of {pipeline} in one matrix"):
        renamed("transformer.layers.0.attn.to_q.lora_A.weight", pipeline)
