"""Pictures: none of NaN, none that cannot be written, none lost; and --compare's labels."""

import errno
import os
import shutil
import signal
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, flags
from PIL import Image
from safetensors.torch import load_file, save_file
from test_distribution import KINDS, launch
from test_errors import assert_one_line, nan_base  # noqa: F401
from test_families import FAMILIES, load
from test_faults import full_disk

import infer_glance
from glance import command_line as cli
from glance import drawing
from glance.ask import latents as ask_latents
from glance.ask import pipeline as ask
from glance.files import pictures
from glance.files.recipe import WEIGHT_NAME
from glance_utils import PHASES, InputError


# --------------------------------------------------------------------------------------------------------------------
# NaN and infinite numbers


@pytest.fixture(scope="module")
def nan_vae(pipelines, tmp_path_factory):
    """FLUX whose VAE encodes as ever and decodes to NaN, as half precision that overflows does."""
    base = tmp_path_factory.mktemp("nan_vae") / "flux"
    shutil.copytree(pipelines["flux"], base)
    path = base / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["decoder.conv_out.bias"][0] = float("inf")
    save_file(weights, path, metadata={"format": "pt"})
    return base


def assert_not_finite(capsys, call, *words):
    """As the script would: exit code 1, the reason in the last line, no traceback."""
    with pytest.raises(SystemExit) as end:
        cli.run(call)
    written = capsys.readouterr()
    line = written.err.splitlines()[-1].partition(": error: ")[2]
    assert end.value.code == 1 and "Traceback" not in written.err and written.out == ""
    assert all(word in line for word in words) and len(line) < 1000, line


LATENTS = "its final latents are not finite numbers"
NAN = {
    "latents": ({}, ["out.png was not written: Glance, 10 steps", LATENTS, "float32", "or a lower --lora_scale"]),
    "the base's": ({"compare": True}, ["base, 50 steps: " + LATENTS, "--dtype float32"]),
    "in half precision": ({"dtype": "bfloat16"}, ["drawn in --dtype bfloat16; try --dtype float32"]),
}


@pytest.mark.parametrize("row", NAN)
def test_nan_is_no_picture(row, trained, infer, nan_base, tmp_path, capsys):  # noqa: F811
    settings, words = NAN[row]
    assert_not_finite(capsys, lambda: infer(nan_base, lora=trained(), **settings), *words)
    assert list(tmp_path.iterdir()) == []


def test_what_the_vae_alone_makes_infinite_is_no_picture(trained, infer, nan_vae, tmp_path, capsys):
    words = ["its latents are finite, but the pixels that its VAE makes of them in float32 are not finite"]
    assert_not_finite(capsys, lambda: infer(nan_vae, lora=trained()), *words)
    assert list(tmp_path.iterdir()) == []


def test_too_strong_a_lora_is_no_picture(trained, infer, tmp_path, capsys):
    assert_not_finite(capsys, lambda: infer(lora=trained(), lora_scale="1e38"), LATENTS, "lower --lora_scale")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def second_is_nan(monkeypatch):
    """The second picture that infer_glance.py draws ends in NaN."""
    timed, drawn = drawing.timed, []

    def watched(pipe, *args, **kwargs):
        drawn.append(pipe)
        bias = pipe.transformer.proj_out.bias
        if len(drawn) == 2:
            bias.data.fill_(float("nan"))
        try:
            return timed(pipe, *args, **kwargs)
        finally:
            bias.data.zero_()

    monkeypatch.setattr(drawing, "timed", watched)


def test_the_others_are_drawn_and_stay(trained, infer, second_is_nan, tmp_path, capsys):
    assert_not_finite(capsys, lambda: infer(lora=trained(), num_images=3), "out-001.png was not written: Glance")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out-000.png", "out-002.png"]


@pytest.mark.parametrize("name", ["prx_pixel", "wan"])
def test_pixels_without_a_vae_and_videos_are_looked_at_too(name, tmp_path):
    make, size, extra = FAMILIES[name]
    pipe = load(make(tmp_path / name))
    call = ask.call_arguments(pipe, "a red ring", size, size, None, extra) | {"output_type": "pil"}
    call |= {"num_inference_steps": 2, "return_dict": False}

    def draw():
        return np.asarray(ask.first_frames(pipe(**call, generator=torch.Generator().manual_seed(0)))[0])

    stock = draw()
    with ask_latents.finite_pictures(pipe):
        assert np.array_equal(draw(), stock)
    list(pipe.transformer.parameters())[-1].data.fill_(float("nan"))
    with ask_latents.finite_pictures(pipe), pytest.raises(FloatingPointError):
        draw()
    draw()  # afterwards it is the stock pipeline again: black


BASE_DRAWS = {"instance_image": None, "instance_prompt": "a red ring", "num_base_steps": 12, "max_train_steps": 1}


def test_what_the_base_draws_to_train_on(train, nan_base, nan_vae, tmp_path, capsys):  # noqa: F811
    drawn = BASE_DRAWS | {"loss": "trajectory"}
    assert_not_finite(capsys, lambda: train(nan_base, **drawn), "what the base draws", LATENTS, "--mixed_precision")
    assert_not_finite(capsys, lambda: train(nan_vae, **drawn), "the image that the base draws", "its VAE")
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_that_an_encoder_makes_nan_of(pipelines, train, tmp_path, capsys):
    """As T5 in half precision may; before the transformer is loaded."""
    base = tmp_path / "base" / "flux"
    shutil.copytree(pipelines["flux"], base)
    (path,) = (base / "text_encoder_2").glob("*.safetensors")
    weights = load_file(path)
    weights["encoder.final_layer_norm.weight"][0] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    words = ["encoder_hidden_states, which FluxPipeline makes of the prompt, holds NaN", "--mixed_precision"]
    assert_not_finite(capsys, lambda: train(base), *words)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_preview_of_nan_leaves_the_loras(train, nan_vae, tmp_path, capsys):
    words = ["the preview was not written, the LoRAs are", "its VAE", "--mixed_precision"]
    assert_not_finite(capsys, lambda: train(nan_vae, max_train_steps=1), *words)
    output = tmp_path / "output"
    assert all((output / phase / WEIGHT_NAME).exists() for phase in PHASES)
    assert not (output / "glance.png").exists()


# --------------------------------------------------------------------------------------------------------------------
# --compare


TEXTS = [
    "two\nlines\tand a tab",
    "x" * 10_000,
    "word " * 2000,
    "赤い輪 🦊",
    "שלום עולם",
    "e\u0301" * 500,
    "\u2028\u2029",
    "",
]


def test_every_prompt_is_labelled_at_once(tmp_path):
    row = [("Glance", Image.new("RGB", (32, 32), "red"), "1.00 s")] * 3
    start = time.process_time()
    strips = [pictures.draw_row(row, text) for text in TEXTS]
    assert time.process_time() - start < 5  # two minutes each before
    assert {strip.size for strip in strips} == {pictures.comparison_size((32, 32), 3, 1)}
    whole = pictures.stack_rows(strips)
    assert whole.size == pictures.comparison_size((32, 32), 3, len(TEXTS))
    font = pictures.ImageFont.load_default(16)
    for text in TEXTS:
        assert font.getlength(pictures._shortened(text, font, 780)) <= 780
    assert pictures._shortened("a red ring", font, 780) == "a red ring"
    assert pictures._shortened(TEXTS[1], font, 780).startswith("x" * 50)


TOO_LARGE = {"webp": 50, "jpg": 200, "ico": 1}  # rows of 356 pixels


@pytest.mark.parametrize("suffix", TOO_LARGE)
def test_a_comparison_that_the_format_cannot_hold_is_refused_first(
    suffix, trained, infer, monkeypatch, tmp_path, capfd
):
    monkeypatch.setattr(infer_glance, "load_pipeline", None)
    settings = {"lora": trained(), "compare": True, "num_images": TOO_LARGE[suffix]}
    with pytest.raises(InputError) as error:
        infer(**settings, output=tmp_path / f"out.{suffix}")
    assert_one_line(error, "holds no picture of 1084x")
    assert list(tmp_path.iterdir()) == [] and "Maximum" not in capfd.readouterr().err  # libjpeg's own


@pytest.mark.parametrize("name", ["out.xbm", "x" * 251 + ".png", "out-002.png/out.png"])
def test_a_file_that_cannot_be_is_refused_first(name, trained, infer, monkeypatch, tmp_path):
    monkeypatch.setattr(infer_glance, "load_pipeline", None)
    (tmp_path / "out-002.png").write_text("a file")
    with pytest.raises(InputError) as error:
        infer(lora=trained(), output=tmp_path / name)
    assert_one_line(error, "--output")
    assert [path.name for path in tmp_path.iterdir()] == ["out-002.png"]


def test_a_folder_in_the_place_of_the_third_picture(trained, infer, monkeypatch, tmp_path):
    monkeypatch.setattr(infer_glance, "load_pipeline", None)
    (tmp_path / "out-002.png").mkdir()
    with pytest.raises(InputError, match="out-002.png: a folder"):
        infer(lora=trained(), num_images=3)


def test_rows_are_on_the_disk_as_they_come(trained, infer, monkeypatch, tmp_path):
    """Also where Ctrl-C ends the run; the comparison is whole or not there."""
    timed, drawn = drawing.timed, []

    def stopping(*args, **kwargs):
        drawn.append(1)
        if len(drawn) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return timed(*args, **kwargs)

    monkeypatch.setattr(drawing, "timed", stopping)
    with pytest.raises(SystemExit) as end:
        infer(lora=trained(), num_images=3, compare=True)
    assert end.value.code == 130
    assert [path.name for path in tmp_path.iterdir()] == ["out-row-000.png"]
    assert Image.open(tmp_path / "out-row-000.png").size == pictures.comparison_size((32, 32), 4, 1, 2)


def test_rows_of_nan_are_left_out(trained, infer, second_is_nan, tmp_path, capsys):
    """The second picture is that of the base at ten steps."""
    words = ["out-row-000.png was not written: base, 10 steps"]
    assert_not_finite(capsys, lambda: infer(lora=trained(), num_images=2, compare=True), *words)
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]
    assert Image.open(tmp_path / "out.png").size == pictures.comparison_size((32, 32), 4, 1, 2)


@pytest.mark.processes
@pytest.mark.long
def test_two_processes_share_the_rows(trained, pipelines, tmp_path):
    settings = {"pretrained_model_name_or_path": pipelines["flux"], "lora": trained(), "compare": True}
    settings |= {"prompt": ["a red ring\nbelow", "a blue ring", "a dog"], "output": tmp_path / "out.png"}
    done = launch(KINDS["ddp"], 2, ROOT / "infer_glance.py", *flags(**settings))
    assert done.returncode == 0, done.stderr[-5000:]
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]
    assert Image.open(tmp_path / "out.png").size == pictures.comparison_size((32, 32), 4, 3, 2)


# --------------------------------------------------------------------------------------------------------------------
# The disk


def test_a_full_disk_keeps_what_was_drawn(trained, infer, monkeypatch, tmp_path, capsys):
    save_frames, saved = pictures.save_frames, []

    def save(*args):
        saved.append(args)
        if len(saved) == 1:
            return save_frames(*args)
        with full_disk(500):
            return save_frames(*args)

    monkeypatch.setattr(pictures, "save_frames", save)
    monkeypatch.setattr(sys, "argv", ["infer_glance.py"])
    with pytest.raises(SystemExit) as end:
        cli.run(lambda: infer(lora=trained(), num_images=3))
    line = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and os.strerror(errno.EFBIG) in line and "out-001.png" in line
    assert [path.name for path in tmp_path.iterdir()] == ["out-000.png"]


def test_an_output_folder_that_vanishes_is_made_again(trained, infer, monkeypatch, tmp_path):
    timed = drawing.timed

    def vanish(*args, **kwargs):
        shutil.rmtree(tmp_path / "new", ignore_errors=True)
        return timed(*args, **kwargs)

    monkeypatch.setattr(drawing, "timed", vanish)
    assert Image.open(infer(lora=trained(), output=tmp_path / "new" / "out.png")).size == (32, 32)
