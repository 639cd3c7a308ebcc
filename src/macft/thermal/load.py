"""Measures which part of the time this process computes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Load:
    """Adds up the time between ``begin`` and ``end``; may be read from another thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._since: float | None = None
        self._busy = 0.0

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
        """Counts the time in the block as computing."""
        self.begin()
        try:
            yield
        finally:
            self.end()

    def total(self) -> tuple[float, float]:
        """(seconds spent computing so far, the monotonic clock's time now)."""
        with self._lock:
            self._settle()
            return self._busy, time.monotonic()

    def _settle(self) -> None:
        if self._since is not None:
            time_now = time.monotonic()
            self._busy += time_now - self._since
            self._since = time_now


class LoadMeter:
    """Reads a :class:`Load` as the part of the time spent computing since this meter's last reading."""

    def __init__(self, load: Load):
        self._load = load
        self._last = load.total()

    def read(self) -> tuple[float, float]:
        """(part of the time, 0 to 1; seconds) since the last call."""
        busy, time_now = self._load.total()
        (busy_before, before), self._last = self._last, (busy, time_now)
        passed = time_now - before
        return (min(1.0, max(0.0, (busy - busy_before) / passed)) if passed > 0 else 0.0), max(passed, 0.0)
