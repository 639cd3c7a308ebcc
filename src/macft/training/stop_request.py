"""A request to stop the run cleanly."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
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
        with handled_by(self):
            yield


@contextmanager
def handled_by(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Gives SIGINT and SIGTERM to ``handler`` while active. Only the main thread gets signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
