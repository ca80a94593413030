"""Questions asked of a diffusers pipeline, answered by its own `__call__`: no code per model family.

Which timesteps does it walk, how are its latents laid out, how is its guidance switched off, what is its velocity
at (noisy, sigma)? Each time the pipeline runs for real, with its scheduler replaced by a probe and, where nothing
needs computing, its transformer bypassed. Training through the pipeline sees exactly what inference will see.
"""

import contextlib
import inspect
import itertools
import re
import traceback
from pathlib import Path

import numpy as np
import torch
from accelerate import init_empty_weights
from diffusers import ConfigMixin, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.guiders import BaseGuidance
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from PIL import Image
from torch.utils._pytree import tree_leaves

from glance_utils import (
    FixedSigmaScheduler,
    InputError,
    as_floats,
    component_class,
    counts_image,
    denoiser,
    denoiser_name,
    first_line,
    replaced,
    timesteps_to_sigmas,
)


# What serves where a base's own scheduler does not.
PLAIN_BASE = "a copy of the base whose model_index.json and scheduler_config.json say FlowMatchEulerDiscreteScheduler"


class Probe(FixedSigmaScheduler):
    """A schedule whose step is a function (index, model_output, sample) -> next sample."""

    def __init__(self, sigmas: list[float], on_step, told: list[float] | None = None, like=None):
        super().__init__(sigmas, told, like=like)
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
    """Carries an answer out of a pipeline's call and ends it."""


def model_input(args: tuple, kwargs: dict) -> torch.Tensor | list:
    """What a denoiser was called with: samples, as a tensor or a list; "hidden_states" or whatever comes first."""
    return kwargs["hidden_states"] if "hidden_states" in kwargs else [*args, *kwargs.values()][0]


def _no_prediction(*args, **kwargs):
    """A transformer's forward that computes nothing: zeros in the shape of its input, the last of several images."""
    samples = model_input(args, kwargs)
    if isinstance(samples, torch.Tensor):
        return Transformer2DModelOutput(sample=torch.zeros_like(samples))
    samples = [sample[-1] if isinstance(sample, list) else sample for sample in samples]
    return Transformer2DModelOutput(sample=[torch.zeros_like(sample) for sample in samples])


def _is_ours(error: Exception) -> bool:
    """Whether a line of this project raised it, or had torch do so: a mistake, to be seen with its traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    files = [Path(frame.filename) for frame in frames if frame.name != "__torch_dispatch__"]  # these only look on
    files = [path for path in files if Path(torch.__file__).parent not in path.parents]
    root = Path(__file__).parents[2]
    return files[-1].parent == root or root / "glance" in files[-1].parents


@contextlib.contextmanager
def refusals(pipe: DiffusionPipeline):
    """Turn whatever the pipeline's own code, or a library that it calls, raises inside into an InputError of one line.

    Pipelines check their arguments by exceptions of every kind, or not at all. Passed on as they are: a mistake in
    what this project has the pipeline call back, and a lack of memory.
    """
    try:
        yield
    except (InputError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if _is_ours(error):
            raise
        raise _refused(pipe, error) from error


def _refused(pipe: DiffusionPipeline, error: Exception) -> InputError:
    wanted = [name for name in accepted_arguments(pipe) if re.search("^(?!.*adapter).*(images?|video)$", name)]
    hint = f" (Glance gives it no {' and no '.join(wanted)})" if wanted else ""
    return InputError(f"{type(pipe).__name__} refuses the call: {described(error)}{hint}")


def described(error: Exception) -> str:
    """An exception in at most 500 characters of one line, with its kind where the words alone may say little."""
    kind = "" if isinstance(error, OSError | ValueError | ImportError) else f"{type(error).__name__}: "
    return f"{kind if str(error).strip() else ''}{first_line(error)}"[:500]


@contextlib.contextmanager
def loading(path: str):
    """Turn what is raised when a part of the pipeline at `path` is missing or unusable into an InputError."""
    try:
        yield
    except (InputError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # broken files end in exceptions of every kind
        raise InputError(f"{path}: cannot be loaded ({described(error)})") from error


def accepted_arguments(pipe: DiffusionPipeline) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(type(pipe).__call__).parameters)


def batch_argument(pipe: DiffusionPipeline) -> str:
    """What its call names the number of pictures of one prompt."""
    return "num_images_per_prompt" if "num_images_per_prompt" in accepted_arguments(pipe) else "num_videos_per_prompt"


def first_picture(output) -> Image.Image:
    """The first picture of what a pipeline returned for output_type="pil", of a video its first frame."""
    while not isinstance(output, Image.Image):
        output = output[0]
    return output


class _ModularIndex(ConfigMixin):
    config_name = "modular_model_index.json"


def _is_modular(path: str | Path, **load_kwargs) -> bool:
    """Whether it is a modular pipeline: blocks that are put together, and no class with a `__call__` of its own."""
    try:
        return bool(_ModularIndex.load_config(path, **load_kwargs))
    except Exception:
        return False


def read_model_index(path: str | Path, **load_kwargs) -> dict:
    """Return a pipeline's model_index.json; InputError where there is none that names its class."""
    try:
        config = DiffusionPipeline.load_config(path, **load_kwargs)
        if not isinstance(config, dict) or not isinstance(config.get("_class_name"), str):
            raise ValueError("its model_index.json names no pipeline class")
        return config
    except Exception as error:  # a file that is no JSON ends in exceptions of every kind
        if isinstance(error, OSError) and _is_modular(path, **load_kwargs):
            raise InputError(
                f"{path}: a modular pipeline ({_ModularIndex.config_name} and no model_index.json), which Glance "
                "cannot ask; give the same model as a standard pipeline, folder or hub id with model_index.json"
            ) from None
        raise InputError(
            f"{path}: not a diffusers pipeline (folder or hub id with model_index.json): {described(error)}"
        ) from None


def find_denoiser(path: str, **load_kwargs) -> tuple[str, type]:
    """The name and the class of the pipeline's model that denoises; InputError where it has none."""
    config = read_model_index(path, **load_kwargs)
    name = denoiser_name(config)
    if name is None or not config.get("scheduler"):
        raise InputError(
            f"{path}: {config.get('_class_name')} has no transformer that takes a timestep, or no scheduler; Glance "
            "needs both"
        )
    return name, component_class(config[name])


def load_pipeline(
    path: str,
    dtype: torch.dtype = torch.float32,
    components: dict | None = None,
    vae_dtype: torch.dtype = torch.float32,
    **load_kwargs,
) -> DiffusionPipeline:
    """A pipeline whose transformer has a config but no weights (meta device): enough for all but velocity.

    So has any other model of its class, which some pipelines keep for guidance. The VAE is `vae_dtype`, float32 where
    an image is to be encoded, since half precision costs latents accuracy; the rest is `dtype`. `components` are taken
    for those of their names. InputError where `path` is not a diffusers pipeline with a flow-matching transformer.
    """
    config, components = read_model_index(path, **load_kwargs), dict(components or {})
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
        return DiffusionPipeline.from_pretrained(path, **components, dtype=dtypes, use_safetensors=True, **load_kwargs)


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


def further_denoisers(pipe: DiffusionPipeline) -> dict[str, torch.nn.Module]:
    """Models of the transformer's class beside it: some pipelines keep one for guidance."""
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
def somewhere(pipe: DiffusionPipeline):
    """Let the pipeline work where its other models are, if it would be nowhere: where its transformer without weights
    is and comes first among its components."""
    places = [getattr(part, "device", None) for part in pipe.components.values()]  # also of freed ones
    places = [place for place in places if isinstance(place, torch.device) and place.type != "meta"]
    nowhere = pipe._execution_device.type == "meta" and places
    with replaced(type(pipe), "_execution_device", places[0]) if nowhere else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def plain_call(pipe: DiffusionPipeline, call: dict):
    """The arguments for pipe(...) itself of a call that may say guiders=False, which is run_pipeline's own."""
    call = dict(call)
    with contextlib.nullcontext() if call.pop("guiders", True) else guiders_off(pipe):
        yield call


def run_pipeline(pipe, scheduler, forward=_no_prediction, further_forward=_no_prediction, guiders=True, **kwargs):
    """The pipeline's own `__call__` without its no_grad, with this scheduler and this transformer forward; further
    denoisers have no say, unless `further_forward` is given."""
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
        stack.enter_context(somewhere(pipe))
        stack.enter_context(replaced(pipe, "scheduler", scheduler))
        stack.enter_context(replaced(denoiser(pipe), "forward", forward))
        for further in further_denoisers(pipe).values():
            stack.enter_context(replaced(further, "forward", further_forward))
        return call(pipe, **kwargs)


def dry_run(pipe: DiffusionPipeline, scheduler, *forwards, **kwargs):
    """run_pipeline to ask a question: no gradients, and what the pipeline refuses is an InputError."""
    with torch.no_grad(), refusals(pipe):
        return run_pipeline(pipe, scheduler, *forwards, **kwargs)


def dry_step(pipe: DiffusionPipeline, forward=_no_prediction, **kwargs) -> None:
    """One step of the pipeline in which nothing is computed but what comes before it: the prompt's encoding.
    InputError where the picture is so small that there is nothing to denoise."""

    def on_step(index, model_output, sample):
        if isinstance(sample, torch.Tensor) and sample.numel() == 0:
            size = f"{kwargs.get('width')}x{kwargs.get('height')}"
            raise InputError(
                f"{type(pipe).__name__}: {size} is less than a patch of its latents; choose a larger size"
            )
        return sample

    dry_run(pipe, Probe([1.0], on_step), forward, **kwargs)


def freeable_components(pipe: DiffusionPipeline) -> dict[str, torch.nn.Module]:
    """Every model but the denoisers."""
    kept = {denoiser_name(pipe.config), *further_denoisers(pipe)}
    models = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return {name: part for name, part in models.items() if name not in kept}


def ask_timesteps(pipe: DiffusionPipeline, num_steps: int, **kwargs) -> list[float]:
    """Return the timesteps (0..1000), 1000 * sigma, that the pipeline walks in `num_steps` steps at this size.

    A pipeline that ships a list of its own steps walks that, whatever is asked: the answer then has its length.
    InputError where the walk is not one strictly descending point a step.
    """
    return [timestep for timestep, _ in _ask_walk(pipe, num_steps, **kwargs)]


def has_own_steps(pipe: DiffusionPipeline, num_steps: int, **kwargs) -> bool:
    """Return whether the pipeline ships a list of its own steps, which are the same for another number of them."""
    other = 3 if num_steps == 2 else 2  # few: a schedule that drops what it rounds to the same is then whole
    return _walk(pipe, num_steps, **kwargs) == _walk(pipe, other, **kwargs)


def check_instantaneous(pipe: DiffusionPipeline, **kwargs) -> None:
    """InputError where the transformer is told where a step ends: it then predicts an average over the step, as
    MeanFlow does, and not the velocity at a point that the flow-matching loss trains."""
    told = []

    def forward(*args, **inputs):
        told[-1].append({name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)})
        return _no_prediction(*args, **inputs)

    for end in (0.5, 0.25):
        told.append([])
        probe = Probe([1.0, end], lambda index, model_output, sample: sample)
        dry_run(pipe, probe, forward, **kwargs)
    for name, value in told[0][0].items():
        if not torch.equal(value, told[1][0][name]):
            raise InputError(
                f"{type(pipe).__name__}: its model is told, as {name}, where a step ends; Glance needs a velocity"
            )


def ask_told(pipe: DiffusionPipeline, num_steps: int, **kwargs):
    """Function of sigmas: the timesteps that the model is told at them, None where they are 1000 * sigma.

    Some pipelines shift the sigmas of their schedule, but not the timesteps that go with them.
    """
    walk = _ask_walk(pipe, num_steps, **kwargs)
    if all(told is None for _, told in walk):
        return lambda sigmas: None
    points = {(timestep, timestep if told is None else told) for timestep, told in walk}
    timesteps, told = zip(*sorted({(0.0, 0.0), (1000.0, 1000.0), *points}))
    return lambda sigmas: np.interp([1000 * sigma for sigma in sigmas], timesteps, told).tolist()


def _ask_walk(pipe: DiffusionPipeline, num_steps: int, **kwargs) -> list[tuple[float, float | None]]:
    """What `_walk` says, or InputError where a schedule of one step after another cannot be taken from it."""
    name, scheduler, walk = type(pipe).__name__, type(pipe.scheduler).__name__, _walk(pipe, num_steps, **kwargs)
    if not walk:
        raise InputError(f"{name}: asked for {num_steps} steps, but it never called scheduler.step")
    if len(walk) != num_steps and not has_own_steps(pipe, num_steps, **kwargs):
        raise InputError(
            f"{name}: with its {scheduler} {num_steps} steps are {len(walk)} model calls; Glance needs one for each: "
            f"use {PLAIN_BASE}"
        )
    timesteps = [timestep for timestep, _ in walk]
    wrong = [timestep for timestep in timesteps if not 0 < timestep <= 1000]  # NaN among them
    wrong += [low for high, low in zip(timesteps, timesteps[1:]) if not low < high]
    if wrong:
        raise InputError(
            f"{name}: with its {scheduler} {num_steps} steps visit timestep {wrong[0]:g} "
            f"({', '.join(f'{timestep:.4g}' for timestep in timesteps[:3])}, ...); a rectified flow descends from at "
            f"most 1000 and stays above 0: give another --num_base_steps, or {PLAIN_BASE}"
        )
    return walk


def _walk(pipe: DiffusionPipeline, num_steps: int, **kwargs) -> list[tuple[float, float | None]]:
    """1000 * sigma of each of `num_steps` steps, from a dry run of the pipeline, and what the model is told there if
    that is another number than FixedSigmaScheduler tells."""
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    unit, acted, walked = 1000 / scheduler.config.num_train_timesteps, set(), []

    def forward(*args, **kwargs):
        acted.add(len(walked))
        return _no_prediction(*args, **kwargs)

    def step(model_output, timestep, sample, *args, **kwargs):
        told, timestep = float(timestep), 1000 * float(scheduler.sigmas[len(walked)])
        same = abs(unit * told - timestep) < 1  # some round it
        timestep = unit * told if same else timestep
        timestep = 1000 - timestep if counts_image(scheduler) else timestep
        if len(walked) not in acted:
            name = denoiser_name(pipe.config)
            raise InputError(f"{type(pipe).__name__}: at timestep {timestep:.0f} another model than its {name} acts")
        walked.append((timestep, None if same else told))
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=sample)

    scheduler.step = step
    try:
        dry_run(pipe, scheduler, forward, num_inference_steps=num_steps, **kwargs)
    except InputError as error:
        if error.__cause__ is None or isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            raise
        # Any other question is asked with a scheduler of ours, which takes what the pipeline gives it.
        raise InputError(f"{error}; it has a {type(scheduler).__name__}, so try {PLAIN_BASE}") from error
    return walked


def ask_single_branch(pipe: DiffusionPipeline, **kwargs) -> dict:
    """Call arguments that switch classifier-free guidance off, {} where the pipeline uses none or an embedded scale.

    The flow loss trains the conditional branch alone. Two model calls in a step, or a doubled batch, are
    classifier-free guidance, unless the velocity depends on one sample of them: 1 * conditional + 0 * unconditional.
    """
    tried, accepted = [], {*accepted_arguments(pipe), "guiders"}  # the last is run_pipeline's own
    for off in (
        {},
        {"guidance_scale": 1.0},
        {"guidance_scale": 0.0},
        {"true_cfg_scale": 1.0},
        {"negative_prompt": None},
        {"guiders": False},
    ):
        if not set(off) <= accepted:
            continue
        try:
            batches, velocity = _made_up_step(pipe, None, **kwargs | off)
        except InputError:
            if not off:
                raise
            continue  # a value that it does not take
        samples = sum(batches) if batches != [1] else 0
        changes = [_made_up_step(pipe, index, **kwargs | off)[1] - velocity for index in range(samples)]
        if batches == [1] or sum(bool(change.abs().max() > 0.1) for change in changes) == 1:
            return off
        tried.append(f"{off or 'as it is'}: {len(batches)} calls of batch {batches}")
    raise InputError(f"{type(pipe).__name__}: guidance cannot be switched off ({'; '.join(tried)})")


def _made_up_step(pipe: DiffusionPipeline, changed: int | None, **kwargs) -> tuple[list[int], torch.Tensor]:
    """The batches of a dry step's model calls, and its velocity where each sample's prediction is made up, that of
    the sample `changed` a little otherwise."""
    batches, velocities = [], []

    def forward(*args, **inputs):
        output = _no_prediction(*args, **inputs)
        for index, sample in enumerate(output.sample, sum(batches)):
            sample.copy_(torch.randn(sample.shape, generator=torch.Generator().manual_seed(index)))
            sample += index == changed
        batches.append(len(output.sample))
        return output

    def on_step(index, model_output, sample):
        velocities.append(model_output.float())
        return sample

    dry_run(pipe, Probe([1.0], on_step), forward, forward, **kwargs)
    if not velocities:
        raise InputError(f"{type(pipe).__name__}: asked for one step, but it never called scheduler.step")
    return batches, velocities[0]


def ask_velocity_shares(pipe: DiffusionPipeline, timesteps: list[float], told, **kwargs) -> list[float]:
    """How much of the velocity (noisy - image) / sigma a pipeline takes at each timestep, where its model predicts the
    image; near 0 some divide by more than sigma. 1 where the model predicts the velocity itself."""
    shares = []
    for sigma in timesteps_to_sigmas(timesteps):
        velocities = []

        def on_step(index, model_output, sample, velocities=velocities):
            velocities.append(model_output)
            return torch.ones_like(sample)

        dry_run(pipe, Probe([sigma, sigma], on_step, told([sigma, sigma]), pipe.scheduler), **kwargs)
        shares.append(sigma * velocities[1].float().mean().item() or 1.0)  # the prediction is all zeros
    return shares


def takes_timesteps(pipe: DiffusionPipeline, **kwargs) -> bool:
    """Whether one step of this pipeline can have another timestep for each sample of its batch.

    Most hand the timestep on, expanded to the batch; some compute with it as with a number. What the transformer is
    told in a dry step with two timesteps must be what it is told with each of them.
    """

    def told(*timesteps) -> list[torch.Tensor]:
        """Every tensor that the transformer gets in a dry step; the noise is the same each time."""
        found = []

        def forward(*args, **inputs):
            found.extend(value for value in tree_leaves((args, inputs)) if isinstance(value, torch.Tensor))
            return _no_prediction(*args, **inputs)

        probe = Probe([1.0], lambda index, model_output, sample: sample, [list(timesteps)], pipe.scheduler)
        dry_run(pipe, probe, forward, **kwargs | {batch_argument(pipe): len(timesteps)})
        return found

    try:
        both, high, low = told(750.0, 250.0), told(750.0, 750.0), told(250.0, 250.0)
    except InputError:  # it wanted a number
        return False
    changed = [not torch.equal(one, other) for one, other in zip(high, low)]
    return any(changed) and all(
        torch.equal(mixed, torch.cat([one[:1], other[1:]]) if differs else one)
        for mixed, one, other, differs in zip(both, high, low, changed)
    )


class PipelineVelocity(torch.nn.Module):
    """velocity = model(noisy, sigma): one step of the pipeline's own `__call__`, with gradients to the transformer.

    The schedule has two entries at the same sigma. At the first the transformer is bypassed and `noisy` enters the
    loop, in the loop's own layout; at the second the pipeline calls the transformer as ever and what it hands to
    `scheduler.step` is the velocity: unpacked, un-negated, exactly what inference will integrate.
    """

    def __init__(self, pipe: DiffusionPipeline, told=lambda sigmas: None, takes_timesteps=False, **kwargs):
        super().__init__()
        self.pipe = pipe
        self.told = told
        self.takes_timesteps = takes_timesteps
        self.transformer = denoiser(pipe)
        self.kwargs = kwargs

    def forward(self, noisy: torch.Tensor, sigmas, **kwargs) -> torch.Tensor:
        """noisy (B, ...) float32, sigmas in (0, 1], one for all or B -> velocity (B, ...) in the pipeline's dtype.

        `sigmas` are any number, or a list, array or tensor of numbers; ValueError where it has another length.
        `kwargs` are further arguments of the pipeline's call, which win over those given before. Different sigmas are
        one run where the pipeline takes them so, and one for each where it does not.
        """
        sigmas = as_floats(sigmas)
        sigmas = sigmas * len(noisy) if len(sigmas) == 1 else sigmas
        if len(sigmas) != len(noisy):
            raise ValueError(f"{len(sigmas)} sigmas for a batch of {len(noisy)}; give one, or one for each")
        runs = [sigmas] if self.takes_timesteps else [list(run) for _, run in itertools.groupby(sigmas)]
        parts = noisy.split([len(run) for run in runs])
        return torch.cat([self._velocity(part, run, **self.kwargs | kwargs) for part, run in zip(parts, runs)])

    def _timesteps(self, sigmas: list[float]) -> list[float]:
        """What the model is told at `sigmas`, in the scheduler's own arithmetic."""
        schedule = FixedSigmaScheduler(sigmas, self.told(sigmas), like=self.pipe.scheduler)
        schedule.set_timesteps()
        return schedule.timesteps.tolist()

    def _velocity(self, noisy: torch.Tensor, sigmas: list[float], **kwargs) -> torch.Tensor:
        velocity, asked = None, False
        told = self._timesteps(sigmas)
        told = told[0] if len(set(sigmas)) == 1 else told

        def on_step(index, model_output, sample):
            if index == 0:
                return noisy.to(sample)
            raise Answer(model_output)  # what some pipelines do to the final latents needs the VAE, which was freed

        probe = Probe([sigmas[0]] * 2, on_step, [told, told], self.pipe.scheduler)
        predict = self.transformer.forward

        def forward(*args, **inputs):
            nonlocal asked
            asked = probe.calls > 0
            return (predict if asked else _no_prediction)(*args, **inputs)

        batch = {batch_argument(self.pipe): len(noisy)}
        try:
            with refusals(self.pipe):
                run_pipeline(self.pipe, probe, forward, **kwargs | batch)
        except Answer as answer:
            velocity = answer.args[0]
        if not asked:
            raise InputError(
                f"{type(self.pipe).__name__}: at sigma {sigmas[0]:g} another model than its transformer acts"
            )
        if velocity is None or velocity.shape != noisy.shape:
            found = "nothing" if velocity is None else tuple(velocity.shape)
            raise InputError(f"{type(self.pipe).__name__}: asked the velocity of {tuple(noisy.shape)}, got {found}")
        return -velocity if counts_image(self.pipe.scheduler) else velocity
