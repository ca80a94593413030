"""Which run a run is: what is compared, and where --resume_from_checkpoint latest begins."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import contents, flags, run_train
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import train_glance_lora
from glance import base as load_base
from glance.files import checkpoints
from glance.files.recipe import WEIGHT_NAME
from glance.shared_flags import CALL_FLAGS
from glance.training import flags as training_flags
from glance.training import trajectories
from glance_utils import InputError


def parse(base="base", **settings):
    return train_glance_lora.parse_args(flags(pretrained_model_name_or_path=base, **settings))


def assert_one_line(error: pytest.ExceptionInfo, *words):
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


# --------------------------------------------------------------------------------------------------------------------
# What makes two runs the same


def test_every_flag_is_compared_or_known_not_to_matter():
    """Also one that is added later: it is compared until somebody says that it cannot change a LoRA."""
    known = {action.dest for action in training_flags.make_parser()._actions} - {"help"}
    assert checkpoints.NOT_COMPARED - known == {"custom_timesteps"}  # made of two flags
    flags_alone = known - vars(parse()).keys()
    assert flags_alone == {"use_8bit_adam", *CALL_FLAGS}  # what they say is in optimizer and pipeline_kwargs
    assert known - checkpoints.NOT_COMPARED >= {"seed", "variant", "mixed_precision", "quantization", "lr_scheduler"}
    assert checkpoints.NOT_DRAWN <= known and not checkpoints.NOT_DRAWN & checkpoints.NOT_COMPARED
    teacher = SimpleNamespace(call={}, timesteps=[])
    settings = checkpoints.run_settings(parse(), {}, "base", "pair", 1)
    digest = trajectories.settings_digest(parse(), teacher, "base", ["a"])
    assert trajectories.settings_digest(parse(), teacher, "another", ["a"]) != digest
    for name in known - flags_alone - {"pretrained_model_name_or_path", "revision", "variant", "train_batch_size"}:
        other = parse().replace(**{name: "of another run"})
        compared = name not in checkpoints.NOT_COMPARED
        assert (checkpoints.run_settings(other, {}, "base", "pair", 1) != settings) == compared, name
        drawn = compared and name not in checkpoints.NOT_DRAWN
        assert (trajectories.settings_digest(other, teacher, "base", ["a"]) != digest) == drawn, name
    for other in ({"base": "another"}, {"learned": "another"}, {"processes": 2}):
        given = {"base": "base", "learned": "pair", "processes": 1} | other
        assert checkpoints.run_settings(parse(), {}, **given) != settings
    shared = [checkpoints.run_settings(parse(train_batch_size=4 // n), {}, "base", "pair", n) for n in (1, 2, 4)]
    assert shared[0] == shared[1] == shared[2] != settings
    assert json.dumps(checkpoints.plain({"lora_alpha": 4.0, "x": 0.5})) == '{"lora_alpha": 4, "x": 0.5}'


def test_a_base_is_known_by_what_its_files_hold(pipelines, tmp_path):
    """Wherever it lies, whenever it was copied there; not by names, sizes or dates."""
    name, weights = load_base.identify(str(pipelines["flux"])), "transformer/diffusion_pytorch_model.safetensors"
    copy = tmp_path / "model[1]"
    shutil.copytree(pipelines["flux"], copy)
    os.utime(copy / weights, (1, 1))
    (copy / "README.md").write_text("a note")
    (copy / "transformer" / ".DS_Store").write_text("not the model's")
    assert load_base.identify(str(copy)) == name
    stat, tensors = (copy / weights).stat(), load_file(copy / weights)
    tensors["proj_out.weight"][0, 0] += 1
    save_file(tensors, copy / weights, {"format": "pt"})
    os.utime(copy / weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (copy / weights).stat().st_size == stat.st_size and load_base.identify(str(copy)) != name


def test_every_part_of_a_large_file_counts(pipelines, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(pipelines["flux"], copy)
    large = copy / "transformer" / "large.safetensors"
    large.write_bytes(bytes(2**25))
    name = load_base.identify(str(copy))
    for place in (0, 2**24 + 12345, 2**25 - 2**17):
        with open(large, "r+b") as file:
            file.seek(place)
            file.write(b"x" * 2**17)  # a tensor of 128 kB
        assert name != (name := load_base.identify(str(copy)))


def test_a_hub_id_is_known_by_the_commit_that_was_loaded(pipelines, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--tiny"
    for commit in ("a" * 40, "b" * 40):
        shutil.copytree(pipelines["flux"], repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    assert load_base.identify("someone/tiny") == f"someone/tiny at {'a' * 40}"
    (repository / "refs" / "main").write_text("b" * 40)
    assert load_base.identify("someone/tiny") == f"someone/tiny at {'b' * 40}"
    assert load_base.identify("someone/tiny", revision="a" * 40) == f"someone/tiny at {'a' * 40}"


@pytest.fixture(scope="module")
def stopped(pipelines, pair, tmp_path_factory):
    """A run of the slow phase with a checkpoint, its LoRA written, on a base of its own."""
    root = tmp_path_factory.mktemp("stopped")
    shutil.copytree(pipelines["flux"], root / "base")
    where = {"pretrained_model_name_or_path": root / "base", "instance_image": pair, "output_dir": root / "output"}
    return run_train(where, {"phase": "slow", "checkpointing_steps": 3, "train_batch_size": 2})


def test_a_resumed_run_on_other_weights_is_refused(stopped, train, tmp_path, monkeypatch):
    """The same name and the same sizes; before anything is loaded."""
    base, output = tmp_path / "base", shutil.copytree(stopped, tmp_path / "output")
    shutil.copytree(stopped.parent / "base", base)
    settings = {"phase": "slow", "train_batch_size": 2, "resume_from_checkpoint": output / "checkpoint-3"}
    (output / WEIGHT_NAME).unlink()
    train(base, **settings)  # a copy in another folder is the same base
    tensors = [load_file(path / WEIGHT_NAME) for path in (output, stopped)]
    assert all(torch.equal(value, tensors[1][name]) for name, value in tensors[0].items())
    (weights,) = (base / "transformer").glob("*.safetensors")
    changed = load_file(weights)
    changed["proj_out.weight"] *= 1.01
    save_file(changed, weights, {"format": "pt"})
    monkeypatch.setattr(train_glance_lora, "prepare_pipeline", lambda *rest: pytest.fail("the base was loaded"))
    with pytest.raises(InputError) as error:
        train(base, **settings)
    assert_one_line(error, "its base_model is files ", "use the same")
    changes = {"train_batch_size": "total_batch_size is 2", "variant": "variant is None"}
    for change, word in (changes | {"instance_prompt": "its image or captions are not this run's"}).items():
        with pytest.raises(InputError) as error:
            train(stopped.parent / "base", **settings | {change: 1})
        assert_one_line(error, word)


def test_a_checkpoint_of_an_earlier_version_is_one_line(stopped, train, tmp_path):
    old = tmp_path / "checkpoint-3"
    shutil.copytree(stopped / "checkpoint-3", old)
    state = torch.load(old / checkpoints.STATE_NAME, weights_only=True)
    del state["settings"]["total_batch_size"]
    torch.save(state | {"settings": state["settings"] | {"train_batch_size": 2}}, old / checkpoints.STATE_NAME)
    with pytest.raises(InputError) as error:
        train(stopped.parent / "base", phase="slow", train_batch_size=2, resume_from_checkpoint=old)
    assert_one_line(error, "total_batch_size", "another version wrote it", "start anew")


# --------------------------------------------------------------------------------------------------------------------
# --resume_from_checkpoint latest


def test_latest_starts_anew_where_there_is_nothing(stopped, train, tmp_path, caplog):
    """One command line for a job that is restarted: nothing there, leftovers of a killed run, then all of it."""
    settings = {"phase": "slow", "train_batch_size": 2, "resume_from_checkpoint": "latest"}
    output = tmp_path / "output"
    (output / "checkpoint-2").mkdir(parents=True)
    (output / "checkpoint-2" / ".training_state.pt.5").write_text("half")
    (output / ".README.md.12").write_text("half")
    (output / "instance.png").write_bytes(b"of the killed run")
    with caplog.at_level("INFO"):
        train(stopped.parent / "base", **settings)
    (line,) = [message for message in caplog.messages if "starting anew" in message]
    assert line.endswith(f"--resume_from_checkpoint latest: {output} holds nothing to go on from; starting anew")
    content = contents(output)
    assert content == {name: value for name, value in contents(stopped).items() if "checkpoint" not in name}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_glance_lora, "train_phase", lambda *rest: pytest.fail("it is trained already"))
        train(stopped.parent / "base", **settings)
    assert contents(output) == content
    with pytest.raises(InputError, match="no training_state.pt there"):
        train(stopped.parent / "base", **settings | {"resume_from_checkpoint": output / "checkpoint-9"})


def test_latest_does_not_write_over_another_runs(stopped, train, tmp_path):
    """Nor does it leave the other layout's checkpoints unseen."""
    content, settings = contents(stopped), {"output_dir": stopped, "resume_from_checkpoint": "latest"}
    (stopped / "checkpoint-3").rename(stopped / "kept")
    with pytest.raises(InputError) as error:
        train(stopped.parent / "base", phase="slow", **settings)
    (stopped / "kept").rename(stopped / "checkpoint-3")
    assert_one_line(error, "latest", "is of another run", "--output_dir")
    assert contents(stopped) == content
    shutil.copytree(stopped / "checkpoint-3", tmp_path / "output" / "fast" / "checkpoint-3")
    with pytest.raises(InputError) as error:
        train(stopped.parent / "base", resume_from_checkpoint="latest")
    assert_one_line(error, "latest", "give --parallel_phases")
