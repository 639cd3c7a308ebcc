"""Chromium without a window, controlled through its DevTools protocol over a pipe."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_SECONDS = 60.0


class Page:
    """A page of a browser, to which commands are sent."""

    def __init__(self, to: int, back: io.BufferedReader):
        self._to, self._back = to, back
        self._rest, self._number, self._session = b"", 0, ""
        self.complaints: list[str] = []
        """Errors of scripts, and what the page's policy has forbidden."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        """Sends a command and returns its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def open(self, url: str, *, width: int, height: int, dark: bool = False) -> None:
        """Goes to an address."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=url)

    def value(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait_for(self, expression: str) -> Any:
        """Waits until a JavaScript expression is true, and returns its value."""
        deadline = time.monotonic() + _SECONDS
        while not (value := self.value(expression)):
            assert time.monotonic() < deadline, expression
            time.sleep(0.05)
        return value

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        """Writes a PNG of the page."""
        picture = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(picture["data"]))

    def _receive(self) -> Any:
        while b"\0" not in self._rest:
            data = self._back.read1(1 << 16)
            assert data, "the browser has ended"
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\0")
        message = json.loads(line)
        if message.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(str(message["params"]["exceptionDetails"]))
        if message.get("method") == "Log.entryAdded" and message["params"]["entry"]["level"] == "error":
            self.complaints.append(str(message["params"]["entry"].get("text")))
        return message


@contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """A page of a new browser, whose profile is in ``folder``."""
    assert CHROMIUM is not None
    to_browser, from_browser = os.pipe(), os.pipe()

    def at_its_numbers() -> None:  # the browser reads from 3 and writes to 4
        read, write = os.dup(to_browser[0]), os.dup(from_browser[1])
        os.dup2(read, 3)
        os.dup2(write, 4)

    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--remote-debugging-pipe", "--disable-gpu"]
    command += ["--hide-scrollbars", "--disable-dev-shm-usage", f"--user-data-dir={folder}", "about:blank"]
    process = subprocess.Popen(
        command, close_fds=False, preexec_fn=at_its_numbers, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(to_browser[0])
    os.close(from_browser[1])
    with os.fdopen(from_browser[0], "rb") as back:
        try:
            yield Page(to_browser[1], back)
        finally:
            process.kill()
            process.wait()
            os.close(to_browser[1])
