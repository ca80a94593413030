"""How is a diffusers pipeline loaded and called so that its own `__call__` answers, with no code per model family?

Each time the pipeline runs for real, with its scheduler replaced by a probe and, where nothing needs computing, its
transformer bypassed. The questions are in the modules beside: schedule, guidance, velocity, latents, prompts, sampler.
What is done to a pipeline before, around and after a call may be touched here; a line that names one family may not.
"""

import contextlib
import inspect
import re
import traceback
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import ConfigMixin, DiffusionPipeline
from diffusers.guiders import BaseGuidance
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from PIL import Image

from glance.ask import hub
from glance.ask.components import component_class, denoiser_name
from glance_utils import FixedSigmaScheduler, InputError, denoiser


# What an error recommends where a base's own scheduler does not serve.
PLAIN_BASE = "a copy of the base whose model_index.json and scheduler_config.json say FlowMatchEulerDiscreteScheduler"


@contextlib.contextmanager
def replaced(owner, name: str, value):
    """Set an attribute of an object or a class inside; afterwards it has its own again, or none."""
    missing = object()
    original = vars(owner).get(name, missing)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if original is missing:
            delattr(owner, name)
        else:
            setattr(owner, name, original)


class Probe(FixedSigmaScheduler):
    """A fixed schedule whose step is a function: on_step(index, model_output, sample) -> next sample (B, ...)."""

    def __init__(self, sigmas: list[float], on_step, model_timesteps: list[float] | None = None, like=None):
        super().__init__(sigmas, model_timesteps, like=like)
        self.on_step = on_step
        self.calls = 0

    def step(self, model_output, timestep, sample, *args, **kwargs):
        sample = self.on_step(self.calls, model_output, sample)
        self.calls += 1
        self._step_index = (self.begin_index or 0) + self.calls  # some pipelines read it
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=sample)  # serves [0] and .prev_sample alike

    def __deepcopy__(self, memo):
        return self  # some pipelines copy their scheduler for each frame


class Answer(BaseException):
    """What ends a pipeline's call and carries an answer out of it, args[0]."""


def model_input(args: tuple, kwargs: dict) -> torch.Tensor | list:
    """Return the samples that a denoiser gets, a tensor (B, ...) or a list: "hidden_states", or the first argument."""
    return kwargs["hidden_states"] if "hidden_states" in kwargs else [*args, *kwargs.values()][0]


@dataclass
class NoPrediction(Transformer2DModelOutput):
    """What a bypassed denoiser answers."""


def no_prediction(*args, **kwargs):
    """Return zeros in the shape of the input, of several images the last: a forward that computes nothing."""
    samples = model_input(args, kwargs)
    if isinstance(samples, torch.Tensor):
        return NoPrediction(sample=torch.zeros_like(samples))
    samples = [sample[-1] if isinstance(sample, list) else sample for sample in samples]
    return NoPrediction(sample=[torch.zeros_like(sample) for sample in samples])


def _is_ours(error: Exception) -> bool:
    """Return whether a line of this project raised it or had torch do so: a mistake, to be seen with its traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    files = [Path(frame.filename) for frame in frames if frame.name != "__torch_dispatch__"]  # these only look on
    files = [path for path in files if Path(torch.__file__).parent not in path.parents]
    root = Path(__file__).parents[2]
    return files[-1].parent == root or root / "glance" in files[-1].parents


def is_out_of_memory(error: Exception) -> bool:
    """Return whether memory ran out, the accelerator's or the host's, by the words of torch, Python or the system."""
    words = "out of memory|not enough memory|can(no|')t allocate memory"
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or bool(re.search(words, str(error), re.IGNORECASE))


@contextlib.contextmanager
def refusals(pipe: DiffusionPipeline):
    """Turn whatever the pipeline's own code, or a library that it calls, raises inside into an InputError of one line.

    Pipelines check their arguments by exceptions of every kind, or not at all. Passed on as they are: a mistake in
    what this project has the pipeline call back, and a lack of memory.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if is_out_of_memory(error) or _is_ours(error):
            raise
        raise _refused(pipe, error) from error


def _refused(pipe: DiffusionPipeline, error: Exception) -> InputError:
    """Return the error for a call that the pipeline refuses, with the pictures that it takes."""
    wanted = [name for name in accepted_arguments(pipe) if re.search("^(?!.*adapter).*(images?|video)$", name)]
    hint = f" (it takes {' and '.join(wanted)}: see --pipeline_images)" if wanted else ""
    return InputError(f"{type(pipe).__name__} refuses the call: {described(error)}{hint}")


def first_line(error: Exception) -> str:
    """Return the first line of an error's message that is not blank, or the error's kind."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def described(error: Exception) -> str:
    """Return an exception as one line of at most 500 characters, with its kind where the words may say little."""
    kind = "" if isinstance(error, OSError | ValueError | ImportError) else f"{type(error).__name__}: "
    return f"{kind if str(error).strip() else ''}{first_line(error)}"[:500]


@contextlib.contextmanager
def loading(path: str):
    """Turn what is raised when a part of the pipeline at `path` is missing or unusable into an InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # broken files end in exceptions of every kind
        if is_out_of_memory(error):
            raise
        reason = hub.refusal(error, str(path)) or f"cannot be loaded ({described(error)})"
        raise InputError(f"{path}: {reason}") from error


def arguments_of(kind: type[DiffusionPipeline]) -> dict[str, inspect.Parameter]:
    """Return the parameters of the `__call__` of a class of pipelines, by name."""
    return dict(inspect.signature(kind.__call__).parameters)


def accepted_arguments(pipe: DiffusionPipeline) -> dict[str, inspect.Parameter]:
    """Return the parameters of the pipeline's `__call__`, by name."""
    return arguments_of(type(pipe))


def frames_argument(kind: type[DiffusionPipeline]) -> str | None:
    """Return the name of the call's argument that says how many frames the pipeline draws; None where it draws one."""
    return next((name for name in arguments_of(kind) if re.fullmatch("(num_)?frames", name)), None)


def with_frames_named(kind: type[DiffusionPipeline], arguments: dict) -> dict:
    """Return a call's further arguments with `num_frames` under the name that the class has for it."""
    named = frames_argument(kind)
    return {named if key == "num_frames" and named else key: value for key, value in arguments.items()}


def batch_argument(pipe: DiffusionPipeline) -> str:
    """Return the name of the call argument that is the number of pictures of one prompt."""
    return "num_images_per_prompt" if "num_images_per_prompt" in accepted_arguments(pipe) else "num_videos_per_prompt"


def first_frames(output) -> list[Image.Image]:
    """Return the first picture of what a pipeline returned for output_type="pil", or all frames of its first video."""
    while not isinstance(output[0], Image.Image):
        output = output[0]
    return list(output)


class _ModularIndex(ConfigMixin):
    config_name = "modular_model_index.json"


def _is_modular(path: str | Path, **load_kwargs) -> bool:
    """Return whether it is a modular pipeline: blocks that are put together, without a `__call__` of their own."""
    try:
        return bool(_ModularIndex.load_config(path, **load_kwargs))
    except Exception:
        return False


def read_model_index(path: str | Path, **load_kwargs) -> dict:
    """Return a pipeline's model_index.json; raise InputError where there is none that names its class."""
    try:
        config = DiffusionPipeline.load_config(path, **load_kwargs)
        if not isinstance(config, dict) or not isinstance(config.get("_class_name"), str):
            raise ValueError("its model_index.json names no pipeline class")
        modular = config["_class_name"].endswith("ModularPipeline")
    except Exception as error:  # a file that is no JSON ends in exceptions of every kind
        modular = isinstance(error, OSError) and _is_modular(path, **load_kwargs)
        if not modular and (reason := hub.refusal(error, str(path), load_kwargs.get("revision"))):
            raise InputError(f"{path}: {reason}") from None
        if not modular:
            raise InputError(
                f"{path}: not a diffusers pipeline (folder or hub id with model_index.json): {described(error)}"
            ) from None
    if modular:
        raise InputError(
            f"{path}: a modular pipeline (blocks without a call of their own), which Glance cannot ask; give the same "
            "model as a standard pipeline, folder or hub id with a model_index.json that names its class"
        )
    return config


def find_denoiser(path: str, **load_kwargs) -> tuple[str, type]:
    """Return the name and the class of the pipeline's model that denoises; raise InputError where it has none."""
    config = read_model_index(path, **load_kwargs)
    name = denoiser_name(config)
    if name is None or not config.get("scheduler"):
        raise InputError(
            f"{path}: {config.get('_class_name')} has no transformer that takes a timestep, or no scheduler; Glance "
            "needs both"
        )
    return name, component_class(config[name])


def class_named(name: str) -> type[DiffusionPipeline]:
    """Return diffusers' pipeline class of this name; raise InputError where there is none."""
    kind = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, DiffusionPipeline)):
        raise InputError(
            f"--pipeline_class {name}: diffusers {diffusers.__version__} has no such pipeline; give the name of one, "
            "such as FluxImg2ImgPipeline"
        )
    return kind


def load_pipeline(
    path: str,
    dtype: torch.dtype = torch.float32,
    components: dict | None = None,
    vae_dtype: torch.dtype = torch.float32,
    pipeline_class: str | None = None,
    **load_kwargs,
) -> DiffusionPipeline:
    """Load a pipeline whose transformer has a config but no weights (meta device): enough for all but velocity.

    The same goes for other models of its class, which some pipelines keep for guidance. The VAE is `vae_dtype`, which
    should be float32 where an image is to be encoded, since half precision costs latents accuracy; the rest is
    `dtype`. `components`, by name, are used in place of the pipeline's own, and the name of a `pipeline_class` of
    diffusers in place of its class. Raise InputError where `path` is not a diffusers pipeline with a flow-matching
    transformer, or where the class cannot be made of it.
    """
    config = read_model_index(path, **load_kwargs)
    components = dict(components or {})
    name, transformer_class = find_denoiser(path, **load_kwargs)
    with loading(path):
        scheduler_class = component_class(config["scheduler"])
        settings = scheduler_class.load_config(path, subfolder="scheduler", **load_kwargs)
        if "FlowMatch" not in scheduler_class.__name__ and not settings.get("use_flow_sigmas"):
            raise InputError(f"{path}: {scheduler_class.__name__} is not a flow-matching scheduler; Glance needs one")
        for part in [part for part in config if config[part] == config[name]]:
            with init_empty_weights():
                components[part] = transformer_class.from_config(
                    transformer_class.load_config(path, subfolder=part, **load_kwargs)
                ).to(dtype)
        dtypes = {"vae": vae_dtype, "default": dtype}
        # By its own class, which knows what it may lack: the general one loads that even where it is given.
        own = getattr(diffusers, config["_class_name"], DiffusionPipeline)
        kind = class_named(pipeline_class) if pipeline_class else own
        return kind.from_pretrained(path, **components, dtype=dtypes, use_safetensors=True, **load_kwargs)


def call_arguments(pipe: DiffusionPipeline, prompt, height, width, guidance_scale, extra: dict) -> dict:
    """Return the pipeline's call arguments; those that are None are left to the pipeline.

    `extra` are further ones of its own. Raise InputError where its signature has no such argument, or one that is set
    by Glance itself.
    """
    reserved = {"prompt", "height", "width", "latents", "sigmas", "timesteps", "num_inference_steps", "output_type"}
    reserved |= {"return_dict", "generator", "num_images_per_prompt", "callback_on_step_end", "self"}
    accepted = set(accepted_arguments(pipe)) - reserved - {"callback_on_step_end_tensor_inputs"}
    extra = with_frames_named(type(pipe), extra)
    arguments = extra if guidance_scale is None else extra | {"guidance_scale": guidance_scale}
    for key in arguments:
        if key not in accepted:
            raise InputError(
                f"{type(pipe).__name__} takes no {key!r} as a further argument; it takes {', '.join(sorted(accepted))}"
            )
    size = {"height": height, "width": width}
    usual = {"prompt": prompt} | {key: size[key] for key in size if key in accepted_arguments(pipe)}
    return {key: value for key, value in usual.items() if value is not None} | arguments


def whole_walk(pipe: DiffusionPipeline, call: dict) -> dict:
    """Return a call's arguments with which a pipeline that begins with a picture leaves none of its steps out: only
    then it can be asked for all of them."""
    return call | ({"strength": 1.0} if "strength" in accepted_arguments(pipe) else {})


def further_denoisers(pipe: DiffusionPipeline) -> dict[str, torch.nn.Module]:
    """Return the models of the transformer's class beside it, by name: some pipelines keep one for guidance."""
    first = denoiser(pipe)
    # FSDP and added adapter methods make the first one's class a subclass of what it was.
    return {
        name: part for name, part in pipe.components.items() if isinstance(first, type(part)) and part is not first
    }


@contextlib.contextmanager
def guiders_off(pipe: DiffusionPipeline):
    """Disable the guiders among the pipeline's components, where guidance is a component and no argument."""
    guiders = [part for part in pipe.components.values() if isinstance(part, BaseGuidance) and part._enabled]
    for guider in guiders:
        guider.disable()
    try:
        yield
    finally:
        for guider in guiders:
            guider.enable()


@contextlib.contextmanager
def on_a_real_device(pipe: DiffusionPipeline):
    """Let the pipeline's calls inside work on the device of its other models where it would choose the meta device.

    A pipeline takes the device of its first component, which may be the transformer without weights.
    """
    devices = []
    if pipe._execution_device.type == "meta":
        devices = [getattr(part, "device", None) for part in pipe.components.values()]  # also of freed ones
        devices = [device for device in devices if isinstance(device, torch.device) and device.type != "meta"]
    if not devices:
        yield
        return
    with replaced(type(pipe), "_execution_device", devices[0]):
        yield


@contextlib.contextmanager
def plain_call(pipe: DiffusionPipeline, call: dict):
    """Yield a call's arguments for pipe(...) itself; guiders=False, which only run_pipeline takes, holds inside."""
    call = dict(call)
    with contextlib.nullcontext() if call.pop("guiders", True) else guiders_off(pipe):
        yield call


def run_pipeline(pipe, scheduler, forward=no_prediction, further_forward=no_prediction, guiders=True, **kwargs):
    """Call the pipeline's own `__call__` without its no_grad, with this scheduler and this forward of its transformer.

    Further denoisers predict nothing unless `further_forward` is given. Raise InputError where the pipeline takes no
    such arguments, or its call is not wrapped in torch.no_grad.
    """
    call = getattr(type(pipe).__call__, "__wrapped__", None)
    if call is None:
        raise InputError(f"{type(pipe).__name__}.__call__ is not wrapped in torch.no_grad: gradients cannot pass")
    pipe.set_progress_bar_config(disable=True)
    # A probe has the steps that it has; some pipelines compute a schedule first, and cannot for a single step.
    kwargs = {
        "num_inference_steps": 2,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
    } | kwargs
    try:
        inspect.signature(call).bind(pipe, **kwargs)
    except TypeError as error:
        raise _refused(pipe, error) from None
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.nullcontext() if guiders else guiders_off(pipe))
        stack.enter_context(on_a_real_device(pipe))
        stack.enter_context(replaced(pipe, "scheduler", scheduler))
        stack.enter_context(replaced(denoiser(pipe), "forward", forward))
        for further in further_denoisers(pipe).values():
            stack.enter_context(replaced(further, "forward", further_forward))
        return call(pipe, **kwargs)


def dry_run(pipe: DiffusionPipeline, scheduler, *forwards, **kwargs):
    """Call run_pipeline without gradients, to ask a question; raise InputError where the pipeline refuses the call."""
    with torch.no_grad(), refusals(pipe):
        return run_pipeline(pipe, scheduler, *forwards, **kwargs)


def dry_step(pipe: DiffusionPipeline, forward=no_prediction, **kwargs) -> None:
    """Run one step of the pipeline in which nothing is computed but what comes before it: the prompt's encoding. A
    picture's `strength` leaves that step, whatever it is.

    Raise InputError where the picture is so small that there is nothing to denoise.
    """

    def on_step(index, model_output, sample):
        if isinstance(sample, torch.Tensor) and sample.numel() == 0:
            size = f"{kwargs.get('width')}x{kwargs.get('height')}"
            raise InputError(
                f"{type(pipe).__name__}: {size} is less than a patch of its latents; choose a larger size"
            )
        return sample

    dry_run(pipe, Probe([1.0], on_step), forward, **whole_walk(pipe, kwargs))


def _models(pipe: DiffusionPipeline) -> dict[str, torch.nn.Module]:
    """Return the pipeline's models, by name, but those that were freed: what stands in for one says it is one."""
    return {name: part for name, part in pipe.components.items() if issubclass(type(part), torch.nn.Module)}


def controlnets(pipe: DiffusionPipeline) -> dict[str, torch.nn.Module]:
    """Return the pipeline's ControlNets, by name: models that act in every step beside the denoiser."""
    return {name: part for name, part in _models(pipe).items() if "ControlNet" in type(part).__name__}


def freeable_components(pipe: DiffusionPipeline) -> dict[str, torch.nn.Module]:
    """Return every model but those that act in the loop, by name."""
    acting = {denoiser_name(pipe.config), *further_denoisers(pipe), *controlnets(pipe)}
    return {name: part for name, part in _models(pipe).items() if name not in acting}
