"""What are train_glance_lora.py's flags, and which defaults depend on other flags?

This is answered before any library is imported. What needs one, the launcher's values and lists of timesteps, comes
after, in glance/training/settings.py. A new flag belongs to a group here; whether a resumed run must have the same
value is said in glance/files/checkpoints.py.
"""

from pathlib import Path

from glance import command_line as cli
from glance import foreign_flags
from glance.shared_flags import CALL_FLAGS, SIDE, add_shared, merge_call_flags
from glance.training.flag_combinations import check_combination


# The flow loss's are the published method's, the others' are what measured best (benchmarks/README.md).
STEADY = {"lr_scheduler": "constant", "lr_warmup_steps": 0}
DEFAULTS = {
    "flow": {"grid": "glance", "solver": "euler", "num_trajectories": 4} | STEADY,
    "trajectory": {"grid": "auto", "solver": "fitted", "num_trajectories": 4} | STEADY,
    # What is found is more than grid and solver, and begins with them.
    "endpoint": {"grid": "auto", "solver": "fitted", "lr_scheduler": "cosine", "lr_warmup_steps": 10},
}
BATCHES = {"endpoint": 4}  # before each step, whose captions differ; 1 for the other losses
CAPTIONS = Path(__file__).parents[2] / "configs" / "captions.txt"  # of anything, for a sampler that is found on them
CALLS = 10  # of the model, for --guidance mix
CHOSEN = ("grid", "solver", "num_inference_steps", "flow_custom_timesteps")  # by --num_model_calls
LOSSES = ("flow", "trajectory", "endpoint")
SEGMENT_WEIGHTS = ("uniform", "length", "length_squared")  # losses.SEGMENT_POWERS
# What trades time for memory where --fit does not choose it; gradient checkpointing is chosen in any case.
MEMORY = {"quantization": "none", "optimizer": "adamw", "enable_group_offload": False}
OPTIMIZERS = ("adamw", "adamw8bit", "prodigy", "adafactor")
# diffusers' SchedulerType, but for piecewise_constant, which takes rules; accelerate's LoggerType.
LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
TRACKERS = ("all", "aim", "tensorboard", "wandb", "trackio", "comet_ml", "mlflow", "clearml", "dvclive", "swanlab")


def make_parser() -> cli.Parser:
    """Return the parser of all flags; those that the launcher has too are None until launcher.with_defaults."""
    parser = cli.Parser(
        foreign_flags.ANSWERS, description="Train Glance's Slow-LoRA and Fast-LoRA on one image and its caption."
    )
    for add_group in (add_model, add_data, add_calls, add_schedule, add_learned, add_lora, add_training, add_memory):
        add_group(parser)
    add_validation(parser)
    add_outputs(parser)
    return parser


def add_model(parser: cli.Parser) -> None:
    group = parser.add_argument_group("model")
    add_shared(
        group,
        "--base_lora",
        help="FILE[:SCALE], folder or hub id: a LoRA to add to the base before anything is drawn or trained; may be "
        "given several times",
    )
    add_shared(group, "--pretrained_model_name_or_path", "--revision", "--variant", "--cache_dir")
    add_shared(group, "--pipeline_images", "--pipeline_kwargs", *(f"--{name}" for name in CALL_FLAGS))
    add_shared(group, "--guidance_scale", help="strength of guidance; the pipeline's own by default")


def add_data(parser: cli.Parser) -> None:
    group = parser.add_argument_group("data", "one image and its caption, or --instance_prompt alone")
    add = group.add_argument
    add("--instance_image", help="the image to learn from")
    add("--instance_prompt", help="its caption, else the .txt beside it; alone, the base draws the image")
    add("--instance_data_dir", help="or: a folder that holds one image and its .txt")
    add("--data_backend_config", help="or: a SimpleTuner dataloader JSON with one image")
    add("--dataset_name", help="or: one row of a data set, hub name or folder")
    add("--dataset_index", type=int, default=0, help="which row of the data set")
    add("--image_column", default="image", help="the data set's column of images")
    add("--caption_column", default="text", help="the data set's column of captions")
    add_shared(group, "--prompts_file", help="further captions for the trajectory loss, one a line")
    add("--resolution", type=SIDE, help="height and width in pixels; the pipeline's own size by default")
    add_shared(group, "--height", "--width", help="in pixels, in place of --resolution")
    add(
        "--aspect",
        choices=("crop", "keep"),
        default="crop",
        help="crop the image to that size, or choose one of as many pixels with its aspect ratio",
    )


def add_schedule(parser: cli.Parser) -> None:
    group = parser.add_argument_group("schedule")
    add = group.add_argument
    add(
        "--phase",
        choices=("slow", "fast", "both"),
        help="which LoRAs to train; both by default, or the one that a single list of timesteps is for",
    )
    add("--parallel_phases", action="store_true", help="slow on one half of the processes, fast on the other")
    timesteps = "0 to 1000: 'LIST' for one phase, 'SLOW LIST;FAST LIST' for both; the base's own by --grid by default"
    add_shared(group, "--flow_custom_timesteps", help=timesteps)
    add(
        "--flow_timesteps_mode",
        choices=("stratified", "random"),
        default="stratified",
        help="stratified: each round of steps visits every timestep once; random: each step draws one",
    )
    add_shared(
        group,
        "--num_base_steps",
        help="steps of the schedule that Glance's are picked from; 50, or as many as a base of few steps has",
    )
    add_shared(
        group,
        "--num_inference_steps",
        help="that the LoRAs are trained for, the first half slow, the rest fast; 10, or half of a base's own few",
    )
    add_shared(
        group,
        "--grid",
        help="which of the base's own steps are kept: the published ones, every n-th, or what measures best of these "
        "and of those that follow its trajectory best; glance for the flow loss, auto for the trajectory loss",
    )


def add_calls(parser: cli.Parser) -> None:
    group = parser.add_argument_group("the dial", "how many model calls a picture may cost; steps and branches follow")
    add = group.add_argument
    add(
        "--num_model_calls",
        type=cli.calls,
        help="4 to 100, or auto: find which branches of guidance to call at which steps, measured on captions that it "
        "was not fitted on",
    )
    add("--target_error", type=cli.positive(float), help="of --num_model_calls auto: the fewest calls with less")
    add("--train_coefficients_only", action="store_true", help="the endpoint loss trains the steps' weights, no LoRA")
    add(
        "--num_plans",
        type=cli.positive(int),
        help="how many ways to spend the calls are tried; by default as many "
        "as cost what drawing the trajectories costs",
    )


def add_learned(parser: cli.Parser) -> None:
    group = parser.add_argument_group("what is learned")
    add = group.add_argument
    add(
        "--loss",
        choices=LOSSES,
        help="flow: towards the image, as published; trajectory: along the base's own, which needs no image; "
        "endpoint: to where that ends, through all of the calls, which is the default with --num_model_calls",
    )
    add_shared(
        group,
        "--guidance",
        help="keep, the default: draw with guidance; fold: the LoRAs learn it, to draw without, in half the model "
        f"calls; mix: each step calls the branches that --num_model_calls, {CALLS} by default, are best spent on",
    )
    add(
        "--num_trajectories",
        type=cli.positive(int, 10**4),
        help="how many the base draws of each caption; 4, or with --num_model_calls as many as make 32 in all",
    )
    add(
        "--segment_weights",
        choices=SEGMENT_WEIGHTS,
        default="uniform",
        help="of the steps in the trajectory loss: alike, or by the length of each step in sigma, or its square",
    )
    add(
        "--flow_weight",
        type=cli.positive(float),
        default=0.0,
        help="add so much of the flow loss to the trajectory loss",
    )
    add_shared(
        group,
        "--solver",
        help="fitted: each step also looks at the one before it, as much as the base's own trajectory says, where "
        "that measures better; euler for the flow loss, fitted for the trajectory loss",
    )


def add_lora(parser: cli.Parser) -> None:
    add = parser.add_argument_group("LoRA").add_argument
    add("--rank", "--lora_rank", type=cli.positive(int, 4096), default=32, help="rank of both LoRAs")
    add("--lora_alpha", type=cli.positive(float), help="a LoRA counts alpha / rank times; the rank by default")
    add("--lora_dropout", type=cli.below_one, default=0.0, help="share of the LoRAs' inputs that is left out")
    add(
        "--lora_layers",
        type=cli.comma_separated,
        help="names of the linear layers to adapt, comma-separated; attention, MLP output and modulation by default",
    )


def add_training(parser: cli.Parser) -> None:
    group = parser.add_argument_group("training")
    add = group.add_argument
    add_shared(group, "--seed", help="seed of every random choice")
    add("--max_train_steps", type=cli.count, default=60, help="optimizer steps of each phase; 0: the sampler alone")
    add("--train_batch_size", type=cli.positive(int), default=1, help="samples of a batch, on each process")
    add(
        "--timesteps_per_step",
        type=cli.positive(int),
        default=1,
        help="how many timesteps a step trains at once; 5 are all of a phase's",
    )
    add(
        "--gradient_accumulation_steps",
        type=cli.positive(int),
        help="batches before each step; accelerate launch's by default, else 1, or 4 for the endpoint loss",
    )
    add(
        "--learning_rate",
        type=cli.positive(float),
        help="by default 1 for prodigy, 1e-5 for the trajectory loss that keeps guidance, else 3e-4",
    )
    add(
        "--lr_scheduler",
        choices=LR_SCHEDULERS,
        help="how the learning rate changes over a phase; constant, or cosine for the endpoint loss",
    )
    add(
        "--lr_warmup_steps",
        type=cli.count,
        help="steps of each phase over which the learning rate rises; 0, or 10 for the endpoint loss",
    )
    add("--lr_num_cycles", type=cli.positive(int), default=1, help="cycles of cosine_with_restarts")
    add("--lr_power", type=cli.positive(float), default=1.0, help="exponent of polynomial")
    add(
        "--optimizer",
        type=str.lower,
        choices=OPTIMIZERS,
        help="adamw by default; prodigy finds the learning rate itself (pip install prodigyopt)",
    )
    add(
        "--use_8bit_adam",
        action="store_true",
        default=None,
        help="the same as --optimizer adamw8bit: a quarter of the state",
    )
    add("--adam_beta1", type=cli.below_one, default=0.9, help="of AdamW and Prodigy: how long gradients are averaged")
    add("--adam_beta2", type=cli.below_one, default=0.999, help="of AdamW and Prodigy: how long their squares are")
    add("--adam_epsilon", type=cli.positive(float), default=1e-8, help="of AdamW and Prodigy: added to the divisor")
    add("--adam_weight_decay", type=cli.finite, default=1e-2, help="weight decay, of any optimizer")
    add(
        "--max_grad_norm",
        type=cli.positive(float),
        help="clip gradients to this norm; accelerate launch's by default, or 1",
    )
    add(
        "--mixed_precision",
        choices=("no", "fp16", "bf16"),
        help="dtype of the frozen base; accelerate launch's by default, or no",
    )


def add_memory(parser: cli.Parser) -> None:
    group = parser.add_argument_group("memory and speed")
    add = group.add_argument
    add_shared(group, "--quantization", "--enable_group_offload", default=None)
    add_shared(group, "--compile")
    add(
        "--gradient_checkpointing",
        "--no-gradient_checkpointing",
        action="store_true",
        default=None,
        help="less memory, about a third slower; by default where the step would not fit without",
    )
    add("--allow_tf32", action="store_true", help="multiply float32 matrices in TF32: faster, with 10 bits")
    add(
        "--fit",
        choices=("auto",),
        help="choose the fastest flags that save memory with which the run fits, beside those that are given; on the "
        "command line it also overrules those in a --config",
    )
    add(
        "--memory", type=cli.memory, help="plan --fit and --dry_run for so much, such as 16GB; by default what is free"
    )
    add("--dry_run", action="store_true", help="say what the run will need, from the configs alone, and stop")


def add_validation(parser: cli.Parser) -> None:
    group = parser.add_argument_group("validation", "the base's full steps | the same few steps without LoRA | Glance")
    add = group.add_argument
    add("--validation_prompt", action="append", help="a prompt to draw at the end; may be given several times")
    add("--num_validation_images", type=cli.positive(int), default=1, help="of each prompt, image i with --seed + i")
    add("--validation_steps", type=cli.positive(int), help="draw them every so many steps of a phase as well")


def add_outputs(parser: cli.Parser) -> None:
    add = parser.add_argument_group("checkpoints, logs, hub").add_argument
    add("--output_dir", default="output/glance", help="where everything is written")
    add("--overwrite_output_dir", action="store_true", help="write over the LoRAs of a run with other settings")
    add("--checkpointing_steps", type=cli.positive(int), help="write a checkpoint every so many steps")
    add("--checkpoints_total_limit", type=cli.positive(int), help="keep only so many checkpoints")
    add("--resume_from_checkpoint", help="a checkpoint's folder, or 'latest', which starts anew where there is none")
    add("--report_to", choices=("none", *TRACKERS), default="none", help="where to log, by accelerate's trackers")
    add("--logging_dir", default="logs", help="folder of the logs, inside --output_dir")
    add("--export", choices=("comfyui",), help="write both LoRAs a second time, as files for ComfyUI")
    add("--export_dtype", choices=("float32", "bfloat16"), default="float32", help="of the exported files")
    add("--push_to_hub", action="store_true", help="upload what was trained, with its model card")
    add("--hub_model_id", help="the repository to push to; the name of output_dir by default")
    add = parser.add_argument_group("understood for other trainers' recipes, without effect").add_argument
    add("--model_type", choices=("lora",), default="lora", help="always so")
    add("--model_family", help="the pipeline itself knows")
    add("--cache_latents", action="store_true", help="always so: the image is encoded once")
    add("--offload", action="store_true", help="always so: encoders and VAE are gone before the transformer is loaded")


def parse(argv: list[str] | None = None) -> cli.Settings:
    """Return the flags' values, with the defaults that depend on other flags.

    `custom_timesteps` is None until settings.complete, and what may still be chosen to fit the device is None until
    fit.resolve. Raise ArgumentError where flags do not go together.
    """
    parser = make_parser()
    values = merge_call_flags(vars(parser.parse(argv)))
    if (typed := parser.typed(argv)).fit:
        values |= {name: getattr(typed, name) for name in (*MEMORY, "use_8bit_adam", "gradient_checkpointing")}
    values["optimizer"] = choose_optimizer(values.pop("use_8bit_adam"), values["optimizer"])
    if not values["fit"]:
        values |= {name: value for name, value in MEMORY.items() if values[name] is None}
    values |= choose_guidance(values)
    values |= choose_captions(values)
    args = cli.Settings(values | {"custom_timesteps": None})
    if not args.pretrained_model_name_or_path:
        raise cli.mistake("--pretrained_model_name_or_path is missing; give a diffusers pipeline, folder or hub id")
    check_combination(args, parser)
    found = not args.max_train_steps and args.loss == "flow"  # a sampler alone is what is found
    usual = DEFAULTS["trajectory" if found else args.loss]
    defaults = {name: value for name, value in usual.items() if getattr(args, name) is None}
    near_base = args.loss == "trajectory" and args.guidance == "keep"  # the base is nearly there already
    rate = 1.0 if args.optimizer == "prodigy" else 1e-5 if near_base else 3e-4
    defaults["learning_rate"] = args.learning_rate or rate
    defaults["lora_alpha"] = args.lora_alpha or args.rank
    defaults["validation_prompt"] = [text.strip() for text in args.validation_prompt or () if text.strip()]
    return args.replace(**defaults)


def choose_guidance(values: dict) -> dict:
    """Return guidance, loss and num_model_calls, of which each may follow from the others.

    Raise ArgumentError where they contradict each other.
    """
    guidance, loss, calls = values["guidance"], values["loss"], values["num_model_calls"]
    mixed = [name for name, given in (("num_model_calls", calls), ("guidance mix", guidance == "mix")) if given]
    mixed += ["loss endpoint"] if loss == "endpoint" else []
    if not mixed:
        for name in ("target_error", "num_plans", "train_coefficients_only"):
            if values[name]:
                raise cli.mistake(f"--{name} belongs to --num_model_calls; give it, or leave --{name} out")
        return {"guidance": guidance or "keep", "loss": loss or "flow"}
    if guidance in ("keep", "fold"):
        raise cli.mistake(f"--guidance {guidance} is not mixed, as --{mixed[0]} means it; leave one of the two out")
    if loss in ("flow", "trajectory") and values["max_train_steps"]:
        raise cli.mistake(f"--loss {loss} trains single steps, --{mixed[0]} is for --loss endpoint; leave one out")
    for name in CHOSEN:
        if values[name] is not None:
            raise cli.mistake(f"--{mixed[0]} chooses the steps by measured error; leave --{name} out")
    if (calls == "auto") != (values["target_error"] is not None):
        raise cli.mistake("--num_model_calls auto and --target_error go together; give both, or a number of calls")
    return {"guidance": "mix", "loss": "endpoint", "num_model_calls": calls or CALLS}


def choose_captions(values: dict) -> dict:
    """Return instance_prompt and prompts_file: for --num_model_calls the captions of a file, the general ones by
    default, need no other beside them."""
    sources = ("instance_image", "instance_prompt", "instance_data_dir", "data_backend_config", "dataset_name")
    if values["guidance"] != "mix" or any(values[name] for name in sources):
        return {}
    file = values["prompts_file"] or str(CAPTIONS)
    return {"prompts_file": file, "instance_prompt": cli.read_prompts(file)[0]}


def choose_optimizer(use_8bit_adam: bool | None, optimizer: str | None) -> str | None:
    """Return which of OPTIMIZERS the two flags mean, None where neither is given.

    Raise ArgumentError where they contradict each other.
    """
    if use_8bit_adam and optimizer not in (None, "adamw", "adamw8bit"):
        raise cli.mistake(f"--use_8bit_adam is not --optimizer {optimizer}; leave one of the two out")
    return "adamw8bit" if use_8bit_adam else optimizer or ("adamw" if use_8bit_adam is False else None)
