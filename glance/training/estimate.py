"""What will a run need, before any weight is loaded? Memory at each of its stages, and floating-point operations.

The transformer and the VAE run as the run will have them run, without weights (weightless.py): the same function that
computes a training step's loss is called, so that every call of the transformer counts that the step makes, whose
activations all live until the backward pass.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from accelerate import init_empty_weights
from peft import LoraConfig

from glance.adapters import compute_as_saved, with_adapters
from glance.ask import latents as ask_latents
from glance.ask import pipeline as ask
from glance.ask.pipeline import replaced
from glance.base import enable_gradient_checkpointing, rest_in_fp8
from glance.encoders import bytes_of
from glance.shared_flags import QUANTIZATIONS
from glance.training.optimizer import state_bytes
from glance.training.weightless import Counter, empty, estimable, weightless, without_content
from glance_utils import denoiser


@dataclass(frozen=True)
class Choice:
    """The flags that trade time for memory. Wherever one is taken, a run's settings serve as well."""

    quantization: str = "none"
    gradient_checkpointing: bool = False
    optimizer: str = "adamw"
    enable_group_offload: bool = False


@dataclass(frozen=True)
class Step:
    """What one step takes beyond the weights: of training, forward and backward, or of drawing, forward alone."""

    activations: int  # bytes at the peak; in training the gradients of the LoRA are among them
    flops: int
    calls: int  # of the transformer


@dataclass(frozen=True)
class Estimate:
    """A run's needs; all sizes in bytes."""

    parameters: int  # the transformer's
    lora_parameters: int
    rank: int
    base: dict[str, int]  # the transformer's weights, by quantization
    layer: int  # the largest linear layer's weight, as it is unpacked to compute with it
    block: int  # the weights of the largest block, in the same way
    encoders: dict[str, int]  # every other model's weights, by the component's name
    encoding: int  # what the VAE needs beyond them to encode the image
    decoding: int  # the VAE's weights, and what it needs to decode the preview
    training: dict[bool, Step]  # a micro-step, by gradient checkpointing; {} where nothing is trained
    drawing: Step | None  # a step of the base, with its guidance; None where it draws nothing
    preview: Step | None  # a step of the preview and the validation; None where there is neither
    trial: Step | None = None  # of --num_model_calls: one branch of a picture, in the memory of as many as are tried

    def lora(self) -> int:
        """Return the size of the LoRA, which is float32."""
        return 4 * self.lora_parameters

    def training_step(self, choice: Choice) -> Step:
        """Return the micro-step of this choice; a model without checkpointing has one alone."""
        return self.training.get(bool(choice.gradient_checkpointing)) or self.training[False]

    def weights(self, choice: Choice, backward: bool) -> int:
        """Return the most of the transformer's weights that are on the device at once.

        Packed weights are unpacked to compute with them and, backward, to transpose them. Layers whose full weight
        comes and goes, by the cast to fp8 or by offload, stay through a block's backward pass.
        """
        if choice.enable_group_offload:
            return self.block + self.layer if backward else 2 * self.layer
        unpacked = {"none": 0, "fp8": self.block if backward else self.layer}
        return self.base[choice.quantization] + unpacked.get(choice.quantization, 2 * self.layer)

    def stages(self, choice: Choice) -> dict[str, int]:
        """Return the bytes on the device at the peak of each stage that the run has, in the order in which they come:
        "encoding", "drawing", "fitting", "training", "preview" and "decoding".

        The text encoders answer and are freed, and the VAE encodes the image; the base draws, where it must, and its
        branches are tried in batches, where they are mixed; the LoRAs are trained; the base draws the preview and is
        freed, and the VAE decodes.
        """
        forward = self.weights(choice, backward=False)
        state = self.lora() + round(state_bytes(choice.optimizer, self.rank) * self.lora_parameters)
        vae = self.encoders.get("vae", 0)
        stages = {"encoding": max(sum(self.encoders.values()), vae + self.encoding)}
        if self.drawing is not None:
            stages["drawing"] = forward + self.drawing.activations
        if self.trial is not None:
            stages["fitting"] = forward + self.trial.activations
        if self.training:
            step = max(self.training_step(choice).activations, 2 * self.lora())  # gradients, and the optimizer's own
            stages["training"] = self.weights(choice, backward=True) + state + step
        if self.preview is not None:
            stages["preview"] = forward + 2 * self.lora() + self.preview.activations
            stages["decoding"] = self.decoding
        return stages

    def peak(self, choice: Choice) -> int:
        """Return the bytes of the largest stage that the transformer is in: those before and after it, of encoders
        and VAE, need not be on the device."""
        return max(size for stage, size in self.stages(choice).items() if stage not in ("encoding", "decoding"))


@dataclass(frozen=True)
class Work:
    """What a run has the transformer do, as functions that call its pipeline."""

    train: Callable[[], torch.Tensor] | None  # returns a micro-step's loss, () float32
    draw: Callable[[], torch.Tensor] | None = None  # returns a velocity, as the base draws trajectories
    preview: Callable[[], torch.Tensor] | None = None  # the same, as the preview is drawn
    trial: Callable[[], torch.Tensor] | None = None  # the same, of one branch, as plans are tried
    at_once: int = 1  # so many pictures are tried together at most
    same: bool = False  # whether drawing and preview are, and one of them tells of both
    accumulates: bool = False  # whether a micro-step finds the gradients of others before it


def measure(pipe, work: Callable[[], torch.Tensor], backward: bool = False) -> Step:
    """Return what work() takes, or with `backward` work().backward(); the pipeline's transformer is `weightless`.

    Raise InputError where the transformer decides by numbers that are not there.
    """
    transformer = denoiser(pipe)
    predict, calls = transformer.forward, 0

    def forward(*args, **kwargs):
        nonlocal calls
        calls += 1
        return predict(*without_content(args), **without_content(kwargs))

    counter = Counter(transformer)
    with estimable(pipe), replaced(transformer, "forward", forward), torch.set_grad_enabled(backward), counter:
        result = work()
        if backward:
            result.backward()
        del result
    transformer.zero_grad()
    return Step(counter.peak, counter.flops, calls)


def measure_vae(vae: torch.nn.Module | None, layout: ask_latents.LatentLayout, size: tuple[int, int]):
    """Return (bytes to encode an image of `size`, (height, width), bytes to decode its latents), beyond the weights.

    The VAE is `weightless`. (0, 0) where there is none.
    """
    if vae is None:
        return 0, 0
    image = ask_latents.vae_input(vae, torch.zeros(1, 3, *size), layout)
    peaks = []
    for work, shape in ((functools.partial(type(vae).encode, vae), image.shape), (vae.decode, layout.z_shape)):
        counter = Counter(vae)
        with torch.no_grad(), counter:
            work(empty(shape, vae.dtype))
        peaks.append(counter.peak)
    return tuple(peaks)


def base_bytes(transformer: torch.nn.Module, quantization: str) -> int:
    """Return the bytes of the weights as base.load_transformer leaves them."""
    if quantization == "fp8":
        with init_empty_weights():
            transformer = type(transformer).from_config(transformer.config).to(transformer.dtype)
        rest_in_fp8(transformer, transformer.dtype)
    total = saved_bytes(transformer)
    for module in transformer.modules():
        if isinstance(module, torch.nn.Linear) and quantization in ("nf4", "int8"):
            count, rows = module.weight.numel(), module.out_features
            # Two weights to a byte and a float32 for each 64; or one to a byte and a float32 for each row.
            total += (count // 2 + 4 * -(-count // 64)) if quantization == "nf4" else (count + 4 * rows)
            total -= count * module.weight.element_size()
    return total


def saved_bytes(module: torch.nn.Module) -> int:
    """Return the bytes of its weights and of what is saved with them, as a quantized weight's scales are."""
    return sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())


def estimate(
    pipe, layers: list[str], rank: int, work: Work, vae=(0, 0), checkpointing=(False, True), dropout: float = 0.0
) -> Estimate:
    """Return what a run needs that does this work, with a LoRA on these layers.

    `vae` is measure_vae's answer, `checkpointing` which steps are measured. The transformer is on the meta device,
    and of no other use afterwards. Raise InputError where it decides by numbers that are not there.
    """
    transformer = denoiser(pipe)
    with_adapters(transformer).requires_grad_(False)
    beside = sum(bytes_of(model) for model in ask.controlnets(pipe).values())  # whatever the base is quantized to
    base = {quantization: base_bytes(transformer, quantization) + beside for quantization in QUANTIZATIONS}
    parameters = sum(parameter.numel() for parameter in transformer.parameters())
    linear = [layer.weight for layer in transformer.modules() if isinstance(layer, torch.nn.Linear)]
    layer = max(weight.numel() * weight.element_size() for weight in linear)
    lists = [part for part in transformer.modules() if isinstance(part, torch.nn.ModuleList)]
    block = max((saved_bytes(part) for blocks in lists for part in blocks), default=base["none"])
    lora = LoraConfig(r=rank, lora_dropout=dropout, target_modules=layers, init_lora_weights=False)
    transformer.add_adapter(lora, "estimate")
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    count = sum(map(torch.numel, trained))
    for parameter in trained:
        parameter.data = parameter.data.float()
    compute_as_saved(transformer)
    weightless(transformer)
    drawing = work.draw and measure(pipe, work.draw)
    preview = work.preview and (drawing if drawing and work.same else measure(pipe, work.preview))
    trial = work.trial and measure(pipe, work.trial)
    trial = trial and replace(trial, activations=work.at_once * trial.activations)
    training = {}
    for choice in checkpointing if transformer._supports_gradient_checkpointing else [False]:
        if work.train is None:
            break
        if choice:
            enable_gradient_checkpointing(transformer)
        step = measure(pipe, work.train, backward=True)
        training[choice] = replace(step, activations=step.activations + (4 * count if work.accumulates else 0))
    encoding, decoding = vae
    encoders = {name: bytes_of(model) for name, model in ask.freeable_components(pipe).items()}
    return Estimate(
        parameters=parameters,
        lora_parameters=count,
        rank=rank,
        base=base,
        layer=layer,
        block=block,
        encoders=encoders,
        encoding=encoding,
        decoding=encoders.get("vae", 0) + decoding,
        training=training,
        drawing=drawing,
        preview=preview,
        trial=trial,
    )


def readable(amount: float, unit: str) -> str:
    """Return the amount in three digits with a prefix: 1234567890 B is 1.23 GB."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if amount < 999.5 or prefix == "P":
            return f"{amount:.3g} {prefix}{unit}"
        amount /= 1000
