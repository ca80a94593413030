"""What are infer_glance.py's flags, and which go together? This is answered before any library is imported.

A new flag belongs to a group here, or into shared_flags where both scripts have it.
"""

from glance import command_line as cli
from glance.shared_flags import CALL_FLAGS, add_shared, merge_call_flags


DTYPES = ("float32", "float16", "bfloat16")
SAMPLER = ("num_inference_steps", "num_base_steps", "grid", "solver")  # of the base without LoRAs
OFFLOADS = ("enable_model_cpu_offload", "enable_group_offload", "enable_sequential_cpu_offload")


def make_parser() -> cli.Parser:
    """Return the parser of all flags."""
    parser = cli.Parser(description="Ten-step inference with a Slow- and a Fast-LoRA.")
    for add_group in (add_model, add_sampling, add_base, add_pictures, add_memory):
        add_group(parser)
    return parser


def add_model(parser: cli.Parser) -> None:
    group = parser.add_argument_group("model and LoRAs")
    add = group.add_argument
    add("--lora", help="what train_glance_lora.py wrote, with slow/ and fast/ in it: folder or hub id")
    add("--sampler", help="a sampler.json, its folder or hub id: its steps, alone or in place of the LoRAs' own")
    add("--slow_lora", help="or: the Slow-LoRA's file, folder or hub id")
    add("--fast_lora", help="and the Fast-LoRA's")
    add("--slow_weight_name", help="the Slow-LoRA's file there, if it has another name")
    add("--fast_weight_name", help="the Fast-LoRA's")
    add("--lora_scale", type=cli.one_or_two, default="1", help="strength of both, or SLOW,FAST")
    add(
        "--style_lora",
        type=cli.file_and_scale,
        action="append",
        default=[],
        help="FILE[:SCALE], folder or hub id: a further LoRA that acts in every step, also of the base beside; may be "
        "given several times",
    )
    add_shared(group, "--pretrained_model_name_or_path", help="the base, folder or hub id; as trained by default")
    add_shared(group, "--base_lora", help="FILE[:SCALE]: a LoRA that was part of the base; where it was by default")
    add_shared(group, "--revision", "--variant", "--cache_dir")
    add("--allow_base_mismatch", action="store_true", help="use LoRAs on a base of another name, such as a fine-tune")


def add_sampling(parser: cli.Parser) -> None:
    group = parser.add_argument_group("sampling")
    timesteps = "'SLOW LIST;FAST LIST'; as trained by default, derived for files without recipe"
    add_shared(group, "--flow_custom_timesteps", help=timesteps)
    add_shared(group, "--guidance_scale", help="strength of guidance; as trained by default")
    add_shared(group, "--guidance", help="as trained by default; fold: none, it is in the LoRAs; mix: as found")
    add_shared(group, "--pipeline_kwargs", *(f"--{name}" for name in CALL_FLAGS))


def add_base(parser: cli.Parser) -> None:
    group = parser.add_argument_group("the base without LoRAs", "in place of them, on a few of its own steps")
    add_shared(group, "--num_inference_steps", help="how many; 10, or half of a base's own few steps")
    add_shared(group, "--num_base_steps", help="of how many; 50, or as many as a base of few steps has")
    add_shared(
        group,
        "--grid",
        help="which: the published ones (glance, by default), every n-th, or whichever measure best (auto), for which "
        "the base first draws in all its steps",
    )
    add_shared(group, "--solver", help="euler by default; fitted, to what the base first draws in all its steps")


def add_pictures(parser: cli.Parser) -> None:
    group = parser.add_argument_group("prompts and pictures")
    add = group.add_argument
    add("--prompt", action="append", help="what to draw; may be given several times")
    add_shared(group, "--prompts_file", help="a text file of prompts, one a line")
    add("--output", default="out.png", help="the picture's file; out-000.png, ... where there are several")
    add("--fps", type=cli.positive(float), help="of a video; the pipeline's own frame_rate, else 16")
    add("--num_images", type=cli.positive(int), default=1, help="images per prompt")
    add("--pipeline_class", help="another of diffusers' pipelines for the same weights, such as FluxImg2ImgPipeline")
    add("--controlnet", help="with a ControlNet pipeline: its model, folder or hub id")
    add_shared(group, "--pipeline_images")
    add_shared(group, "--seed", help="seed of a prompt's first image; the next has the next")
    add_shared(group, "--height", "--width", help="in pixels; as trained by default")
    add(
        "--compare",
        action="store_true",
        help="one labelled picture: base at full steps, base at as many model calls, the steps without LoRAs, Glance",
    )


def add_memory(parser: cli.Parser) -> None:
    group = parser.add_argument_group("memory and speed")
    add = group.add_argument
    add("--dtype", "--torch_dtype", choices=DTYPES, help="accelerate launch's by default, or float32")
    add_shared(group, "--quantization")
    add("--fuse_lora", action="store_true", help="add each LoRA to the weights: no cost a step, more memory")
    add_shared(group, "--compile", help="torch.compile the repeated blocks; fuses the LoRAs where it can")
    add("--enable_model_cpu_offload", action="store_true", help="keep only the component at work on the accelerator")
    add_shared(group, "--enable_group_offload")
    add(
        "--enable_sequential_cpu_offload",
        action="store_true",
        help="move each layer to the accelerator when it computes: slowest, least memory",
    )
    add("--enable_vae_tiling", action="store_true", help="decode large pictures in tiles")


def parse(argv: list[str] | None = None) -> cli.Settings:
    """Return the flags' values, as `checked` does."""
    return checked(vars(make_parser().parse(argv)))


def checked(values: dict) -> cli.Settings:
    """Return the parser's values as settings.

    `prompts` are those of --prompt and --prompts_file, `fuse_lora` is set where --compile fuses, `custom_timesteps` is
    None until infer_glance.complete, `without_loras` says that the base draws alone. Raise ArgumentError where flags
    do not go together.
    """
    args = cli.Settings(merge_call_flags(values) | {"custom_timesteps": None})
    without_loras = check_without_loras(args)
    fuse = check_combination(args) and not without_loras
    prompts = read_prompts(args.prompt, args.prompts_file)
    return cli.Settings(vars(args) | {"fuse_lora": fuse, "prompts": prompts, "without_loras": without_loras})


def check_without_loras(args: cli.Settings) -> bool:
    """Return whether the base draws alone, on the steps that flags say.

    Raise ArgumentError where these come with LoRAs, which say their own, or with flags that are for LoRAs.
    """
    sampler = [f"--{name}" for name in SAMPLER if getattr(args, name) is not None]
    loras = [f"--{name}" for name in ("lora", "slow_lora", "fast_lora") if getattr(args, name)]
    if args.sampler and (sampler or args.flow_custom_timesteps):
        other = sampler[0] if sampler else "--flow_custom_timesteps"
        raise cli.mistake(f"--sampler holds the steps; leave {other} out")
    if args.sampler and not loras:
        sampler = ["--sampler"]
    if not sampler:
        return False
    if loras:
        raise cli.mistake(
            f"{sampler[0]}: LoRAs are for the steps that they were trained at, which their files say; leave it out, "
            f"or {loras[0]} to draw the base without"
        )
    if not args.pretrained_model_name_or_path and not args.sampler:
        raise cli.mistake(f"{sampler[0]} draws the base without LoRAs; give --pretrained_model_name_or_path")
    if args.pipeline_class and not args.sampler:
        raise cli.mistake(f"--pipeline_class is for LoRAs or a --sampler; leave it or {sampler[0]} out")
    for_loras = ["flow_custom_timesteps", "fuse_lora", "slow_weight_name", "fast_weight_name"]
    for_loras += [] if args.sampler else ["allow_base_mismatch"]
    for_loras += ["lora_scale"] if set(args.lora_scale.values()) != {1.0} else []
    for_loras += ["guidance"] if args.guidance == "fold" or args.guidance == "mix" and not args.sampler else []
    for name in for_loras:
        if getattr(args, name):
            raise cli.mistake(f"--{name} is for LoRAs, and {sampler[0]} draws without; leave one of the two out")
    return True


def check_combination(args: cli.Settings) -> bool:
    """Return whether the LoRAs are fused: as --fuse_lora says, or where --compile can.

    Raise ArgumentError where ways to save memory or time exclude each other.
    """
    offload = [f"--{name}" for name in OFFLOADS if getattr(args, name)]
    if len(offload) > 1:
        raise cli.mistake(f"{' and '.join(offload)} exclude each other; give one")
    fixed = f"--quantization {args.quantization}" if args.quantization != "none" else " ".join(offload)
    if args.fuse_lora and fixed:
        raise cli.mistake(
            f"--fuse_lora changes weights in place, which {fixed} does not allow; leave one of the two out"
        )
    if args.quantization == "nf4" and args.enable_sequential_cpu_offload:
        raise cli.mistake(
            "--enable_sequential_cpu_offload does not take --quantization nf4; use --enable_model_cpu_offload"
        )
    return args.fuse_lora or (args.compile and not fixed)


def read_prompts(prompts: list[str] | None, path: str | None) -> list[str]:
    """Return the prompts of the command line, then those of the file; raise ArgumentError where there is none."""
    prompts = [prompt.strip() for prompt in prompts or [] if prompt.strip()] + cli.read_prompts(path)
    if not prompts:
        raise cli.mistake("no prompt; give --prompt TEXT or --prompts_file FILE")
    return prompts
