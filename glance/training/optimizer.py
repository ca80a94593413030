"""Which optimizer trains the LoRA, and what does a checkpoint hold of it, so that a resumed run equals the
uninterrupted one bit for bit?

A further optimizer is one more of flags.OPTIMIZERS, of make_optimizer's cases and of state_bytes.
"""

import contextlib
import io

from diffusers.optimization import get_scheduler
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from glance.files.lora import check_loaded
from glance.training.draws import Draws
from glance_utils import InputError


def make_optimizer(args, parameters):
    """Return --optimizer and its learning rate schedule over --max_train_steps."""
    optimizer = optimizer_class(args.optimizer)
    usual = {"lr": args.learning_rate, "weight_decay": args.adam_weight_decay}
    adam = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    further = {
        "adamw": adam,
        "adamw8bit": adam,
        # As diffusers' examples have it.
        "prodigy": adam | {"decouple": True, "use_bias_correction": True, "safeguard_warmup": True},
        # With a learning rate of its own, instead of the steps relative to the weights, of which half begin at zero.
        "adafactor": {"relative_step": False, "scale_parameter": False},
    }
    with contextlib.redirect_stdout(io.StringIO()):  # prodigy prints what it was told
        optimizer = optimizer(parameters, **usual, **further[args.optimizer])
    schedule = {"num_cycles": args.lr_num_cycles, "power": args.lr_power}
    schedule |= {"num_warmup_steps": args.lr_warmup_steps, "num_training_steps": args.max_train_steps}
    return optimizer, get_scheduler(args.lr_scheduler, optimizer, **schedule)


def optimizer_class(name: str) -> type:
    """Return the class of one of flags.OPTIMIZERS; raise InputError where its package is missing."""
    try:
        if name == "adamw8bit":
            from bitsandbytes.optim import AdamW8bit as kind
        elif name == "prodigy":
            from prodigyopt import Prodigy as kind
        elif name == "adafactor":
            from transformers import Adafactor as kind
        else:
            from torch.optim import AdamW as kind
    except ImportError as error:
        raise InputError(f"--optimizer {name}: {error.name} is not installed; pip install {error.name}") from None
    return kind


def state_bytes(name: str, rank: int) -> float:
    """Return the bytes of an optimizer's state for each parameter of a LoRA of this rank."""
    # Prodigy keeps a third average, and a copy of where the half of the LoRA began that does not begin at zero.
    # Adafactor keeps a number for each row and column of a matrix, whose shorter side is the rank.
    return {"adamw": 8, "adamw8bit": 2, "prodigy": 14, "adafactor": 4 / rank}[name]


class TrainingState:
    """All that changes while a phase trains: the LoRA, the optimizer, its schedule, fp16's loss scale, the draws."""

    def __init__(self, transformer, adapter: str, draws: Draws, optimizer, lr_scheduler, scaler=None):
        self.transformer, self.adapter, self.draws = transformer, adapter, draws
        self.parts = {"optimizer": optimizer, "lr_scheduler": lr_scheduler}
        if scaler is not None:
            self.parts["scaler"] = scaler

    def content(self) -> dict:
        """Return it as a dictionary of state dicts and tensors."""
        content = {name: part.state_dict() for name, part in self.parts.items()}
        lora = get_peft_model_state_dict(self.transformer, adapter_name=self.adapter)
        return content | {"generator": self.draws.state(), "lora": lora}

    def restore(self, content: dict, draws_taken: int) -> None:
        """Go on from the content that another one had after so many draws; raise InputError where the LoRA does not
        become what it holds."""
        set_peft_model_state_dict(self.transformer, content["lora"], adapter_name=self.adapter)
        check_loaded(self.transformer, self.adapter, content["lora"])
        self.draws.restore(draws_taken, content["generator"])
        for name, part in self.parts.items():
            part.load_state_dict(content[name])
