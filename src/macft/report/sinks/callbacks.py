"""A program's own functions as a sink."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TypeAlias

from macft.report.events import Event

Callback: TypeAlias = Callable[[Event], object]


class StopTraining(Exception):
    """Raised by a callback: the run stops after the current step, as after Ctrl-C, and can be resumed."""


class Callbacks:
    """Calls each of ``callbacks`` with every event. Whoever runs the training sets ``stop``, which ends it in order."""

    def __init__(self, callbacks: Sequence[Callback]):
        self._callbacks = list(callbacks)
        self.stop: Callable[[], None] = lambda: None
        self._is_stopped = False

    def handle(self, event: Event) -> None:
        """Calls them in order. One that fails is not called again; its traceback goes to stderr."""
        for callback in list(self._callbacks):
            try:
                callback(event)
            except StopTraining:
                if not self._is_stopped:
                    self._is_stopped = True
                    self.stop()
            except Exception:
                self._callbacks.remove(callback)
                with contextlib.suppress(OSError):
                    print("a callback failed and is not called again, training goes on:", file=sys.stderr)
                    traceback.print_exc()

    def close(self) -> None:
        """Has nothing to release."""
