"""What a run shows: its settings at once, its stages, its losses by round, what lies where; whose LoRA it would
write over."""

import logging
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, flags
from PIL import Image
from safetensors.torch import load_file

import train_glance_lora
from glance.files.recipe import WEIGHT_NAME, read_recipe
from glance.training import flags as training_flags
from glance.training import log, stages, summary
from glance.training.loss_chart import draw_chart, gridlines
from glance_utils import PHASES, InputError


# --------------------------------------------------------------------------------------------------------------------
# What it says


def test_what_flags_alone_say_comes_before_torch():
    code = """
import sys
from glance.training import flags, summary
summary.device_name = lambda: sys.exit("torch" in sys.modules)
summary.begin(flags.parse(sys.argv[1:]))
"""
    settings = flags(config="configs/demo.yaml", loss="trajectory", guidance_scale=2.5)
    done = subprocess.run([sys.executable, "-c", code, *settings], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for words in (
        "Base = demo/model, FluxPipeline",
        "Loss = trajectory, auto grid, fitted solver, guidance 2.5: keep",
        "LoRA = rank 8, 60 steps of adamw, learning rate 1e-05",
        "Output = output/demo",
    ):
        assert words in done.stderr


def test_the_device_and_what_is_computed_in(caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # accelerate launch's
    args = training_flags.parse(flags(pretrained_model_name_or_path="somebody/unknown", quantization="nf4"))
    summary.begin(args)
    assert "Base = somebody/unknown\n" in caplog.text  # its class is not on this machine
    device, _ = caplog.messages[-2:]
    assert device.startswith("  Device = cpu, ") and device.endswith("; bfloat16, quantization nf4")
    caplog.clear()
    monkeypatch.setenv("RANK", "1")
    summary.begin(args)
    assert caplog.messages == []


def test_a_run_from_its_first_line_to_its_last(train, caplog, capsys):
    caplog.set_level(logging.INFO)
    caption = {"instance_image": None, "instance_prompt": "a", "validation_prompt": "b"}
    output = train(loss="trajectory", num_base_steps=20, num_trajectories=1, **caption)
    said = caplog.messages
    assert not any("RANK" in message for message in said)
    (adapted,) = [message for message in said if "Adapted" in message]
    lora = load_file(output / "slow" / WEIGHT_NAME)
    count = sum(tensor.numel() for tensor in lora.values())
    assert adapted == f"  Adapted = {len(lora) // 2} layers, {count:,} trainable parameters in each LoRA"
    entered = ["Loading encoders", "Encoding", "Loading transformer", "Drawing", "Choosing"]
    entered += ["Training slow", "Training fast", "Preview", "Validation", "Preview"]
    assert [message for message in said if message in entered] == entered
    (taken,) = [message for message in said if message.startswith("  Sampler = ")]
    grid, timesteps = (
        read_recipe(output / "slow" / WEIGHT_NAME).grid,
        read_recipe(output / "slow" / WEIGHT_NAME).timesteps,
    )
    assert taken.startswith(f"  Sampler = {grid} grid, ") and taken.endswith(" of 20") and timesteps[0] == 1000
    positions = taken.split("positions ")[1].removesuffix(" of 20").replace(" |", "")
    assert positions.split()[0] == "1"  # counted from 1
    ranked = [message for message in said if "solver: error" in message]
    assert len(ranked) == 4 and ranked[0].endswith(f"positions {positions}")
    assert f"  In {output}:" in said
    done = said[said.index("***** Done *****") :]
    for name in dict.fromkeys(name.lower() for name in entered):
        assert any(line.startswith(f"  {name} ") for line in done), name
    # What --num_model_calls and --export write beside.
    written = [name for name in summary.WHAT if not name.startswith("calls.") and name != "comfyui"]
    for name in ("slow/" + WEIGHT_NAME, "fast/" + WEIGHT_NAME, *written):
        assert any(line.startswith(f"    {name} ") for line in done), name
    assert "infer_glance.py --lora" in capsys.readouterr().out.splitlines()[-1]


def test_stages(caplog):
    caplog.set_level(logging.INFO)
    stages.enter("nothing is measured here")
    with stages.measured(torch.device("cpu")) as measurement:
        stages.enter("loading")
        content = torch.ones(10**7)
        stages.enter("drawing")
        stages.enter("loading")
        header, *lines = measurement.report()
        found = measurement.stages
    assert caplog.messages == ["Loading", "Drawing", "Loading"]
    assert "resident set" in header and [line.split()[0] for line in lines] == ["starting", "loading", "drawing"]
    assert found["loading"].peak > content.nbytes and all(stage.seconds > 0 for stage in found.values())


# --------------------------------------------------------------------------------------------------------------------
# Losses


def test_a_mean_is_over_all_timesteps():
    losses = log.LossLog("slow", [1000.0, 900.0])
    assert losses.add(1, [0], [0.5]) == 0.5 and losses.last_round() is None
    losses.add(2, [1], [0.1])
    assert losses.last_round() == pytest.approx(0.3)
    losses.add(3, [1, 0], [0.2, 0.4])
    assert losses.last_round() == pytest.approx(0.3)
    assert losses.first_and_last() == "1000: 0.5 -> 0.4, 900: 0.1 -> 0.2"
    other = log.LossLog("slow", [1000.0, 900.0])
    other.restore(losses.state())
    assert (other.rows(), other.last_round()) == (losses.rows(), losses.last_round())
    assert losses.rows()[-1] == ("slow", 3, 1000.0, 0.4)


ROWS = [("slow", 1, 1000.0, 0.1 + 0.2), ("slow", 2, 900.5, 0.0), ("fast", 1, 20.0, 12.5)]


def test_losses_are_read_as_they_were_written(tmp_path):
    log.write_losses(tmp_path, ROWS)
    assert log.read_losses(tmp_path, list(PHASES)) == ROWS
    assert log.read_losses(tmp_path, ["fast"]) == ROWS[2:]
    assert Image.open(tmp_path / log.CHART).size[0] > 1000
    for text in ("", "a,b\n", "phase,step,timestep,loss\nslow,1\n", "phase,step,timestep,loss\nslow,x,1,1\n", "\0"):
        (tmp_path / "loss.csv").write_text(text)
        assert log.read_losses(tmp_path, list(PHASES)) == []
    assert log.read_losses(tmp_path / "nowhere", list(PHASES)) == []


def test_losses_of_both_halves_become_one_file(tmp_path):
    """Also where one of them had been finished before."""
    for phase in PHASES:
        (tmp_path / phase).mkdir()
        log.write_losses(tmp_path / phase, [row for row in ROWS if row[0] == phase])
    log.join_losses(tmp_path)
    log.write_losses(tmp_path / "fast", ROWS[2:])
    log.join_losses(tmp_path)
    assert log.read_losses(tmp_path, list(PHASES)) == ROWS
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["loss.csv", "loss.png"]


def test_a_chart_of_any_losses():
    assert draw_chart([("fast", 1, 20.0, 0.0)]).size == draw_chart(ROWS[2:]).size
    assert gridlines(-1.0, 0.0) == pytest.approx([0.1, 0.2, 0.5, 1.0])
    chart = draw_chart([("slow", step, 1000.0, 0.5**step) for step in range(1, 9)])
    assert len(chart.getcolors(10**6)) > 10


def test_losses_go_on_in_a_resumed_run(train, tmp_path, caplog):
    """Through a checkpoint of the second phase, in a folder where the first is finished."""
    caplog.set_level(logging.INFO)
    whole = train(output_dir=tmp_path / "whole", max_train_steps=3)
    output = train(max_train_steps=3, checkpointing_steps=2)
    wanted = (whole / "loss.csv").read_bytes()
    assert (output / "loss.csv").read_bytes() == wanted and wanted.count(b"\n") == 7
    (output / "fast" / WEIGHT_NAME).unlink()
    log.write_losses(output, log.read_losses(output, ["slow"]))  # as when it was stopped
    train(max_train_steps=3, checkpointing_steps=2, resume_from_checkpoint=output / "checkpoint-5")
    assert (output / "loss.csv").read_bytes() == wanted
    assert "Resuming from checkpoint-5 (fast, step 2 of 3)" in caplog.messages


# --------------------------------------------------------------------------------------------------------------------
# What it would write over


def test_a_lora_of_other_settings_is_not_written_over(train, tmp_path, monkeypatch):
    settings = {"phase": "slow", "max_train_steps": 2}
    output = train(**settings)
    content = (output / WEIGHT_NAME).read_bytes()
    train(**settings, checkpointing_steps=1)  # the same again; when it saves cannot change it
    assert (output / WEIGHT_NAME).read_bytes() == content
    with monkeypatch.context() as patch:
        patch.setattr(train_glance_lora, "prepare_pipeline", lambda *rest: pytest.fail("the base was loaded"))
        for change in ({"learning_rate": 1e-3}, {"phase": "fast"}, {"width": 48}, {"instance_prompt": "another"}):
            with pytest.raises(InputError) as error:
                train(**settings | change)
            message = str(error.value)
            assert "\n" not in message and str(output / WEIGHT_NAME) in message
            assert "--overwrite_output_dir" in message and (output / WEIGHT_NAME).read_bytes() == content
    train(**settings | {"learning_rate": 1e-3}, overwrite_output_dir=True)
    assert (output / WEIGHT_NAME).read_bytes() != content
    (output / WEIGHT_NAME).write_bytes(b"another trainer's")
    with pytest.raises(InputError, match="--overwrite_output_dir"):
        train(**settings)


def test_latest_writes_over_another_runs_where_told(train):
    settings = {"phase": "slow", "max_train_steps": 2, "resume_from_checkpoint": "latest"}
    output = train(**settings)
    content = (output / WEIGHT_NAME).read_bytes()
    with pytest.raises(InputError, match="--overwrite_output_dir"):
        train(**settings, learning_rate=1e-3)
    train(**settings, learning_rate=1e-3, overwrite_output_dir=True)
    assert (output / WEIGHT_NAME).read_bytes() != content
