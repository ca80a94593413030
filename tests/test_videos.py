"""Videos: every frame is drawn, written and compared."""

import importlib.util

import imageio.v3
import numpy as np
import pytest
import torch
from conftest import REFUSED, run_train
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageSequence
from test_families import FAMILIES, load

from glance.ask import pipeline as ask
from glance.ask.latents import ask_layout
from glance.files import pictures
from glance.files.image_file import read_frames
from glance.files.pipeline_images import read_pipeline_images
from glance.files.recipe import WEIGHT_NAME, read_recipe
from glance.training.prepare import encode_frames
from glance_utils import InputError


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    return FAMILIES["wan"][0](tmp_path_factory.mktemp("wan") / "base")


@pytest.fixture(scope="module")
def video_pair(wan, tmp_path_factory):
    return train_on_frames(wan, tmp_path_factory.mktemp("pair") / "output")


def train_on_frames(base, output, **others):
    settings = {"resolution": 32, "num_frames": 5, "loss": "trajectory", "instance_prompt": "a red ring rolls"}
    settings |= {"num_base_steps": 6, "num_inference_steps": 2, "num_trajectories": 1, "max_train_steps": 1}
    return run_train({"pretrained_model_name_or_path": base, "output_dir": output}, settings | others)


def frames_in(path) -> list[np.ndarray]:
    if path.suffix == ".mp4":
        return list(imageio.v3.imread(path, plugin="FFMPEG"))
    with Image.open(path) as file:
        return [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(file)]


@pytest.mark.families
def test_all_frames_are_written(wan, video_pair, infer, tmp_path, caplog):
    shown = {}
    for ending in ("png", "webp", "gif", "mp4", "jpg"):
        path = infer(wan, lora=video_pair, output=tmp_path / f"out.{ending}", fps=8)
        shown[ending] = frames_in(path)
        told = [record.getMessage() for record in caplog.records if "1 of 5 frames" in record.getMessage()]
        assert len(told) == (ending == "jpg")
    assert {ending: len(frames) for ending, frames in shown.items()} == dict.fromkeys(shown, 5) | {"jpg": 1}
    assert not any(np.array_equal(one, other) for one, other in zip(shown["png"], shown["png"][1:]))
    exact = np.stack(shown["png"]).astype(float)
    for ending in ("webp", "gif", "mp4"):
        frames = np.stack(shown[ending])
        assert 2 * np.abs(frames - exact).mean() < np.abs(frames - np.roll(exact, 1, axis=0)).mean(), ending
    with Image.open(tmp_path / "out.webp") as file:
        file.seek(1)
        file.load()
        assert file.info["duration"] == 125
    assert imageio.v3.immeta(tmp_path / "out.mp4", plugin="FFMPEG")["fps"] == 8


@pytest.mark.families
def test_the_number_of_frames_is_the_callers(wan, video_pair, infer, tmp_path):
    assert len(frames_in(infer(wan, lora=video_pair, output=tmp_path / "out.webp", num_frames=9))) == 9
    assert len(frames_in(infer(wan, lora=video_pair, output=tmp_path / "one.png", num_frames=1))) == 1


@pytest.mark.families
def test_videos_are_compared_frame_by_frame(wan, video_pair, infer, tmp_path):
    path = infer(wan, lora=video_pair, output=tmp_path / "out.webp", compare=True, prompt=["a ring", "a disc"])
    frames = frames_in(path)
    height, width, _ = frames[0].shape
    assert len(frames) == 5 and (width, height) == pictures.comparison_size((32, 32), 4, 2, details=2)
    assert not np.array_equal(frames[0], frames[4]) and [file.name for file in tmp_path.iterdir()] == ["out.webp"]


def test_a_video_needs_its_writer(trained, infer, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    missing = lambda name, *others: None if name == "imageio_ffmpeg" else find(name, *others)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", missing)
    with pytest.raises(REFUSED, match=r"\.mp4 is written by imageio; pip install imageio imageio-ffmpeg"):
        infer(lora=trained(), output=tmp_path / "out.mp4")
    assert not list(tmp_path.iterdir())


def test_a_pipeline_of_pictures_has_no_frames(trained, infer):
    with pytest.raises(REFUSED, match="FluxPipeline takes no 'num_frames'"):
        infer(lora=trained(), num_frames=5)


@pytest.mark.families
def test_the_name_of_the_argument_is_the_pipelines(infer, tmp_path):
    """Sana's video pipeline calls them `frames`."""
    base = FAMILIES["sana_video"][0](tmp_path / "sana")
    kwargs = '{"use_resolution_binning": false}'
    output = train_on_frames(base, tmp_path / "output", pipeline_kwargs=kwargs)
    assert len(frames_in(infer(base, lora=output, output=tmp_path / "out.webp"))) == 5
    assert len(frames_in(infer(base, lora=output, output=tmp_path / "nine.webp", num_frames=9))) == 9


# --------------------------------------------------------------------------------------------------------------------
# Learned from


def clip(path, frames: int, side: int = 40):
    """A square that moves, as a video's file."""
    pictures_of_it = []
    for number in range(frames):
        frame = Image.new("RGB", (side, side), "navy")
        frame.paste("orange", (4 * number, 8, 4 * number + 12, 20))
        pictures_of_it.append(frame)
    pictures.save_frames(pictures_of_it, path, 8)
    return path


@pytest.mark.families
@pytest.mark.parametrize("ending", ["webp", "mp4", "gif"])
def test_the_flow_loss_learns_a_video(ending, wan, train, infer, tmp_path, caplog):
    settings = {"resolution": 32, "num_frames": 5, "instance_prompt": "a square moves", "max_train_steps": 2}
    settings |= {"learning_rate": 1e-2, "instance_image": clip(tmp_path / f"clip.{ending}", 7)}
    output = train(wan, output_dir=tmp_path / "output", **settings)
    assert read_recipe(output / "slow" / WEIGHT_NAME).pipeline_kwargs == {"num_frames": 5}
    assert len(frames_in(infer(wan, lora=output, output=tmp_path / "out.webp"))) == 5
    if ending != "mp4":  # whose frames depend on those around them
        settings |= {"instance_image": clip(tmp_path / f"other.{ending}", 5)}  # the same, as far as it is learned
        with caplog.at_level("INFO"):
            train(wan, output_dir=tmp_path / "output", **settings, resume_from_checkpoint="latest")
        assert "slow: finished before" in caplog.text


@pytest.mark.families
def test_each_frame_of_a_video_is_encoded(wan, tmp_path):
    pipe = load(wan)
    call = ask.call_arguments(pipe, "a square moves", 32, 32, None, {"num_frames": 5})
    layout = ask_layout(pipe, **call)
    frames, _ = read_frames(clip(tmp_path / "clip.webp", 5, 32), "clip", 5)
    latents = encode_frames(pipe, frames, layout, call)
    decoded = pipe.vae.encode(torch.stack([VaeImageProcessor().preprocess(frame)[0] for frame in frames], 1)[None])
    stock = decoded.latent_dist.mode()
    assert (layout.z_from(latents) - stock).abs().max() < 1e-5


@pytest.mark.families
@pytest.mark.parametrize("frames", [1, 3])
def test_too_few_frames_are_refused(frames, wan, train, tmp_path):
    path = clip(tmp_path / "clip.webp", frames)
    with pytest.raises(REFUSED, match=f"it holds {frames} of the 5 frames that are drawn; give --num_frames {frames}"):
        train(wan, resolution=32, num_frames=5, instance_image=path, instance_prompt="a square")


@pytest.mark.families
def test_of_a_video_one_frame_is_learned_unless_more_are_asked(wan, train, tmp_path, caplog):
    path = clip(tmp_path / "clip.webp", 3)
    output = train(wan, resolution=32, instance_image=path, instance_prompt="a square", max_train_steps=1)
    assert read_recipe(output / "slow" / WEIGHT_NAME).pipeline_kwargs == {"num_frames": 1}
    assert "it holds several pictures; the first is taken" in caplog.text


def test_a_video_beside_the_prompt_is_all_of_its_frames(tmp_path):
    path = clip(tmp_path / "clip.webp", 4)
    files = []
    for number, frame in enumerate(read_frames(path, "clip", 4)[0]):
        frame.save(tmp_path / f"{number}.png")
        files.append(str(tmp_path / f"{number}.png"))
    whole, listed = (read_pipeline_images({"video": given})["video"] for given in (str(path), files))
    assert [frame.tobytes() for frame in whole] == [frame.tobytes() for frame in listed]
    assert read_pipeline_images({"image": str(path)})["image"].tobytes() == whole[0].tobytes()


def test_a_video_that_is_none_is_one_line(tmp_path):
    (tmp_path / "clip.mp4").write_bytes(b"no video" * 100)
    with pytest.raises(InputError, match=r"clip\.mp4: (not a readable image|it holds no picture)") as error:
        read_pipeline_images({"video": str(tmp_path / "clip.mp4")})
    assert "\n" not in str(error.value)
