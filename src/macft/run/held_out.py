"""What a run asks of the model before and after training: for the dataset's metrics, and as samples to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from macft.config.schema import TrainConfig
from macft.data.formats import Row
from macft.data.load import LoadedData, Split, sample_rows
from macft.errors import DataError
from macft.evaluation.metrics import Metric, answer_metrics
from macft.evaluation.question import RowQuestion, sample_question, shortest_first
from macft.evaluation.trial import asked_of
from macft.report.settings import MOST_SAMPLES

_SAMPLE_SLACK = 16
"""Tokens that a sample may be longer than the right answers."""
_CANDIDATES = MOST_SAMPLES
"""Rows from which samples are chosen, the same number whatever ``report.samples`` is."""


def is_scored(config: TrainConfig) -> bool:
    """Whether the dataset's metrics are measured before and after training."""
    return bool(config.dataset.metrics()) and config.training.metric_rows != 0


def test_rows_needed(config: TrainConfig) -> int:
    """How many test rows the run looks at; -1: all that there are."""
    if is_scored(config):
        return -1
    return _CANDIDATES if config.report.samples else 0


@dataclass(frozen=True)
class HeldOut:
    """What both models are asked, the same before and after training.

    Attributes:
        split: Of the rows: test, or valid where there are no test rows.
        rows: Those that the metrics are measured on.
        questions: To answer: those of ``rows`` if a metric scores answers, else the samples.
        metrics: Those that score answers, by name.
        names: Of all metrics, in the order of the configuration.
        max_tokens: Of an answer.
    """

    split: str
    rows: Sequence[Row]
    questions: Sequence[RowQuestion]
    metrics: Mapping[str, Metric]
    names: Sequence[str]
    max_tokens: int


def choose_held_out(config: TrainConfig, data: LoadedData, tokenizer: Any) -> tuple[HeldOut, list[str]]:
    """What is asked of a run with these rows, and lines for the user. Each metric is tried on a row's own answer.

    Raises:
        ConfigError: A metric of the user's own can't be used.
        DataError: There are no rows for the metrics, or one of them can't score a row.
    """
    names, notes, chosen = config.dataset.metrics(), list[str](), list[int]()
    split, held_out = ("test", data.test) if data.test.rows else ("valid", data.valid)
    if is_scored(config):
        if not held_out.rows:
            raise DataError(
                "training.metric_rows: the dataset has no test or validation rows to score; dataset.test_fraction=0.1 "
                "holds some of the training rows out"
            )
        if split == "valid":
            notes.append("dataset.metric: there are no test rows, so validation rows are scored")
        chosen = sample_rows(len(held_out.rows), config.training.metric_rows, config.seed)
    elif names:
        notes.append(f"dataset.metric: {', '.join(names)} is not measured (training.metric_rows=0)")
        names = []
    metrics = answer_metrics(config.dataset) if names else {}
    if metrics:
        questions = asked_of([held_out.records[i] for i in chosen], metrics, tokenizer)
        longest = config.training.metric_max_tokens
    else:
        questions, longest = _samples(config, held_out, tokenizer)
    if config.report.samples and not questions:
        what = "rows with a question and an answer" if held_out.rows else "rows, which dataset.test_fraction=0.1 makes"
        notes.append(f"report.samples: no answers are shown before and after training, for want of held-out {what}")
    return HeldOut(split, [held_out.rows[i] for i in chosen], questions, metrics, names, longest), notes


def _samples(config: TrainConfig, split: Split, tokenizer: Any) -> tuple[list[RowQuestion], int]:
    """The samples of a run, and the most tokens of an answer to one: little more than the right ones have."""
    questions = []
    for number in sample_rows(len(split.rows), _CANDIDATES, config.seed):
        try:
            questions.append(sample_question(split.records[number], split.rows[number], tokenizer))
        except DataError:  # a chat without an answer, for instance
            continue
    chosen = shortest_first(questions, config.report.samples)
    needed = max((len(tokenizer.encode(item.expected)) for item in chosen), default=0) + _SAMPLE_SLACK
    return chosen, min(config.training.metric_max_tokens, needed)
