"""Which pipelines do the benchmarks time, and how are time, model FLOPs and memory measured?

A pipeline is loaded from a directory, or built at a named shape with random weights, without any download: its
transformer is made on the device itself, what its text encoders would say is random, and it has no VAE.
"""

import contextlib
import json
import math
import platform
import resource
import statistics
import sys
import time
import types
from pathlib import Path

import bitsandbytes as bnb
import diffusers
import peft
import torch
from accelerate import init_empty_weights
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch.overrides import TorchFunctionMode


sys.path.insert(0, str(Path(__file__).parent.parent))

from glance import base as load_base  # noqa: E402
from glance import command_line as cli  # noqa: E402
from glance.adapters import with_adapters  # noqa: E402
from glance.ask import pipeline as ask  # noqa: E402
from glance.ask import prompts as ask_prompts  # noqa: E402
from glance.ask.guidance import ask_single_branch  # noqa: E402
from glance.shared_flags import QUANTIZATIONS  # noqa: E402
from glance.training import weightless  # noqa: E402
from glance_utils import InputError  # noqa: E402


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MIXED_PRECISION = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
TINY = {"num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 32, "joint_attention_dim": 64}
TINY |= {"axes_dims_rope": (8, 12, 12)}
# Pipeline, transformer and what differs from its config's defaults; the defaults are FLUX.1-schnell's, SD3 medium's
# and Qwen-Image's.
SHAPES = {
    "flux-dev": (FluxPipeline, FluxTransformer2DModel, {"guidance_embeds": True}),
    "qwen-image": (QwenImagePipeline, QwenImageTransformer2DModel, {}),
    "sd3.5-large": (
        StableDiffusion3Pipeline,
        SD3Transformer2DModel,
        {
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "in_channels": 16,
            "out_channels": 16,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
    ),
    "small": (
        FluxPipeline,
        FluxTransformer2DModel,
        {"guidance_embeds": True, "num_layers": 2, "num_single_layers": 6, "num_attention_heads": 6},
    ),
    # For a CPU, in a second: nothing is measured with them.
    "tiny-flux": (FluxPipeline, FluxTransformer2DModel, TINY | {"num_single_layers": 2, "guidance_embeds": True}),
    "tiny-qwen": (QwenImagePipeline, QwenImageTransformer2DModel, TINY),
    "tiny-sd3.5": (
        StableDiffusion3Pipeline,
        SD3Transformer2DModel,
        {name: TINY[name] for name in TINY if name != "axes_dims_rope"}
        | {"caption_projection_dim": 128, "in_channels": 16, "pos_embed_max_size": 64, "qk_norm": "rms_norm"},
    ),
}
RESOLUTIONS = {"small": 512, **dict.fromkeys(("tiny-flux", "tiny-qwen", "tiny-sd3.5"), 128)}  # of the others 1024


def parser(description: str) -> cli.Parser:
    """Return a parser with the options that all benchmarks share."""
    parser = cli.Parser(description=description)
    add = parser.add_argument
    add("--pretrained_model_name_or_path", help="a diffusers pipeline: folder or hub id")
    add("--shape", choices=tuple(SHAPES), help="or: random weights of this shape; small unless something is said")
    add("--resolution", type=cli.positive(int), help="height and width; 1024, for a small shape less")
    add("--batch_size", type=cli.positive(int), default=1)
    add("--text_tokens", type=cli.positive(int), default=512, help="length of a shape's random prompt")
    add("--dtype", choices=tuple(DTYPES), default="bfloat16", help="of the frozen base")
    add("--rank", type=cli.positive(int), default=32)
    add("--steps", type=cli.positive(int), default=7, help="timed steps; the median is reported")
    add("--warmup", type=int, default=2, help="steps before them")
    add("--quantization", choices=QUANTIZATIONS, default="none")
    add("--gradient_checkpointing", action="store_true")
    add("--use_8bit_adam", action="store_true")
    add("--compile", action="store_true", help="regional compilation of the transformer's repeated blocks")
    add("--process_time", action="store_true", help="count the processor's seconds: for a CPU shared with other work")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--json", help="write the result here as well")
    return parser


def parse(parser: cli.Parser, argv: list[str] | None = None):
    """Return the options, shape and resolution filled in; raise InputError where they contradict each other."""
    args = parser.parse(argv)
    if args.pretrained_model_name_or_path and args.shape:
        raise InputError("give --pretrained_model_name_or_path or --shape, not both")
    if not args.pretrained_model_name_or_path:
        args.shape = args.shape or "small"
    args.resolution = args.resolution or RESOLUTIONS.get(args.shape, 1024)
    cli.set_up_logging()
    return args


# --------------------------------------------------------------------------------------------------------------------
# The pipeline


def make_pipeline(args) -> tuple[DiffusionPipeline, dict, torch.Tensor]:
    """Return the pipeline as training has it, its call's arguments without guidance, and latents (B, ...) float32."""
    dtype = DTYPES[args.dtype]
    if args.shape:
        _, kind, config = SHAPES[args.shape]
        transformer = random_transformer(kind, config, dtype, args.device, args.quantization)
        pipe = random_pipeline(args.shape, args.text_tokens, transformer, args.device)
    else:
        pipe = ask.load_pipeline(args.pretrained_model_name_or_path, dtype)
        for component in ask.freeable_components(pipe).values():
            component.to(args.device)
        ask_prompts.remember_prompts(pipe)
    call = single_call(args, pipe)
    latents = loop_latents(pipe, **call)
    if not args.shape:
        ask_prompts.free_components(pipe)
        device = torch.device(args.device)
        pipe.transformer = load_base.load_transformer(
            args.pretrained_model_name_or_path, dtype, device, args.quantization
        )
    with_adapters(pipe.transformer).requires_grad_(False)
    if args.gradient_checkpointing:
        load_base.enable_gradient_checkpointing(pipe.transformer)
    if args.device.startswith("cuda"):  # what it took to build does not count
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return pipe, call, latents


def single_call(args, pipe) -> dict:
    """Return the arguments of the pipeline's call, without guidance."""
    call = {"prompt": "a red ring", "height": args.resolution, "width": args.resolution}
    ask.dry_step(pipe, **call)
    call |= ask_single_branch(pipe, **call)
    return call | {ask.batch_argument(pipe): args.batch_size}


def weightless_pipeline(args) -> DiffusionPipeline:
    """Return the pipeline with a transformer on the meta device, all else on the CPU: enough for the estimate."""
    dtype = DTYPES[args.dtype]
    if args.pretrained_model_name_or_path:
        return weightless.load_without_weights(args.pretrained_model_name_or_path, dtype)
    _, kind, config = SHAPES[args.shape]
    with init_empty_weights():
        transformer = kind(**config).to(dtype)
    pipe = random_pipeline(args.shape, args.text_tokens, transformer, "cpu")
    pipe.text_encoder = types.SimpleNamespace(device=torch.device("cpu"), dtype=dtype)  # says where the pipeline works
    return pipe


def random_pipeline(shape: str, text_tokens: int, transformer, device: str) -> DiffusionPipeline:
    """Return a pipeline of one of SHAPES with this transformer and random prompts, without text encoders and VAE."""
    pipeline, _, _ = SHAPES[shape]
    parts = dict.fromkeys(name for name in pipeline._get_signature_types() if name != "self")
    pipe = pipeline(**parts | {"transformer": transformer, "scheduler": FlowMatchEulerDiscreteScheduler()})
    config, random = transformer.config, {"dtype": transformer.dtype, "device": device}
    prompt = torch.randn(1, text_tokens, config.joint_attention_dim, **random)
    pooled = torch.randn(1, config.get("pooled_projection_dim", 1), **random)

    def encode_prompt(*args, num_images_per_prompt=1, **kwargs):
        prompts, pooleds = prompt.repeat(num_images_per_prompt, 1, 1), pooled.repeat(num_images_per_prompt, 1)
        if pipeline is FluxPipeline:
            return prompts, pooleds, torch.zeros(text_tokens, 3, **random)
        if pipeline is QwenImagePipeline:
            return prompts, None
        return prompts, prompts, pooleds, pooleds

    pipe.encode_prompt = encode_prompt  # as ask.remember_prompts leaves it, with the encoders freed
    return pipe


def random_transformer(kind, config: dict, dtype: torch.dtype, device: str, quantization: str) -> torch.nn.Module:
    """Return a transformer whose weights are made on the device, in `dtype`: no second copy of 20 billion anywhere.

    Quantized, it is as glance.base.load_transformer leaves that of a file; nf4 and int8 one layer after the other, so
    that a card need not hold the whole in `dtype`.
    """
    with init_empty_weights():
        transformer = kind(**config)
    generator = torch.Generator(device).manual_seed(0)
    for name, module in list(transformer.named_modules()):
        for part, parameter in list(module.named_parameters(recurse=False)):
            value = torch.empty(parameter.shape, dtype=dtype, device=device)
            if value.ndim > 1:
                value.normal_(0, 1 / math.sqrt(value[0].numel()), generator=generator)
            else:
                value.fill_(float(part == "weight"))  # of norms; biases are 0
            setattr(module, part, torch.nn.Parameter(value))
        if isinstance(module, torch.nn.Linear) and quantization in ("nf4", "int8"):
            transformer.set_submodule(name, quantized(module, quantization))
    transformer = transformer.to(device, dtype).eval()
    for module in transformer.modules():  # as load_transformer does: bitsandbytes' kernel for eval has no backward
        if isinstance(module, bnb.nn.Linear4bit):
            module.train()
    if quantization == "int8":
        load_base.forget_frozen_inputs()
    if quantization == "fp8":
        load_base.rest_in_fp8(transformer, dtype)
    return transformer


def quantized(layer: torch.nn.Linear, quantization: str) -> torch.nn.Linear:
    """Return the layer as one of bitsandbytes', in nf4 or int8, on its device."""
    sizes = layer.in_features, layer.out_features
    weight, has_bias = layer.weight.data, layer.bias is not None
    if quantization == "nf4":
        kinds = {"compress_statistics": False, "quant_type": "nf4"}
        new = bnb.nn.Linear4bit(*sizes, bias=has_bias, compute_dtype=weight.dtype, **kinds)
        new.weight = bnb.nn.Params4bit(weight, requires_grad=False, **kinds).to(weight.device)
    else:
        new = bnb.nn.Linear8bitLt(*sizes, bias=has_bias, has_fp16_weights=False)
        rows, scales, _ = bnb.functional.int8_vectorwise_quant(weight.half())
        new.weight = bnb.nn.Int8Params(rows, requires_grad=False, has_fp16_weights=False, CB=rows, SCB=scales)
    new.bias = layer.bias
    return new


def loop_latents(pipe: DiffusionPipeline, **call) -> torch.Tensor:
    """Return random latents (B, ...) in the layout of the pipeline's loop, float32."""

    def on_step(index, model_output, sample):
        raise ask.Answer(sample)

    try:
        with torch.no_grad():
            ask.run_pipeline(pipe, ask.Probe([1.0], on_step), num_inference_steps=1, **call)
    except ask.Answer as answer:
        return answer.args[0].float()


# --------------------------------------------------------------------------------------------------------------------
# What is measured


class CountFlops(TorchFunctionMode):
    """A count of a forward's FLOPs: `linear` of weight products (2 * parameters * tokens), `attention` of QK' and PV.

    Counted where torch is called, so that a quantized layer or any attention backend counts alike.
    """

    linear = attention = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.scaled_dot_product_attention:
            inputs = (kwargs or {}) | dict(zip(("query", "key", "value"), args))
            self.attention += 4 * inputs["query"].numel() * inputs["key"].shape[-2]
        output = function(*args, **kwargs or {})
        if function is torch.nn.functional.linear:
            self.linear += 2 * output.numel() * args[0].shape[-1]
        elif function in (torch.conv2d, torch.conv3d):
            self.linear += 2 * output.numel() * args[1][0].numel()
        return output


def count_flops(transformer, forward) -> CountFlops:
    """Return the count of forward(), which is called once, without gradients.

    bitsandbytes' layers, whose kernels differ by device, are counted as the products with the weights they stand for.
    """
    with contextlib.ExitStack() as stack:
        for layer in transformer.modules():
            if isinstance(layer, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt):
                sizes = layer.out_features, layer.in_features
                product = lambda x, sizes=sizes: torch.nn.functional.linear(x, x.new_zeros(sizes))  # noqa: E731
                stack.enter_context(ask.replaced(layer, "forward", product))
        stack.enter_context(torch.no_grad())
        counted = stack.enter_context(CountFlops())
        forward()
    return counted


def training_flops(counted: CountFlops) -> int:
    """Return the FLOPs of forward and backward without weight gradients: 4 * parameters * tokens plus attention."""
    return 2 * counted.linear + 3 * counted.attention


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def seconds(function, args) -> float:
    """Return the seconds that function() takes, by the clock that is asked for."""
    clock = time.process_time if args.process_time else time.perf_counter
    synchronize(args.device)
    start = clock()
    function()
    synchronize(args.device)
    return clock() - start


def in_turns(functions: dict, args) -> dict[str, list[float]]:
    """Return the seconds of each function in each of --steps rounds, in turns: other work on the machine hits all."""
    for _ in range(args.warmup):
        for function in functions.values():
            function()
    times = {name: [] for name in functions}
    for _ in range(args.steps):
        for name, function in functions.items():
            times[name].append(seconds(function, args))
    return times


def ratio(times: list[float], others: list[float]) -> float:
    """Return the median over the rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(times, others))


def matmul_rate(args) -> float:
    """Return the FLOP/s of a square matrix product in --dtype, the median of nine."""
    device, dtype = args.device, DTYPES[args.dtype]
    size = 8192 if device.startswith("cuda") else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    for _ in range(2):
        a @ b
    return 2 * size**3 / statistics.median(seconds(lambda: a @ b, args) for _ in range(9))


def peak_memory(device: str) -> int:
    """Return the most bytes that torch held on the accelerator, or this process's largest resident set on a CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB


def machine(device: str) -> dict:
    cuda = device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "bitsandbytes": bnb.__version__,
        "diffusers": diffusers.__version__,
        "peft": peft.__version__,
    }


def model_facts(args, pipe, latents) -> dict:
    return {
        "model": args.shape or Path(args.pretrained_model_name_or_path).name,
        "parameters": sum(p.numel() for name, p in pipe.transformer.named_parameters() if ".lora_" not in name),
        "resolution": args.resolution,
        "latents": list(latents.shape),
        "dtype": args.dtype,
        "rank": args.rank,
        "quantization": args.quantization,
        "gradient_checkpointing": args.gradient_checkpointing,
        "compile": args.compile,
        "clock": "process" if args.process_time else "wall",
    }


def report(result: dict, path: str | None) -> None:
    """Write the result as JSON, and print it as JSON and as a Markdown table."""
    text = json.dumps(result)
    if path:
        Path(path).write_text(text + "\n")
    print(text)
    for key, value in result.items():
        print(f"| {key} | {f'{value:.4g}' if isinstance(value, float) else value} |")
