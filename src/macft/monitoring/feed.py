"""The facts of runs as JSON, for any number of pages: each run's file is read once for all of them."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from pathlib import Path
from typing import NamedTuple

from macft.monitoring.run_watch import RunWatch
from macft.monitoring.runs import FoundRun, runs_below
from macft.report.sinks.metrics_file import plain

_LOOK_SECONDS = 3.0
_MOST_WATCHED = 8


class Moment(NamedTuple):
    """What a page shows: the run's name, and all of it as JSON. Both empty while there is no run."""

    run: str
    data: str


class Feed:
    """The runs that pages can choose from, and how each stands. Any thread may use it.

    Args:
        roots: The folders below which there are runs.
    """

    def __init__(self, roots: list[Path]):
        self._roots = roots
        self._lock = threading.Lock()
        self._runs: list[FoundRun] = []
        self._looked = -_LOOK_SECONDS
        self._watches: dict[Path, RunWatch] = {}

    def moment(self, wanted: str = "") -> Moment:
        """How the run named ``wanted`` stands; for an empty or unknown name the run that began last."""
        with self._lock:
            runs = self._look()
            run = next((each for each in runs if each.name == wanted), runs[0] if runs else None)
            body: dict[str, object] = {"runs": [each.name for each in runs]}
            if run is None:
                return Moment("", json.dumps(body))
            watch = self._watch(run.folder)
            try:
                watch.update()
            except OSError as error:
                body["error"] = f"{run.name} can't be read: {error.strerror or error}"
            facts = watch.facts()
            body |= {"run": run.name, "facts": dataclasses.asdict(facts)}
            return Moment(run.name, json.dumps(plain(body), allow_nan=False, separators=(",", ":")))

    def _look(self) -> list[FoundRun]:
        if time.monotonic() - self._looked >= _LOOK_SECONDS:
            self._runs = runs_below(self._roots)
            self._looked = time.monotonic()
        return self._runs

    def _watch(self, folder: Path) -> RunWatch:
        watch = self._watches.pop(folder, None) or RunWatch(folder)
        self._watches[folder] = watch  # the newest last
        while len(self._watches) > _MOST_WATCHED:
            del self._watches[next(iter(self._watches))]
        return watch
