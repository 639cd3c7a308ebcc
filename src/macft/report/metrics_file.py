"""``metrics.jsonl``: every event of a run, one JSON object a line."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

from macft.report.events import (
    CheckpointSaved,
    Evaluated,
    MetricScored,
    Noted,
    RunEnded,
    RunStarted,
    SamplesShown,
    SilentReporter,
    StepDone,
)
from macft.report.run_folder import write_atomically


class MetricsFile(SilentReporter):
    """Appends events to ``path``. A resumed run first drops what lies beyond the step it resumes from."""

    def __init__(self, path: Path, *, first_step: int):
        self._path = path
        if path.exists():
            write_atomically(path, "".join(_kept_lines(path, first_step)))
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")

    def _write(self, kind: str, event: Any) -> None:
        fields = {item.name: getattr(event, item.name) for item in dataclasses.fields(event)}
        line = json.dumps(_plain({"type": kind, "time": time.time(), **fields}), allow_nan=False)
        self._file.write(line + "\n")
        self._file.flush()

    def run_started(self, event: RunStarted) -> None:
        """Written without the configuration, which has a file of its own."""
        self._write("run_started", dataclasses.replace(event, config_yaml=""))

    def step_done(self, event: StepDone) -> None:
        """Written."""
        self._write("step_done", event)

    def evaluated(self, event: Evaluated) -> None:
        """Written."""
        self._write("evaluated", event)

    def metric_scored(self, event: MetricScored) -> None:
        """Written."""
        self._write("metric_scored", event)

    def samples_shown(self, event: SamplesShown) -> None:
        """Written."""
        self._write("samples_shown", event)

    def checkpoint_saved(self, event: CheckpointSaved) -> None:
        """Written."""
        self._write("checkpoint_saved", event)

    def noted(self, event: Noted) -> None:
        """Written."""
        self._write("noted", event)

    def run_ended(self, event: RunEnded) -> None:
        """Written."""
        self._write("run_ended", event)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _kept_lines(path: Path, first_step: int) -> list[str]:
    """Whole lines of events up to ``first_step``; a line torn by a kill is dropped."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            continue
        if line.endswith("\n") and isinstance(event, dict) and not _is_beyond(event, first_step):
            kept.append(line)
    return kept


def _is_beyond(event: dict[str, Any], first_step: int) -> bool:
    step = event.get("step", -1)
    # With no checkpoint to resume from, the start is done again, evaluations before the first step included.
    return isinstance(step, int) and (step > first_step or (first_step == 0 and step == 0))


def _plain(value: Any) -> Any:
    """JSON values only; NaN and infinities, which JSON lacks, become strings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return str(value) if isinstance(value, Path) else value
