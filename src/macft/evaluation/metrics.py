"""The interface of a metric, and the registry of metrics."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from macft.data.formats import Record
from macft.data.settings import DatasetConfig
from macft.errors import ConfigError
from macft.evaluation.exact_match import ExactMatch
from macft.evaluation.own_metric import OwnMetric, is_dotted
from macft.evaluation.rouge_l import RougeL
from macft.evaluation.sql_execution import SqlExecution

PERPLEXITY = "perplexity"
"""The metric that needs no answers: exp of the loss, in nats per target token, of all rows together."""


class Metric(Protocol):
    """Scores one generated answer."""

    def score(self, answer: str, expected: str, record: Record) -> float | bool:
        """How good ``answer`` is where ``expected`` is right; more is better. A bool: whether it is right.

        Args:
            answer: Without thinking and what else the chat template writes around an answer.
            expected: The row's own answer, likewise.
            record: The row as it was read.

        Raises:
            DataError: The record doesn't have what the metric needs.
        """
        ...


# By the name in dataset.metric.
METRICS: dict[str, type[Metric]] = {"exact_match": ExactMatch, "rouge_l": RougeL, "sql_execution": SqlExecution}


def check_metrics(config: DatasetConfig) -> list[str]:
    """The names of the configured metrics; nothing is imported.

    Raises:
        ConfigError: A name is that of no metric and no dotted path.
    """
    names = config.metrics()
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"dataset.metric: {min(twice)} is given twice")
    for name in names:
        if name not in METRICS and name != PERPLEXITY and not is_dotted(name):
            known = [*METRICS, PERPLEXITY]
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(known)}, or my_module.my_metric"
            raise ConfigError(f"dataset.metric: no metric '{name}'; {hint}")
    return names


def answer_metrics(config: DatasetConfig) -> dict[str, Metric]:
    """The configured metrics that score answers, by name; all but perplexity.

    Raises:
        ConfigError: There is no metric of a name, or a function of the user's own can't be used.
    """
    folder = Path(config.metric_folder or ".").expanduser().absolute()
    names = [name for name in check_metrics(config) if name != PERPLEXITY]
    return {name: METRICS[name]() if name in METRICS else OwnMetric(name, folder) for name in names}


def is_higher_better(name: str) -> bool:
    """Whether more of the metric called ``name`` is better."""
    return name != PERPLEXITY


def right_answers(scores: Mapping[str, Sequence[float | bool]], count: int) -> list[bool | None]:
    """Whether each of ``count`` answers is right, by the first metric that says so; None where none does."""
    for values in scores.values():
        if values and all(isinstance(value, bool) for value in values):
            return [bool(value) for value in values]
    return [None] * count
