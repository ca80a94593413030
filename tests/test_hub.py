"""What the hub refuses is one line that names the cause: asked of a local server that answers as the hub does."""

import http.server
import json
import threading
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import OfflineModeIsEnabled

from glance import base, inference_flags
from glance.ask.hub import refusal
from glance.ask.pipeline import find_denoiser, read_model_index
from glance.files.pair import find_loras
from glance_utils import InputError


# By repository: the status and the X-Error-Code without and with a token; None where the file is there.
REPOSITORIES = {
    "lab/gated": [(401, "GatedRepo"), (403, "GatedRepo")],
    "lab/private": [(401, "RepoNotFound"), (404, "RepoNotFound")],
    "lab/data": [(404, "EntryNotFound"), (404, "EntryNotFound")],
    "lab/down": [(503, None), (503, None)],
    "lab/good": [None, None],
}
COMMIT = "0123456789" * 4
INDEX = json.dumps({"_class_name": "FluxPipeline", "_diffusers_version": "0.42.1"}).encode()


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers /OWNER/NAME/resolve/REVISION/FILE."""

    def do_HEAD(self, body=b""):
        owner, name, _, revision, file = self.path.lstrip("/").split("/", 4)
        login = self.headers.get("Authorization")
        answer = REPOSITORIES[f"{owner}/{name}"][login is not None]
        if login == "Bearer hf_mistyped":
            self.send_response(401)
            self.send_header("X-Error-Message", "Invalid credentials in Authorization header")
        elif answer is None and revision not in ("main", COMMIT):
            self.send_response(404)
            self.send_header("X-Error-Code", "RevisionNotFound")
        elif answer is None and file == "model_index.json":
            self.send_response(200)
            self.send_header("ETag", '"1"')
            self.send_header("X-Repo-Commit", COMMIT)
        else:
            status, code = answer or (404, "EntryNotFound")
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
            self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(INDEX)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.do_HEAD(INDEX)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The hub's address is the local server's, nobody is logged in, and nothing is in the cache."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # it tries several times
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        yield address
        server.shutdown()
    huggingface_hub.close_session()


def line_of(path: str, **arguments) -> str:
    with pytest.raises(InputError) as error:
        read_model_index(path, **arguments)
    line = str(error.value)
    assert line.startswith(f"{path}: ") and "\n" not in line and len(line) < 300
    return line


CAUSES = {
    "gated": ("lab/gated", None, "it is gated: ask for access at {hub}/lab/gated, then log in with `hf auth login`"),
    "gated, logged in": ("lab/gated", "hf_a", "it is gated: ask for access at {hub}/lab/gated, with the account of"),
    "not logged in": ("lab/private", None, "nor a repository on the hub, or private; check the name, log in with"),
    "not there": ("lab/private", "hf_a", "nor a repository on the hub, or not readable by this login; check the name"),
    "mistyped token": ("lab/good", "hf_mistyped", "the hub knows no such token; mend HF_TOKEN"),
    "not a pipeline": ("lab/data", None, "not a diffusers pipeline (folder or hub id with model_index.json)"),
    "down": ("lab/down", None, "the hub answers 503"),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_each_cause_has_its_line(cause, hub, monkeypatch):
    path, token, words = CAUSES[cause]
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    line = line_of(path)
    assert words.format(hub=hub) in line and (not token or token not in line)


def test_a_wrong_revision(hub):
    assert read_model_index("lab/good")["_class_name"] == "FluxPipeline"
    assert f"it has no branch, tag or commit 'v9'; see {hub}/lab/good/commits/main" in line_of(
        "lab/good", revision="v9"
    )


def test_loras_on_the_hub_too(hub):
    for path, words in (("lab/gated", "it is gated: ask for access"), ("lab/data", "neither a folder nor on the hub")):
        with pytest.raises(InputError, match=f"^{path}: {words}"):
            find_loras(inference_flags.parse(["--prompt=a", f"--lora={path}"]))


def test_no_network(hub, monkeypatch):
    address = "http://127.0.0.1:9"  # nobody listens
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(hub, address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    assert f"nor in the cache, and {address} is out of reach; check the network" in line_of("lab/good")


def test_offline(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "nor in the cache, and HF_HUB_OFFLINE forbids downloads" in line_of("lab/good")
    assert "nor in the cache at --revision v9, and HF_HUB_OFFLINE" in line_of("lab/good", revision="v9")


def test_a_folder_is_not_the_hubs(hub, tmp_path):
    """Libraries look there for what a folder lacks."""
    (tmp_path / "base").mkdir()
    for path in ("base", "base/vae"):
        assert refusal(OfflineModeIsEnabled("no"), str(tmp_path / path)) is None
    assert "HF_HUB_OFFLINE" in refusal(OfflineModeIsEnabled("no"), "lab/base/vae")


def test_a_cache_of_ones_own(hub, monkeypatch, tmp_path):
    """What was downloaded into --cache_dir is found there, and the base known by its commit."""
    mine = str(tmp_path / "mine")
    assert base.identify("lab/good", cache_dir=mine) == f"lab/good at {COMMIT}"
    assert list(Path(mine).rglob("model_index.json")) and not list((tmp_path / "cache").rglob("model_index.json"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert base.identify("lab/good", cache_dir=mine) == f"lab/good at {COMMIT}"
    with pytest.raises(InputError, match="has no transformer"):
        find_denoiser("lab/good", cache_dir=mine)
    assert "HF_HUB_OFFLINE" in line_of("lab/good")
