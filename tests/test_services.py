"""What a run asks of services: the hub, which may refuse it after training; trackers, which may break at any time."""

import http.server
import json
import os
import subprocess
import threading

import huggingface_hub
import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from huggingface_hub import constants
from huggingface_hub.hf_api import api as hf_api
from test_runs import assert_one_line, contents

from glance import command_line as cli
from glance.ask import pipeline as ask
from glance.files import faults
from glance.files.recipe import WEIGHT_NAME
from glance_utils import PHASES, InputError


PAIR = {f"{phase}/{WEIGHT_NAME}" for phase in PHASES}
PUSHED = {"README.md", "instance.png", "glance.png", "loss.png", *PAIR}
PUSHED |= {"sampler.json", "comfyui.json", "scheduler/scheduler_config.json"}


# --------------------------------------------------------------------------------------------------------------------
# The hub


class Hub(http.server.BaseHTTPRequestHandler):
    """Takes what huggingface_hub uploads, as the hub does; notes the names of each commit's files."""

    commits, refuses = [], False

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        status, answer = 200, {}
        if self.path == "/api/repos/create":
            answer = {"url": f"http://{self.headers['Host']}/someone/{json.loads(body)['name']}"}
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            answer = {"files": [{"path": file["path"], **modes} for file in files]}
        elif "/commit/" in self.path and self.refuses:
            status = 403
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            self.commits.append({line["value"]["path"] for line in lines if line["key"] == "file"})
            answer = {"commitOid": "0" * 40, "commitUrl": f"http://{self.headers['Host']}/someone/output/commit/0"}
        content = json.dumps(answer).encode()
        self.send_response(status)
        if status == 403:
            self.send_header("X-Error-Message", "storage limit reached")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        self.send_error(404)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    """The server that the hub's client speaks to."""
    monkeypatch.setattr(Hub, "commits", [])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        server.address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(hf_api, "endpoint", server.address)
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_a")
        huggingface_hub.close_session()
        yield server
        server.shutdown()
    huggingface_hub.close_session()


def test_what_a_run_has_made_is_pushed_and_nothing_else(hub, train, infer, tmp_path):
    output = tmp_path / "output"
    (output / "fast").mkdir(parents=True)
    (output / "notes.txt").write_text("the user's own")
    (output / "fast" / "x.safetensors").write_text("another's")
    shown = {"validation_prompt": "a blue disc", "validation_steps": 5, "export": "comfyui"}
    train(push_to_hub=True, checkpointing_steps=5, report_to="tensorboard", grid="even", solver="fitted", **shown)
    exported = {f"comfyui/flux-glance-10calls-{phase}.safetensors" for phase in PHASES}
    assert Hub.commits == [PUSHED | exported | {"validation/step_0010.png"}]
    left = {
        "checkpoint-5",
        "checkpoint-10",
        "fast",
        "logs",
        "notes.txt",
        "loss.csv",
        faults.TRAJECTORIES,
        "validation",
    }
    assert {name.split("/")[0] for name in contents(output) if name not in Hub.commits[0]} == left
    card = (output / "README.md").read_text()
    assert "--lora someone/output" in card and str(output) not in card
    train(push_to_hub=True, phase="slow", hub_model_id="a/b", output_dir=output)  # where both phases were before
    assert Hub.commits[1] == {"README.md", "instance.png", "loss.png", WEIGHT_NAME}


def test_a_sampler_is_pushed_without_loras(hub, train, tmp_path):
    found = {"instance_image": None, "instance_prompt": "a disc", "max_train_steps": 0, "num_base_steps": 12}
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "glance.png").write_text("an earlier run's")
    train(push_to_hub=True, num_inference_steps=4, **found)
    assert Hub.commits == [{"README.md", "sampler.json", "scheduler/scheduler_config.json"}]
    assert "--sampler someone/output" in (tmp_path / "output" / "README.md").read_text()


@pytest.mark.processes
def test_a_refused_push_loses_nothing_and_its_command_pushes(hub, train, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Hub, "refuses", True)
    with pytest.raises(SystemExit) as end:
        cli.run(lambda: train(push_to_hub=True, hub_model_id="output", output_dir=tmp_path / "it's here"))
    output, error = tmp_path / "it's here", capsys.readouterr().err
    line = error.splitlines()[-1]
    assert end.value.code == 2 and "Traceback" not in error and len(Hub.commits) == 0
    assert "--push_to_hub someone/output: " in line and "storage limit" in line and "nothing is lost" in line
    monkeypatch.setattr(Hub, "refuses", False)
    command = line.partition("this pushes it: ")[2]
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.address}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert Hub.commits == [PUSHED] and PUSHED | {"loss.csv"} == set(contents(output))


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
    before = contents(tmp_path)
    monkeypatch.setattr(ask, "load_pipeline", lambda *rest, **where: pytest.fail("the base was loaded"))
    with pytest.raises(InputError) as error:
        train(report_to="tensorboard")
    assert_one_line(error, "--report_to tensorboard: it cannot begin", "logs" if how == "file" else "no key in")
    assert contents(tmp_path) == before


def test_a_tracker_leaves_nothing_of_a_run_that_does_not_begin(train, tmp_path):
    with pytest.raises(InputError, match="such as 28x28"):
        train(report_to="tensorboard", resolution=30)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["log", "finish"])
def test_a_tracker_that_fails_later_does_not_end_the_run(where, train, service, trained, caplog):
    tracker = service(where)
    assert contents(train(report_to="tensorboard", learning_rate=3e-2)) == contents(trained())
    steps = [step for step in tracker.logged if step is not None]
    assert steps == ([1, 2] if where == "log" else [*range(1, 11)])
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert line.endswith(f"--report_to: nothing more is logged (Refused: no key in {where})")
