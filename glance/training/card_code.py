"""Which lines of Python draw what a run wrote, without its scripts? For the model card, with the run's own lists.

Where the base's stock scheduler walks sigmas as they are given, and the steps are Euler's, they need diffusers alone;
else glance_utils.py beside them. They draw, bit for bit on a CPU, what infer_glance.py draws.
"""

import json

from safetensors import safe_open

from glance import command_line as cli
from glance.ask.pipeline import find_denoiser, frames_argument
from glance.ask.schedule import UNSHIFTED
from glance.files.further_loras import find_file
from glance.files.recipe import WEIGHT_NAME
from glance.shared_flags import DTYPES
from glance.training.card_data import draws_video
from glance.training.prepare import Prepared
from glance_utils import Schedule, model_timesteps, timesteps_to_sigmas


def obstacle(prepared: Prepared, schedule: Schedule, loras: bool) -> str | None:
    """Return why a diffusers pipeline cannot draw it in its own call, None where it can."""
    kind = type(prepared.models.pipe)
    if schedule.branches is not None:
        return "The steps call single branches of guidance, which no diffusers pipeline does in its own call"
    settings = prepared.settings
    name, _ = find_denoiser(settings.pretrained_model_name_or_path, **cli.load_arguments(settings))
    if loras and name not in getattr(kind, "_lora_loadable_modules", ()):
        return f"{kind.__name__} of diffusers loads no LoRAs"
    if settings.pipeline_images:
        return "It is drawn with pictures beside the prompt"
    if "guiders" in prepared.answers.preview_call:
        return f"{kind.__name__} guides by a component, which has to be switched off"
    return None


def python_lines(
    args, prepared: Prepared, schedule: Schedule, base_loras: list[dict] | None, place: str | None
) -> str:
    """Return the lines that draw the run's caption on its schedule; there must be no obstacle.

    `place` is the folder or the repository that holds its LoRAs, None where there are none; `base_loras` are a
    recipe's, and part of the base.
    """
    loras = place is not None
    pipe, call = prepared.models.pipe, prepared.answers.preview_call
    stock = prepared.answers.walks_sigmas and schedule.coefficients is None
    imports, lines = ["import torch", "from diffusers import DiffusionPipeline"], []
    for name, timesteps in schedule.phases.items():
        last = name == [*schedule.phases][-1]
        ended = "  # the 0 is where the last step ends; diffusers adds it itself" if last else ""
        lines.append(f"{name.upper()} = {timesteps_to_sigmas(timesteps) + ([0.0] if last else [])}{ended}")
    lines += [f"SIGMAS = {' + '.join(map(str.upper, schedule.phases))}", ""]
    if loras and stock:
        lines += [
            "",
            "def hand_off(pipe, step, timestep, kwargs):",
            "    if step + 1 == len(SLOW):",
            '        pipe.set_adapters("fast", 1.0)',
            "    return kwargs",
            "",
            "",
        ]
    lines.append(f"pipe = DiffusionPipeline.from_pretrained({', '.join(loaded_with(args))})")
    for lora in base_loras or ():
        lines += fused_lora(args, lora, prepared.answers.layers)
    if loras:
        lines += [
            'for phase in ("slow", "fast"):',
            f'    file = f"{{phase}}/{WEIGHT_NAME}"',
            f"    pipe.load_lora_weights({literal(place)}, weight_name=file, adapter_name=phase)",
            'pipe.set_adapters("slow", 1.0)',
        ]
    given = {name: literal(value) for name, value in call.items()}
    if stock:
        imports[1] += ", FlowMatchEulerDiscreteScheduler"
        off = ", ".join(f"{name}={value}" for name, value in UNSHIFTED.items())
        made = "FlowMatchEulerDiscreteScheduler.from_config"
        lines.append(f"pipe.scheduler = {made}(\n    pipe.scheduler.config, {off}\n)")
        given |= {"sigmas": "SIGMAS[:-1]"}  # the scheduler adds the 0
        given |= {"callback_on_step_end": "hand_off"} if loras else {}
    else:
        imports.append("from glance_utils import FixedSigmaScheduler  # copy the file from beside the scripts")
        lines += fixed_scheduler(prepared, schedule, loras)
    lines.append('pipe.to("cuda" if torch.cuda.is_available() else "cpu")  # or pipe.enable_model_cpu_offload()')
    given |= {"num_inference_steps": "len(SIGMAS) - 1", "generator": f"torch.Generator().manual_seed({args.seed})"}
    video = frames_argument(type(pipe)) is not None
    given |= {"output_type": literal("pil")} if video else {}
    lines += [f"{'frames' if video else 'image'} = pipe("]
    lines += [f"    {name}={value}," for name, value in given.items()]
    if draws_video(type(pipe), call):
        imports.append("from diffusers.utils import export_to_video")
        lines += [")[0][0]", 'export_to_video(frames, "out.mp4")']
    else:
        lines += [")[0][0]", f'{"frames[0]" if video else "image"}.save("out.png")']
    return "\n".join([*imports, "", *lines]) + "\n"


def fused_lora(args, lora: dict, layers: list[str]) -> list[str]:
    """Return the lines that add an entry of a recipe's `base_loras` to the base's weights, some of whose `layers` are
    given by their names.

    A file whose layers are named as the transformer names them, without that before, is loaded by the transformer:
    the pipeline would find nothing in it, and say so in a warning alone.
    """
    name, _ = find_denoiser(args.pretrained_model_name_or_path, **cli.load_arguments(args))
    with safe_open(
        find_file(lora["file"], WEIGHT_NAME, args.cache_dir, "no such LoRA file of the base"), "pt"
    ) as file:
        first = {key.split(".")[0] for key in file.keys() if ".lora_A." in key}
    if first and first <= {layer.split(".")[0] for layer in layers}:
        loaded = f"pipe.{name}.load_lora_adapter({literal(lora['file'])}, prefix=None)"
        return [loaded, f"pipe.{name}.fuse_lora(lora_scale={lora['scale']})", f"pipe.{name}.unload_lora()"]
    loaded = f"pipe.load_lora_weights({literal(lora['file'])})"
    return [loaded, f"pipe.fuse_lora(lora_scale={lora['scale']})", "pipe.unload_lora_weights()"]


def literal(value) -> str:
    """Return a value of JSON as Python writes it, texts in double quotes."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def loaded_with(args) -> list[str]:
    """Return the arguments of from_pretrained for the base as it was trained on, but for its quantization."""
    given = [literal(args.pretrained_model_name_or_path)]
    if dtype := DTYPES.get(args.mixed_precision):
        given.append(f"dtype=torch.{dtype}")
    return given + [f"{name}={literal(value)}" for name in ("revision", "variant") if (value := getattr(args, name))]


def fixed_scheduler(prepared: Prepared, schedule: Schedule, loras: bool) -> list[str]:
    """Return the lines that put the schedule into the pipeline by glance_utils' scheduler, which also switches the
    adapters."""
    told = model_timesteps(prepared.answers.timestep_table, timesteps_to_sigmas(schedule.timesteps))
    given = {"model_timesteps": told, "coefficients": schedule.coefficients}
    parts = ["SIGMAS[:-1]", *(f"{name}={value}" for name, value in given.items() if value is not None)]
    lines = []
    if loras:
        lines = [
            "",
            "",
            "def switch(step):",
            '    pipe.set_adapters("slow" if step < len(SLOW) else "fast", 1.0)',
            "",
            "",
        ]
        parts.append("before_step=switch")
    inner = "".join(f"    {part},\n" for part in [*parts, "like=pipe.scheduler"])
    return [*lines, f"pipe.scheduler = FixedSigmaScheduler(\n{inner})"]
