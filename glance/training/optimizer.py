"""Which optimizer trains the LoRA, and what does a checkpoint hold of it, so that a resumed run equals the
uninterrupted one bit for bit?"""

from diffusers.optimization import get_scheduler
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from glance.files.lora import check_loaded
from glance.training.draws import Draws


def make_optimizer(args, parameters):
    """Return AdamW, 8-bit if asked for, and its learning rate schedule over --max_train_steps."""
    if args.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit as AdamW
    else:
        from torch.optim import AdamW
    optimizer = AdamW(parameters, lr=args.learning_rate, weight_decay=args.adam_weight_decay)
    counts = {"num_warmup_steps": args.lr_warmup_steps, "num_training_steps": args.max_train_steps}
    return optimizer, get_scheduler(args.lr_scheduler, optimizer, **counts)


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
