"""A request to stop the run cleanly."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Ctrl-C and SIGTERM stop the run after the current step; a second one interrupts it at once."""

    def __init__(self) -> None:
        self._requested = False
        self._other = threading.Event()

    @property
    def requested(self) -> bool:
        """Whether a stop was requested."""
        return self._requested or self._other.is_set()

    def __call__(self, _signal: int = 0, _frame: FrameType | None = None) -> None:
        """Requests a stop. Usable as a signal handler."""
        if self._requested:
            raise KeyboardInterrupt
        self._requested = True

    @contextmanager
    def listening(self, other: threading.Event | None = None) -> Iterator[None]:
        """Handles SIGINT and SIGTERM while active; ``other`` requests a stop too when it is set."""
        self._other = other or self._other
        previous = {number: signal.signal(number, self) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
