"""infer_glance.py and glance_inference: the same picture as plain diffusers, the hand-off, what is left behind."""

import os
import shutil

import numpy as np
import pytest
import torch
from conftest import flags, picture_distance
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from PIL import Image
from safetensors.torch import load_file, save_file

import infer_glance
import train_glance_lora
from glance.adapters import fused_adapters
from glance.ask import pipeline as ask
from glance.files.recipe import WEIGHT_NAME, Recipe, read_recipe
from glance_utils import InputError, glance_inference


PHASES = ("slow", "fast")
BASES = ["flux", "sd3", "qwen"]


def pixels(image) -> np.ndarray:
    return np.asarray(image if isinstance(image, Image.Image) else Image.open(image))


def same(one, other) -> bool:
    return np.array_equal(pixels(one), pixels(other))


def recipes_of(folder) -> dict[str, Recipe]:
    return {phase: read_recipe(folder / phase / WEIGHT_NAME) for phase in PHASES}


def schedule_of(folder) -> dict[str, list[float]]:
    return {phase: recipe.timesteps for phase, recipe in recipes_of(folder).items()}


def seeded(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stock(base, folder=None):
    """diffusers' own pipeline, with the two LoRAs loaded if a folder is given."""
    pipe = DiffusionPipeline.from_pretrained(base)
    for phase in PHASES if folder else ():
        pipe.load_lora_weights(folder / phase, adapter_name=phase)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# --------------------------------------------------------------------------------------------------------------------
# Equal to plain diffusers


@pytest.mark.parametrize("base", BASES)
def test_the_picture_is_that_of_plain_diffusers(base, trained, infer, pipelines):
    folder = trained(base)
    picture = infer(base, lora=folder, prompt="a blue ring")

    recipes = recipes_of(folder)
    timesteps = recipes["slow"].timesteps + recipes["fast"].timesteps
    pipe = stock(pipelines[base], folder)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(
        pipe.scheduler.config, shift=1.0, use_dynamic_shifting=False, shift_terminal=None
    )

    def switch(pipe, step, timestep, callback_kwargs):
        if step == 4:
            pipe.set_adapters("fast")
        return callback_kwargs

    pipe.set_adapters("slow")
    guidance = recipes["slow"].guidance_scale
    call = {} if guidance is None else {"guidance_scale": guidance}
    call |= {"prompt": "a blue ring", "height": 32, "width": 32, "num_inference_steps": 10}
    call |= {"sigmas": [timestep / 1000 for timestep in timesteps]}
    wanted = pipe(**call, callback_on_step_end=switch, generator=seeded(0)).images[0]
    assert same(picture, wanted)

    pipe.set_adapters("slow")
    assert not same(picture, pipe(**call, generator=seeded(0)).images[0])  # without the hand-off
    pipe.disable_lora()
    assert not same(picture, pipe(**call, generator=seeded(0)).images[0])  # without the LoRAs


def deltas(transformer, adapter) -> dict[str, torch.Tensor]:
    """What each adapted layer adds to its base's weight: lora_B @ lora_A * scaling."""
    layers = {name: layer for name, layer in transformer.named_modules() if isinstance(layer, LoraLayer)}
    return {
        name: layer.lora_B[adapter].weight @ layer.lora_A[adapter].weight * layer.scaling[adapter]
        for name, layer in layers.items()
    }


@pytest.mark.parametrize("base, factor", [("flux", 1), ("flux", 4), ("sd3", 4), ("qwen", 4)])
def test_files_load_in_stock_diffusers_at_the_trained_strength(base, factor, train, pipelines, monkeypatch):
    trained_deltas, train_phase = {}, train_glance_lora.train_phase

    def watched(args, accelerator, prepared, phase, *others):
        train_phase(args, accelerator, prepared, phase, *others)
        trained_deltas[phase.recipe.phase] = deltas(prepared.models.pipe.transformer, train_glance_lora.ADAPTER)

    monkeypatch.setattr(train_glance_lora, "train_phase", watched)
    folder = train(base, lora_alpha=4 * factor, rank=4, learning_rate=1e-2, max_train_steps=2)

    for phase in PHASES:
        pipe = DiffusionPipeline.from_pretrained(pipelines[base])
        before = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
        pipe.load_lora_weights(folder / phase)
        pipe.fuse_lora()
        after = dict(pipe.transformer.named_parameters())
        assert sum(value.abs().max() > 1e-4 for value in trained_deltas[phase].values()) > 5
        for name, value in trained_deltas[phase].items():
            merged = after[f"{name}.base_layer.weight"] - before[f"{name}.weight"]
            assert (merged - value).abs().max() < 1e-6, name


@pytest.mark.parametrize("name", ["glance.safetensors", ""])
def test_files_and_folders_are_taken_alike(name, trained, infer, tmp_path):
    folder = trained("flux")
    for phase in PHASES:
        (tmp_path / phase).mkdir()
        shutil.copy(folder / phase / WEIGHT_NAME, tmp_path / phase / (name or WEIGHT_NAME))
    wanted = pixels(infer(lora=folder))
    assert same(infer(slow_lora=tmp_path / "slow" / name, fast_lora=tmp_path / "fast" / name), Image.fromarray(wanted))


# --------------------------------------------------------------------------------------------------------------------
# The hand-off


@pytest.fixture
def seen_adapters(monkeypatch):
    """The adapter that was at work in each call of infer_glance.py's transformer, None where none was."""
    seen, load_pipeline = [], infer_glance.load_pipeline

    def watched(*args):
        pipe = load_pipeline(*args)
        watch(pipe.transformer, seen)
        return pipe

    monkeypatch.setattr(infer_glance, "load_pipeline", watched)
    return seen


def watch(transformer, seen: list) -> None:
    layer = next(module for module in transformer.modules() if isinstance(module, LoraLayer))

    def note(module, args):
        if "forward" not in vars(module):  # else it is bypassed: a dry step
            seen.append(None if layer.disable_adapters else "+".join(layer.active_adapters))

    transformer.register_forward_pre_hook(note)


@pytest.mark.parametrize("base", BASES)
def test_the_adapter_switches_after_step_five(base, trained, infer, seen_adapters):
    infer(base, lora=trained(base))
    assert seen_adapters == ["slow"] * 5 + ["fast"] * 5


def test_the_adapter_switches_for_every_picture_also_with_two_calls_a_step(trained, infer, seen_adapters):
    guided = '{"true_cfg_scale": 3.0, "negative_prompt": ""}'
    infer(lora=trained(), num_images=2, pipeline_kwargs=guided)
    assert seen_adapters == (["slow"] * 10 + ["fast"] * 10) * 2


def test_lists_of_other_lengths_switch_where_they_meet(train, infer, seen_adapters, tmp_path):
    folder = train(flow_custom_timesteps="1000,950,900;800,400")
    picture = infer(lora=folder, output=tmp_path / "five.png")
    assert seen_adapters == ["slow"] * 3 + ["fast"] * 2
    assert Image.open(picture).size == (32, 32)


def test_all_sigmas_are_walked_as_they_were_trained(trained, pipelines):
    folder = trained("qwen")
    pipe, seen = stock(pipelines["qwen"], folder), []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(1000 * kwargs["timestep"].item()), with_kwargs=True
    )
    with glance_inference(pipe, schedule_of(folder)) as kwargs:
        pipe("a dog", height=32, width=32, generator=seeded(), **kwargs)
        sigmas = pipe.scheduler.sigmas.tolist()
    timesteps = sum(schedule_of(folder).values(), [])
    np.testing.assert_allclose(seen, timesteps, rtol=1e-6)
    assert sigmas == torch.tensor([timestep / 1000 for timestep in timesteps] + [0]).tolist()


# --------------------------------------------------------------------------------------------------------------------
# What is left behind


def test_each_call_inside_begins_with_the_slow_adapter(trained, pipelines):
    folder, seen = trained(), []
    pipe = stock(pipelines["flux"], folder)
    watch(pipe.transformer, seen)
    with glance_inference(pipe, schedule_of(folder)) as kwargs:
        pictures = [pipe("a dog", height=32, width=32, **kwargs, generator=seeded()).images[0] for _ in range(2)]
    assert seen == (["slow"] * 5 + ["fast"] * 5) * 2
    assert same(*pictures)


@pytest.mark.parametrize("base", BASES)
def test_afterwards_the_base_is_as_it_was(base, trained, pipelines):
    folder = trained(base)
    call = {"prompt": "a dog", "height": 32, "width": 32}
    wanted = stock(pipelines[base])(**call, num_inference_steps=4, generator=seeded()).images[0]
    pipe, seen = stock(pipelines[base], folder), []
    pipe.disable_lora()
    watch(pipe.transformer, seen)
    scheduler, config = pipe.scheduler, dict(pipe.scheduler.config)
    with glance_inference(pipe, schedule_of(folder)) as kwargs:
        glance_picture = pipe(**call, **kwargs, generator=seeded()).images[0]
    assert pipe.scheduler is scheduler and dict(scheduler.config) == config
    seen.clear()
    assert same(pipe(**call, num_inference_steps=4, generator=seeded()).images[0], wanted)
    assert seen == [None] * 4
    with glance_inference(pipe, schedule_of(folder)) as kwargs:  # and it can be used again
        assert same(pipe(**call, **kwargs, generator=seeded()).images[0], glance_picture)


@pytest.mark.parametrize("step", [0, 7])
def test_nor_after_an_exception(step, trained, pipelines):
    folder = trained()
    call = {"prompt": "a dog", "height": 32, "width": 32}
    wanted = stock(pipelines["flux"])(**call, num_inference_steps=4, generator=seeded()).images[0]
    pipe = stock(pipelines["flux"], folder)
    pipe.disable_lora()
    scheduler, calls = pipe.scheduler, []

    def interrupt(module, args):
        calls.append(1)
        if len(calls) == step + 1:
            raise KeyboardInterrupt

    hook = pipe.transformer.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), glance_inference(pipe, schedule_of(folder)) as kwargs:
        pipe(**call, **kwargs, generator=seeded())
    hook.remove()
    assert pipe.scheduler is scheduler
    assert same(pipe(**call, num_inference_steps=4, generator=seeded()).images[0], wanted)


def test_infer_loads_a_pipeline_with_no_adapter_active(trained, pipelines):
    folder = trained()
    args = infer_glance.parse_args(flags(pretrained_model_name_or_path=pipelines["flux"], lora=folder, prompt="x"))
    pipe = infer_glance.load_pipeline(args, infer_glance.find_loras(args), torch.device("cpu"))
    call = {"prompt": "a dog", "height": 32, "width": 32, "num_inference_steps": 3}
    wanted = stock(pipelines["flux"])(**call, generator=seeded()).images[0]
    assert same(pipe(**call, generator=seeded()).images[0], wanted)


# --------------------------------------------------------------------------------------------------------------------
# Pictures and flags


def test_several_prompts_and_images_are_numbered_and_seeded(trained, infer, tmp_path):
    folder = trained()
    prompts = ["a red ring", "a blue dog"]
    infer(lora=folder, prompt=prompts, num_images=2, seed=5, output=tmp_path / "many" / "out.png")
    names = [f"out-{number:03d}.png" for number in range(4)]
    assert sorted(path.name for path in (tmp_path / "many").iterdir()) == names
    pictures = [pixels(tmp_path / "many" / name) for name in names]
    for number, (prompt, seed) in enumerate([(prompts[0], 5), (prompts[0], 6), (prompts[1], 5), (prompts[1], 6)]):
        single = infer(lora=folder, prompt=prompt, seed=seed, output=tmp_path / f"single-{number}.png")
        assert np.array_equal(pixels(single), pictures[number])
    assert len({picture.tobytes() for picture in pictures}) == 4


def test_prompts_file(trained, infer, tmp_path):
    (tmp_path / "prompts.txt").write_bytes("\ufeffa red ring\r\n\r\n  ein blauer Hündchen \n".encode())
    args = ["--pretrained_model_name_or_path=x", f"--prompts_file={tmp_path / 'prompts.txt'}", "--prompt=first"]
    assert infer_glance.parse_args(args).prompts == ["first", "a red ring", "ein blauer Hündchen"]
    infer(lora=trained(), prompt=None, prompts_file=tmp_path / "prompts.txt")
    assert {path.name for path in tmp_path.glob("*.png")} == {"out-000.png", "out-001.png"}


def test_config_repeats_prompts(tmp_path):
    (tmp_path / "config.yaml").write_text("prompt: [a red ring, a blue dog]\npretrained_model_name_or_path: x\n")
    assert infer_glance.parse_args(flags(config=tmp_path / "config.yaml")).prompts == ["a red ring", "a blue dog"]


def test_compare_is_one_labelled_picture(trained, infer, seen_adapters, tmp_path):
    folder = trained()
    picture = Image.open(infer(lora=folder, prompt=["a red ring", "a blue dog"], compare=True))
    steps = [None] * 70 + ["slow"] * 5 + ["fast"] * 5  # the base at 50 steps, at 10, on Glance's; then Glance
    assert seen_adapters == steps * 2
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]
    width, height = picture.size
    assert picture.mode == "RGB" and 4 * 256 < width < 1100 and 2 * 256 < height < 800
    colours = picture.getcolors(maxcolors=1 << 20)
    assert (255, 255, 255) in [colour for _, colour in colours] and len(colours) > 100
    # the last column of the first row is what Glance alone draws, enlarged eight times
    single = pixels(infer(lora=folder, prompt="a red ring", output=tmp_path / "single.png"))
    enlarged = single.repeat(8, axis=0).repeat(8, axis=1)
    canvas = pixels(picture)
    tops = range(canvas.shape[0] - 255)
    left = width - 12 - 256
    assert any(np.array_equal(canvas[top : top + 256, left : left + 256], enlarged) for top in tops)


def test_size_and_guidance_are_read_from_the_files_and_can_be_overridden(train, infer, tmp_path):
    folder = train(height=32, width=48, guidance_scale=2.0, learning_rate=1e-2, max_train_steps=2)
    as_trained = pixels(infer(lora=folder))
    assert as_trained.shape == (32, 48, 3)
    assert np.array_equal(as_trained, pixels(infer(lora=folder, guidance_scale=2.0, height=32, width=48)))
    assert not np.array_equal(as_trained, pixels(infer(lora=folder, guidance_scale=9.0)))
    assert pixels(infer(lora=folder, height=48, width=32)).shape == (48, 32, 3)


def test_trained_pipeline_kwargs_are_used(train, infer, seen_adapters):
    folder = train(pipeline_kwargs='{"true_cfg_scale": 3.0, "negative_prompt": "blue"}', max_train_steps=1)
    infer(lora=folder)
    assert len(seen_adapters) == 20


@pytest.mark.parametrize("name", ["out.jpg", "out.webp", "new/folder/out.PNG"])
def test_output_formats(name, trained, infer, tmp_path):
    assert Image.open(infer(lora=trained(), output=tmp_path / name)).size == (32, 32)


def test_bfloat16(trained, infer, seen_adapters, tmp_path, monkeypatch):
    dtypes = []
    load_pipeline = infer_glance.load_pipeline

    def watched(*args):
        pipe = load_pipeline(*args)
        dtypes.append((pipe.transformer.dtype, pipe.vae.dtype, pipe.text_encoder.dtype))
        return pipe

    monkeypatch.setattr(infer_glance, "load_pipeline", watched)
    full = pixels(infer(lora=trained())).astype(int)
    half = pixels(infer(lora=trained(), torch_dtype="bfloat16", output=tmp_path / "half.png")).astype(int)
    assert dtypes == [(torch.float32,) * 3, (torch.bfloat16,) * 3]
    assert 0 < np.abs(full - half).mean() < 8


def test_vae_tiling_leaves_a_small_picture_as_it_is(trained, infer, tmp_path):
    plain = infer(lora=trained())
    assert same(infer(lora=trained(), enable_vae_tiling=True, output=tmp_path / "tiled.png"), plain)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without an accelerator")
def test_model_offload_without_an_accelerator_changes_nothing(trained, infer, tmp_path):
    plain = infer(lora=trained())
    assert same(infer(lora=trained(), enable_model_cpu_offload=True, output=tmp_path / "offloaded.png"), plain)


def test_allow_base_mismatch_takes_a_base_of_another_name(trained, infer, pipelines, tmp_path):
    os.symlink(pipelines["flux"], tmp_path / "link")  # a link is the folder it points to
    wanted = pixels(infer(lora=trained()))
    assert np.array_equal(pixels(infer(tmp_path / "link", lora=trained())), wanted)
    shutil.copytree(pipelines["flux"], tmp_path / "fine-tune")
    with pytest.raises(InputError, match="fine-tune"):
        infer(tmp_path / "fine-tune", lora=trained())
    assert np.array_equal(pixels(infer(tmp_path / "fine-tune", lora=trained(), allow_base_mismatch=True)), wanted)


def test_a_moved_base_of_the_same_name_is_the_same_base(trained, infer, pipelines, tmp_path):
    shutil.copytree(pipelines["flux"], tmp_path / "elsewhere" / "flux")
    wanted = pixels(infer(lora=trained()))
    assert np.array_equal(pixels(infer(tmp_path / "elsewhere" / "flux", lora=trained())), wanted)


def test_call_arguments_are_the_pipelines_own(pipelines):
    pipe = stock(pipelines["sd3"])
    arguments = ask.call_arguments(pipe, "x", 32, 48, None, {"skip_layer_guidance_scale": 1.0})
    assert arguments == {"prompt": "x", "height": 32, "width": 48, "skip_layer_guidance_scale": 1.0}
    assert ask.call_arguments(pipe, "x", 32, 48, 3.0, {})["guidance_scale"] == 3.0


# --------------------------------------------------------------------------------------------------------------------
# LoRA files that were not trained here


@pytest.fixture
def foreign(trained, tmp_path):
    """foreign(scale): the trained pair without recipe, under other names, lora_B divided by `scale`."""

    def call(scale=1.0, change=dict):
        folder = tmp_path / f"foreign-{scale:g}-{change.__name__}"
        folder.mkdir()
        for phase in PHASES:
            weights = load_file(trained() / phase / WEIGHT_NAME)
            weights = {name: value / scale if "lora_B" in name else value for name, value in weights.items()}
            save_file(change(weights), folder / f"glance-{phase}.safetensors")
        names = {f"{phase}_weight_name": f"glance-{phase}.safetensors" for phase in PHASES}
        return {"lora": folder, "height": 32, "width": 32, "guidance_scale": 3.5} | names

    return call


def unprefixed(weights):
    return {name.removeprefix("transformer."): value for name, value in weights.items()}


def with_alphas(weights):
    """As kohya's scripts and ComfyUI's trainers write them: alpha beside the matrices, here four times the rank."""
    layers = {name.split(".lora_")[0] for name in weights}
    names = {".lora_A": ".lora_down", ".lora_B": ".lora_up", "transformer.": "diffusion_model."}
    for old, new in names.items():
        weights = {name.replace(old, new): value for name, value in weights.items()}
    return weights | {
        f"{layer.replace('transformer.', 'diffusion_model.')}.alpha": torch.tensor(16.0) for layer in layers
    }


def test_files_without_recipe_walk_the_derived_schedule(trained, foreign, infer, tmp_path):
    """Whoever wrote them, at the strength that they tell, or else the full one."""
    wanted = infer(lora=trained(), output=tmp_path / "wanted.png")
    for scale, change in [(1.0, dict), (1.0, unprefixed), (4.0, with_alphas)]:
        assert picture_distance(infer(**foreign(scale, change)), wanted) <= 1


def test_lora_scale_brings_back_a_strength_that_was_not_saved(trained, foreign, infer, tmp_path):
    wanted = infer(lora=trained(), output=tmp_path / "wanted.png")
    weak = foreign(4.0)
    assert picture_distance(infer(**weak), wanted) > 1
    assert picture_distance(infer(**weak, lora_scale="4.0"), wanted) <= 1
    assert picture_distance(infer(**weak, lora_scale="4,4"), wanted) <= 1
    assert picture_distance(infer(**weak, lora_scale="4,1"), wanted) > 1


def test_a_given_schedule_wins_over_the_files_own(trained, foreign, infer, seen_adapters, tmp_path):
    for files in ({"lora": trained()}, foreign()):
        seen_adapters.clear()
        infer(**files, flow_custom_timesteps="1000,950,900;800,400")
        assert seen_adapters == ["slow"] * 3 + ["fast"] * 2


@pytest.mark.parametrize("kind", ["use_dora", "lora_bias"])
def test_what_is_more_than_a_lora_is_not_fused(kind, pipelines):
    """Fused without its magnitudes or biases it would silently be another one."""
    transformer = DiffusionPipeline.from_pretrained(pipelines["flux"]).transformer
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], **{kind: True}), "slow")
    with pytest.raises(InputError, match="cannot be added to the weights"), fused_adapters(transformer):
        pass
