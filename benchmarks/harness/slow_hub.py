"""A stand-in of the Hugging Face Hub from which a model comes so slowly that a download never ends."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler

from harness.loopback_http import serving

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {"config.json": 2, "model.safetensors": 1 << 30}
"""The files of every model, and their sizes in bytes."""
_PIECE = b"\0" * 4096
_PAUSE_SECONDS = 0.05


class SlowHub:
    """Where it is, and whether somebody is downloading weights from it."""

    def __init__(self) -> None:
        self.address = ""
        self.is_downloading = threading.Event()
        self.is_closed = threading.Event()

    @property
    def variables(self) -> dict[str, str]:
        """The environment of a process that is to use it."""
        return {"HF_ENDPOINT": self.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": ""}


@contextmanager
def slow_hub() -> Iterator[SlowHub]:
    """The stand-in on loopback; it knows any model."""
    hub = SlowHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Prints nothing."""

        def handle(self) -> None:
            with contextlib.suppress(OSError):  # the reader has ended
                super().handle()

        def do_HEAD(self) -> None:
            self._headers(self._size())

        def do_GET(self) -> None:
            if self.path.startswith("/api/"):
                name = "/".join(self.path.split("/")[3:5])
                files = [{"type": "file", "path": path, "size": size, "oid": COMMIT} for path, size in FILES.items()]
                answer = files if "/tree/" in self.path else {"id": name, "sha": COMMIT, "siblings": []}
                data = json.dumps(answer).encode()
                self._headers(len(data))
                self.wfile.write(data)
                return
            size = self._size()
            self._headers(size)
            if size == FILES["config.json"]:
                self.wfile.write(b"{}")
                return
            hub.is_downloading.set()
            while not hub.is_closed.wait(_PAUSE_SECONDS):
                self.wfile.write(_PIECE)
            self.close_connection = True

        def _size(self) -> int:
            return FILES.get(self.path.rpartition("/")[2], 0)

        def _headers(self, size: int) -> None:
            self.send_response(200)
            self.send_header("content-length", str(size))
            self.send_header("etag", f'"{size:040x}"')
            self.send_header("x-repo-commit", COMMIT)
            self.end_headers()

    with serving(Handler) as hub.address:
        try:
            yield hub
        finally:
            hub.is_closed.set()
