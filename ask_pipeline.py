"""Questions asked of a diffusers pipeline, answered by its own `__call__`: no code per model family.

Which timesteps does it walk, how are its latents laid out, how is its guidance switched off, what is its velocity
at (noisy, sigma)? Each time the pipeline runs for real, with its scheduler replaced by a probe and, where nothing
needs computing, its transformer bypassed. Training through the pipeline sees exactly what inference will see.
"""

import contextlib
import importlib
import inspect
from dataclasses import dataclass

import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from PIL import Image

from glance_utils import FixedSigmaScheduler, InputError, first_line


class _Probe(FixedSigmaScheduler):
    """A schedule whose step is a function (index, model_output, sample) -> next sample."""

    def __init__(self, sigmas: list[float], on_step):
        super().__init__(sigmas)
        self.on_step = on_step
        self.calls = 0

    def step(self, model_output, timestep, sample, *args, **kwargs):
        sample = self.on_step(self.calls, model_output, sample)
        self.calls += 1
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=sample)  # serves [0] and .prev_sample alike


class _Answer(BaseException):
    """Carries an answer out of a pipeline's call and ends it."""


@contextlib.contextmanager
def replaced(owner, name: str, value):
    """Set an attribute on an instance and put things back as they were, instance attribute or none."""
    before = vars(owner).get(name, _Answer)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is _Answer:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def _no_prediction(*args, hidden_states=None, **kwargs):
    """A transformer's forward that computes nothing: zeros in the shape of its input."""
    hidden_states = args[0] if hidden_states is None else hidden_states
    if isinstance(hidden_states, torch.Tensor):
        return Transformer2DModelOutput(sample=torch.zeros_like(hidden_states))
    return Transformer2DModelOutput(sample=[torch.zeros_like(item) for item in hidden_states])


@contextlib.contextmanager
def loading(path: str):
    """Turn what diffusers raises when a part of the pipeline at `path` is missing or unusable into an InputError."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, ImportError, AttributeError) as error:
        raise InputError(f"{path}: cannot be loaded ({first_line(error)})") from error


def accepted_arguments(pipe: DiffusionPipeline) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(type(pipe).__call__).parameters)


def read_model_index(path: str, **load_kwargs) -> dict:
    """A pipeline's model_index.json; InputError where there is none."""
    try:
        return DiffusionPipeline.load_config(path, **load_kwargs)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: not a diffusers pipeline (folder or hub id with model_index.json): {first_line(error)}"
        ) from None


def load_pipeline(path: str, dtype: torch.dtype = torch.float32, **load_kwargs) -> DiffusionPipeline:
    """A pipeline whose transformer has a config but no weights (meta device): enough for all but velocity.

    The VAE is float32, since half precision costs latents accuracy; the rest is `dtype`. InputError where `path` is
    not a diffusers pipeline with a flow-matching transformer.
    """
    config = read_model_index(path, **load_kwargs)
    library, name = config.get("transformer") or (None, None)
    if library is None:
        raise InputError(f"{path}: {config.get('_class_name')} has no transformer; Glance needs a flow-matching one")
    with loading(path):
        transformer_class = getattr(importlib.import_module(library), name)
        with init_empty_weights():
            transformer = transformer_class.from_config(
                transformer_class.load_config(path, subfolder="transformer", **load_kwargs)
            )
        pipe = DiffusionPipeline.from_pretrained(
            path,
            transformer=transformer.to(dtype),
            dtype={"vae": torch.float32, "default": dtype},
            **load_kwargs,
        )
    scheduler = pipe.scheduler
    if "FlowMatch" not in type(scheduler).__name__ and not scheduler.config.get("use_flow_sigmas"):
        raise InputError(f"{path}: {type(scheduler).__name__} is not a flow-matching scheduler; Glance needs one")
    return pipe


def call_arguments(pipe: DiffusionPipeline, prompt, height, width, guidance_scale, extra: dict) -> dict:
    """The pipeline's call arguments, checked against its signature: None leaves one to the pipeline, `extra` are its
    own further ones."""
    ours = {"prompt", "height", "width", "latents", "sigmas", "timesteps", "num_inference_steps", "output_type"}
    ours |= {"return_dict", "generator", "num_images_per_prompt", "callback_on_step_end", "self"}
    accepted = set(accepted_arguments(pipe)) - ours - {"callback_on_step_end_tensor_inputs"}
    arguments = extra if guidance_scale is None else extra | {"guidance_scale": guidance_scale}
    for key in arguments:
        if key not in accepted:
            raise InputError(
                f"{type(pipe).__name__} takes no {key!r} as a further argument; it takes {', '.join(sorted(accepted))}"
            )
    ours = {"prompt": prompt, "height": height, "width": width}
    return {key: value for key, value in ours.items() if value is not None} | arguments


def check_call(pipe: DiffusionPipeline, **kwargs) -> None:
    """Try the call in a dry step; what the pipeline's own checks refuse is an InputError."""
    try:
        dry_step(pipe, **kwargs)
    except InputError:
        raise
    except (ValueError, TypeError) as error:
        raise InputError(f"{type(pipe).__name__} refuses the call: {first_line(error)}") from error


def run_pipeline(pipe: DiffusionPipeline, scheduler, forward=_no_prediction, **kwargs):
    """The pipeline's own `__call__` without its no_grad, with this scheduler and this transformer forward."""
    call = getattr(type(pipe).__call__, "__wrapped__", None)
    if call is None:
        raise InputError(f"{type(pipe).__name__}.__call__ is not wrapped in torch.no_grad: gradients cannot pass")
    pipe.set_progress_bar_config(disable=True)
    kwargs = {"output_type": "latent", "generator": torch.Generator().manual_seed(0)} | kwargs
    with replaced(pipe, "scheduler", scheduler), replaced(pipe.transformer, "forward", forward):
        return call(pipe, **kwargs)


def dry_step(pipe: DiffusionPipeline, forward=_no_prediction, **kwargs) -> None:
    """One step of the pipeline in which nothing is computed but what comes before it: the prompt's encoding."""
    probe = _Probe([1.0], lambda index, model_output, sample: sample)
    with torch.no_grad():
        run_pipeline(pipe, probe, forward, num_inference_steps=1, **kwargs)


def remember_prompts(pipe: DiffusionPipeline) -> None:
    """Let the pipeline encode each prompt once, without gradients, and hand the result back ever after.

    The text encoders can then be freed; a prompt that was never seen before raises RuntimeError.
    """
    encode, known = pipe.encode_prompt, {}

    def encode_prompt(*args, **kwargs):
        arguments = inspect.signature(encode).bind(*args, **kwargs).arguments
        key = repr(sorted((name, value) for name, value in arguments.items() if name != "device"))
        if key not in known:
            if pipe.components.get("text_encoder") is None:
                raise RuntimeError("this prompt was not encoded before the text encoders were freed")
            with torch.no_grad():
                known[key] = encode(*args, **kwargs)
        return known[key]

    pipe.encode_prompt = encode_prompt


def free_components(pipe: DiffusionPipeline) -> None:
    """Drop every model but the transformer: what they had to say is known."""
    for name, component in pipe.components.items():
        if isinstance(component, torch.nn.Module) and name != "transformer":
            setattr(pipe, name, None)


def ask_timesteps(pipe: DiffusionPipeline, num_steps: int, **kwargs) -> list[float]:
    """The timesteps (0..1000) that the pipeline walks in `num_steps` steps at this size, from a dry run of it."""
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    walked = []

    def step(model_output, timestep, sample, *args, **kwargs):
        walked.append(float(timestep))
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=sample)

    scheduler.step = step
    with torch.no_grad():
        run_pipeline(pipe, scheduler, num_inference_steps=num_steps, **kwargs)
    return walked


def ask_single_branch(pipe: DiffusionPipeline, **kwargs) -> dict:
    """Call arguments that switch classifier-free guidance off, {} where the pipeline uses none or an embedded scale.

    The transformer's calls and their batch are counted in a dry step: two calls, or a doubled batch, is
    classifier-free guidance; the flow loss trains the conditional branch alone.
    """
    batches, tried = [], []

    def count(*args, **inputs):
        output = _no_prediction(*args, **inputs)
        batches.append(len(output.sample))
        return output

    accepted = accepted_arguments(pipe)
    for off in (
        {},
        {"guidance_scale": 1.0},
        {"guidance_scale": 0.0},
        {"true_cfg_scale": 1.0},
        {"negative_prompt": None},
    ):
        if not set(off) <= set(accepted):
            continue
        batches.clear()
        dry_step(pipe, count, **kwargs | off)
        if batches == [1]:
            return off
        tried.append(f"{off or 'as it is'}: {len(batches)} calls of batch {batches}")
    raise InputError(f"{type(pipe).__name__}: guidance cannot be switched off ({'; '.join(tried)})")


@dataclass
class LatentLayout:
    """How final latents become `vae.decode`'s input: z = scale * latents[source] + shift, all flattened."""

    latents_shape: torch.Size  # (1, ...), what the denoising loop holds
    z_shape: torch.Size  # (1, C, H, W), with a frame axis for some VAEs
    source: torch.Tensor  # int64 (N,), which latents element each z element comes from
    scale: torch.Tensor  # float32 (N,)
    shift: torch.Tensor  # float32 (N,)

    def latents_from(self, z: torch.Tensor) -> torch.Tensor:
        """What the VAE encoded, in the layout in which the pipeline denoises, float32."""
        latents = torch.empty(z.numel(), device=z.device)
        latents[self.source] = (z.float().flatten() - self.shift) / self.scale
        return latents.reshape(self.latents_shape)


def _decode_input(pipe: DiffusionPipeline, final_latents, **kwargs) -> torch.Tensor:
    """What reaches `vae.decode`, in float32, when the denoising loop ends with `final_latents(sample)`."""

    def decode(z, *args, **kwargs):
        raise _Answer(z.float())

    probe = _Probe([1.0], lambda index, model_output, sample: final_latents(sample))
    with replaced(pipe.vae, "decode", decode), torch.no_grad():
        try:
            run_pipeline(pipe, probe, num_inference_steps=1, output_type="pt", **kwargs)
        except _Answer as answer:
            return answer.args[0]
    raise InputError(f"{type(pipe).__name__}: asked how it decodes its latents, but it never called vae.decode")


def ask_layout(pipe: DiffusionPipeline, **kwargs) -> LatentLayout:
    """Read the latents' layout off the pipeline's decode path, which only permutes, scales and shifts them.

    Dry runs end with all zeros (the shift), all ones (the scale) and the base-32 digits of each element's index (the
    permutation): digits stay exact in any precision, where one float ramp over 262,144 elements would not.
    """
    shapes = []

    def constant(value):
        def final_latents(sample):
            shapes.append(sample.shape)
            return torch.full(sample.shape, value, device=sample.device)

        return final_latents

    shift = _decode_input(pipe, constant(0.0), **kwargs)
    z_shape, latents_shape, count = shift.shape, shapes[0], shapes[0].numel()
    shift = shift.flatten()
    fits = shift.numel() == count
    if fits:
        scale = _decode_input(pipe, constant(1.0), **kwargs).flatten() - shift
        source = torch.zeros(count, dtype=torch.long, device=shift.device)
        fits = bool((scale.abs() > 1e-6).all())
    place = 1
    while fits and place < count:

        def digits(sample, place=place):
            return (torch.arange(count, device=sample.device).reshape(sample.shape) // place % 32).float()

        found = (_decode_input(pipe, digits, **kwargs).flatten() - shift) / scale
        fits = bool((found - found.round()).abs().max() < 0.2)
        source += found.round().long() * place
        place *= 32
    if not fits or not torch.equal(source.sort().values, torch.arange(count, device=source.device)):
        raise InputError(
            f"{type(pipe).__name__}: between its latents {tuple(latents_shape)} and vae.decode's {tuple(z_shape)} "
            "it does more than permute, scale and shift; an image cannot be put into its layout"
        )
    return LatentLayout(latents_shape, z_shape, source, scale, shift)


def encode_image(pipe: DiffusionPipeline, image: torch.Tensor, layout: LatentLayout, **kwargs) -> torch.Tensor:
    """Latents (1, ...), float32, of an image (1, 3, H, W) in -1..1, as the denoising loop holds them.

    They are sent down the pipeline's decode path once more; InputError where it does not return what the VAE encoded.
    """
    vae = pipe.vae
    frames = [1] * (len(layout.z_shape) - 4)
    with torch.no_grad():
        encoded = vae.encode(image.reshape(*image.shape[:2], *frames, *image.shape[2:]).to(vae.device, vae.dtype))
    if hasattr(encoded, "latent_dist"):
        z = encoded.latent_dist.mode().float()
    else:
        z = (encoded.latents if hasattr(encoded, "latents") else encoded.latent).float()
    if z.shape != layout.z_shape:
        raise InputError(
            f"an image of {image.shape[-1]}x{image.shape[-2]} has latents {tuple(z.shape)}, but {type(pipe).__name__} "
            f"decodes {tuple(layout.z_shape)} at that size; choose a height and width that are multiples of 32"
        )
    latents = layout.latents_from(z)
    error = (_decode_input(pipe, lambda sample: latents, **kwargs) - z).abs().max().item()
    if error > 1e-2 * max(1.0, z.abs().max().item()):
        raise InputError(f"{type(pipe).__name__}: the image's latents come back from its decode path {error:.3g} off")
    return latents


def decode(pipe: DiffusionPipeline, latents: torch.Tensor, **kwargs) -> Image.Image:
    """The picture of final latents (1, ...), by the pipeline's own decode path."""
    probe = _Probe([1.0], lambda index, model_output, sample: latents.to(pipe.vae.dtype))
    with torch.no_grad():
        return run_pipeline(pipe, probe, num_inference_steps=1, output_type="pil", **kwargs).images[0]


class PipelineVelocity(torch.nn.Module):
    """velocity = model(noisy, sigma): one step of the pipeline's own `__call__`, with gradients to the transformer.

    The schedule has two entries at the same sigma. At the first the transformer is bypassed and `noisy` enters the
    loop, in the loop's own layout; at the second the pipeline calls the transformer as ever and what it hands to
    `scheduler.step` is the velocity: unpacked, un-negated, exactly what inference will integrate.
    """

    def __init__(self, pipe: DiffusionPipeline, **kwargs):
        super().__init__()
        self.pipe = pipe
        self.transformer = pipe.transformer  # a submodule, so that DDP and FSDP see its parameters
        self.kwargs = kwargs

    def forward(self, noisy: torch.Tensor, sigma: float) -> torch.Tensor:
        """noisy (B, ...) float32, sigma in (0, 1] -> velocity (B, ...) in the pipeline's dtype."""
        velocity = None

        def on_step(index, model_output, sample):
            nonlocal velocity
            if index == 0:
                return noisy.to(sample)
            velocity = model_output
            return sample

        probe, predict = _Probe([sigma, sigma], on_step), self.transformer.forward

        def forward(*args, **kwargs):
            return (predict if probe.calls else _no_prediction)(*args, **kwargs)

        batch = {"num_images_per_prompt": len(noisy), "num_inference_steps": 2}
        run_pipeline(self.pipe, probe, forward, **batch, **self.kwargs)
        if velocity is None or velocity.shape != noisy.shape:
            found = "nothing" if velocity is None else tuple(velocity.shape)
            raise InputError(f"{type(self.pipe).__name__}: asked the velocity of {tuple(noisy.shape)}, got {found}")
        return velocity
