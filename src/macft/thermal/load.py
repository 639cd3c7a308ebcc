"""How much of the time this process computes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Load:
    """Adds up the time between ``begin`` and ``end``; read from another thread while that goes on."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._since: float | None = None
        self._busy = 0.0
        self._taken = time.monotonic()

    def begin(self) -> None:
        """Computing starts."""
        with self._lock:
            if self._since is None:
                self._since = time.monotonic()

    def end(self) -> None:
        """Computing ends."""
        with self._lock:
            self._settle()
            self._since = None

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Computing while active."""
        self.begin()
        try:
            yield
        finally:
            self.end()

    def take(self) -> tuple[float, float]:
        """(part of the time spent computing, seconds) since the last call."""
        with self._lock:
            self._settle()
            time_now = time.monotonic()
            passed, self._taken = time_now - self._taken, time_now
            busy, self._busy = self._busy, 0.0
            return (min(1.0, busy / passed) if passed > 0 else 0.0), passed

    def _settle(self) -> None:
        if self._since is not None:
            time_now = time.monotonic()
            self._busy += time_now - self._since
            self._since = time_now
