"""What are the page's flags, and what does each say to infer_glance.py's own code? Answered before any import.

The flags for the model, the sampling and the memory are infer_glance.py's, with their checks; only --lora and
--sampler may be given several times here. What the page alone has is in `add_page`.
"""

from glance import command_line as cli
from glance import inference_flags
from glance.shared_flags import add_shared


PORT = cli.positive(int, 65535)
OWN = ("port", "share", "export_space")  # what is nothing to infer_glance.py
FOR_LORAS = ("lora_scale", "fuse_lora", "flow_custom_timesteps", "slow_weight_name", "fast_weight_name")
LORAS = ("lora", "slow_lora", "fast_lora")


def make_parser() -> cli.Parser:
    """Return the parser of all flags."""
    parser = cli.Parser(
        description="A page that draws with the base and with Glance, side by side.", conflict_handler="resolve"
    )
    groups = (inference_flags.add_model, inference_flags.add_sampling, add_page, inference_flags.add_memory)
    for add_group in groups:
        add_group(parser)
    return parser


def add_page(parser: cli.Parser) -> None:
    group = parser.add_argument_group("the page")
    add = group.add_argument
    many = "may be given several times, each a position of the dial"
    add("--lora", action="append", default=[], help=f"folder with slow/ and fast/, or hub id; {many}")
    add("--sampler", action="append", default=[], help=f"a sampler.json or its folder, drawn without LoRAs; {many}")
    add("--prompt", action="append", help="what the page begins with; further ones are offered below")
    add_shared(group, "--prompts_file", help="a text file of such prompts, one a line")
    add_shared(group, "--seed", "--height", "--width")
    add("--port", type=PORT, help="of 127.0.0.1; Gradio's own by default, 7860 or the next that is free")
    add("--share", action="store_true", help="let Gradio's server show the page to the world, for a week")
    add("--export_space", help="write a Space for the hub into this new folder, and end")


def parse(argv: list[str] | None = None) -> cli.Settings:
    """Return the page's settings: OWN, `prompts`, `given` (the flags that differ from the defaults, by name) and
    `choices`, infer_glance.py's settings for each position of the dial.

    Raise ArgumentError where flags do not go together.
    """
    values, defaults = vars(make_parser().parse(argv)), vars(make_parser().parse([]))
    given = {name: value for name, value in values.items() if value != defaults[name]}
    prompts = [text.strip() for text in values["prompt"] or [] if text.strip()]
    prompts += cli.read_prompts(values["prompts_file"])
    sources = [{"lora": folder} for folder in values["lora"]]
    if values["slow_lora"] or values["fast_lora"]:
        sources.append({name: values[name] for name in ("slow_lora", "fast_lora")})
    # A flag for LoRAs is a mistake beside a sampler, unless there are LoRAs for it too.
    plain = {name: defaults[name] for name in FOR_LORAS} if sources else {}
    sources += [{"sampler": file} | plain for file in values["sampler"]]
    if not sources:
        raise cli.mistake("nothing to draw with; give --lora FOLDER, --sampler FILE, or several of them")
    rest = {name: value for name, value in values.items() if name not in (*OWN, *LORAS, "sampler")}
    inference = vars(inference_flags.make_parser().parse([]))
    shared = inference | rest | {"prompt": prompts[:1] or ["a picture"], "prompts_file": None, "compare": True}
    choices = [inference_flags.checked(shared | source) for source in sources]
    own = {name: values[name] for name in OWN}
    return cli.Settings(own | {"prompts": prompts, "given": given, "choices": choices})
