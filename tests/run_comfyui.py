"""Run comfyui.json and comfyui/glance_nodes.py in a real ComfyUI: python tests/run_comfyui.py COMFYUI_FOLDER

COMFYUI_FOLDER is a checkout, the environment one with its requirements and ours; no server is started, nothing is
written into it. Tiny random transformers with random pairs are drawn by both; a line each says how far the final
latents are from ours, relative to their size, and the exit code is 1 where that is above 1e-5. Text encoders and VAE
are not run: conditionings are random, latents are compared.
"""

import asyncio
import importlib
import sys
import tempfile
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
COMFYUI = Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve()
sys.path[:0] = [str(ROOT), str(COMFYUI)]
sys.argv = ["main.py", "--cpu", "--force-fp32"]

import comfy.options  # noqa: E402


comfy.options.enable_args_parsing()

import diffusers  # noqa: E402
import folder_paths  # noqa: E402
import nodes  # noqa: E402
import torch  # noqa: E402
from comfyui_version import __version__  # noqa: E402
from peft import LoraConfig  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from glance.adapters import lora_layers  # noqa: E402
from glance.ask import mixed  # noqa: E402
from glance.files.comfyui import cfg_of, file_names, graph_of  # noqa: E402
from glance.files.comfyui_export import FOLDER, export_pair  # noqa: E402
from glance.files.comfyui_facts import FAMILIES  # noqa: E402
from glance.files.lora import save_lora  # noqa: E402
from glance.files.recipe import Recipe, schedule_of  # noqa: E402
from glance_utils import glance_inference  # noqa: E402


MODULES = ("nodes_custom_sampler", "nodes_flux", "nodes_sd3", "nodes_cond")  # of comfy_extras
SIDE, TOKENS, SEED, LIMIT = 128, 12, 7, 1e-5
PHASES = {"slow": [1000.0, 960.5, 913.25, 850.125], "fast": [777.7, 561.3, 299.9, 61.7]}
FITTED = [[1.0, 0.0], [1.07, -0.07], [1.1, -0.12], [1.2, -0.2], [1.15, -0.1], [1.3, -0.3], [1.2, -0.25], [1.1, -0.1]]
BRANCHES = ["both", "prompt", "negative", "prompt", "both", "prompt", "negative", "prompt"]


def classes() -> dict[str, type]:
    """ComfyUI's nodes by name: its own list, and the classes of its extras with the newer schema."""
    found = dict(nodes.NODE_CLASS_MAPPINGS)
    for name in MODULES:
        extension = asyncio.run(importlib.import_module(f"comfy_extras.{name}").comfy_entrypoint())
        found |= {kind.define_schema().node_id: kind for kind in asyncio.run(extension.get_node_list())}
    return found


def run(graph: dict, replaced: dict) -> dict:
    """Every node's outputs by its number; `replaced` stands for nodes that read or write what is not there."""
    kinds, done = classes(), {}
    for number, node in graph.items():  # links lead back only
        inputs = {
            name: done[value[0]][value[1]] if isinstance(value, list) else value
            for name, value in node["inputs"].items()
        }
        kind = node["class_type"]
        if kind in replaced:
            done[number] = (replaced[kind](**inputs),)
        elif hasattr(kinds[kind], "define_schema"):
            done[number] = kinds[kind].execute(**inputs).result
        else:
            done[number] = getattr(kinds[kind](), kinds[kind].FUNCTION)(**inputs)
    return done


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def flux():
    """A pipeline of one layer each with what its call takes, and the conditionings for ComfyUI, by branch."""
    sizes = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1, "attention_head_dim": 128}
    text = {"joint_attention_dim": 32, "pooled_projection_dim": 16, "guidance_embeds": True}
    transformer = diffusers.FluxTransformer2DModel(**sizes, **text)
    pipe = diffusers.FluxPipeline(scheduler(), None, None, None, None, None, transformer)
    return pipe, {}, ("prompt_embeds", 32), ("pooled_prompt_embeds", 16)


def sd3():
    sizes = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 64, "sample_size": 32}
    text = {"joint_attention_dim": 48, "caption_projection_dim": 128, "pooled_projection_dim": 16}
    transformer = diffusers.SD3Transformer2DModel(**sizes, **text, pos_embed_max_size=32, qk_norm="rms_norm")
    none = [None] * 7
    pipe = diffusers.StableDiffusion3Pipeline(transformer, scheduler(), *none)
    return pipe, {"guidance_scale": 4.0}, ("prompt_embeds", 48), ("pooled_prompt_embeds", 16)


def qwen():
    """As wide as the real one: ComfyUI knows no other width."""
    transformer = diffusers.QwenImageTransformer2DModel(num_layers=1)
    pipe = diffusers.QwenImagePipeline(scheduler(), None, None, None, transformer)
    call = {"true_cfg_scale": 4.0, "negative_prompt": ""}
    return pipe, call, ("prompt_embeds", 3584), None


def scheduler():
    return diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)


def conditionings(embeds, pooled) -> tuple[dict, dict]:
    """Random ones for "prompt" and "negative": the pipeline's arguments, and ComfyUI's."""
    ours, theirs = {}, {}
    for seed, branch in enumerate(("prompt", "negative"), start=1):
        values = noise(1, TOKENS, embeds[1], seed=seed)
        ours[branch], more = {embeds[0]: values}, {}
        if pooled is not None:
            more = {"pooled_output": noise(1, pooled[1], seed=seed + 10)}
            ours[branch][pooled[0]] = more["pooled_output"]
        theirs[branch] = [[values, more]]
    return ours, theirs


def add_loras(transformer) -> None:
    """Give the transformer a random adapter for each phase."""
    config = LoraConfig(r=4, target_modules=lora_layers(transformer), init_lora_weights=False)
    for phase in PHASES:
        transformer.add_adapter(config, phase)


def write_pair(pipe, call: dict, folder: Path, **own) -> dict[str, Recipe]:
    """Write both adapters as a pair, and return its recipes."""
    recipes, first = {}, 0
    for phase, timesteps in PHASES.items():
        part = slice(first, first := first + len(timesteps))
        kwargs = {name: value for name, value in call.items() if name != "guidance_scale"}
        recipes[phase] = Recipe(
            phase=phase,
            timesteps=timesteps,
            base_model="tiny",
            pipeline=type(pipe).__name__,
            height=SIDE,
            width=SIDE,
            guidance_scale=call.get("guidance_scale", 3.5),
            pipeline_kwargs=kwargs,
            num_base_steps=50,
            loss="flow",
            max_train_steps=1,
            rank=4,
            version="0",
            **{name: value[part] for name, value in own.items()},
        )
        save_lora(pipe.transformer, phase, folder / phase, recipes[phase])
    return recipes


def ours(pipe, recipes, call: dict, texts: dict) -> torch.Tensor:
    """Our final latents, (1, C, ..., H, W)."""
    schedule, size = schedule_of(recipes), {"height": SIDE, "width": SIDE, "output_type": "latent"}
    generator = torch.Generator().manual_seed(SEED)
    rest = {name: value for name, value in call.items() if name != "negative_prompt"}
    if schedule.branches is not None:
        single = {"guidance_scale": 1.0} if "guidance_scale" in rest else {}
        calls = {branch: size | single | text for branch, text in texts.items()}
        start = mixed.starting_latents(pipe, generator=generator, **calls["prompt"])
        names = schedule.phase_of_steps
        latents = mixed.final_latents(
            pipe, schedule, calls, start, lambda index: pipe.transformer.set_adapter(names[index])
        )
    else:
        negative = {f"negative_{name}": value for name, value in texts["negative"].items()} if rest else {}
        with torch.no_grad(), glance_inference(pipe, schedule) as steps:
            latents = pipe(**texts["prompt"], **negative, **rest, **size, **steps, generator=generator).images
    return pipe._unpack_latents(latents, SIDE, SIDE, 8) if latents.ndim == 3 else latents


def theirs(recipes, folder: Path, pipe, prompts: dict, node: bool) -> torch.Tensor:
    """ComfyUI's, of comfyui.json or of our node in its place, in the latents' own scale."""
    export_pair(folder)
    folder_paths.add_model_folder_path("loras", str(folder / FOLDER), is_default=True)
    folder_paths.filename_list_cache.clear()
    graph = graph_of({phase: plain(recipe) for phase, recipe in recipes.items()}, "prompt", SEED)
    [base] = [number for number, item in graph.items() if item["class_type"] == "UNETLoader"]
    for item in graph.values():
        if item["class_type"] == "CLIPTextEncode":
            item["inputs"]["text"] = item["_meta"]["title"]
    guide = [item for item in graph.values() if item["class_type"] in ("CFGGuider", "BasicGuider")][0]["inputs"]
    walks = [number for number, item in graph.items() if item["class_type"] == "SamplerCustomAdvanced"]
    if node:
        first = graph[walks[0]]["inputs"]
        names = {f"{phase}_lora": name for phase, name in file_names(recipes).items()}
        links = {"model": [base, 0], "positive": guide.get("positive", guide.get("conditioning"))}
        links |= {name: first[name] for name in ("noise", "latent_image")}
        links |= {"negative": guide["negative"]} if "negative" in guide else {}
        inputs = links | names | {"strength": 1.0, "cfg": guide.get("cfg", 1.0)}
        graph[walks[1]] = {"class_type": "GlanceSampler", "inputs": inputs}
    texts = {"Prompt": prompts["prompt"], "Negative prompt": prompts["negative"]}
    encoders = FAMILIES[recipes["slow"].pipeline]["encoders"][0]
    replaced = dict.fromkeys((encoders, "VAELoader", "T5TokenizerOptions", "VAEDecode", "SaveImage"), lambda **_: None)
    done = run(graph, replaced | {"CLIPTextEncode": lambda clip, text: texts[text]})
    model, latents = done[base][0], done[walks[1]][0]["samples"]
    return model.get_model_object("latent_format").process_in(latents)


def plain(recipe: Recipe) -> Recipe:
    """The recipe with Euler's steps, of which there is a graph."""
    return Recipe(**recipe.as_dict() | {"branches": None, "coefficients": None})


def main() -> None:
    print(f"ComfyUI {__version__}, torch {torch.__version__}, diffusers {diffusers.__version__}")
    spec = importlib.util.spec_from_file_location("glance_nodes", ROOT / "comfyui/glance_nodes.py")
    ours_in_comfyui = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ours_in_comfyui)
    nodes.NODE_CLASS_MAPPINGS |= ours_in_comfyui.NODE_CLASS_MAPPINGS
    generator = torch.Generator().manual_seed(0)
    weights = [[round(x, 3) for x in (torch.randn(8, generator=generator) / 4).tolist()] for _ in BRANCHES]
    solvers = {"Euler": {}, "fitted": {"coefficients": FITTED}}
    mixed_branches = {"mixed": {"coefficients": weights, "branches": BRANCHES}}
    cases = {flux: solvers, sd3: solvers | mixed_branches, qwen: {"Euler": {}}}
    wrong = False
    for make, kinds in cases.items():
        torch.manual_seed(0)
        pipe, call, embeds, pooled = make()
        pipe.set_progress_bar_config(disable=True)
        texts, prompts = conditionings(embeds, pooled)
        with tempfile.TemporaryDirectory() as root:
            name = FAMILIES[type(pipe).__name__]["unet"]
            save_file(pipe.transformer.state_dict(), Path(root, name))
            folder_paths.add_model_folder_path("diffusion_models", root, is_default=True)
            add_loras(pipe.transformer)
            for solver, own in kinds.items():
                recipes = write_pair(pipe, call, Path(root, solver), **own)
                expected = ours(pipe, recipes, call, texts)
                for way in ("stock nodes", "our node") if solver == "Euler" else ("our node",):
                    found = theirs(recipes, Path(root, solver), pipe, prompts, way == "our node")
                    error = float((found - expected.reshape(found.shape)).norm() / expected.norm())
                    exact = way == "our node" or make is not qwen  # whose norm stock nodes do not know
                    wrong |= exact and not error <= LIMIT
                    cfg = cfg_of(plain(recipes["slow"]))
                    note = "" if exact else ", as known"
                    print(f"{make.__name__:5} {solver:6} cfg {cfg:g} {way}: {error:.1e}{note}")
    sys.exit(int(wrong))


if __name__ == "__main__":
    main()
