"""How does an image become latents as a pipeline denoises them, and back? The pipeline itself is asked.

Between its denoising loop and `vae.decode` a pipeline only permutes, scales and shifts; dry runs show how. What a VAE
takes and returns (channels, frames, NaN) is dealt with here and nowhere else.
"""

import contextlib
import functools
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from glance.ask.pipeline import Answer, Probe, dry_run, refusals, replaced
from glance_utils import InputError


@dataclass
class LatentLayout:
    """The map from final latents to `vae.decode`'s input: z = scale * latents[source] + shift, all flattened."""

    latents_shape: torch.Size  # (1, ...), what the denoising loop holds
    z_shape: torch.Size  # (1, C, H, W), with a frame axis for some VAEs
    source: torch.Tensor  # int64 (N,), which latents element each z element comes from
    scale: torch.Tensor  # float32 (N,)
    shift: torch.Tensor  # float32 (N,)

    def latents_from(self, z: torch.Tensor) -> torch.Tensor:
        """Return what the VAE encoded, z (1, C, H, W), as the pipeline denoises it: (1, ...), float32."""
        latents = torch.empty(z.numel(), device=z.device)
        latents[self.source] = (z.float().flatten() - self.shift) / self.scale
        return latents.reshape(self.latents_shape)

    def z_from(self, latents: torch.Tensor) -> torch.Tensor:
        """Return what `vae.decode` gets of final latents (1, ...): (1, C, H, W), float32."""
        z = latents.float().flatten()[self.source.to(latents.device)]
        return (z * self.scale.to(z) + self.shift.to(z)).reshape(self.z_shape)


def _decode_input(pipe: DiffusionPipeline, final_latents, /, **kwargs) -> torch.Tensor:
    """Return what reaches `vae.decode`, in float32, when the denoising loop ends with `final_latents(sample)`.

    A pipeline without a VAE denoises pixels: there it is what reaches the image processor. Raise InputError where
    neither is called.
    """
    decoder = (pipe.image_processor, "postprocess") if getattr(pipe, "vae", None) is None else (pipe.vae, "decode")

    def decode(z, *args, **kwargs):
        raise Answer(z.float())

    probe = Probe([1.0], lambda index, model_output, sample: final_latents(sample))
    with replaced(*decoder, decode):
        try:
            dry_run(pipe, probe, output_type="np", **kwargs)
        except Answer as answer:
            return answer.args[0]
    raise InputError(f"{type(pipe).__name__}: asked how it decodes its latents, but it never called {decoder[1]}")


def ask_size(pipe: DiffusionPipeline, **kwargs) -> tuple[int, int]:
    """Return (height, width) in pixels of what the pipeline draws where its call, `kwargs`, names no size.

    Its VAE decodes once, whose weights need no content for that. Raise InputError where it takes no such call.
    """
    vae = getattr(pipe, "vae", None)
    owner, name = (pipe.image_processor, "postprocess") if vae is None else (vae, "decode")
    original = getattr(owner, name)

    def decode(z, *args, **kwargs):
        picture = z if vae is None else original(z.to(vae.dtype), *args, **kwargs)[0]
        raise Answer(picture.shape)

    with replaced(owner, name, decode):
        try:
            dry_run(pipe, Probe([1.0], lambda index, model_output, sample: sample), output_type="np", **kwargs)
        except Answer as answer:
            return tuple(answer.args[0][-2:])
    raise InputError(f"{type(pipe).__name__}: asked for a picture of its own size, but it never called {name}")


def ask_layout(pipe: DiffusionPipeline, **kwargs) -> LatentLayout:
    """Read the latents' layout off the pipeline's decode path, which only permutes, scales and shifts them.

    Dry runs end with all zeros (the shift), all ones (the scale) and the base-32 digits of each element's index (the
    permutation): digits stay exact in any precision, where one float ramp over 262,144 elements would not. Raise
    InputError where the decode path does anything else to them.
    """
    shapes = []

    def constant(value):
        def final_latents(sample):
            shapes.append(sample.shape)
            return torch.full(sample.shape, value, device=sample.device)

        return final_latents

    shift = _decode_input(pipe, constant(0.0), **kwargs)
    z_shape, latents_shape = shift.shape, shapes[0]
    count = latents_shape.numel()
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

        decoded = (_decode_input(pipe, digits, **kwargs).flatten() - shift) / scale
        fits = bool((decoded - decoded.round()).abs().max() < 0.2)
        source += decoded.round().long() * place
        place *= 32
    if not fits or not torch.equal(source.sort().values, torch.arange(count, device=source.device)):
        raise InputError(
            f"{type(pipe).__name__}: between its latents {tuple(latents_shape)} and vae.decode's {tuple(z_shape)} "
            "it does more than permute, scale and shift; an image cannot be put into its layout"
        )
    return LatentLayout(latents_shape, z_shape, source, scale, shift)


def loop_shape(pipe: DiffusionPipeline, **kwargs) -> torch.Size:
    """Return the shape (1, ...) of the latents that the pipeline's denoising loop holds."""

    def on_step(index, model_output, sample):
        raise Answer(sample.shape)

    try:
        dry_run(pipe, Probe([1.0], on_step), **kwargs)
    except Answer as answer:
        return answer.args[0]
    raise InputError(f"{type(pipe).__name__}: asked for the shape of its latents, but it never called scheduler.step")


def vae_input(vae: torch.nn.Module, image: torch.Tensor, layout: LatentLayout) -> torch.Tensor:
    """Return an image (1, 3, H, W), or a video (1, 3, frames, H, W), as the VAE takes it: an image perhaps as one
    frame, or with a fourth channel."""
    if 4 in (vae.config.get("in_channels"), vae.config.get("input_channels")):
        image = torch.cat([image, torch.ones_like(image[:, :1])], dim=1)  # opaque RGBA
    if image.ndim == 5:
        return image
    frames = [1] * (len(layout.z_shape) - 4)
    return image.reshape(*image.shape[:2], *frames, *image.shape[2:])


def _vae_latents(pipe: DiffusionPipeline, image: torch.Tensor, layout: LatentLayout) -> torch.Tensor:
    """Return the VAE's latents of an image (1, 3, H, W) in -1..1, float32; the image itself where there is no VAE.

    They are made on the CPU where the VAE's device has no room. Raise FloatingPointError where they are not finite.
    """
    vae = getattr(pipe, "vae", None)
    if vae is None:
        return image.float().to(layout.scale.device)
    image = vae_input(vae, image, layout)
    device = vae.device
    with torch.no_grad(), refusals(pipe):
        try:
            encoded = vae.encode(image.to(device, vae.dtype))
        except torch.OutOfMemoryError:
            encoded = vae.cpu().encode(image.to("cpu", vae.dtype))
            vae.to(device)
    if hasattr(encoded, "latent_dist"):
        latents = encoded.latent_dist.mode()
    else:
        latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent
    return check_finite(latents.float().to(device), f"the latents that the VAE in {_dtype(vae)} makes of the image")


def ask_noise_scale(pipe: DiffusionPipeline, **kwargs) -> float:
    """Return the standard deviation of the noise that the pipeline starts from: 1.0 for nearly all.

    The same seed draws the same numbers here and in the pipeline, in whatever layout, so their norms tell.
    """
    starts = []

    def on_step(index, model_output, sample):
        starts.append(sample)
        return sample

    probe = Probe([1.0], on_step)
    dry_run(pipe, probe, **kwargs)
    standard = torch.randn(starts[0].numel(), generator=torch.Generator().manual_seed(0))
    scale = round((starts[0].float().norm().cpu() / standard.norm()).item(), 2)
    return scale if abs(scale - 1) > 0.1 else 1.0


def encode_image(pipe: DiffusionPipeline, image: torch.Tensor, layout: LatentLayout, /, **kwargs) -> torch.Tensor:
    """Return an image (1, 3, H, W) or a video (1, 3, frames, H, W) in -1..1 as latents (1, ...), float32, as the
    denoising loop holds them.

    They are sent down the pipeline's decode path once more. Raise InputError where that does not return what the VAE
    encoded, or where the size has no such latents.
    """
    z = _vae_latents(pipe, image, layout)
    if z.shape != layout.z_shape:
        width, height = (image.shape[i] // z.shape[i] * layout.z_shape[i] for i in (-1, -2))
        raise InputError(
            f"an image of {image.shape[-1]}x{image.shape[-2]} has latents {tuple(z.shape)}, but {type(pipe).__name__} "
            f"decodes {tuple(layout.z_shape)} at that size; choose a width and height that it keeps, such as "
            f"{width}x{height}, or see whether --pipeline_kwargs can make it keep others"
        )
    latents = layout.latents_from(z)
    error = (_decode_input(pipe, lambda sample: latents, **kwargs) - z).abs().max().item()
    if error > 1e-2 * max(1.0, z.abs().max().item()):
        raise InputError(f"{type(pipe).__name__}: the image's latents come back from its decode path {error:.3g} off")
    return latents


def loop_points(pipe: DiffusionPipeline, advance=lambda: None, **kwargs) -> list[torch.Tensor]:
    """Return the latents (B, ...) before each step of the denoising loop and after the last, in float32 on the CPU.

    They are as the loop holds them; some pipelines return another layout as "latent". advance() is called after each
    step.
    """
    scheduler = pipe.scheduler
    step = scheduler.step
    points = []

    @functools.wraps(step)
    def keep(model_output, timestep, sample, *args, **kwargs):
        points.append(sample.to("cpu", torch.float32, copy=True))  # some pipelines write into it
        output = step(model_output, timestep, sample, *args, **kwargs)
        advance()
        if scheduler.step_index == len(scheduler.timesteps):
            points.append(output[0].float().cpu())
            raise Answer  # what some pipelines do to the final latents needs the VAE, which was freed
        return output

    with replaced(scheduler, "step", keep), contextlib.suppress(Answer):
        pipe(output_type="latent", **kwargs)
    return points


@contextlib.contextmanager
def final_latents(pipe: DiffusionPipeline):
    """Yield a list that holds, after a call of the pipeline inside, its final latents (B, ...): what the last step of
    its scheduler returned or, where it takes none itself, that of a copy of it."""
    scheduler, steps, ends = pipe.scheduler, type(pipe.scheduler).step, []
    is_own = False

    @functools.wraps(steps)
    def keep(stepping, *args, **kwargs):
        nonlocal is_own
        output = steps(stepping, *args, **kwargs)
        is_own = is_own or stepping is scheduler
        if stepping is scheduler or not is_own:
            ends[:] = [output[0].clone()]  # some pipelines write into it
        return output

    with replaced(type(scheduler), "step", keep):
        yield ends


def check_finite(values: torch.Tensor, name: str) -> torch.Tensor:
    """Return the values as they are; raise FloatingPointError where some are NaN or infinite.

    A picture made of them would be black there, and nothing would say why.
    """
    if not values.isfinite().all():
        raise FloatingPointError(f"{name} are not finite numbers (NaN or infinite)")
    return values


@contextlib.contextmanager
def finite_pictures(pipe: DiffusionPipeline):
    """Raise FloatingPointError in the pipeline's calls inside where the final latents or the pixels are not finite.

    It comes before they become a picture. Finite ones pass unchanged, to the bit.
    """
    vae = getattr(pipe, "vae", None)
    decode = vae.decode if hasattr(vae, "decode") else None
    postprocess = VaeImageProcessor.postprocess

    def checked_decode(z, *args, **kwargs):
        output = decode(check_finite(z, "its final latents"), *args, **kwargs)
        check_finite(output[0], f"its latents are finite, but the pixels that its VAE makes of them in {_dtype(vae)}")
        return output

    def checked_postprocess(processor, image, *args, **kwargs):
        return postprocess(processor, check_finite(image, "its pixels"), *args, **kwargs)

    with contextlib.ExitStack() as stack:
        if decode:
            stack.enter_context(replaced(vae, "decode", checked_decode))
        # Videos pass it too, frame by frame, and what a pipeline without a VAE denoises.
        stack.enter_context(replaced(VaeImageProcessor, "postprocess", checked_postprocess))
        yield


def _dtype(module: torch.nn.Module) -> str:
    return str(module.dtype).removeprefix("torch.")


def decode_pixels(vae: torch.nn.Module | None, latents: torch.Tensor, layout: LatentLayout) -> torch.Tensor:
    """Return the picture (1, 3, H, W), float32 in -1..1, of final latents (1, ...); only the VAE is needed.

    Raise FloatingPointError where the latents or the pixels are not finite.
    """
    pixels = layout.z_from(check_finite(latents, "its final latents"))
    if vae is not None:
        with torch.no_grad():
            pixels = vae.decode(pixels.to(vae.device, vae.dtype)).sample
        check_finite(pixels, f"its latents are finite, but the pixels that its VAE makes of them in {_dtype(vae)}")
    pixels = pixels[:, :, 0] if pixels.ndim == 5 else pixels  # the first frame
    return pixels[:, :3].float()


def decode(vae: torch.nn.Module | None, latents: torch.Tensor, layout: LatentLayout) -> Image.Image:
    """Return decode_pixels' picture as an image."""
    return VaeImageProcessor().postprocess(decode_pixels(vae, latents, layout))[0]


def decode_on(
    device: torch.device, vae: torch.nn.Module | None, latents: torch.Tensor, layout: LatentLayout
) -> Image.Image:
    """Return `decode`'s picture; the VAE is on the device meanwhile if that has room for it, and then on the CPU."""
    if vae is None:
        return decode(vae, latents, layout)
    try:
        return decode(vae.to(device), latents, layout)
    except torch.OutOfMemoryError:
        return decode(vae.cpu(), latents, layout)
    finally:
        vae.cpu()
