"""Says which phase a process is in: a line once the phase has lasted a second, and then from time to time."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

from macft.report.durations import duration

FIRST_SECONDS, EVERY_SECONDS = 1.0, 5.0
_log = logging.getLogger("macft.run")


@dataclass
class _Phase:
    name: str
    unit: str
    total: int | None
    is_told_once: bool
    done: int = 0
    began: float = field(default_factory=time.monotonic)
    lines: int = 0

    @property
    def line(self) -> str:
        count = "" if self.total is None else f": {self.done:,} of {self.total:,}{self.unit and f' {self.unit}'}"
        return f"{self.name}{count}" + (f"  {duration(time.monotonic() - self.began)}" if self.lines else " ...")


class PhaseLines:
    """Tells of one phase at a time, from a thread of its own: a phase may be a single long call.

    Args:
        show: Prints a line.
        first: Seconds until a phase's first line; shorter ones have none.
        every: Seconds between two lines.
    """

    def __init__(self, show: Callable[[str], None], *, first: float = FIRST_SECONDS, every: float = EVERY_SECONDS):
        self._show, self._first, self._every = show, first, every
        self._changed = threading.Condition()
        self._phase: _Phase | None = None
        self._thread: threading.Thread | None = None
        self._is_closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def begin(self, name: str, total: int | None = None, *, unit: str = "", once: bool = False) -> None:
        """Another phase begins, and ends the one before. ``once``: it shows its progress by other means."""
        with self._changed:
            self._phase = _Phase(name, unit, total, once)
            if self._thread is None:
                self._is_closed = False
                self._thread = threading.Thread(target=self._tell, name="phase-lines", daemon=True)
                self._thread.start()
            self._changed.notify()

    def advance(self, done: int) -> None:
        """``done`` of the phase's total are done."""
        phase = self._phase
        if phase is not None:
            phase.done = done

    def end(self) -> None:
        """No line of the phase is printed after this call."""
        with self._changed:
            self._phase = None

    def close(self) -> None:
        """Ends the phase and the thread, until another phase begins. Safe to call twice."""
        with self._changed:
            thread, self._thread = self._thread, None
            self._phase, self._is_closed = None, True
            self._changed.notify()
        if thread is not None:
            thread.join()

    def _tell(self) -> None:
        with self._changed:
            while not self._is_closed:
                phase = self._phase
                if phase is None or (phase.is_told_once and phase.lines):
                    self._changed.wait()
                    continue
                due = phase.began + self._first + phase.lines * self._every
                if (left := due - time.monotonic()) > 0:
                    self._changed.wait(left)
                    continue
                with contextlib.suppress(OSError, ValueError):  # the output is no longer read, or closed
                    self._show(phase.line)
                phase.lines += 1


def printed_phases(*, is_shown: bool) -> PhaseLines:
    """Phases before a run has its reporter, on stdout; in the log file, at level debug, unless ``is_shown``."""
    return PhaseLines((lambda line: print(f"· {line}", flush=True)) if is_shown else _log.debug)
