"""The interface of a metric, and the registry of metrics."""

from __future__ import annotations

import difflib
from typing import Protocol

from macft.data.formats import Record
from macft.errors import ConfigError
from macft.evaluation.exact_match import ExactMatch
from macft.evaluation.sql_execution import SqlExecution


class Metric(Protocol):
    """Scores one generated answer."""

    def score(self, record: Record, generated: str) -> bool:
        """Whether ``generated`` is a right answer to ``record``, a raw row of the test split.

        Raises:
            DataError: The record doesn't have what the metric needs.
        """
        ...


# By the name in dataset.metric.
METRICS: dict[str, type[Metric]] = {"exact_match": ExactMatch, "sql_execution": SqlExecution}


def metric(name: str) -> Metric:
    """The metric called ``name``.

    Raises:
        ConfigError: There is no metric of that name.
    """
    if name not in METRICS:
        near = difflib.get_close_matches(name, METRICS, 1)
        hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(METRICS)}"
        raise ConfigError(f"dataset.metric: no metric '{name}'; {hint}")
    return METRICS[name]()
