"""Samples as a table: questions with the right answers, and those before and after training."""

from __future__ import annotations

import html
from collections.abc import Sequence

from macft.report.events import Sample

COLUMNS = ("question", "expected", "before", "after")


def sample_cells(sample: Sample) -> tuple[str, ...]:
    """The texts of :data:`COLUMNS`, with a mark where a metric says that an answer is right or wrong."""
    return (
        sample.prompt,
        sample.expected,
        _marked(sample.before, sample.before_correct),
        _marked(sample.after, sample.after_correct),
    )


def markdown_table(samples: Sequence[Sample]) -> list[str]:
    """The lines of a Markdown table, with a row for each sample."""
    rows = [COLUMNS, ("---",) * len(COLUMNS), *(tuple(map(_cell, sample_cells(sample))) for sample in samples)]
    return [f"| {' | '.join(row)} |" for row in rows]


def _marked(answer: str | None, is_right: bool | None) -> str:
    return {True: "✓ ", False: "✗ ", None: ""}[is_right] + (answer or "")


def _cell(text: str) -> str:
    return html.escape(text.strip(), quote=False).replace("|", "&#124;").replace("\n", "<br>")
