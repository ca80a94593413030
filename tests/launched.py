"""Started by test_train.py under `accelerate launch`: `launched.py RUNS.json` with [[flag, ...], ...].

Calls train_glance_lora's main() with one list of flags after the other; every rank also keeps the LoRA it holds after
each phase, as OUTPUT_DIR/PHASE-rank-N.pt.
"""

import json
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402
from accelerate.state import PartialState  # noqa: E402
from peft import get_peft_model_state_dict  # noqa: E402

import train_glance_lora  # noqa: E402


train_phase = train_glance_lora.train_phase


def train_and_keep(args, accelerator, asked, recipe, *rest):
    train_phase(args, accelerator, asked, recipe, *rest)
    lora = get_peft_model_state_dict(asked.pipe.transformer, adapter_name=train_glance_lora.ADAPTER)
    torch.save(lora, Path(args.output_dir) / f"{recipe['phase']}-rank-{accelerator.process_index}.pt")


train_glance_lora.train_phase = train_and_keep
PartialState.destroy_process_group = lambda self, group=None: None  # the processes meet only once
for arguments in json.loads(Path(sys.argv[1]).read_text()):
    train_glance_lora.main(arguments)
