"""Validation pictures: what they show, that nothing trained depends on them, and that nothing is lost to them.

tests/test_distribution.py draws them in several processes, tests/test_lifetimes.py looks at what is in memory then.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REFUSED
from diffusers import AutoencoderKL
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_families import FAMILIES, as_flags
from test_pictures import nan_vae  # noqa: F401

from glance.files import pictures
from glance.files.recipe import WEIGHT_NAME
from glance.training.validation import Validation
from glance_utils import PHASES


pytestmark = pytest.mark.slow


PROMPT = "a blue disc"
SHORT = {"max_train_steps": 2, "num_base_steps": 12, "num_inference_steps": 4, "learning_rate": 3e-2}
ON_THE_WAY = {"validation_prompt": PROMPT, "validation_steps": 1}
FULL, FEW = "base, 12 steps", "base, the same 4 steps"


@pytest.fixture
def rows(monkeypatch):
    """The rows of all validation pictures, in order: [(label, image, details)] of the three columns each."""
    found, draw_row = [], pictures.draw_row

    def watched(row, prompt):
        found.append(row)
        return draw_row(row, prompt)

    monkeypatch.setattr(pictures, "draw_row", watched)
    return found


def files_of(folder: Path) -> dict[str, bytes]:
    """The validation pictures in an output folder."""
    return {path.name: path.read_bytes() for path in (folder / "validation").iterdir()}


def loras_of(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.rglob(WEIGHT_NAME))]


def assert_same_picture(one, other):
    """But for the last bit: training and inference may round otherwise."""
    one, other = (np.asarray(image).astype(int) for image in (one, other))
    assert one.shape == other.shape and np.abs(one - other).max() <= 1


def labels(rows) -> list[str]:
    """The third column's, once it is clear that the first two are the base's."""
    assert all([label for label, _, _ in row[:2]] == [FULL, FEW] for row in rows)
    return [row[2][0] for row in rows]


# --------------------------------------------------------------------------------------------------------------------
# What they show


def test_each_picture_is_that_of_inference(train, infer, rows, tmp_path):
    """After one step and two of the slow phase, which the base ends, after one of the fast phase, and at the end; with
    an alpha that is another number than the rank, and that the files have in them."""
    settings = SHORT | {"lora_alpha": 7, "rank": 3}
    folder = train(**settings, **ON_THE_WAY, seed=5)
    assert labels(rows) == [
        "slow at step 1, then base",
        "slow at step 2, then base",
        "slow, then fast at step 1",
        "Glance, 4 steps",
    ]
    one_step = train(**settings | {"max_train_steps": 1}, seed=5, output_dir=tmp_path / "one")
    wanted = [
        {"lora": one_step, "lora_scale": "1,0"},
        {"lora": folder, "lora_scale": "1,0"},
        {"slow_lora": folder / "slow", "fast_lora": one_step / "fast"},
        {"lora": folder},
    ]
    for row, files in zip(rows, wanted, strict=True):
        assert_same_picture(row[2][1], Image.open(infer(**files, prompt=PROMPT, seed=5)))
        assert [image.tobytes() for _, image, _ in row[:2]] == [image.tobytes() for _, image, _ in rows[0][:2]]
        assert row[1][1].tobytes() != row[2][1].tobytes()
    assert_same_picture(rows[0][1][1], Image.open(infer(lora=folder, lora_scale=0, prompt=PROMPT, seed=5)))


def test_the_error_is_that_of_the_final_latents_to_the_full_run(train, rows):
    """Zero where the few steps are all of the base's own."""
    steps = {"num_base_steps": 4, "num_inference_steps": 4, "grid": "even"}
    train(**SHORT | steps, phase="slow", validation_prompt=PROMPT)
    (row,) = rows
    assert [label for label, _, _ in row] == ["base, 4 steps", "base, the same 4 steps", "slow, then base"]
    assert [details for _, _, details in row[:2]] == ["the full run", "error 0.0000 to the full run"]
    error = float(row[2][2].split()[1])
    assert 0 < error < 1 and row[0][1].tobytes() == row[1][1].tobytes() != row[2][1].tobytes()


def test_several_prompts_and_images_are_rows_of_one_picture(train, rows, tmp_path, infer):
    folder = train(**SHORT, validation_prompt=[PROMPT, "a red ring"], num_validation_images=2)
    assert list(files_of(folder)) == ["step_0004.png"] and len(rows) == 4
    size = pictures.comparison_size((32, 32), 3, 4)
    assert Image.open(folder / "validation" / "step_0004.png").size == size
    infer(lora=folder, prompt=[PROMPT, "a red ring"], num_images=2, output=tmp_path / "out.png")
    for number, row in enumerate(rows):
        assert_same_picture(row[2][1], Image.open(tmp_path / f"out-{number:03d}.png"))


@pytest.mark.parametrize(
    "settings, label",
    [
        ({"flow_custom_timesteps": "1000,900,500"}, "slow at step 1, then base"),
        ({"flow_custom_timesteps": "1000,900,10"}, "slow at step 1"),  # which ends below the base's own last step
        ({"phase": "fast"}, "base, then fast at step 1"),
        ({"phase": "fast", "flow_custom_timesteps": "700,300"}, "base, then fast at step 1"),
    ],
)
def test_a_single_phase_is_drawn_with_the_base_in_the_other(settings, label, train, rows, tmp_path):
    settings = SHORT | settings | {"output_dir": tmp_path / "one"}
    train(**settings, **ON_THE_WAY)
    assert [row[2][0] for row in rows] == [label, label.replace(" at step 1", "")]
    assert all(row[2][1].tobytes() != row[1][1].tobytes() for row in rows)


def test_trackers_get_the_picture_the_errors_and_the_norms(train, rows):
    folder = train(**SHORT, **ON_THE_WAY, report_to="tensorboard")
    found = EventAccumulator(str(folder / "logs" / "glance"), size_guidance={"images": 0})
    found.Reload()
    assert [event.step for event in found.Images("validation")] == [1, 2, 3, 4]
    width, height = pictures.comparison_size((32, 32), 3, 1)
    assert all((event.width, event.height) == (width, height) for event in found.Images("validation"))
    for name, column in (("validation/error", 2), ("validation/error_of_base", 1)):
        errors = [event.value for event in found.Scalars(name)]
        assert errors == pytest.approx([float(row[column][2].split()[1]) for row in rows], abs=1e-4)
    norms = [event.value for phase in PHASES for event in found.Scalars(f"{phase}/grad_norm")]
    assert len(norms) == 4 and all(norm > 0 for norm in norms)


# --------------------------------------------------------------------------------------------------------------------
# Nothing that is trained depends on them


TRAJECTORY = {"loss": "trajectory", "instance_image": None, "instance_prompt": "a red ring", "num_trajectories": 1}
CROSSES = {
    "alpha, dropout": ("flux", {"lora_alpha": 7, "lora_dropout": 0.3, "validation_prompt": [PROMPT, "a red ring"]}),
    "folded, fitted, fp8": ("qwen", TRAJECTORY | {"guidance": "fold", "solver": "fitted", "quantization": "fp8"}),
    "nf4": ("sd3", {"quantization": "nf4", "phase": "fast", "num_base_steps": 4, "num_inference_steps": 2}),
    "group offload": ("flux", {"enable_group_offload": True}),
    "fp16, checkpointing": ("qwen", {"mixed_precision": "fp16", "gradient_checkpointing": True}),
}


@pytest.mark.parametrize("name", CROSSES)
def test_the_loras_are_the_same_without_them(name, train, rows, tmp_path):
    base, settings = CROSSES[name]
    with_them = train(base, **SHORT | ON_THE_WAY | settings)
    assert len(files_of(with_them)) == 2 * len(loras_of(with_them)) and len(rows) >= 2
    settings = settings | {"validation_prompt": None, "output_dir": tmp_path / "without"}
    without = train(base, **SHORT | settings)
    assert loras_of(with_them) == loras_of(without) and not (without / "validation").exists()


def test_torch_s_random_state_is_not_theirs(train, rows, monkeypatch):
    """Though the pictures draw from it, as some VAEs do."""
    states, decode, on_the_way = [], AutoencoderKL.decode, Validation.on_the_way

    def noisy(*args, **kwargs):
        torch.rand(1)
        states.append(torch.get_rng_state())
        return decode(*args, **kwargs)

    def watched(*args):
        states.append(torch.get_rng_state())
        on_the_way(*args)
        states.append(torch.get_rng_state())

    monkeypatch.setattr(AutoencoderKL, "decode", noisy)
    monkeypatch.setattr(Validation, "on_the_way", watched)
    train(**SHORT | {"phase": "slow", "max_train_steps": 2}, **ON_THE_WAY)
    before, *inside, after = states[:5]
    assert len(inside) == 3 and torch.equal(before, after) and not torch.equal(before, inside[-1])


def test_after_a_resume_they_are_those_of_the_uninterrupted_run(train, tmp_path):
    """Which the first run may have left without them: they are no setting of a LoRA."""
    whole = train(**SHORT, **ON_THE_WAY)
    first = train(**SHORT, output_dir=tmp_path / "first", checkpointing_steps=1)
    for number, names in ((1, {2, 3, 4}), (3, {4})):
        resumed = tmp_path / f"resumed from {number}"
        resumed.mkdir()
        shutil.copytree(first / "slow", resumed / "slow")
        checkpoint = first / f"checkpoint-{number}"
        train(**SHORT, **ON_THE_WAY, output_dir=resumed, resume_from_checkpoint=checkpoint)
        found = files_of(resumed)
        assert found.keys() == {f"step_{step:04d}.png" for step in names}
        assert found == {name: files_of(whole)[name] for name in found}
        assert loras_of(resumed) == loras_of(whole)
    train(**SHORT, **ON_THE_WAY, output_dir=first, resume_from_checkpoint="latest")  # all is trained already
    assert files_of(first) == {"step_0004.png": files_of(whole)["step_0004.png"]}


# --------------------------------------------------------------------------------------------------------------------
# Nothing is lost to them


def test_nan_is_no_validation_picture_and_no_end(train, nan_vae, caplog):  # noqa: F811
    with pytest.raises(FloatingPointError, match="the preview was not written"):
        train(nan_vae, **SHORT, **ON_THE_WAY)
    lines = [line.getMessage() for line in caplog.records if line.levelname == "WARNING"]
    assert len(lines) == 4
    assert all(
        f"validation picture 1 after {total} steps is left out: " in line for total, line in enumerate(lines, 1)
    )
    assert all("the pixels that its VAE makes of them in float32 are not finite" in line for line in lines)


def test_a_file_in_their_folder_s_place_is_one_line(train, caplog, tmp_path):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "validation").write_text("a file")
    folder = train(**SHORT, **ON_THE_WAY)
    lines = [line.getMessage() for line in caplog.records if line.levelname == "WARNING"]
    assert len(lines) == 4 and all("validation pictures are left out" in line for line in lines)
    assert len(loras_of(folder)) == 2 and (folder / "glance.png").exists()


def test_where_the_accelerator_has_no_room_the_vae_decodes_on_the_cpu(train, monkeypatch, tmp_path):
    decode, calls = AutoencoderKL.decode, []

    def full(self, z, *args, **kwargs):
        calls.append(1)
        if z.shape[0] == 1 and len(calls) % 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return decode(self, z, *args, **kwargs)

    settings = SHORT | {"phase": "slow"}
    slow = files_of(train(**settings, **ON_THE_WAY, output_dir=tmp_path / "roomy"))
    monkeypatch.setattr(AutoencoderKL, "decode", full)
    assert files_of(train(**settings, **ON_THE_WAY, output_dir=tmp_path / "full")) == slow
    assert len(calls) == 12


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"validation_steps": 2}, "--validation_steps: there is nothing to draw; give --validation_prompt TEXT"),
        ({"num_validation_images": 2}, "--num_validation_images: there is nothing to draw"),
        ({"validation_prompt": " ", "validation_steps": 2}, "--validation_steps: there is nothing to draw"),
        (ON_THE_WAY | {"parallel_phases": True}, "--parallel_phases .* leave --validation_steps out"),
        ({"validation_prompt": PROMPT, "validation_steps": 0}, "--validation_steps"),
    ],
)
def test_flags_that_draw_nothing_are_refused(settings, message, train, tmp_path):
    with pytest.raises(REFUSED, match=message):
        train(**settings)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.families
def test_a_base_that_guides_with_a_second_model_is_drawn_at_the_end_alone(train, rows, tmp_path):
    make, side, extra = FAMILIES["ideogram4"]
    settings = SHORT | {"resolution": side, "max_train_steps": 1} | as_flags(extra)
    base = make(tmp_path / "base")
    with pytest.raises(REFUSED, match="--validation_steps: Ideogram4Pipeline guides with a second model"):
        train(base, **settings, **ON_THE_WAY)
    assert not (tmp_path / "output").exists()
    folder = train(base, **settings, validation_prompt=PROMPT)
    assert list(files_of(folder)) == ["step_0002.png"] and rows[0][1][1].tobytes() != rows[0][2][1].tobytes()
