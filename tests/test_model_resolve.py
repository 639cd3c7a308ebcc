"""Finding a model folder: local paths, and the Hugging Face Hub as a local server plays it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import psutil
import pytest

from harness.loopback_http import serving
from harness.slow_hub import slow_hub
from helpers.network import closed_port
from macft.api.configuration import compose
from macft.errors import ConfigError, ModelError
from macft.model.fetch.hub_download import download
from macft.model.fetch.resolve import fetch_config, resolve
from macft.model.files.weight_files import check_weight_files
from macft.model.settings import ModelConfig
from macft.planner.known_models import find_shape


def test_a_local_folder_is_itself(tiny_model_folder: Path) -> None:
    assert resolve(ModelConfig(path=str(tiny_model_folder))) == tiny_model_folder


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe{}"], ids=["empty", "array", "cut", "UTF-16"])
def test_a_configuration_that_is_none_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"has a config\.json that is no JSON object; fetch or copy it again$"):
        resolve(ModelConfig(path=str(tmp_path)))


def test_a_clone_without_its_large_files_is_told(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(
        ConfigError, match=r"is only Git LFS's pointer to the weights; run `git lfs pull` in that folder$"
    ):
        check_weight_files(tmp_path)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("smollm2-135m", "did you mean 'smollm2-135m-instruct'?"),
        ("gpt-17", "neither a bundled model (smollm2-135m-instruct), nor a folder, nor a Hugging Face id"),
        ("./no-such-model", "folder './no-such-model' doesn't exist"),
        ("~/no-such-folder/model", "doesn't exist, and neither does"),
        ("here/modle", "folder 'here/modle' doesn't exist; did you mean 'model'?"),
        ("a/b/c", "folder 'a/b/c' doesn't exist"),
        ("org/na me", "not a Hugging Face id"),
        ("org/a--b", "not a Hugging Face id"),
        ("file.txt", "is a file"),
        ("empty", "has no config.json"),
        ("here/model", "has no model*.safetensors"),
        ("sharded", "lacks 1 of 2 weight files, model-00002-of-00002.safetensors"),
    ],
)
def test_a_wrong_path_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "here/model", "sharded"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "file.txt").touch()
    (tmp_path / "here/model/config.json").write_text("{}")
    (tmp_path / "sharded/config.json").write_text("{}")
    (tmp_path / "sharded/model-00001-of-00002.safetensors").touch()
    shards = {name: f"model-0000{i}-of-00002.safetensors" for i, name in ((1, "a"), (2, "b"))}
    (tmp_path / "sharded/model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(ModelError) as caught:
        resolve(ModelConfig(path=path))
    assert words in str(caught.value)
    assert "model.path" in str(caught.value)
    assert "\n" not in str(caught.value)


class Hub(BaseHTTPRequestHandler):
    """Answers as the Hugging Face Hub does for models that can't be had; the id says which answer."""

    def do_HEAD(self) -> None:
        kind = self.path.split("/")[2]
        status, code = {"gated": (403, "GatedRepo"), "missing": (404, "RepoNotFound")}.get(
            kind, (404, "RevisionNotFound" if "v9" in self.path else "EntryNotFound")
        )
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def point_to(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT does when huggingface_hub is imported."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from huggingface_hub import constants

    with serving(Hub) as address:
        point_to(address, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        yield


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("path", "revision", "words"),
    [
        ("org/gated", None, ("is gated", "accept its licence", "HF_TOKEN")),
        ("org/missing", None, ("'org/missing' doesn't exist on", "private")),
        ("org/other", None, ("has no config.json",)),
        ("org/other", "v9", ("model.revision", "no revision 'v9'")),
    ],
)
def test_the_hubs_refusals_are_told_apart(path: str, revision: str | None, words: tuple[str, ...]) -> None:
    with pytest.raises(ModelError) as caught:
        resolve(ModelConfig(path=path, revision=revision))
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("hub")
def test_a_hub_out_of_reach_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    point_to(f"http://127.0.0.1:{closed_port()}", monkeypatch)
    with pytest.raises(ModelError, match=r"org/name.*refused.*local folder.*model=smollm2-135m.*HF_ENDPOINT"):
        resolve(ModelConfig(path="org/name"))


@pytest.mark.usefixtures("hub")
def test_a_plan_asks_once_for_a_model_that_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """And tells a path from an id of the hub, as a run does."""
    with pytest.raises(ModelError, match=r"'org/other' has no config\.json on"):
        fetch_config(ModelConfig(path="org/other"))
    with pytest.raises(ModelError, match=r"folder '\./nowhere' doesn't exist"):
        find_shape(compose(overrides=["model=./nowhere"]), [])
    point_to(f"http://127.0.0.1:{closed_port()}", monkeypatch)
    with pytest.raises(ModelError, match=r"org/name.*refused.*local folder"):
        find_shape(compose(overrides=["model=org/name"]), [])


@pytest.mark.usefixtures("hub")
def test_a_silent_hub_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("macft.model.fetch.resolve._PROBE_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        point_to(f"http://127.0.0.1:{silent.getsockname()[1]}", monkeypatch)
        with pytest.raises(ModelError, match=r"can't be fetched .*(no answer|timed out)"):
            resolve(ModelConfig(path="org/name"))


@pytest.mark.usefixtures("hub")
def test_a_complete_model_in_the_hubs_cache_needs_no_hub(tmp_path: Path, tiny_model_folder: Path) -> None:
    cached = tmp_path / "hub" / "models--org--cached"
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(tiny_model_folder, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    assert resolve(ModelConfig(path="org/cached")) == cached / "snapshots" / commit
    (cached / "snapshots" / commit / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json on"):  # the hub is asked now
        resolve(ModelConfig(path="org/cached"))


def test_a_download_ends_at_once_with_all_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(psutil.Process().children(recursive=True))
    with slow_hub() as hub:
        for name, value in (hub.variables | {"HF_HOME": str(tmp_path)}).items():
            monkeypatch.setenv(name, value)

        def interrupt() -> None:
            hub.is_downloading.wait(60)
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            download("org/endless", None)
        assert set(psutil.Process().children(recursive=True)) <= before
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed_port()}")
        with pytest.raises(ModelError, match=r"^model.path: 'org/other' is not on this machine and can't be fetched"):
            download("org/other", None)
