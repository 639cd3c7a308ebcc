"""``macft serve`` under attack: a tiny model behind the server that the command starts."""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path

from harness.fuzz.answer import SECONDS, Answer
from harness.tiny_model import make_tiny_model
from macft.device.mlx_device import prepare_device
from macft.evaluation.chat import Sampling
from macft.model.backends.choose import make_backend
from macft.model.fetch.bundled import ensure_bundled
from macft.model.load import LoadedModel
from macft.run.tuned_model import TunedModel
from macft.serving.engine import OwnEngine
from macft.serving.http_server import Server
from macft.serving.options import ServerConfig

_PATH = "/v1/chat/completions"
_BODY = {"messages": [{"role": "user", "content": "seven lamps"}], "max_tokens": 4, "temperature": 0.0}


class ServeTarget:
    """A server of completions."""

    def __init__(self, *, encrypted: bool):  # noqa: ARG002
        folder = Path(tempfile.mkdtemp()) / "model"
        make_tiny_model(folder, ensure_bundled())
        config = ServerConfig("tiny", "127.0.0.1", 0, "", (), Sampling(max_tokens=8), 8)
        self._server = Server(config)
        prepare_device()
        engine = OwnEngine(_opened(folder), config)
        ready = threading.Event()
        threading.Thread(target=self._server.serve, args=(engine, ready.set), daemon=True).start()
        ready.wait()
        self._done = 0
        self._expected = self._ask()

    def open(self) -> Answer:
        body = json.dumps(_BODY).encode()
        stream = json.dumps({**_BODY, "stream": True, "stop": ["x"], "top_p": 0.5, "seed": 3}).encode()
        host, port = self._server.server_address[:2]
        head = f"Host: {host}\r\nContent-Type: application/json\r\nContent-Length: "
        frames = [
            *(f"POST {_PATH} HTTP/1.1\r\n{head}{len(each)}\r\n\r\n".encode() + each for each in (body, stream)),
            f"GET /v1/models HTTP/1.1\r\n{head}0\r\n\r\n".encode(),
            f"OPTIONS {_PATH} HTTP/1.0\r\n{head}0\r\n\r\n".encode(),
        ]
        return Answer(addresses=[f"{host}:{port}"], valid=[frame.hex() for frame in frames])

    def check(self) -> Answer:
        """A client gets the answer that it got before."""
        self._done += 1
        found = self._ask()
        wrong = "" if found == self._expected else f"answered {found!r}, before {self._expected!r}"
        return Answer(wrong=wrong, done=self._done)

    def _ask(self) -> str:
        host, port = self._server.server_address[:2]
        connection = HTTPConnection(str(host), int(port), timeout=SECONDS)
        connection.request("POST", _PATH, json.dumps(_BODY), {"Content-Type": "application/json"})
        answer = json.loads(connection.getresponse().read())
        connection.close()
        return str(answer["choices"][0]["message"]["content"])


@contextmanager
def _opened(folder: Path) -> Iterator[LoadedModel]:
    loaded = TunedModel.find(None, base_model=str(folder)).load()
    with make_backend(loaded.execution.padded()).installed(loaded.model):
        yield loaded
