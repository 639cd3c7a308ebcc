"""Writes the log of one rank to a file in the run's folder.

Any module logs through ``logging.getLogger("macft.AREA")`` and needs nothing from here. The areas are named after
packages: ``ring``, ``membership``, ``rendezvous``, ``launch``, ``model``, ``checkpoint``, ``thermal``, ``training``,
``report``, ``run``. A line looks like this::

    2026-11-27 11:05:03.123 INFO    macft.membership rank=1 generation=2 step=17 studio is lost: its process ended
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from logging.handlers import RotatingFileHandler
from pathlib import Path

LEVELS = ("debug", "info", "warning", "error")

_FORMAT = (
    "%(asctime)s.%(msecs)03d %(levelname)-7s %(name)s rank=%(rank)s generation=%(generation)s step=%(step)s %(message)s"
)
_TIME_FORMAT = "%Y-%m-%d %H:%M:%S"
_MAX_FILE_BYTES = 5_000_000
_OLD_FILES = 2
# A model is found before there is a reporter, so its warnings stay on the console.
_CONSOLE_AREA = "macft.model"


@dataclass
class LogContext:
    """Where this process is in its run. A process runs one rank, so all threads share it; None is unknown.

    ``step`` counts the optimizer updates made so far; ``generation`` counts the changes of the members.
    """

    rank: int | None = None
    generation: int | None = None
    step: int | None = None

    def update(self, *, rank: int | None = None, generation: int | None = None, step: int | None = None) -> None:
        """Sets what is given; None leaves a value as it is."""
        if rank is not None:
            self.rank = rank
        if generation is not None:
            self.generation = generation
        if step is not None:
            self.step = step

    def clear(self) -> None:
        """Makes everything unknown."""
        self.rank = self.generation = self.step = None


log_context = LogContext()
"""The context that every line of this process gets."""


def log_path(folder: Path, rank: int | str) -> Path:
    """The log file of ``rank``, or of another process of the run such as ``"launcher"``, in the run's ``folder``."""
    return folder / "logs" / (f"macft-rank-{rank}.log" if isinstance(rank, int) else f"macft-{rank}.log")


@contextlib.contextmanager
def start_log(folder: Path, rank: int | str, level: str) -> Iterator[None]:
    """Sends macft's log lines of ``level`` (one of :data:`LEVELS`) and above to :func:`log_path`, while active.

    Nothing else changes: other libraries' loggers and the root logger stay as they are, and macft's lines do not reach
    the root logger, which Hydra prints. The file is rotated at 5 MB; two older ones are kept. A file that cannot be
    written costs one line on stderr, not the run; without lines there is no file.
    """
    number = logging.getLevelNamesMapping()[level.upper()]
    macft, console_area = logging.getLogger("macft"), console_logger(_CONSOLE_AREA)
    before = macft.level, macft.propagate, console_area.level
    handler = _open(log_path(folder, rank), number)
    log_context.clear()
    log_context.update(rank=rank if isinstance(rank, int) else None)
    macft.addHandler(handler)
    macft.setLevel(number)
    macft.propagate = False
    console_area.setLevel(min(number, logging.WARNING))
    try:
        yield
    finally:
        macft.removeHandler(handler)
        handler.close()
        macft.propagate = before[1]
        macft.setLevel(before[0])
        console_area.setLevel(before[2])
        log_context.clear()


class _AddContext(logging.Filter):
    """Gives each record the fields of :data:`log_context`."""

    def filter(self, record: logging.LogRecord) -> bool:
        for name in ("rank", "generation", "step"):
            value = getattr(log_context, name)
            setattr(record, name, "-" if value is None else value)
        return True


def console_logger(area: str) -> logging.Logger:
    """The logger ``area``, whose warnings and those below it are shown even while macft's lines go to a file."""
    logger = logging.getLogger(area)
    if not any(isinstance(handler, _ToConsole) for handler in logger.handlers):
        logger.addHandler(_ToConsole())
    return logger


class _ToConsole(logging.Handler):
    """Shows warnings as other libraries' are shown: through the root logger's handlers, or on stderr."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        on_root: Sequence[logging.Handler | None] = logging.getLogger().handlers or [logging.lastResort]
        if logging.getLogger().handlers and logging.getLogger("macft").propagate:
            return  # they get it anyway
        for handler in on_root:
            if handler is not None and record.levelno >= handler.level:
                handler.handle(record)


class _LogFile(RotatingFileHandler):
    """A log file that complains once, in one line, when it cannot be written, and is silent from then on."""

    _has_failed = False

    def emit(self, record: logging.LogRecord) -> None:
        if not self._has_failed:
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)  # a mistake in a call of the logger
        elif not self._has_failed:
            self._has_failed = True
            _complain(Path(self.baseFilename), error)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


def _open(path: Path, level: int) -> logging.Handler:
    handler: logging.Handler
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = _LogFile(
            path, maxBytes=_MAX_FILE_BYTES, backupCount=_OLD_FILES, encoding="utf-8", errors="replace", delay=True
        )
    except OSError as error:
        _complain(path, error)
        return logging.NullHandler()
    handler.setLevel(level)
    handler.setFormatter(logging.Formatter(_FORMAT, _TIME_FORMAT))
    handler.addFilter(_AddContext())
    return handler


def _complain(path: Path, error: OSError) -> None:
    with contextlib.suppress(OSError):
        print(f"warning: no log in {path}, the run goes on: {error.strerror or error}", file=sys.stderr)
