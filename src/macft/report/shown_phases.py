"""The phases of a command that reports no events: on standard error, a bar at a terminal and lines elsewhere."""

from __future__ import annotations

import sys
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

from macft.report.phase_lines import PhaseLines

_BAR_WIDTH = 16


class _Count(TextColumn):
    """``1,500/20,000``; empty for a phase without a count."""

    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Task) -> Text:
        return Text("" if task.total is None else f"{task.completed:,.0f}/{task.total:,.0f}")


class ShownPhases:
    """Shows one phase at a time until it is closed. At a terminal it leaves nothing behind."""

    def __init__(self) -> None:
        self._lines = PhaseLines(lambda line: print(f"· {line}", file=sys.stderr, flush=True))
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._name = ""
        if sys.stderr.isatty():
            name = TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"))
            columns = (SpinnerColumn(), name, BarColumn(_BAR_WIDTH), _Count(), TimeElapsedColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True, expand=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, name: str, done: int, total: int) -> None:
        """``done`` of ``total`` of the phase ``name`` are done; it begins if it is another one. 0 of 0: no count."""
        if name != self._name:
            self.begin(name, total or None)
        self.advance(done)

    def begin(self, name: str, total: int | None = None) -> None:
        """Another phase begins, and ends the one before."""
        self._name = name
        if self._bar is None:
            self._lines.begin(name, total)
            return
        self._bar.start()
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(name, total=total)

    def advance(self, done: int) -> None:
        """``done`` of the phase's total are done."""
        if self._bar is None:
            self._lines.advance(done)
        elif self._task is not None:
            self._bar.update(self._task, completed=done)

    def close(self) -> None:
        """Nothing is shown after this call."""
        self._name = ""
        self._lines.close()
        if self._bar is not None:
            if self._task is not None:
                self._bar.remove_task(self._task)
                self._task = None
            self._bar.stop()
