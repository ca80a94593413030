"""What a run asks of services: the hub, which may refuse it after training; trackers, which may break at any time."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from huggingface_hub import HfApi, ModelCard
from test_runs import assert_one_line, files_in

from glance import command_line as cli
from glance.ask import pipeline as ask
from glance.files import faults
from glance.files.recipe import WEIGHT_NAME, read_recipe
from glance.training import model_card
from glance_utils import PHASES, InputError


PUSHED = {"README.md", "instance.png", "glance.png", *(f"{phase}/{WEIGHT_NAME}" for phase in PHASES)}
PUSHED |= {"sampler.json", "comfyui.json", "scheduler/scheduler_config.json"}


# --------------------------------------------------------------------------------------------------------------------
# The hub


@pytest.fixture
def hub(monkeypatch):
    """The names of what huggingface_hub would upload; nothing leaves this machine."""
    uploaded = []

    def upload(repo_id, folder_path, **patterns):
        additions = HfApi()._prepare_upload_folder_additions(folder_path, "", **patterns)
        uploaded.extend(addition.path_in_repo for addition in additions)

    monkeypatch.setattr(model_card, "create_repo", lambda name, **rest: SimpleNamespace(repo_id=f"someone/{name}"))
    monkeypatch.setattr(model_card, "upload_folder", upload)
    monkeypatch.setattr(HfApi, "_validate_yaml", lambda self, content, **rest: None)  # which the hub itself does
    return uploaded


def test_what_a_run_has_made_is_pushed_and_nothing_else(hub, train, tmp_path):
    output = tmp_path / "output"
    (output / "fast").mkdir(parents=True)
    (output / "notes.txt").write_text("the user's own")
    (output / "fast" / "x.safetensors").write_text("another's")
    train(push_to_hub=True, checkpointing_steps=5, report_to="tensorboard", grid="even", solver="fitted")
    assert set(hub) == PUSHED
    assert {name.split("/")[0] for name in files_in(output) if name not in hub} == {
        *("checkpoint-5", "checkpoint-10", "fast", "logs", "notes.txt", "loss.csv", "loss.png", faults.TRAJECTORIES)
    }
    hub.clear()
    train(push_to_hub=True, phase="slow", hub_model_id="a/b", output_dir=output)  # where both phases were before
    assert set(hub) == {"README.md", "instance.png", WEIGHT_NAME}


def test_a_refused_push_loses_nothing(train, tmp_path, monkeypatch, capsys):
    """The upload is the real one, which finds no network."""
    monkeypatch.setattr(model_card, "create_repo", lambda name, **rest: SimpleNamespace(repo_id=f"someone/{name}"))
    with pytest.raises(SystemExit) as end:
        cli.run(lambda: train(push_to_hub=True))
    output, error = tmp_path / "output", capsys.readouterr().err
    line = error.splitlines()[-1]
    assert end.value.code == 2 and "Traceback" not in error
    assert "--push_to_hub someone/output: " in line and f"all of it is in {output}" in line
    assert line.endswith(f"hf upload someone/output {output} . --include {' '.join(sorted(PUSHED, key=line.rindex))}")
    assert set(files_in(output)) == PUSHED | {"loss.csv", "loss.png"}


@pytest.mark.parametrize(
    "base, name",
    [
        ("black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-dev"),
        ("/models/a: b #1", None),
        ("{here}/model", None),
        ("./model", None),
        ("model", None),
        ("some/model", None),
    ],
)
def test_the_card_names_a_base_of_the_hub_or_none(base, name, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("model", "some/model"):
        Path(folder).mkdir(parents=True)
    recipe = read_recipe(trained() / "slow" / WEIGHT_NAME)
    args = SimpleNamespace(pretrained_model_name_or_path=base.replace("{here}", str(tmp_path)))
    model_card.write_model_card(args, tmp_path, [recipe], "a red ring")
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.base_model == name and data.library_name == "diffusers" and "lora" in data.tags


# --------------------------------------------------------------------------------------------------------------------
# Trackers


class Service(GeneralTracker):
    """A tracker that wants a login, and can lose its connection."""

    name, requires_logging_directory, tracker = "tensorboard", False, None
    fails, logged = "", []

    class Refused(Exception):
        pass

    def __init__(self, run_name, **kwargs):
        super().__init__()

    def act(self, where, value=None):
        if self.fails == where:
            raise self.Refused(f"\nno key in {where}\nlog in first")
        self.logged.append(value)

    def start(self):
        self.act("start")

    def store_init_configuration(self, values):
        self.act("store")

    def log(self, values, step=None, **kwargs):
        self.act("log" if step == 3 else "", step)

    def finish(self):
        self.act("finish")


@pytest.fixture
def service(monkeypatch):
    """service(where): the tracker fails there."""

    def call(where):
        monkeypatch.setattr(Service, "fails", where)
        monkeypatch.setattr(Service, "logged", [])
        monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "tensorboard", Service)
        return Service

    return call


@pytest.mark.parametrize("how", ["file", "start", "store"])
def test_a_tracker_that_cannot_begin_is_one_line_before_the_base_is_loaded(how, train, service, monkeypatch, tmp_path):
    if how == "file":
        (tmp_path / "output").mkdir()
        (tmp_path / "output" / "logs").write_text("a file")
    else:
        service(how)
    before = files_in(tmp_path)
    monkeypatch.setattr(ask, "load_pipeline", lambda *rest, **where: pytest.fail("the base was loaded"))
    with pytest.raises(InputError) as error:
        train(report_to="tensorboard")
    assert_one_line(error, "--report_to tensorboard: it cannot begin", "logs" if how == "file" else "no key in")
    assert files_in(tmp_path) == before


def test_a_tracker_leaves_nothing_of_a_run_that_does_not_begin(train, tmp_path):
    with pytest.raises(InputError, match="such as 28x28"):
        train(report_to="tensorboard", resolution=30)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["log", "finish"])
def test_a_tracker_that_fails_later_does_not_end_the_run(where, train, service, trained, caplog):
    tracker = service(where)
    assert files_in(train(report_to="tensorboard", learning_rate=3e-2)) == files_in(trained())
    steps = [step for step in tracker.logged if step is not None]
    assert steps == ([1, 2] if where == "log" else [*range(1, 11)])
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert line.endswith(f"--report_to: nothing more is logged (Refused: no key in {where})")
