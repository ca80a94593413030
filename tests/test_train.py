"""train_glance_lora.py: what it changes, what it leaves alone, its repeatability, its data, its output folder."""

import json
import logging
import re
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from conftest import ROOT, flags, own_size
from diffusers import DiffusionPipeline
from peft.tuners.lora import LoraLayer
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_glance_lora
from glance.adapters import lora_layers
from glance.ask.velocity import PipelineVelocity
from glance.files.checkpoints import find_checkpoints
from glance.files.instance_data import load_pair
from glance.files.lora import load_lora, save_lora
from glance.files.recipe import NO_RECIPE, WEIGHT_NAME, Recipe, read_recipe
from glance_utils import __version__, activate_adapter, add_noise, flow_matching_loss, timesteps_to_sigmas


PHASES = ("slow", "fast")
WRITTEN = {"README.md", "instance.png", "loss.csv", "loss.png"}
# The last block's text output goes nowhere, so what makes it is in the LoRA but gets no gradient.
UNREACHABLE = {
    "flux": r"$^",
    "sd3": r"transformer_blocks\.1\.attn\.add_q_proj",
    "qwen": r"transformer_blocks\.1\.(attn\.(add_q_proj|to_add_out)|txt_mlp\.net\.2)",
}
SIMPLETUNER = ROOT / "configs" / "simpletuner"


def lora(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHT_NAME)


def lora_bytes(folder: Path) -> list[bytes]:
    return [(folder / phase / WEIGHT_NAME).read_bytes() for phase in PHASES]


def lora_content(folder: Path) -> list[tuple]:
    """Both files' recipes and, bit for bit, tensors."""
    content = []
    for phase in PHASES:
        tensors = {name: value.numpy().tobytes() for name, value in lora(folder / phase).items()}
        content.append((recipe_of(folder / phase), tensors))
    return content


def recipe_of(folder: Path) -> Recipe:
    return read_recipe(folder / WEIGHT_NAME)


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def assert_close(one: Path, other: Path, tolerance: float):
    for phase in PHASES:
        one_lora, other_lora = lora(one / phase), lora(other / phase)
        assert one_lora.keys() == other_lora.keys()
        for name, value in one_lora.items():
            assert (value - other_lora[name]).abs().max() <= tolerance, name


@pytest.fixture
def around_phase(monkeypatch):
    """around_phase(look): look("before" | "after", prepared, recipe) is called around the training of each phase."""

    def call(look):
        train_phase = train_glance_lora.train_phase

        def watched(args, accelerator, prepared, phase, *others):
            look("before", prepared, phase.recipe)
            train_phase(args, accelerator, prepared, phase, *others)
            look("after", prepared, phase.recipe)

        monkeypatch.setattr(train_glance_lora, "train_phase", watched)

    return call


@pytest.fixture
def seen_timesteps(monkeypatch):
    """The timesteps at which a velocity was asked of the pipeline, in order."""
    seen, forward = [], PipelineVelocity.forward

    def watched(self, noisy, sigmas, **kwargs):
        seen.extend(1000 * sigma for sigma in sigmas)
        return forward(self, noisy, sigmas, **kwargs)

    monkeypatch.setattr(PipelineVelocity, "forward", watched)
    return seen


# --------------------------------------------------------------------------------------------------------------------
# What training changes


def base_weights(transformer) -> dict[str, torch.Tensor]:
    state = {name.replace(".base_layer", ""): value for name, value in transformer.state_dict().items()}
    return {name: value.clone() for name, value in state.items() if ".lora_" not in name}


@torch.no_grad()
def fixed_loss(prepared, timesteps) -> float:
    """Mean loss over four fixed noises at each timestep."""
    model = PipelineVelocity(prepared.models.pipe, **prepared.answers.train_call)
    generator = torch.Generator().manual_seed(123)
    losses = []
    for sigma in timesteps_to_sigmas(timesteps) * 4:
        noise = torch.randn(prepared.latents.shape, generator=generator)
        velocity = model(add_noise(prepared.latents, noise, sigma), sigma)
        losses.append(flow_matching_loss(velocity, prepared.latents, noise).item())
    return sum(losses) / len(losses)


@pytest.mark.parametrize("base", ["flux", "sd3", "qwen"])
def test_training_moves_the_lora_and_nothing_else(base, train, around_phase):
    weights, losses, phases = {}, {}, []

    def look(when, prepared, recipe):
        transformer, trained = prepared.models.pipe.transformer, train_glance_lora.ADAPTER
        weights[recipe.phase, when] = base_weights(transformer)
        activate_adapter(transformer, None if when == "before" else trained)
        losses[recipe.phase, when] = fixed_loss(prepared, recipe.timesteps)
        activate_adapter(transformer, trained)
        phases.append(recipe.phase)

    around_phase(look)
    output = train(base, max_train_steps=15, learning_rate=1e-2)
    assert phases == ["slow", "slow", "fast", "fast"]
    for phase in PHASES:
        assert losses[phase, "after"] < 0.95 * losses[phase, "before"]
        for name, value in lora(output / phase).items():
            assert value.isfinite().all() and value.dtype == torch.float32
            assert value.any() != bool("lora_B" in name and re.search(UNREACHABLE[base], name)), name
    first = weights["slow", "before"]
    assert len(first) > 20
    for found in weights.values():
        assert found.keys() == first.keys()
        assert all(torch.equal(found[name], first[name]) for name in first)
    slow, fast = (lora(output / phase) for phase in PHASES)
    assert any(not torch.equal(slow[name], fast[name]) for name in slow)


def test_same_seed_same_files_other_seed_other_files(train, tmp_path):
    runs = [
        lora_bytes(train(output_dir=tmp_path / name, max_train_steps=2, seed=seed))
        for name, seed in [("a", 7), ("b", 7), ("c", 8)]
    ]
    assert runs[0] == runs[1]
    assert runs[0][0] != runs[2][0] and runs[0][1] != runs[2][1]
    assert runs[0][0] != runs[0][1]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_each_phase_visits_its_own_timesteps_equally_often(train, seen_timesteps, accumulation):
    output = train(max_train_steps=10, gradient_accumulation_steps=accumulation)
    half = 10 * accumulation
    assert len(seen_timesteps) == 2 * half
    for phase, seen in zip(PHASES, (seen_timesteps[:half], seen_timesteps[half:])):
        timesteps = recipe_of(output / phase).timesteps
        assert Counter(np.round(seen, 4)) == dict.fromkeys(np.round(timesteps, 4), 2 * accumulation)
        assert seen[:5] != seen[5:10]  # shuffled anew in each round


def test_random_mode_draws_with_replacement(train, seen_timesteps):
    output = train(phase="slow", max_train_steps=12, flow_timesteps_mode="random")
    timesteps = np.round(recipe_of(output).timesteps, 4)
    counts = Counter(np.round(seen_timesteps, 4))
    assert set(counts) <= set(timesteps) and len(seen_timesteps) == 12
    assert max(counts.values()) - min(counts[timestep] for timestep in timesteps) > 1


def test_custom_lists_are_trained_as_given(train, seen_timesteps):
    output = train(flow_custom_timesteps="1,0.95,0.9;0.8,0.4", max_train_steps=6)
    assert [recipe_of(output / phase).timesteps for phase in PHASES] == [[1000, 950, 900], [800, 400]]
    assert Counter(np.round(seen_timesteps)) == {1000: 2, 950: 2, 900: 2, 800: 3, 400: 3}


def test_a_list_far_from_the_models_own_is_warned_of(train, caplog):
    with caplog.at_level(logging.WARNING):
        output = train(flow_custom_timesteps="1000,990,980,970,960", max_train_steps=1)
    derived = [message for message in caplog.messages if "timesteps off this model's own" in message]
    assert len(derived) == 1 and "slow" in derived[0]
    assert recipe_of(output).phase == "slow"


def test_bf16_trains_float32_lora_on_a_bf16_base(train, around_phase):
    dtypes = {}

    def look(when, prepared, recipe):
        for name, parameter in prepared.models.pipe.transformer.named_parameters():
            kind = "lora" if ".lora_" in name else "base"
            dtypes.setdefault((recipe.phase, when, kind), set()).add((parameter.dtype, parameter.requires_grad))

    around_phase(look)
    output = train(mixed_precision="bf16", max_train_steps=5, learning_rate=1e-2)
    for phase in PHASES:
        assert dtypes[phase, "after", "lora"] == {(torch.float32, True)}
        assert dtypes[phase, "after", "base"] == {(torch.bfloat16, False)}
        weights = lora(output / phase)
        assert all(value.isfinite().all() for value in weights.values())
        # float32 steps of Adam, not multiples of what bfloat16 can hold
        assert any(not torch.equal(value, value.bfloat16().float()) for value in weights.values())


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_training_sees_what_the_saved_lora_gives(dtype, pipelines, tmp_path):
    """Also in half precision, to the last bit, and where alpha is not the rank."""
    torch.manual_seed(0)
    call = {"prompt": "a red ring", "height": 32, "width": 32}
    pipe = DiffusionPipeline.from_pretrained(pipelines["flux"], dtype=dtype)
    settings = train_glance_lora.parse_args(flags(pretrained_model_name_or_path="-", rank=4, lora_alpha=12))
    here, layers = SimpleNamespace(device=torch.device("cpu")), lora_layers(pipe.transformer)
    for parameter in train_glance_lora.fresh_adapter(settings, here, pipe.transformer, layers):
        parameter.data.normal_(std=0.1)
    noisy = torch.randn(1, 64, 16)
    with torch.no_grad():
        trained = PipelineVelocity(pipe, **call)(noisy, 0.9)
        path = save_lora(pipe.transformer, train_glance_lora.ADAPTER, tmp_path, NO_RECIPE)
        pipe.transformer.unload_lora()
        base = PipelineVelocity(pipe, **call)(noisy, 0.9)
        load_lora(pipe, path, "slow")
        assert {parameter.dtype for parameter in pipe.transformer.parameters()} == {dtype}
        error = (trained - PipelineVelocity(pipe, **call)(noisy, 0.9)).abs().max()
        assert error <= (1e-6 if dtype == torch.float32 else 0)
    assert (trained - base).abs().max() > 0.1


def test_fp16_run_is_finite(train, around_phase):
    dtypes = set()
    around_phase(lambda when, prepared, recipe: dtypes.add(prepared.models.pipe.transformer.proj_out.weight.dtype))
    output = train(mixed_precision="fp16", phase="slow", learning_rate=1e-2)
    assert dtypes == {torch.float16}
    assert all(value.any() and value.isfinite().all() for value in lora(output).values())


# --------------------------------------------------------------------------------------------------------------------
# Checkpoints


@pytest.mark.parametrize(
    "stops, settings",
    [
        ((2, 4, 7, 9), {}),
        ((4, 9), {"flow_timesteps_mode": "random", "gradient_accumulation_steps": 2, "lr_scheduler": "cosine"}),
        ((4,), {"use_8bit_adam": True, "rank": 128}),  # bitsandbytes keeps tensors below 4,096 elements in 32 bits
        ((4,), {"mixed_precision": "bf16", "train_batch_size": 2}),
    ],
    ids=["stratified", "random-accumulated", "8bit", "bf16"],
)
def test_resumed_equals_uninterrupted(stops, settings, train, tmp_path):
    settings |= {"checkpointing_steps": 2, "learning_rate": 1e-3}
    whole = train(output_dir=tmp_path / "whole", **settings)
    wanted = lora_content(whole)
    for stopped_at in stops:
        output = tmp_path / f"resumed-{stopped_at}"
        shutil.copytree(whole / f"checkpoint-{stopped_at}", output / f"checkpoint-{stopped_at}")
        if stopped_at > 5:
            shutil.copytree(whole / "slow", output / "slow")
        train(output_dir=output, resume_from_checkpoint="latest", **settings)
        assert lora_content(output) == wanted, stopped_at
        left = [name for name in (2, 4, 7, 9) if name >= stopped_at]
        assert sorted(path.name for path in output.glob("checkpoint-*")) == [f"checkpoint-{name}" for name in left]


def test_resume_by_path_of_a_single_phase(train, tmp_path):
    settings = {"phase": "fast", "checkpointing_steps": 1, "learning_rate": 1e-3, "max_train_steps": 3}
    whole = train(output_dir=tmp_path / "whole", **settings)
    settings["resume_from_checkpoint"] = whole / "checkpoint-2"
    resumed = train(output_dir=tmp_path / "resumed", **settings)
    assert_equal(lora(resumed), lora(whole))


def test_rotation_keeps_the_newest_checkpoints(train):
    output = train(checkpointing_steps=1, checkpoints_total_limit=2)
    assert sorted(path.name for path in output.glob("*checkpoint-*")) == ["checkpoint-10", "checkpoint-9"]
    state = torch.load(output / "checkpoint-10" / "training_state.pt", weights_only=True)
    assert (state["settings"]["phase"], state["step"]) == ("fast", 5)
    assert find_checkpoints(output)[-1][1].name == "checkpoint-10"


def test_rotation_does_not_drop_a_new_runs_checkpoint_for_an_older_run_s(train):
    settings = {"phase": "slow", "checkpointing_steps": 3, "checkpoints_total_limit": 1}
    output = train(max_train_steps=6, **settings)
    assert (output / "checkpoint-6").is_dir()
    # a shorter run, from the start, in the same folder
    train(max_train_steps=3, overwrite_output_dir=True, **settings)
    assert (output / "checkpoint-3").is_dir()


# --------------------------------------------------------------------------------------------------------------------
# Ways to train


def dtypes_in(state) -> set[torch.dtype]:
    """Of all tensors in nested dictionaries."""
    if isinstance(state, torch.Tensor):
        return {state.dtype}
    return set().union(*map(dtypes_in, state.values())) if isinstance(state, dict) else set()


def test_8bit_adam_moves_the_weights(train):
    output = train(use_8bit_adam=True, rank=128, phase="slow", checkpointing_steps=5)
    state = torch.load(output / "checkpoint-5" / "training_state.pt", weights_only=True)
    assert torch.uint8 in dtypes_in(state["optimizer"]["state"])
    for name, value in lora(output).items():
        assert value.any() and value.isfinite().all(), name


def test_gradient_checkpointing_gives_the_same_lora(train, around_phase, tmp_path):
    switched = []
    around_phase(
        lambda when, prepared, recipe: switched.append(prepared.models.pipe.transformer.is_gradient_checkpointing)
    )
    plain = train(output_dir=tmp_path / "plain", max_train_steps=3)
    checkpointed = train(output_dir=tmp_path / "checkpointed", max_train_steps=3, gradient_checkpointing=True)
    assert switched == [False] * 4 + [True] * 4
    assert_close(plain, checkpointed, 1e-5)


def test_accumulating_two_batches_of_one_is_one_batch_of_two(train, tmp_path):
    """With one timestep a phase nothing but noise is drawn, so that both runs see the same."""
    settings = {"flow_custom_timesteps": "990;500", "learning_rate": 1e-4, "max_train_steps": 3}
    accumulated = train(output_dir=tmp_path / "accumulated", gradient_accumulation_steps=2, **settings)
    batch = train(output_dir=tmp_path / "batch", train_batch_size=2, **settings)
    single = train(output_dir=tmp_path / "single", **settings)
    assert_close(accumulated, batch, 1e-5)
    with pytest.raises(AssertionError):
        assert_close(accumulated, single, 1e-5)


def test_tensorboard_logs_each_optimizer_step(train):
    output = train(report_to="tensorboard", gradient_accumulation_steps=2, lr_scheduler="linear", learning_rate=1e-3)
    logs = EventAccumulator(str(next((output / "logs").rglob("events.out*")).parent))
    logs.Reload()
    np.testing.assert_allclose([log.value for log in logs.Scalars("lr")], [8e-4, 6e-4, 4e-4, 2e-4, 0] * 2, atol=1e-9)
    for phase, steps in zip(PHASES, (range(1, 6), range(6, 11))):
        losses = {log.step: log.value for log in logs.Scalars(f"{phase}/loss")}
        assert list(losses) == list(steps)
        assert all(0 < loss < 100 for loss in losses.values())
        names = {f"{phase}/loss_at_{timestep:.0f}" for timestep in recipe_of(output / phase).timesteps}
        found = [tag for tag in logs.Tags()["scalars"] if tag.startswith(f"{phase}/loss_at_")]
        assert set(found) <= names
        assert {log.step: log.value for tag in found for log in logs.Scalars(tag)} == losses


# --------------------------------------------------------------------------------------------------------------------
# Data: one image and its caption


def pair_of(**settings):
    args = train_glance_lora.parse_args(flags(pretrained_model_name_or_path="base", **settings))
    return load_pair(args, own_size)


def test_caption_is_the_text_beside_the_image_or_the_prompt(pair, tmp_path):
    image, caption, size = pair_of(instance_image=pair, resolution=32)
    assert (caption, size, image.size) == ("a red ring", (32, 32), (32, 32))
    assert pair_of(instance_image=pair, instance_prompt="a blue dog ")[1] == "a blue dog"
    assert pair_of(instance_image=pair)[2] == (1024, 1024)
    image, _, size = pair_of(instance_image=pair, height=48, width=32)
    assert (size, image.size) == ((48, 32), (32, 48))
    (tmp_path / "x.txt").write_bytes("\ufeffein Hündchen\r\n".encode())
    shutil.copy(pair, tmp_path / "x.png")
    assert pair_of(instance_image=tmp_path / "x.png")[1] == "ein Hündchen"


def test_a_folder_with_one_pair(pair, tmp_path):
    shutil.copytree(pair.parent, tmp_path / "data")
    (tmp_path / "data" / "notes.md").write_text("not an image")
    image, caption, _ = pair_of(instance_data_dir=tmp_path / "data", resolution=32)
    assert caption == "a red ring"
    assert np.array_equal(image, pair_of(instance_image=pair, resolution=32)[0])


def test_the_caption_reaches_the_training(train, tmp_path):
    first = train(output_dir=tmp_path / "a", phase="slow", max_train_steps=2)
    second = train(output_dir=tmp_path / "b", phase="slow", max_train_steps=2, instance_prompt="another caption")
    assert "a red ring" in (first / "README.md").read_text()
    assert "another caption" in (second / "README.md").read_text()
    assert any(not torch.equal(value, lora(second)[name]) for name, value in lora(first).items())


def pixels_of(image: Image.Image, path: Path) -> np.ndarray:
    """The 8x8 pixels that are trained for an image of that size."""
    image.save(path)
    path.with_suffix(".txt").write_text("x")
    return np.asarray(pair_of(instance_image=path, resolution=8)[0])


def test_alpha_is_laid_over_white(tmp_path):
    rgba = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    rgba.paste((0, 0, 255, 255), (0, 0, 4, 8))
    rgba.paste((0, 0, 0, 51), (0, 0, 8, 1))
    wanted = np.full((8, 8, 3), 255, np.uint8)
    wanted[:, :4] = (0, 0, 255)
    wanted[0] = 204
    assert np.array_equal(pixels_of(rgba, tmp_path / "rgba.png"), wanted)
    grey = Image.merge("LA", [Image.new("L", (8, 8), 0), Image.new("L", (8, 8), 0)])
    assert (pixels_of(grey, tmp_path / "la.png") == 255).all()
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.info["transparency"] = 1
    assert (pixels_of(palette, tmp_path / "p.png") == 255).all()


def test_greyscale_and_cmyk_become_rgb(tmp_path):
    assert (pixels_of(Image.new("L", (8, 8), 77), tmp_path / "l.png") == 77).all()
    assert (pixels_of(Image.new("1", (8, 8), 1), tmp_path / "1.png") == 255).all()
    cmyk = pixels_of(Image.new("RGB", (8, 8), (200, 40, 40)).convert("CMYK"), tmp_path / "cmyk.jpg")
    assert np.abs(cmyk.astype(int) - (200, 40, 40)).max() < 12


def test_16_bit_greyscale_keeps_its_brightness(tmp_path):
    half = Image.fromarray(np.full((8, 8), 0x8000, np.uint16))
    assert np.abs(pixels_of(half, tmp_path / "i16.png").astype(int) - 128).max() <= 1


def test_exif_rotation_is_applied(tmp_path):
    upright = np.zeros((8, 8, 3), np.uint8)
    upright[:4] = 255  # white above, black below
    stored = Image.fromarray(upright).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to view
    stored.save(tmp_path / "photo.jpg", exif=exif, quality=100, subsampling=0)
    (tmp_path / "photo.txt").write_text("x")
    found = np.asarray(pair_of(instance_image=tmp_path / "photo.jpg", resolution=8)[0])
    assert np.abs(found.astype(int) - upright).max() < 20


def test_a_wide_image_is_cropped_at_the_center(tmp_path):
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, 8:16] = 255
    assert (pixels_of(Image.fromarray(pixels), tmp_path / "wide.png") == 255).all()


@pytest.fixture
def rows(pair):
    """A data set of two rows; the pair is the second."""
    other = Image.new("RGB", (40, 50), "black")
    columns = {"image": [other, Image.open(pair)], "text": ["black", "a red ring"], "label": ["no", "yes"]}
    features = datasets.Features(image=datasets.Image(), text=datasets.Value("string"), label=datasets.Value("string"))
    return datasets.Dataset.from_dict(columns, features=features)


def test_a_row_of_a_saved_data_set(rows, pair, tmp_path):
    rows.save_to_disk(tmp_path / "rows")
    datasets.DatasetDict(train=rows).save_to_disk(tmp_path / "split")
    wanted = pair_of(instance_image=pair, resolution=32)[0]
    for name in ("rows", "split"):
        image, caption, _ = pair_of(dataset_name=tmp_path / name, dataset_index=1, resolution=32)
        assert caption == "a red ring" and np.array_equal(image, wanted)
        assert pair_of(dataset_name=tmp_path / name, resolution=32)[1] == "black"
    settings = {"dataset_name": tmp_path / "rows", "caption_column": "label", "dataset_index": 1}
    assert pair_of(**settings)[1] == "yes"
    assert pair_of(instance_prompt="a dog", **settings)[1] == "a dog"


def test_a_row_of_an_image_folder_trains_as_the_pair_does(pair, train, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(pair, folder / "glance.png")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "glance.png", "text": "a red ring"}) + "\n")
    settings = {"phase": "slow", "max_train_steps": 2}
    from_file = train(output_dir=tmp_path / "a", **settings)
    from_row = train(output_dir=tmp_path / "b", instance_image=None, dataset_name=folder, **settings)
    assert_equal(lora(from_row), lora(from_file))


def test_an_image_folder_without_captions_takes_the_prompt(pair, tmp_path):
    (tmp_path / "folder").mkdir()
    shutil.copy(pair, tmp_path / "folder" / "glance.png")
    assert pair_of(dataset_name=tmp_path / "folder", instance_prompt="a red ring")[1] == "a red ring"


# --------------------------------------------------------------------------------------------------------------------
# Configs


@pytest.mark.parametrize("name", ["config.yaml", "config.yml", "config.json"])
@pytest.mark.parametrize("dashes", ["", "--"])
def test_config_files(name, dashes, tmp_path):
    settings = {"rank": 8, "learning_rate": 1e-4, "gradient_checkpointing": True, "use_8bit_adam": False}
    settings |= {"flow_custom_timesteps": [1000, 950, 900], "pipeline_kwargs": {"max_sequence_length": 16}}
    settings |= {"pretrained_model_name_or_path": "base", "instance_prompt": None, "seed": -3}
    settings = {dashes + key: value for key, value in settings.items()}
    text = (
        json.dumps(settings)
        if name.endswith("json")
        else "\n".join(f"{k}: {json.dumps(v)}" for k, v in settings.items())
    )
    (tmp_path / name).write_text(text)
    args = train_glance_lora.parse_args(flags(config=tmp_path / name, rank=16))
    assert args.rank == args.lora_alpha == 16  # the command line wins
    assert (args.learning_rate, args.gradient_checkpointing, args.optimizer) == (1e-4, True, "adamw")
    assert args.custom_timesteps == {"slow": [1000, 950, 900]}
    assert (args.pipeline_kwargs, args.instance_prompt, args.seed) == ({"max_sequence_length": 16}, None, -3)


def test_yaml_no_and_exponents_mean_what_they_say(tmp_path):
    """YAML reads a bare no as false and 1e-4 as a string."""
    (tmp_path / "config.yaml").write_text("mixed_precision: no\nlearning_rate: 1e-4\n")
    args = train_glance_lora.parse_args(flags(pretrained_model_name_or_path="b", config=tmp_path / "config.yaml"))
    assert (args.mixed_precision, args.learning_rate) == ("no", 1e-4)


def test_simpletuners_recipe_runs_as_written(train, infer, pair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(SIMPLETUNER, "config")
    shutil.copytree(pair.parent, "data")
    wanted = {
        "slow": [1000, 979.1915, 957.5157, 934.9171, 911.3354],
        "fast": [886.7053, 745.0728, 562.9505, 320.0802, 20],
    }
    for phase in PHASES:
        settings = dict.fromkeys(("instance_image", "output_dir", "rank"))  # not of the command line but of the config
        settings |= {"config": f"config/glance-{phase}.json", "max_train_steps": 3}
        with pytest.raises(KeyError):  # no output_dir among the flags
            train(**settings)
        recipe = recipe_of(Path("output", f"glance-{phase}"))
        assert (recipe.phase, recipe.timesteps, recipe.rank) == (phase, wanted[phase], 32)
        assert {path.name for path in Path("output", f"glance-{phase}").iterdir()} >= {"README.md", WEIGHT_NAME}
    assert "a red ring" in Path("output/glance-slow/README.md").read_text()
    picture = infer(slow_lora="output/glance-slow", fast_lora="output/glance-fast")
    assert Image.open(picture).size == (32, 32)


# --------------------------------------------------------------------------------------------------------------------
# The output folder


def test_output_folder_and_recipes(train, pipelines, pair):
    output = train(height=32, width=48, guidance_scale=2.5, lora_alpha=8)
    both = {"slow", "fast", "glance.png", "sampler.json", "scheduler", "comfyui.json"}
    assert {path.name for path in output.iterdir()} == WRITTEN | both
    assert Image.open(output / "instance.png").size == Image.open(output / "glance.png").size == (48, 32)
    timesteps = []
    for phase in PHASES:
        assert [path.name for path in (output / phase).iterdir()] == [WEIGHT_NAME]
        with safe_open(output / phase / WEIGHT_NAME, framework="pt") as file:
            header, names = file.metadata(), list(file.keys())
        recipe = json.loads(header["glance"])
        timesteps += recipe.pop("timesteps")
        assert re.fullmatch("[0-9a-f]{64}", recipe.pop("run")) and re.fullmatch("[0-9a-f]{64}", recipe.pop("asked"))
        assert recipe == {
            "phase": phase,
            "base_model": str(pipelines["flux"]),
            "pipeline": "FluxPipeline",
            "height": 32,
            "width": 48,
            "guidance_scale": 2.5,
            "pipeline_kwargs": {},
            "num_base_steps": 50,
            "grid": "glance",
            "coefficients": None,
            "guidance": "keep",
            "loss": "flow",
            "max_train_steps": 5,
            "rank": 4,
            "version": __version__,
        }
        metadata = json.loads(header["lora_adapter_metadata"])
        assert metadata["transformer.r"] == metadata["transformer.lora_alpha"] == 4
        adapted = {name.removeprefix("transformer.").split(".lora_")[0] for name in names}
        assert set(metadata["transformer.target_modules"]) == adapted
    assert len(timesteps) == 10 and timesteps[0] == 1000 and timesteps == sorted(timesteps, reverse=True)
    card = (output / "README.md").read_text()
    for expected in ("instance.png", "glance.png", "a red ring", str(pipelines["flux"]), f"{timesteps[6]:.4f}"):
        assert expected in card


def test_one_phase_is_written_directly_into_the_output_folder(train):
    output = train(phase="fast")
    assert {path.name for path in output.iterdir()} == {WEIGHT_NAME, *WRITTEN}
    assert recipe_of(output).phase == "fast"
    assert "](./glance.png)" not in (output / "README.md").read_text()


def test_lora_layers_are_those_asked_for(train, around_phase):
    adapted = set()

    def look(when, prepared, recipe):
        layers = prepared.models.pipe.transformer.named_modules()
        adapted.update(name for name, module in layers if isinstance(module, LoraLayer))

    around_phase(look)
    train(lora_layers="to_q,attn.to_v", max_train_steps=1)
    wanted = {
        f"{block}.0.attn.{name}"
        for block in ("transformer_blocks", "single_transformer_blocks")
        for name in ("to_q", "to_v")
    }
    assert adapted == wanted
