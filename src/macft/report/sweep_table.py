"""The closing table of a sweep: on the terminal, and as ``sweep.json`` and ``sweep.md`` in the sweep's folder."""

from __future__ import annotations

import json
import re
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path

from macft.device.durable import write_atomically
from macft.report.durations import duration
from macft.report.result_text import result_name, result_text
from macft.report.sinks.metrics_file import plain

_GAP = "  "
_STATUS = {"early_stopped": "early stop"}


@dataclass(frozen=True)
class SweepRow:
    """One job of a sweep.

    Attributes:
        number: Its index, from 0.
        folder: Its folder, relative to the sweep's.
        values: The value of each key that its command sets.
        status: finished, early_stopped, interrupted or failed.
        reason: Why it failed, in one line.
        loss: The training loss of its last step.
        valid_loss: The validation loss of the adapter that was exported.
        metrics: The metric's score of that adapter, by the metric's name.
        seconds: How long it took, loading included.
        objective: What the sweep compares: see ``report.objective``.
    """

    number: int
    folder: str
    values: Mapping[str, object]
    status: str
    reason: str | None = None
    loss: float | None = None
    valid_loss: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    objective: float | None = None


@dataclass(frozen=True)
class SweepTable:
    """The jobs of a sweep that have ended.

    Attributes:
        rows: A row for each of them.
        swept: The keys with several values, in the order of the command.
        objective: The name of what is compared.
        maximize: Whether more of it is better.
        planned: How many jobs the sweep has; None if the sweeper decides that.
    """

    rows: Sequence[SweepRow]
    swept: Sequence[str]
    objective: str
    maximize: bool
    planned: int | None

    @property
    def keys(self) -> list[str]:
        """The swept keys, and what else differs between the jobs."""
        others = {key: None for row in self.rows for key in row.values if key not in self.swept}
        return [*self.swept, *(key for key in others if len({str(row.values.get(key)) for row in self.rows}) > 1)]

    @property
    def best(self) -> SweepRow | None:
        """The job with the best value of the objective; the first of several."""
        scored = [row for row in self.rows if row.objective is not None]
        sign = -1 if self.maximize else 1
        return min(scored, key=lambda row: sign * (row.objective or 0.0), default=None)

    @property
    def count(self) -> str:
        """How many jobs ended how: ``2 finished, 1 failed, 1 not started``."""
        counts = Counter(_status(row) for row in self.rows)
        if self.planned is not None and self.planned > len(self.rows):
            counts["not started"] = self.planned - len(self.rows)
        return ", ".join(f"{count} {status}" for status, count in counts.items())

    def text(self, width: int | None) -> str:
        """The table for a terminal of ``width`` columns; None for a file or a pipe, where no line is broken.

        Where the columns don't fit, their titles are broken; where that is not enough, each job is a block of lines.
        """
        header, *lines = self._cells()
        titles = [[name] for name in header]
        if width is not None and _width(_widths(titles, lines)) > width:
            titles = [re.findall(r"[^_ ]+_?", name) for name in header]
        widths = _widths(titles, lines)
        fits = width is None or _width(widths) <= width
        shown = [_aligned(line, widths) for line in zip_longest(*titles, fillvalue="")] if fits else []
        for row, line in zip(self.rows, lines, strict=True):
            if fits:
                shown.append(_aligned(line, widths))
            else:
                label = max(map(len, header))
                shown += ["", *(f"{name:<{label}}{_GAP}{cell}" for name, cell in zip(header, line, strict=True))]
            if row.reason:
                shown += _broken(f"{_GAP}{row.reason}", width)
        if self.best is not None:
            shown += ["", *_broken(f"best: {self._named(self.best)}", width)]
        return "\n".join(shown).lstrip("\n")

    def write(self, folder: Path) -> None:
        """Writes ``sweep.json`` and ``sweep.md`` in ``folder``. Raises OSError where that fails."""
        values = {
            "keys": self.keys,
            "objective": self.objective,
            "direction": "maximize" if self.maximize else "minimize",
            "best": None if self.best is None else self.best.number,
            "planned": self.planned,
            "jobs": [asdict(row) for row in self.rows],
        }
        write_atomically(folder / "sweep.json", json.dumps(plain(values), indent=2, allow_nan=False) + "\n")
        write_atomically(folder / "sweep.md", self._markdown())

    def _markdown(self) -> str:
        header, *lines = self._cells()
        shown = ["# Sweep", "", _markdown_row([*header, "reason"]), _markdown_row(["---"] * (len(header) + 1))]
        for row, line in zip(self.rows, lines, strict=True):
            shown.append(_markdown_row([*line, row.reason or ""]))
        shown += ["", self.count]
        if self.best is not None:
            shown += ["", f"Best: {self._named(self.best)}"]
        return "\n".join([*shown, ""])

    def _cells(self) -> list[list[str]]:
        """The header, then a line for each job."""
        keys, metrics = self.keys, list({name: None for row in self.rows for name in row.metrics})
        has_losses = any(row.valid_loss is not None for row in self.rows)
        header = [*_short_names(keys), "loss", *(["valid"] * has_losses), *map(result_name, metrics)]
        lines = [
            [
                *(_value(row.values.get(key)) for key in keys),
                _loss(row.loss),
                *([_loss(row.valid_loss)] * has_losses),
                *(result_text(name, row.metrics[name]) if name in row.metrics else "-" for name in metrics),
                duration(row.seconds),
                row.folder,
                _status(row),
            ]
            for row in self.rows
        ]
        return [[*header, "time", "folder", "status"], *lines]

    def _named(self, row: SweepRow) -> str:
        keys = self.keys
        values = ", ".join(f"{key}={_value(row.values.get(key))}" for key in keys) or f"job {row.number}"
        what = result_name(self.objective)
        value = row.objective
        number = _loss(value) if value is None or self.objective == "valid_loss" else result_text(self.objective, value)
        return f"{row.folder} ({values}): {what} {number}"


def _short_names(keys: Sequence[str]) -> list[str]:
    """The last part of each key, or all of it where two would be called the same."""
    leaves = [_leaf(key) for key in keys]
    return [leaf if leaves.count(leaf) == 1 else key for key, leaf in zip(keys, leaves, strict=True)]


def _leaf(key: str) -> str:
    group, _, leaf = key.rpartition(".")
    return group if leaf == "path" else leaf


def _value(value: object) -> str:
    """A value of the command; of a long path only its end."""
    text = f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split())
    return text if len(text) <= 24 else f"...{text[-21:]}"


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if abs(value) < 1000 else f"{value:.2e}"


def _status(row: SweepRow) -> str:
    return _STATUS.get(row.status, row.status)


def _widths(titles: Sequence[Sequence[str]], lines: Sequence[Sequence[str]]) -> list[int]:
    """Of each column, whose title may have several lines."""
    return [max(map(len, [*title, *(line[column] for line in lines)])) for column, title in enumerate(titles)]


def _width(widths: Sequence[int]) -> int:
    return sum(widths) + len(_GAP) * (len(widths) - 1)


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    return _GAP.join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip()


def _broken(text: str, width: int | None) -> list[str]:
    if width is None:
        return [text]
    return textwrap.wrap(text, max(width, 20), subsequent_indent=_GAP, break_on_hyphens=False)


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"
