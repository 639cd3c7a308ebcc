"""``metrics.jsonl``: every event of a run, one JSON object a line."""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from macft.report.events import (
    CheckpointSaved,
    Evaluated,
    MetricScored,
    NodesChanged,
    Noted,
    RunEnded,
    RunStarted,
    SamplesShown,
    SilentReporter,
    StepDone,
)
from macft.report.run_folder import write_atomically


class MetricsFile(SilentReporter):
    """Appends events to ``path``: ``type``, ``time`` (seconds since 1970) and the event's fields.

    Each line is flushed as it is written. A run that resumes after ``first_step`` updates first drops what an
    earlier attempt wrote beyond that step, so that each step stands once. How far an evaluation is
    (:class:`~macft.report.events.PhaseProgress`) is not kept.

    Raises:
        OSError: the file can't be read or written; also from every event.
    """

    def __init__(self, path: Path, *, first_step: int):
        if path.exists():
            write_atomically(path, "".join(_kept_lines(path, first_step)))
        self._file = path.open("a", encoding="utf-8")

    def run_started(self, event: RunStarted) -> None:
        """Written without the configuration, which has a file of its own."""
        fields = _fields(event)
        del fields["config_yaml"]
        self._write("run_started", fields)

    def step_done(self, event: StepDone) -> None:
        """Written."""
        self._write("step_done", _fields(event))

    def evaluated(self, event: Evaluated) -> None:
        """Written."""
        self._write("evaluated", _fields(event))

    def metric_scored(self, event: MetricScored) -> None:
        """Written."""
        self._write("metric_scored", _fields(event))

    def samples_shown(self, event: SamplesShown) -> None:
        """Written."""
        self._write("samples_shown", _fields(event))

    def checkpoint_saved(self, event: CheckpointSaved) -> None:
        """Written."""
        self._write("checkpoint_saved", _fields(event))

    def noted(self, event: Noted) -> None:
        """Written."""
        self._write("noted", _fields(event))

    def nodes_changed(self, event: NodesChanged) -> None:
        """Written."""
        self._write("nodes_changed", _fields(event))

    def run_ended(self, event: RunEnded) -> None:
        """Written."""
        self._write("run_ended", _fields(event))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _write(self, kind: str, fields: dict[str, Any]) -> None:
        line = json.dumps(plain({"type": kind, "time": time.time(), **fields}), allow_nan=False)
        self._file.write(line + "\n")
        self._file.flush()


def last_step(path: Path) -> int:
    """The last step that ``path`` tells of; 0 where there is none."""
    if not path.exists():
        return 0
    found = 0
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            event = json.loads(line)
        except ValueError:  # torn by a kill
            continue
        if isinstance(event, dict) and event.get("type") == "step_done" and isinstance(event.get("step"), int):
            found = max(found, event["step"])
    return found


def changes_told(path: Path, until: int) -> list[NodesChanged]:
    """The changes of the nodes that ``path`` tells of, up to those after step ``until``."""
    if not path.exists():
        return []
    found = [event for event in map(json.loads, _kept_lines(path, until)) if event.get("type") == "nodes_changed"]
    names = [item.name for item in dataclasses.fields(NodesChanged)]
    return [NodesChanged(**{name: event[name] for name in names}) for event in found if event.keys() >= {*names}]


def plain(value: Any) -> Any:
    """``value`` in JSON's types. What JSON lacks becomes a string: ``"nan"``, ``"inf"``, a path."""
    if value is None or isinstance(value, bool | str):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(_fields(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):  # NumPy's scalars included
        number = float(value)
        return number if math.isfinite(number) else str(number)
    return str(value)


def _fields(event: Any) -> dict[str, Any]:
    return {item.name: getattr(event, item.name) for item in dataclasses.fields(event)}


def _kept_lines(path: Path, first_step: int) -> list[str]:
    """The lines that a run resuming after ``first_step`` won't write again."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            event = json.loads(line)
        except ValueError:  # torn by a kill, or the nothing after the last newline
            continue
        if isinstance(event, dict) and not _is_written_again(event, first_step):
            kept.append(line + "\n")
    return kept


def _is_written_again(event: dict[str, Any], first_step: int) -> bool:
    step = event.get("step")
    if not isinstance(step, int):
        return False
    # Without a checkpoint the start is done again too; the end, its answers and its score, always is.
    is_of_the_end = event.get("type") == "samples_shown" or event.get("when") == "after"
    return step > first_step or first_step == 0 or is_of_the_end
