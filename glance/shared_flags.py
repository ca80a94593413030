"""Which flags do both scripts have? Each is declared once, here.

Nothing but the standard library is imported, so that the command line is answered before torch is there; tests hold
the numbers against the libraries' and glance_utils'.
"""

import argparse

from glance import command_line as cli


MAX_SIDE = 16384  # pixels of a picture
DTYPES = {"fp16": "float16", "bf16": "bfloat16"}  # --mixed_precision's as infer_glance.py names them; else float32
QUANTIZATIONS = ("none", "nf4", "int8", "fp8")
SIDE = cli.positive(int, MAX_SIDE)

SHARED = {
    "--pretrained_model_name_or_path": {"help": "the base: a diffusers pipeline, folder or hub id"},
    "--base_lora": {
        "type": cli.file_and_scale,
        "action": "append",
        "default": [],
    },
    "--revision": {"help": "branch, tag or commit of the base on the hub"},
    "--variant": {"help": "variant of the base's weight files, for example fp16"},
    "--cache_dir": {"help": "where downloads are kept; the hub's own cache by default"},
    "--pipeline_kwargs": {
        "type": cli.json_object,
        "default": {},
        "help": "further arguments of the pipeline's call, as JSON",
    },
    "--pipeline_images": {
        "type": cli.json_object,
        "default": {},
        "help": "pictures for the pipeline's call: JSON of its arguments' names and files, such as "
        """'{"image": "a.png"}', or lists of files""",
    },
    "--max_sequence_length": {"type": cli.positive(int), "help": "how many tokens of a prompt the pipeline encodes"},
    "--negative_prompt": {"help": "what classifier-free guidance leads away from"},
    "--true_cfg_scale": {
        "type": cli.finite,
        "help": "strength of guidance by a negative prompt, beside a guidance that the model is told",
    },
    "--num_frames": {"type": cli.positive(int), "help": "of a video; 1 where an image is learned"},
    "--guidance_scale": {"type": cli.finite},
    "--guidance": {"choices": ("keep", "fold", "mix")},
    "--flow_custom_timesteps": {"type": cli.comma_separated},
    "--num_base_steps": {"type": cli.positive(int, 65536)},
    "--num_inference_steps": {"type": cli.positive(int)},
    "--grid": {"choices": ("glance", "even", "auto")},
    "--solver": {"choices": ("euler", "fitted")},
    "--prompts_file": {},
    "--height": {"type": SIDE},
    "--width": {"type": SIDE},
    "--seed": {"type": cli.seed, "default": 0},
    "--quantization": {
        "choices": QUANTIZATIONS,
        "default": "none",
        "help": "load the base's transformer in fewer bits",
    },
    "--enable_group_offload": {
        "action": "store_true",
        "help": "keep the base in host memory, one layer on the accelerator and the next on its way",
    },
    "--compile": {"action": "store_true", "help": "torch.compile the repeated blocks: a minute before the first step"},
}


# Arguments of the pipeline's call, where it has them: short for --pipeline_kwargs.
CALL_FLAGS = ("max_sequence_length", "negative_prompt", "true_cfg_scale", "num_frames")


def merge_call_flags(values: dict) -> dict:
    """Return the flags' values without CALL_FLAGS, which go into pipeline_kwargs and win there.

    However an argument was spelled, the settings are then the same.
    """
    given = {name: values[name] for name in CALL_FLAGS if values[name] is not None}
    rest = {name: value for name, value in values.items() if name not in CALL_FLAGS}
    return rest | {"pipeline_kwargs": values["pipeline_kwargs"] | given}


def add_shared(group: argparse._ArgumentGroup, *flags: str, **other) -> None:
    """Add these of the flags that both scripts have; `other` is what differs here, such as a help or a default."""
    for flag in flags:
        group.add_argument(flag, **SHARED[flag] | other)
