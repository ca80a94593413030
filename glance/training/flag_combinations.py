"""Which flags of train_glance_lora.py exclude each other?

A further pair is one more case here, said in one line with what to leave out.
"""

from glance import command_line as cli


def check_combination(args: cli.Settings, parser: cli.Parser) -> None:
    """Raise ArgumentError where flags exclude each other."""
    if args.gradient_checkpointing is False and (args.enable_group_offload or args.quantization == "fp8"):
        raise cli.mistake(
            "--no-gradient_checkpointing: with --enable_group_offload or --quantization fp8 every layer's full weight "
            "would stay until the backward pass; leave it out"
        )
    for name in ("adam_beta1", "adam_beta2", "adam_epsilon"):
        if args.optimizer == "adafactor" and getattr(args, name) != parser.get_default(name):
            raise cli.mistake(f"--{name} belongs to AdamW and Prodigy; adafactor has none, so leave it out")
    if args.export and args.phase in ("slow", "fast"):
        raise cli.mistake("--export comfyui writes a pair, --phase trains one LoRA; leave one of the two out")
    if args.memory and not (args.fit or args.dry_run):
        raise cli.mistake("--memory is for --fit auto or --dry_run; give one of them, or leave it out")
    if args.aspect == "keep" and (args.height or args.width):
        raise cli.mistake("--aspect keep chooses height and width; give --resolution in their place, or leave it out")
    if args.pipeline_images and args.guidance == "mix":
        raise cli.mistake(
            "--pipeline_images: mixed branches go from noise and prompt alone; leave it out, or the dial"
        )
    if not args.max_train_steps:
        check_sampler_alone(args)
    if args.flow_custom_timesteps is not None and args.grid is not None:
        raise cli.mistake("--flow_custom_timesteps gives the timesteps; leave --grid out")
    if args.loss == "flow":
        for name in ("prompts_file", "flow_weight", "segment_weights", "num_trajectories"):
            if getattr(args, name) != parser.get_default(name):
                raise cli.mistake(f"--{name} belongs to the trajectory loss; give --loss trajectory or leave it out")
    elif args.loss == "endpoint":
        check_endpoint(args, parser)
    elif args.flow_custom_timesteps is not None:
        raise cli.mistake(
            "--flow_custom_timesteps: the trajectory loss learns steps of the model's own schedule; give --grid "
            "instead, or --loss flow"
        )
    if args.flow_custom_timesteps is not None and args.solver == "fitted":
        raise cli.mistake("--solver fitted is fitted to steps of the model's own; leave --flow_custom_timesteps out")
    if args.validation_steps or args.num_validation_images != parser.get_default("num_validation_images"):
        if not any(map(str.strip, args.validation_prompt or ())):
            name = "validation_steps" if args.validation_steps else "num_validation_images"
            raise cli.mistake(f"--{name}: there is nothing to draw; give --validation_prompt TEXT, or leave it out")
    if args.parallel_phases and args.validation_steps:
        raise cli.mistake(
            "--parallel_phases has neither LoRA whole before its end, when --validation_prompt is drawn; leave "
            "--validation_steps out"
        )
    if args.parallel_phases and args.resume_from_checkpoint not in (None, "latest"):
        raise cli.mistake("--parallel_phases resumes each phase from its own checkpoint; give latest")


def check_endpoint(args: cli.Settings, parser: cli.Parser) -> None:
    """Raise ArgumentError where a flag is for losses of single steps."""
    for name in ("flow_weight", "segment_weights", "timesteps_per_step", "flow_timesteps_mode"):
        if getattr(args, name) != parser.get_default(name):
            raise cli.mistake(f"--{name} is for losses of single steps, --loss endpoint has none; leave it out")
    if args.phase in ("slow", "fast") or args.parallel_phases:
        name = "parallel_phases" if args.parallel_phases else f"phase {args.phase}"
        raise cli.mistake(f"--{name}: --loss endpoint trains both phases together; leave it out")
    if args.compile and args.max_train_steps:
        raise cli.mistake("--compile: --loss endpoint switches LoRAs in each walk, which compiles anew; leave it out")
    if args.validation_steps:
        raise cli.mistake("--validation_steps: --loss endpoint draws --validation_prompt at the end; leave it out")


def check_sampler_alone(args: cli.Settings) -> None:
    """Raise ArgumentError where a flag needs LoRAs, and none are trained."""
    needs = ["resume_from_checkpoint", "parallel_phases", "validation_prompt", "validation_steps"]
    needs += ["export", "flow_custom_timesteps"] + (["phase"] if args.phase != "both" else [])
    for name in needs:
        if getattr(args, name):
            raise cli.mistake(f"--{name}: --max_train_steps 0 finds a sampler and trains no LoRA; leave it out")
    if args.guidance == "fold":
        raise cli.mistake("--guidance fold: without LoRAs nothing holds the guidance; leave it out")
