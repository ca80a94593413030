"""How do several processes train together? They share work and results, spread a base's rows over themselves (FSDP2),
or train the two phases on two halves of them.

The frozen base is the same on every process and never wrapped: each of them reads it or, where it does not fit one
card, has some rows of it (FSDP2). The LoRA, a hundredth of it, is whole on every process and its gradients are
averaged; so LoRA files, checkpoints and the optimizer are those of any other run.
"""

import functools
import json
import os
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState, init_empty_weights
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    broadcast_object_list,
    disable_fsdp_ram_efficient_loading,
    parse_flag_from_env,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import distribute_tensor
from torch.utils._pytree import tree_map_only
from tqdm.auto import tqdm

from glance import base as load_base
from glance.ask.pipeline import find_denoiser
from glance.command_line import Settings
from glance.files.recipe import Recipe
from glance_utils import PHASES, InputError


PATIENCE = timedelta(hours=2)  # for other processes: one may have a base to download


def is_sharded() -> bool:
    """Return whether FSDP was launched, also on CPUs, where accelerate has none: each process has rows of the base."""
    return parse_flag_from_env("ACCELERATE_USE_FSDP")


def is_deepspeed(accelerator) -> bool:
    """Return whether DeepSpeed holds the optimizer."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def check_combination(args, accelerator) -> None:
    """Raise InputError where what was launched does not go with the flags."""
    if accelerator.distributed_type == DistributedType.XLA:
        raise InputError("nothing here runs on TPUs; launch on GPUs, or with --cpu")
    if accelerator.gradient_accumulation_steps != args.gradient_accumulation_steps:
        raise InputError(
            f"--gradient_accumulation_steps is {args.gradient_accumulation_steps}, but accelerate was launched with "
            f"{accelerator.gradient_accumulation_steps}; give it to the script alone, after its name"
        )
    if args.enable_group_offload and accelerator.num_processes > 1:
        raise InputError("--enable_group_offload goes with one process; leave it out, or launch one")
    if is_deepspeed(accelerator):
        if accelerator.state.deepspeed_plugin.zero_stage == 3:
            raise InputError("ZeRO 3 would shard the LoRA alone; set zero_stage: 2, or shard the base by FSDP")
        refuse(args, "DeepSpeed", "checkpointing_steps", "resume_from_checkpoint", "parallel_phases", "fit")
        refuse(args, "DeepSpeed", *(["optimizer"] if args.optimizer != "adamw" else []))  # it hands them flat parts
        refuse(args, "DeepSpeed", *(["num_model_calls"] if args.max_train_steps else []))  # nor parts of two rates
    if is_sharded():
        plugin = FullyShardedDataParallelPlugin()  # of what the launcher put into the environment
        if plugin.fsdp_version != 2:
            raise InputError("FSDP 1 cannot shard a base whose LoRA is of another dtype; set fsdp_version: 2")
        if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
            raise InputError("fsdp_offload_params: a sharded base stays on its accelerators; launch more of them")
        refuse(args, "FSDP", "compile", "fit", *(["quantization"] if args.quantization != "none" else []))
        # A backward pass that calls the model again would gather its rows while others are given back.
        refuse(args, "FSDP", *(["num_model_calls"] if args.max_train_steps else []))
        if not torch.distributed.is_initialized():
            raise InputError("FSDP shards the base among several processes; launch them with --num_processes")
        disable_fsdp_ram_efficient_loading()  # with it transformers gives only the first process its text encoders


def refuse(args, kind: str, *names: str) -> None:
    """Raise InputError where one of these flags is set, or fp16 with its loss scaling."""
    given = [f"--{name}" for name in names if getattr(args, name)]
    given += ["--mixed_precision fp16"] if args.mixed_precision == "fp16" else []
    if given:
        raise InputError(f"{given[0]} does not go with {kind}; leave one of the two out")


def check_same(*values) -> None:
    """Raise InputError where the processes have other values, read from output_dir, to go on from."""
    if any(others != values for others in gather_on_host(values)):
        raise InputError(
            "--resume_from_checkpoint: the processes do not find the same; let --output_dir be a folder that all of "
            "them share"
        )


# --------------------------------------------------------------------------------------------------------------------
# Work shared out


def gather_on_host(value) -> list:
    """Return every process's `value`, in the order of the processes, on each of them: by way of host memory, where
    NCCL would take all of it through the accelerators'. [value] where there is one process."""
    values = [None] * PartialState().num_processes
    if len(values) == 1:
        return [value]
    torch.distributed.all_gather_object(values, value, group=_host_group(torch.distributed.group.WORLD))
    return values


@functools.cache
def _host_group(world) -> torch.distributed.ProcessGroup:
    """Return another group of the processes of `world`, the default one, which exchanges what lies in host memory."""
    return torch.distributed.new_group(timeout=PATIENCE, backend="gloo")


def leave() -> None:
    """Part from the other processes in order. A group that lives on while Python ends may abort its process."""
    _host_group.cache_clear()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def share(jobs: list, work, description: str, steps: int = 1) -> list:
    """Return [work(job, advance) for job in jobs] on every process; job i is done by process i modulo their number.

    Each job has so many `steps`, after each of which it may call advance(), for a progress bar.

    A sharded model computes on all processes or on none: where the jobs of the last round are fewer, the processes
    without one do its last job too.
    """
    state = PartialState()
    count, rank = state.num_processes, state.process_index
    results = []
    starts, hidden = range(0, len(jobs), count), not state.is_local_main_process
    with tqdm(total=len(starts) * steps, desc=description, delay=1, disable=hidden) as progress:
        for done, start in enumerate(starts, 1):
            part = jobs[start : start + count]
            busy = rank < len(part)
            result = work(part[rank if busy else -1], progress.update) if busy or is_sharded() else None
            results += gather_on_host(result if busy else None)[: len(part)]
            progress.update(done * steps - progress.n)
    return results


# --------------------------------------------------------------------------------------------------------------------
# FSDP2


def load_transformer(
    accelerator,
    path: str,
    dtype: torch.dtype,
    quantization: str = "none",
    enable_group_offload: bool = False,
    part: str | None = None,
    additions: dict | None = None,
    **load_arguments,
) -> torch.nn.Module:
    """Return base.load_transformer's for this process: the whole transformer or, under FSDP, this process's rows.

    `part` is another component of the same class; `load_arguments` are from_pretrained's, revision and variant.
    """
    device, what = accelerator.device, {"part": part, "additions": additions} | load_arguments
    if not is_sharded():
        return load_base.load_transformer(path, dtype, device, quantization, enable_group_offload, **what)
    name, kind = find_denoiser(path, **load_arguments)
    weights = {}
    if accelerator.is_main_process:  # mapped, not read, where the files' dtype is `dtype`
        whole = load_base.load_transformer(path, dtype, torch.device("cpu"), **what)
        weights = dict([*whole.named_parameters(), *whole.named_buffers()])
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # as from_pretrained does, for what a model computes when it is made
    try:
        with init_empty_weights():
            transformer = kind.from_config(kind.load_config(path, subfolder=part or name, **load_arguments)).eval()
    finally:
        torch.set_default_dtype(default)
    shard(transformer.requires_grad_(False), weights, device, FullyShardedDataParallelPlugin().reshard_after_forward)
    return transformer


def shard(transformer: torch.nn.Module, weights: dict, device: torch.device, reshard_after_forward: bool) -> None:
    """Give each process its rows of the first process's `weights`, one parameter after the other.

    `transformer` is on the meta device; `weights` are all of its parameters and buffers by name, {} on the others. A
    block, of those by which LoRA layers are named, is made whole when it computes.
    """
    dtypes = broadcast_object_list([{name: value.dtype for name, value in weights.items()}])[0]
    for name, parameter in transformer.named_parameters():
        parameter.data = parameter.to(dtypes[name])
    for name, buffer in transformer.named_buffers():
        buffer.data = weights.get(name, buffer).to(device, dtypes[name])
        torch.distributed.broadcast(buffer, src=0)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for part in transformer.children():
        for block in part if isinstance(part, torch.nn.ModuleList) else ():
            block.register_forward_hook(without_views)
            fully_shard(block, mesh=mesh, reshard_after_forward=reshard_after_forward)
    transformer.register_forward_hook(without_views)
    fully_shard(transformer, mesh=mesh)
    rows = {}
    for name, parameter in transformer.named_parameters():
        whole = (
            weights[name].detach() if weights else torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        )
        rows[name] = distribute_tensor(whole, mesh, parameter.placements)  # sent by the first process
    transformer.load_state_dict(rows, strict=False, assign=True)
    kind = type(transformer)  # named as diffusers knows it: a pipeline writes down its models' classes
    kind.__name__, kind.__module__ = kind.__mro__[2].__name__, kind.__mro__[2].__module__


def without_views(module, args, output):
    """Return a block's output with copies of what are views.

    Where the model adds to a view in place, FSDP's hook on it is lost, and with it the block's weights in backward.
    """
    return tree_map_only(torch.Tensor, lambda part: part.clone() if part._is_view() else part, output)


def prepare(args, accelerator, model, parameters, optimizer):
    """Return (model, optimizer) as accelerator.prepare does, for a model that is placed already and of which the LoRA
    alone, `parameters`, is trained."""
    if is_deepspeed(accelerator):
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"] = args.train_batch_size
        config["gradient_clipping"] = args.max_grad_norm
        config["bf16"] = {"enabled": False}  # it would convert the LoRA, which stays float32
        return accelerator.prepare(LoraAlone(model, parameters), optimizer)
    model.set_requires_gradient_sync = lambda requires: None  # for accelerate's no_sync under FSDP
    return model, accelerator.prepare_optimizer(optimizer)


class LoraAlone(torch.nn.Module):
    """A model that shows nothing but its LoRA: DeepSpeed takes parameters of one dtype, all of them."""

    def __init__(self, model, parameters):
        super().__init__()
        self.parts = torch.nn.ParameterList(parameters)
        self.call = model.__call__

    def forward(self, *args, **kwargs):
        return self.call(*args, **kwargs)


def is_alone(accelerator) -> bool:
    """Return whether this project exchanges nothing: there is one process, or DeepSpeed does it."""
    return accelerator.num_processes == 1 or is_deepspeed(accelerator)


@torch.no_grad()
def copy_from_first(accelerator, parameters) -> None:
    """Give every process the first one's parameters."""
    if is_alone(accelerator):
        return
    together = torch.cat([parameter.flatten() for parameter in parameters])
    torch.distributed.broadcast(together, src=0)
    for parameter, part in zip(parameters, together.split([parameter.numel() for parameter in parameters])):
        parameter.copy_(part.view_as(parameter))


@torch.no_grad()
def average_gradients(accelerator, parameters) -> None:
    """Replace each gradient by its mean over all processes; what has none on one of them counts as zeros there, and
    what has none anywhere goes on having none."""
    if is_alone(accelerator):
        return
    gradients = [torch.zeros_like(part) if part.grad is None else part.grad for part in parameters]
    has_one = torch.tensor([float(parameter.grad is not None) for parameter in parameters], device=accelerator.device)
    together = torch.cat([*(gradient.flatten() for gradient in gradients), has_one]).div_(accelerator.num_processes)
    torch.distributed.all_reduce(together)
    *means, shares = together.split([*(gradient.numel() for gradient in gradients), len(has_one)])
    for parameter, gradient, mean, anywhere in zip(parameters, gradients, means, shares.tolist()):
        parameter.grad = gradient.copy_(mean.view_as(gradient)) if anywhere else None


# --------------------------------------------------------------------------------------------------------------------
# Two phases on two halves of the processes


@dataclass
class Halves:
    """This process's half of all processes: a world of its own, which trains one phase into that phase's folder."""

    phase: str
    output_dir: Path  # of both phases
    store: torch.distributed.Store  # all that the two have in common

    def exchange(self, name: str, value) -> list:
        """Return both halves' `value`, plain data, the slow one's first, on every process.

        All processes of a half have the same one, and call this once with this name.
        """
        self.store.set(f"{name} {self.phase}", json.dumps(value))
        keys = [f"{name} {phase}" for phase in PHASES]
        while not self.store.check(keys):  # not Store.wait, inside which no signal would be heard
            time.sleep(0.1)
        return [json.loads(self.store.get(key)) for key in keys]

    def meet(self, accelerator, recipes: dict[str, Recipe]) -> dict[str, Recipe]:
        """Return both phases' recipes in the slow half, as soon as the fast half has written its LoRA.

        In the fast half return {} at once: the slow one makes what both phases share, and the fast one is done.
        """
        if self.phase == "fast":
            if accelerator.is_main_process:
                self.store.set("fast", recipes["fast"].to_json())
            return {}
        while not self.store.check(["fast"]):  # not Store.wait, inside which no signal would be heard
            time.sleep(0.1)
        return recipes | {"fast": Recipe(**json.loads(self.store.get("fast")))}


def split(args: Settings) -> tuple[Halves, Settings]:
    """Begin --parallel_phases: from here on this process goes through a run of one phase, among half the processes.
    Return its half, and the settings of that run.

    To be called before anything asks torch or accelerate about processes.
    """
    rank, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if count % 2:
        raise InputError(f"--parallel_phases needs an even number of processes, {count} launched; leave it out")
    phase, output_dir = PHASES[2 * rank // count], Path(args.output_dir)
    store, _, _ = next(rendezvous("env://"))
    store_of_half = torch.distributed.PrefixStore(phase, store)
    torch.distributed.init_process_group(
        store=store_of_half, rank=rank % (count // 2), world_size=count // 2, timeout=PATIENCE
    )
    args = args.replace(
        custom_timesteps={phase: args.custom_timesteps[phase]},
        output_dir=str(output_dir / phase),
        hub_model_id=args.hub_model_id or output_dir.resolve().name,
    )
    return Halves(phase, output_dir, store), args
