"""How is a pair drawn in ComfyUI by its stock nodes? comfyui.json, the graph in API format, and what differs there.

They walk Euler's steps over ManualSigmas, split at the hand-off; the second half goes on from the first's `output`,
without new noise. tests/run_comfyui.py runs the graph in a checkout of ComfyUI. What differs by family is data of
comfyui_facts.
"""

import json
import re
from pathlib import Path

from glance.ask.mixed import count_calls
from glance.files.atomic import replace_text
from glance.files.comfyui_facts import FAMILIES, ONE_MATRIX, RENAMES
from glance.files.recipe import WEIGHT_NAME, Recipe, schedule_of
from glance_utils import timesteps_to_sigmas


GRAPH = "comfyui.json"
FOLDER = "comfyui"  # inside the run's, where the export is written
ONE_MATRIX_TEXT = "ComfyUI has q, k and v of {} in one matrix and no names for the three"
VERSION = "0.7.0"  # of ComfyUI, the first with ManualSigmas


def sigmas_text(recipes: dict[str, Recipe]) -> str:
    """Return what ManualSigmas takes: all digits of float32 and never an exponent, which it would read as another
    number; the last is 0."""
    return ", ".join(f"{sigma:.9f}" for sigma in [*timesteps_to_sigmas(schedule_of(recipes).timesteps), 0.0])


def cfg_of(recipe: Recipe) -> float | None:
    """Return ComfyUI's cfg, 1 where nothing guides; None where that is not known of the pipeline."""
    family = FAMILIES.get(recipe.pipeline)
    if recipe.guidance == "fold":
        return 1.0
    if family is None:
        return None
    kwargs, name = recipe.pipeline_kwargs, family["guidance"]
    if name is None or family["asked_by_negative"] and kwargs.get("negative_prompt") is None:
        return 1.0
    scale = recipe.guidance_scale if name == "guidance_scale" else kwargs.get(name)
    scale = family["default"] if scale is None else scale
    return float(scale + 1 - family["off_at"]) if scale > family["off_at"] else 1.0


def file_names(recipes: dict[str, Recipe]) -> dict[str, str]:
    """Return by phase the name of its file among all others in ComfyUI's folder of LoRAs: the base, what a picture
    takes, the phase; where the calls are not known, the steps."""
    schedule, first = schedule_of(recipes), recipes["slow"]
    steps, cfg = len(schedule.timesteps), cfg_of(first)
    if schedule.branches is not None:
        taken = f"{count_calls(schedule.branches)}calls"
    else:
        taken = f"{steps}steps" if cfg is None else f"{steps * (1 if cfg == 1 else 2)}calls"
    base = re.sub(r"[^\w.-]+", "-", Path(first.base_model).name) or "base"
    return {phase: f"{base}-glance-{taken}-{phase}.safetensors" for phase in recipes}


def obstacle(recipes: dict[str, Recipe]) -> str | None:
    """Return why stock nodes would draw something else, None where they step as infer_glance.py does or by Euler."""
    if recipes["slow"].branches is not None:
        return "This sampler calls single branches of guidance, stock nodes step by Euler alone"
    if recipes["slow"].pipeline_images:
        return "It is drawn with pictures beside the prompt"
    if (highest := recipes["slow"].timesteps[0]) < 1000:
        return f"The first step is at {highest:g}, and stock nodes scale the noise by that"
    return None


def differences(recipes: dict[str, Recipe]) -> list[str]:
    """Return what stock nodes cannot draw as infer_glance.py does, a sentence each."""
    first = recipes["slow"]
    family, cfg = FAMILIES.get(first.pipeline), cfg_of(first)
    if reason := obstacle(recipes):
        return [f"{reason}: there is no {GRAPH}; comfyui/glance_nodes.py draws it."]
    found = [f"It needs ComfyUI {VERSION} or newer, for ManualSigmas."]
    if first.coefficients is not None:
        found.append("The fitted solver has no stock node: they step by Euler; comfyui/glance_nodes.py draws it.")
    if cfg is None:
        found.append("What its cfg must be is not known; where the pipeline counts guidance from 0 it is one more.")
    elif cfg != 1 and family["off_at"] == 0:
        found.append("The cfg is guidance_scale + 1, as this pipeline counts guidance from 0.")
    if family is not None and cfg != 1 and "differs" in family:
        found.append(f"{family['differs'][0].upper()}{family['differs'][1:]}; comfyui/glance_nodes.py does it too.")
    return found


def graph_of(recipes: dict[str, Recipe], prompt: str, seed: int = 0) -> dict[str, dict] | None:
    """Return the graph by the numbers of its nodes; None where stock nodes would draw something else, or where
    ComfyUI's files and nodes for the pipeline are not known.

    A link is [number of the node, index of its output].
    """
    first = recipes["slow"]
    family, cfg = FAMILIES.get(first.pipeline), cfg_of(first)
    if family is None or obstacle(recipes):
        return None
    graph, names, kwargs = {}, file_names(recipes), first.pipeline_kwargs

    def node(kind: str, title: str | None = None, **inputs) -> str:
        number = str(len(graph) + 1)
        graph[number] = {"class_type": kind, "inputs": inputs} | ({"_meta": {"title": title}} if title else {})
        return number

    base = node("UNETLoader", "Base", unet_name=family["unet"], weight_dtype="default")
    for lora in first.base_loras or ():
        file = Path(lora["file"]).name.removesuffix(".safetensors") + ".safetensors"
        loaded = {"lora_name": file, "strength_model": lora["scale"]}
        base = node("LoraLoaderModelOnly", "Part of the base", model=[base, 0], **loaded)
    kind, files = family["encoders"]
    clip = node(kind, "Text encoders", **files)
    vae = node("VAELoader", vae_name=family["vae"])
    if family["t5"]:
        options = dict(family["t5"])
        if options["min_length"]:
            options["min_length"] = kwargs.get("max_sequence_length", options["min_length"])
        clip = node("T5TokenizerOptions", "T5 padded as diffusers does", clip=[clip, 0], **options)
    texts = [node("CLIPTextEncode", "Prompt", clip=[clip, 0], text=prompt)]
    if cfg != 1:
        texts.append(
            node("CLIPTextEncode", "Negative prompt", clip=[clip, 0], text=kwargs.get("negative_prompt") or "")
        )
    if family["told"] and first.guidance_scale is not None:
        told = first.guidance_scale
        texts = [node("FluxGuidance", "As trained", conditioning=[text, 0], guidance=told) for text in texts]
    solver = "Euler" if first.coefficients is None else "Euler, as the fitted solver has no stock node"
    euler = node("KSamplerSelect", solver, sampler_name="euler")
    sigmas = node("ManualSigmas", "Glance's steps", sigmas=sigmas_text(recipes))
    parts = node("SplitSigmas", "The hand-off", sigmas=[sigmas, 0], step=len(first.timesteps))
    latents = node(family["latent"], "Size as trained", width=first.width, height=first.height, batch_size=1)
    noises = [node("RandomNoise", noise_seed=seed), node("DisableNoise", "None at the hand-off")]
    for index, (phase, name) in enumerate(names.items()):
        model = node("LoraLoaderModelOnly", phase, model=[base, 0], lora_name=name, strength_model=1.0)
        if cfg == 1:
            guider = node("BasicGuider", phase, model=[model, 0], conditioning=[texts[0], 0])
        else:
            ends = {"positive": [texts[0], 0], "negative": [texts[1], 0]}
            guider = node("CFGGuider", phase, model=[model, 0], **ends, cfg=cfg)
        ways = {"noise": [noises[index], 0], "guider": [guider, 0], "sampler": [euler, 0], "sigmas": [parts, index]}
        latents = node("SamplerCustomAdvanced", phase, **ways, latent_image=[latents, 0])
    image = node("VAEDecode", samples=[latents, 0], vae=[vae, 0])
    node("SaveImage", images=[image, 0], filename_prefix="glance")
    return graph


def write_graph(folder: Path, recipes: dict[str, Recipe], prompt: str) -> None:
    """Write comfyui.json, whole or not at all; one that an earlier run left is taken away where there is none."""
    graph = graph_of(recipes, prompt)
    if graph is None:
        (folder / GRAPH).unlink(missing_ok=True)
    else:
        replace_text(folder / GRAPH, json.dumps(graph, indent=1) + "\n")


def card_section(recipes: dict[str, Recipe], exported: list[str]) -> str:
    """Return what the model card says of ComfyUI: files, steps, split, cfg, and what is known to differ.

    `exported` are the names of the files in ComfyUI's form, in the card's folder, none where they were not written.
    """
    first, cfg = recipes["slow"], cfg_of(recipes["slow"])
    title = ["## ComfyUI", ""]
    if first.pipeline in ONE_MATRIX:
        return "\n".join([*title, f"{ONE_MATRIX_TEXT.format(first.pipeline)}: it cannot read these LoRAs.", ""])
    if exported:
        lines = ["Copy into its `models/loras`:", "", *(f"- `{name}`" for name in exported)]
    else:
        copied = f"`python -m glance.files.comfyui_export FOLDER` writes them into `FOLDER/{FOLDER}`"
        if first.pipeline not in RENAMES:
            known = "" if first.pipeline in FAMILIES else "Where ComfyUI has this model: "
            copied = (
                f"{known}{'c' if known else 'C'}opy the files into its `models/loras` under these names, or {copied}"
            )
        else:
            copied = f"It has other names for the layers: {copied}, to be copied into its `models/loras`"
        names = file_names(recipes).items()
        lines = [f"{copied}:", "", *(f"- `{phase}/{WEIGHT_NAME}` as `{name}`" for phase, name in names)]
    if not obstacle(recipes):
        opens = f"`{GRAPH}` opens as a graph of stock nodes; by hand, they are " if first.pipeline in FAMILIES else ""
        shown = "" if cfg is None else f", cfg {cfg:g}"
        steps = f"`SplitSigmas` after {len(first.timesteps)}{shown}, sampler euler, and for `ManualSigmas`:"
        lines += ["", f"{opens}{steps}", "", f"    {sigmas_text(recipes)}"]
        lines += ["", "Both LoRAs have strength 1, each in a model of its own (`LoraLoaderModelOnly`). The second "]
        lines[-1] += "`SamplerCustomAdvanced` takes `DisableNoise` and the first one's `output`."
    return "\n".join([*title, *lines, "", *(f"- {text}" for text in differences(recipes)), ""])
