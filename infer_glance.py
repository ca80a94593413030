"""Ten-step inference with a Slow- and a Fast-LoRA: one pipeline, one loop over all ten sigmas, an exact hand-off.

    python infer_glance.py --pretrained_model_name_or_path black-forest-labs/FLUX.1-dev --lora output/glance \\
        --dtype bfloat16 --prompt "a red fox in the snow" --output out.png
    python infer_glance.py --pretrained_model_name_or_path demo/model --lora output/demo \\
        --prompts_file demo/prompts.txt --compare --output comparison.png

The schedule, the size and the guidance are read from the LoRA files. Image i of a prompt has the seed --seed + i.
With more than one image, out.png becomes out-000.png, out-001.png, ... `accelerate launch infer_glance.py` splits the
images over its processes. --compare draws the base at full steps, the base at ten and Glance beside each other.
"""

import start


if __name__ == "__main__":
    start.as_script("what was not saved yet is lost")

import logging
import os
import re
import time
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download
from PIL import Image, ImageDraw, ImageFont
from tqdm.auto import tqdm

import ask_pipeline as ask
import command_line as cli
import glance_utils as glance
import load_base
import lora_files
from glance_utils import InputError


logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def parse_args(argv: list[str] | None = None):
    parser = cli.Parser(description="Ten-step inference with a Slow- and a Fast-LoRA.")
    add = parser.add_argument
    add("--pretrained_model_name_or_path", help="the base: a diffusers pipeline, folder or hub id")
    add("--revision", help="git revision of the base on the hub")
    add("--variant", help="variant of the weight files, for example fp16")
    add("--lora", help="what train_glance_lora.py wrote, with slow/ and fast/ in it: folder or hub id")
    add("--slow_lora", help="or: the Slow-LoRA's file, folder or hub id")
    add("--fast_lora", help="and the Fast-LoRA's")
    add("--slow_weight_name", help="the Slow-LoRA's file there, if it has another name")
    add("--fast_weight_name", help="the Fast-LoRA's")
    add("--lora_scale", type=cli.one_or_two, default="1", help="strength of both, or SLOW,FAST")
    add(
        "--flow_custom_timesteps",
        help="'SLOW LIST;FAST LIST'; as trained by default, derived for files without recipe",
    )
    add("--allow_base_mismatch", action="store_true", help="use LoRAs on a base of another name, such as a fine-tune")
    add("--prompt", action="append", help="may be given several times")
    add("--prompts_file", help="one prompt a line")
    add("--output", default="out.png")
    add("--num_images", type=cli.positive(int), default=1, help="images per prompt")
    add("--seed", type=cli.seed, default=0)
    add("--height", type=cli.positive(int, glance.MAX_SIDE), help="as trained by default")
    add("--width", type=cli.positive(int, glance.MAX_SIDE), help="as trained by default")
    add("--guidance_scale", type=cli.finite, help="as trained by default")
    add("--guidance", choices=("keep", "fold"), help="as trained by default; fold: none, it is in the LoRAs")
    add("--pipeline_kwargs", type=cli.json_object, default={}, help="JSON: further arguments of the pipeline's call")
    add("--compare", action="store_true", help="one labelled picture: base at full steps, base at ten, Glance")
    add("--dtype", "--torch_dtype", choices=tuple(DTYPES), default="float32")
    add("--quantization", choices=load_base.QUANTIZATIONS, default="none", help="of the transformer, while it loads")
    add("--fuse_lora", action="store_true", help="add each LoRA to the weights: no cost a step, more memory")
    add("--compile", action="store_true", help="torch.compile the repeated blocks; fuses the LoRAs where it can")
    add("--enable_model_cpu_offload", action="store_true", help="keep only the component at work on the accelerator")
    add("--enable_group_offload", action="store_true", help="keep weights in host memory, the next layer on its way")
    add("--enable_sequential_cpu_offload", action="store_true", help="slowest, least memory")
    add("--enable_vae_tiling", action="store_true", help="decode large pictures in tiles")
    args = parser.parse(argv)
    if not args.pretrained_model_name_or_path:
        raise InputError("--pretrained_model_name_or_path is missing; give a diffusers pipeline, folder or hub id")
    check_combination(args)
    args.prompts = read_prompts(args)
    args.custom_timesteps = None
    if args.flow_custom_timesteps is not None:
        lists = glance.parse_timesteps(args.flow_custom_timesteps)
        if len(lists) != 2:
            raise InputError("--flow_custom_timesteps holds one list; inference takes two: 'SLOW LIST;FAST LIST'")
        args.custom_timesteps = dict(zip(glance.PHASES, lists))
    return args


def check_combination(args) -> None:
    """InputError where ways to save memory or time exclude each other; --compile fuses where it can."""
    load_base.check_combination(args.quantization, args.enable_group_offload)
    offloads = ("enable_model_cpu_offload", "enable_group_offload", "enable_sequential_cpu_offload")
    offload = [f"--{name}" for name in offloads if getattr(args, name)]
    if len(offload) > 1:
        raise InputError(f"{' and '.join(offload)} exclude each other; give one")
    fixed = f"--quantization {args.quantization}" if args.quantization != "none" else " ".join(offload)
    if args.fuse_lora and fixed:
        raise InputError(
            f"--fuse_lora changes weights in place, which {fixed} does not allow; leave one of the two out"
        )
    if args.quantization == "nf4" and args.enable_sequential_cpu_offload:
        raise InputError(
            "--enable_sequential_cpu_offload does not take --quantization nf4; use --enable_model_cpu_offload"
        )
    args.fuse_lora = args.fuse_lora or (args.compile and not fixed)


def read_prompts(args) -> list[str]:
    prompts = [prompt.strip() for prompt in args.prompt or [] if prompt.strip()] + cli.read_prompts(args.prompts_file)
    if not prompts:
        raise InputError("no prompt; give --prompt TEXT or --prompts_file FILE")
    return prompts


def find_loras(args) -> dict[str, Path]:
    """The two files, as {"slow": path, "fast": path}; from the hub where a source is no path but a hub id."""
    if bool(args.lora) == bool(args.slow_lora or args.fast_lora) or bool(args.slow_lora) != bool(args.fast_lora):
        raise InputError("give --lora FOLDER, or both --slow_lora and --fast_lora")
    paths = {}
    for phase in glance.PHASES:
        source, name = args.lora or getattr(args, f"{phase}_lora"), getattr(args, f"{phase}_weight_name")
        name = name or (f"{phase}/{glance.WEIGHT_NAME}" if args.lora else glance.WEIGHT_NAME)
        path = Path(source)
        if not name.endswith(".safetensors") or os.path.isfile(path) and path.suffix != ".safetensors":
            raise InputError(f"{source} {name}: only .safetensors files are read, as others can run code; give one")
        if os.path.isdir(path):
            path = path / name
        elif not os.path.exists(path) and re.fullmatch(r"[\w.-]+/[\w.-]+", source):
            try:
                path = Path(hf_hub_download(source, name))
            except Exception as error:  # not there, no login, no network: each of another kind
                raise InputError(f"{source}: neither a folder nor on the hub ({glance.first_line(error)})") from error
        if not os.path.isfile(path):
            raise InputError(f"{path}: no such {phase} LoRA file; train it with train_glance_lora.py")
        paths[phase] = path
    return paths


def read_recipes(args, paths: dict[str, Path]) -> tuple[dict, dict[str, list[float]] | None]:
    """What both files say, checked against each other and the base: (recipe, timesteps by phase), the recipe with the
    fitted solver's coefficients of both.

    Files that were not trained here say nothing: the pipeline's defaults, and None for the timesteps.
    """
    recipes = {phase: lora_files.read_recipe(path, required=False) for phase, path in paths.items()}
    silent = [str(paths[phase]) for phase, recipe in recipes.items() if recipe is None]
    if len(silent) == 1:
        raise InputError(
            f"{silent[0]}: carries no Glance recipe, but the other file does; give two that were trained together"
        )
    if silent:
        ask.read_model_index(args.pretrained_model_name_or_path, **cli.load_arguments(args))
        nothing = dict.fromkeys(("height", "width", "guidance_scale", "coefficients"))
        return nothing | {"pipeline_kwargs": {}, "num_base_steps": 50, "guidance": "keep"}, args.custom_timesteps
    if args.custom_timesteps:
        for phase, recipe in recipes.items():
            recipe |= {"timesteps": args.custom_timesteps[phase], "coefficients": None}
    check_pair(recipes, paths)
    check_base(args, recipes["slow"])
    fitted = [recipe["coefficients"] for recipe in recipes.values()]
    recipe = recipes["slow"] | {"coefficients": sum(fitted, []) if all(fitted) else None}
    return recipe, {phase: recipe["timesteps"] for phase, recipe in recipes.items()}


def published_timesteps(pipe: DiffusionPipeline, base_timesteps: list[float]) -> dict[str, list[float]]:
    """The published ten of the base's own, for files that do not say theirs; InputError where it has too few."""
    if glance.most_positions("glance", 10, len(base_timesteps)) < 10:
        raise InputError(
            f"the LoRA files carry no recipe, and this {type(pipe).__name__} has its own {len(base_timesteps)} steps, "
            "too few for the published ten; give those that were trained as --flow_custom_timesteps 'SLOW LIST;FAST "
            f"LIST', of {', '.join(f'{timestep:.4f}' for timestep in base_timesteps)}"
        )
    return glance.derive_timesteps(base_timesteps)


def check_pair(recipes: dict[str, dict], paths: dict[str, Path]) -> None:
    """Raise InputError where two LoRA files do not belong together."""
    slow, fast = recipes["slow"], recipes["fast"]
    for phase, recipe in recipes.items():
        if recipe["phase"] != phase:
            raise InputError(
                f"{paths[phase]}: given as the {phase} LoRA, but it was trained as the {recipe['phase']} one"
            )
    if slow["timesteps"][-1] <= fast["timesteps"][0]:
        raise InputError(
            f"the pair does not chain: slow ends at timestep {slow['timesteps'][-1]:g}, fast begins at "
            f"{fast['timesteps'][0]:g}; slow must end above where fast begins, so train both on one schedule"
        )
    same = ("base_model", "pipeline", "height", "width", "num_base_steps", "guidance_scale", "pipeline_kwargs")
    for key in (*same, "guidance"):
        if slow[key] != fast[key]:
            raise InputError(f"the pair does not match: slow has {key} {slow[key]}, fast has {fast[key]}")
    if bool(slow["coefficients"]) != bool(fast["coefficients"]):
        raise InputError("the pair does not match: one was trained for the fitted solver, the other for Euler's")


def check_base(args, recipe: dict) -> None:
    """Raise InputError where the LoRAs were trained on another base; names count, not the folders they lie in."""
    index = ask.read_model_index(args.pretrained_model_name_or_path, **cli.load_arguments(args))
    if index["_class_name"] != recipe["pipeline"]:
        raise InputError(f"the LoRAs are for a {recipe['pipeline']}, the base is a {index['_class_name']}")
    trained, given = Path(recipe["base_model"]), Path(args.pretrained_model_name_or_path)
    if trained.resolve().name.lower() != given.resolve().name.lower() and not args.allow_base_mismatch:
        raise InputError(
            f"the LoRAs were trained on {trained}, not on {given}; --allow_base_mismatch tries nevertheless"
        )


def load_pipeline(args, paths: dict[str, Path], device: torch.device) -> DiffusionPipeline:
    """The base with both adapters loaded and none active."""
    base, dtype, where = args.pretrained_model_name_or_path, DTYPES[args.dtype], cli.load_arguments(args)
    offload = args.enable_model_cpu_offload or args.enable_group_offload or args.enable_sequential_cpu_offload
    place = torch.device("cpu") if offload else device
    transformer = load_base.load_transformer(base, dtype, place, args.quantization, **where)
    name, _ = ask.find_denoiser(base, **where)
    with ask.loading(base):
        pipe = DiffusionPipeline.from_pretrained(
            base, **{name: transformer}, dtype=dtype, use_safetensors=True, **where
        )
    for phase, path in paths.items():
        lora_files.check_fits(pipe, path)
        glance.load_lora(pipe, path, phase)
    glance.activate_adapter(glance.denoiser(pipe), None)
    if args.enable_vae_tiling:
        pipe.vae.enable_tiling()
    if args.enable_sequential_cpu_offload:
        pipe.enable_sequential_cpu_offload(device=device)
    elif args.enable_model_cpu_offload:
        pipe.enable_model_cpu_offload(device=device)
    elif args.enable_group_offload:
        pipe.enable_group_offload(**load_base.group_offload_arguments(device))
    else:
        pipe.to(device)
    if args.compile:
        load_base.compile_blocks(glance.denoiser(pipe))
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Counter:
    """Counts the samples that pass the model, so that guidance by a doubled batch counts as two model calls."""

    def __init__(self, pipe):
        self.calls = 0
        for denoiser in (glance.denoiser(pipe), *ask.further_denoisers(pipe).values()):
            denoiser.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module, args, kwargs):
        self.calls += len(ask.model_input(args, kwargs))


def timed(pipe, counter, call: dict, seed: int, **kwargs):
    """One picture, its seconds and model calls."""
    counter.calls, start = 0, time.perf_counter()
    kwargs |= {"generator": torch.Generator().manual_seed(seed), "output_type": "pil", "return_dict": False}
    image = ask.first_picture(pipe(**call, **kwargs))
    return image, time.perf_counter() - start, counter.calls


def draw_comparison(rows: list[list[tuple]], prompts: list[str]) -> Image.Image:
    """One picture: for each prompt a row of (label, image, seconds, model calls)."""
    columns, size = len(rows[0]), rows[0][0][1].size
    scale = max(1, round(256 / size[0]))
    width, height = scale * size[0], scale * size[1]
    font, gap, line = ImageFont.load_default(16), 12, 22
    row_height = height + 3 * line + gap
    canvas = Image.new("RGB", (columns * (width + gap) + gap, len(rows) * row_height + gap), "white")
    draw = ImageDraw.Draw(canvas)
    for number, (row, prompt) in enumerate(zip(rows, prompts)):
        top = gap + number * row_height
        while draw.textlength(prompt, font) > canvas.width - 2 * gap:
            prompt = prompt[:-4].rstrip() + "..."
        draw.text((gap, top), prompt, "black", font)
        for column, (label, image, seconds, calls) in enumerate(row):
            left = gap + column * (width + gap)
            canvas.paste(image.convert("RGB").resize((width, height), Image.Resampling.NEAREST), (left, top + line))
            draw.text((left, top + line + height + 2), label, "black", font)
            draw.text((left, top + 2 * line + height), f"{seconds:.2f} s, {calls} model calls", "dimgray", font)
    return canvas


def check_output(args) -> Path:
    """--output as a path; InputError where no picture can be written there."""
    output = Path(args.output)
    if Image.registered_extensions().get(output.suffix.lower()) not in Image.SAVE:
        raise InputError(f"--output {output}: not an image file name; end it in .png, .jpg or .webp")
    if output.is_dir():
        raise InputError(f"--output {output}: a folder; name a file in it")
    cli.check_writable(output.parent, "--output")
    return output


def save_image(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = Image.registered_extensions()[path.suffix.lower()]
    image = image.convert("RGB") if kind == "JPEG" else image  # some draw RGBA
    glance.replace_file(path, lambda temporary: image.save(temporary, format=kind))


def main(argv: list[str] | None = None):
    args = parse_args(argv)
    cli.set_up_logging()
    paths = find_loras(args)
    recipe, schedule = read_recipes(args, paths)
    output = check_output(args)
    height, width = args.height or recipe["height"], args.width or recipe["width"]
    if recipe["height"] and (height, width) != (recipe["height"], recipe["width"]):
        trained = f"{recipe['width']}x{recipe['height']}"
        logger.warning(f"{width}x{height} was asked, {trained} was trained: the schedule is that of {trained}")
    guidance = recipe["guidance_scale"] if args.guidance_scale is None else args.guidance_scale

    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    if args.enable_sequential_cpu_offload and state.device.type == "cpu":
        raise InputError("--enable_sequential_cpu_offload needs an accelerator; there is none, so leave it out")
    pipe = load_pipeline(args, paths, state.device)
    extra = recipe["pipeline_kwargs"] | args.pipeline_kwargs
    jobs = [(prompt, args.seed + image) for prompt in args.prompts for image in range(args.num_images)]
    calls = [ask.call_arguments(pipe, prompt, height, width, guidance, extra) for prompt, _ in jobs]
    ask.dry_step(pipe, **calls[0])
    base_timesteps = ask.ask_timesteps(pipe, recipe["num_base_steps"], **calls[0])
    if schedule is None:
        schedule = published_timesteps(pipe, base_timesteps)
    told = ask.ask_told(pipe, recipe["num_base_steps"], **calls[0])
    steps, folded = sum(map(len, schedule.values())), (args.guidance or recipe["guidance"]) == "fold"
    single = ask.ask_single_branch(pipe, **calls[0]) if folded else {}
    # A base that ships its own steps cannot be asked for fewer of them.
    own_steps = args.compare and ask.has_own_steps(pipe, steps, **calls[0])
    counts = [len(base_timesteps)] if own_steps else [len(base_timesteps), steps]
    counter = Counter(pipe)
    with state.split_between_processes(list(range(len(jobs)))) as mine:
        rows = []
        for number in tqdm(mine, desc="images", disable=not state.is_local_main_process):
            call, seed = calls[number], jobs[number][1]
            row = []
            for count in counts if args.compare else ():
                row.append((f"base, {count} steps", *timed(pipe, counter, call, seed, num_inference_steps=count)))
            inference = glance.glance_inference(
                pipe, schedule, args.lora_scale, told, args.fuse_lora, recipe["coefficients"]
            )
            with inference as kwargs, ask.plain_call(pipe, call | single) as call:
                row.append((f"Glance, {steps} steps", *timed(pipe, counter, call, seed, **kwargs)))
            rows.append(row)
            if not args.compare:
                save_image(row[0][1], output.with_stem(f"{output.stem}-{number:03d}") if len(jobs) > 1 else output)
    if args.compare:
        rows = gather_object(rows) if state.num_processes > 1 else rows
        if state.is_main_process:
            save_image(draw_comparison(rows, [prompt for prompt, _ in jobs]), output)
    if state.is_main_process:
        numbered = len(jobs) > 1 and not args.compare
        written = output.with_stem(f"{output.stem}-*") if numbered else output
        print(f"{written}: {len(jobs)} x {steps} steps, {rows[0][-1][2]:.2f} s and {rows[0][-1][3]} model calls each")


if __name__ == "__main__":
    cli.run(main)
