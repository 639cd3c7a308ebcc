"""The page of ``macft monitor --web`` under attack."""

from __future__ import annotations

import json
import tempfile
import threading
from http.client import HTTPConnection
from pathlib import Path

from harness.fuzz.answer import SECONDS, Answer
from macft.monitoring.feed import Feed
from macft.monitoring.runs import roots_of
from macft.monitoring.web import MonitorServer

_TOKEN = "token-of-this-server"


class MonitorTarget:
    """Serves the page of a folder with a run; ``encrypted``: a token is needed, which the attacker doesn't have."""

    def __init__(self, *, encrypted: bool):
        folder = Path(tempfile.mkdtemp())
        run = folder / "runs/fuzzed/1"
        run.mkdir(parents=True)
        (run / "metrics.jsonl").write_text(json.dumps({"type": "run_started", "time": 1.0, "model": "tiny"}) + "\n")
        self._token = _TOKEN if encrypted else ""
        self._server = MonitorServer(Feed(roots_of(None, folder)), "127.0.0.1", 0, self._token)
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True).start()
        self._done = 0
        self._expected = self._ask()

    def open(self) -> Answer:
        requests = [
            "GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
            "GET /events?run=fuzzed/1 HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: text/event-stream\r\n\r\n",
            "GET /?token=guess&run=fuzzed%2F1 HTTP/1.0\r\nHost: localhost\r\nCookie: token=guess\r\n\r\n",
            "POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 3\r\n\r\nabc",
        ]
        return Answer(
            addresses=[f"127.0.0.1:{self._server.server_port}"], valid=[each.encode().hex() for each in requests]
        )

    def check(self) -> Answer:
        """A browser gets the page."""
        self._done += 1
        found = self._ask()
        return Answer(wrong="" if found == self._expected else f"another page: {found[:200]!r}", done=self._done)

    def _ask(self) -> bytes:
        connection = HTTPConnection("127.0.0.1", self._server.server_port, timeout=SECONDS)
        connection.request("GET", "/", headers={"Authorization": f"Bearer {self._token}"} if self._token else {})
        page = connection.getresponse().read()
        connection.close()
        return page
