"""The runs below a folder, found by their metrics files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from macft.report.run_folder import RunFolder

_DEEPEST = 3
_MOST_FOLDERS = 20_000
_MOST_RUNS = 200
RUNS = ("runs", "multirun")
"""The folders in which macft puts runs, and those of sweeps."""


class FoundRun(NamedTuple):
    """A run: its name for people and requests, its folder, and when it began, or was resumed (seconds since 1970)."""

    name: str
    folder: Path
    began: float


def runs_below(roots: list[Path]) -> list[FoundRun]:
    """The newest runs in ``roots``, the one that began last first. Links are not followed."""
    found = []
    left = _MOST_FOLDERS
    for root in roots:
        waiting = [(root, 0)]
        while waiting and left:
            folder, depth = waiting.pop()
            left -= 1
            run = RunFolder(folder)
            try:
                if run.metrics.is_file():
                    begun = run.config if run.config.is_file() else run.metrics
                    found.append(FoundRun(name_of(folder, root), folder, begun.stat().st_mtime))
                    continue
                if depth < _DEEPEST:
                    with os.scandir(folder) as entries:
                        waiting += [(Path(e.path), depth + 1) for e in entries if e.is_dir(follow_symlinks=False)]
            except OSError:
                continue
    return sorted(found, key=lambda run: run.began, reverse=True)[:_MOST_RUNS]


def roots_of(folder: Path | None, working: Path) -> list[Path]:
    """Where to look for runs: beside ``folder``, which is a run, or in ``working``'s folders of runs."""
    if folder is None:
        return [working / name for name in RUNS]
    folder = folder.absolute()
    above = next((each for each in folder.parents if each.name in RUNS), None)
    return [above if above is not None else folder]


def newest_run(working: Path) -> Path | None:
    """The run below ``working``'s folders of runs that began last; None if there is none."""
    runs = runs_below(roots_of(None, working))
    return runs[0].folder if runs else None


def name_of(folder: Path, root: Path) -> str:
    """What the run in ``folder`` is called among those below ``root``."""
    return str(folder.relative_to(root)) if folder != root else folder.name
