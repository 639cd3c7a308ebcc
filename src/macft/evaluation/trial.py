"""Questions for the metrics of answers, and each metric tried on the first one before a model answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from macft.data.formats import Record
from macft.evaluation.metrics import Metric
from macft.evaluation.question import RowQuestion, question


def asked_of(records: Sequence[Record], metrics: Mapping[str, Metric], tokenizer: Any) -> list[RowQuestion]:
    """The questions of ``records``; none without ``metrics``. Each metric has scored one row's own answer.

    Raises:
        DataError: A row has no question or no answer, or a metric can't score the first row.
    """
    questions = [question(record, tokenizer) for record in records] if metrics else []
    for metric in metrics.values():
        for first in questions[:1]:
            metric.score(first.expected, first.expected, first.record)
    return questions
