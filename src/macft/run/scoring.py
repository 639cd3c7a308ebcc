"""What a run measures on held-out rows before and after training: the dataset's metrics, and samples to look at."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from macft.config.schema import TrainConfig
from macft.data.formats import Row
from macft.data.load import LoadedData, Split, sample_rows
from macft.errors import DataError
from macft.evaluation.answers import Scored, score_answers
from macft.evaluation.batched import greedy_answers, quick_answers
from macft.evaluation.metrics import PERPLEXITY, Metric, answer_metrics
from macft.evaluation.question import Question, sample_question, shortest_first
from macft.evaluation.trial import asked_of
from macft.parallel.shares import DataShard
from macft.report.events import MetricScored, Noted, PhaseProgress, Sample, SamplesShown
from macft.report.settings import MOST_SAMPLES
from macft.training.validation import validation_loss

if TYPE_CHECKING:
    from macft.run.prepare import Run

_SAMPLE_SECONDS = 10.0
"""Samples stop there, before and after training: a large model is not to be waited for."""
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
class Asked:
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
    questions: Sequence[Question]
    metrics: Mapping[str, Metric]
    names: Sequence[str]
    max_tokens: int


def choose_asked(config: TrainConfig, data: LoadedData, tokenizer: Any) -> tuple[Asked, list[str]]:
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
    return Asked(split, [held_out.rows[i] for i in chosen], questions, metrics, names, longest), notes


def _samples(config: TrainConfig, split: Split, tokenizer: Any) -> tuple[list[Question], int]:
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


def score_before(run: Run) -> Mapping[str, Any]:
    """What the untrained model answers; kept in the run's progress, so that a resumed run does not repeat it.

    Raises:
        DataError: A metric of the user's own fails on an answer.
        Stopped: A stop was requested.
    """
    progress = run.state.progress
    if progress.before or progress.step:
        return progress.before
    values, scored = _measure(run, "before")
    if scored is not None and scored.failures:
        raise DataError(next(iter(scored.failures.values())))
    if values or scored:
        progress.before = {
            "values": values,
            "rows": len(run.asked.rows),
            "questions": [asked.text for asked in run.asked.questions] if scored else [],
            "answers": _shown(scored) if scored else [],
            "right": scored.right if scored else [],
        }
    return progress.before


def score_after(run: Run, before: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of the adapter that is exported, and those before; shows the samples.

    A metric of the user's own that fails is left out with a warning: the adapter is there.

    Raises:
        Stopped: A stop was requested.
    """
    values, scored = _measure(run, "after")
    final: dict[str, float] = {}
    # A resumed run may be asked other questions than before.
    values_before = before.get("values", {}) if before.get("rows") == len(run.asked.rows) else {}
    for name, value in values.items():
        if name in values_before:
            final[f"{name}_before"] = float(values_before[name])
        final[name] = value
    if scored is None:
        return final
    for reason in scored.failures.values():
        run.reporter.handle(Noted(reason, "warning"))
    asked, answers, right = run.asked.questions, _shown(scored), scored.right
    has_before = before.get("questions") == [item.text for item in asked]
    samples = [
        Sample(
            prompt=item.text,
            expected=scored.expected[i],
            before=before["answers"][i] if has_before else None,
            after=answers[i],
            before_correct=before["right"][i] if has_before else None,
            after_correct=right[i],
        )
        for i, item in enumerate(asked[: run.config.report.samples])
    ]
    if samples:
        run.reporter.handle(SamplesShown(run.state.progress.step, samples))
    return final


def _measure(run: Run, when: str) -> tuple[dict[str, float], Scored | None]:
    """The value of each metric, and the answers; a call of all ranks."""
    asked, values, seconds = run.asked, dict[str, float](), 0.0
    scored: Scored | None = None
    if asked.questions:
        model, tokenizer = run.loaded.model, run.loaded.tokenizer
        answers_to = greedy_answers if asked.metrics else partial(quick_answers, seconds=_SAMPLE_SECONDS)
        scored = score_answers(
            partial(answers_to, model, tokenizer),
            tokenizer,
            asked.questions,
            asked.metrics,
            run.collective,
            max_tokens=asked.max_tokens,
            progress=lambda done, total: run.reporter.handle(PhaseProgress(f"answering, {when}", done, total)),
            stopped=lambda: run.stop.requested,
        )
        values, seconds = dict(scored.values), scored.seconds
        if scored.unanswered and asked.metrics:
            text = (
                f"{', '.join(asked.metrics)}, {when}: {scored.unanswered} of {len(asked.questions)} answers were still "
                f"thinking after {asked.max_tokens} tokens (training.metric_max_tokens); they count as wrong"
            )
            run.reporter.handle(Noted(text, "warning"))
    if PERPLEXITY in asked.names:
        perplexity, loss_seconds = _perplexity(run, when)
        values |= {} if perplexity is None else {PERPLEXITY: perplexity}
        seconds += loss_seconds
    values = {name: values[name] for name in asked.names if name in values}
    for name, value in values.items():
        step = run.state.progress.step
        run.reporter.handle(MetricScored(step, name, asked.split, when, value, len(asked.rows), seconds))
    return values, scored


def _perplexity(run: Run, when: str) -> tuple[float | None, float]:
    """exp of the loss of the rows, in nats per target token over all of them; and the seconds that it took."""
    nodes, compute = run.trainer.nodes, run.compute
    # At the end a rank may be alone, with the shares of the others.
    is_alone = nodes.collective is not run.collective
    if is_alone and compute.execution.placement == "pipeline":
        run.reporter.handle(Noted(f"{PERPLEXITY}, {when}: not measured, the other stages are gone", "warning"))
        return None, 0.0
    shard = DataShard(0, 1) if is_alone else nodes.shard
    with nodes.working():
        result = validation_loss(
            run.loaded.model,
            compute.loss,
            compute.execution,
            run.asked.rows,
            run.collective,
            shard=shard,
            progress=lambda done, total: run.reporter.handle(PhaseProgress(f"perplexity, {when}", done, total)),
            stopped=lambda: run.stop.requested,
        )
    return (math.exp(result.loss) if result.loss < 700 else math.inf), result.seconds


def _shown(scored: Scored) -> list[str]:
    """The answers, with a mark where they would go on."""
    return [f"{text} ..." if is_cut else text for text, is_cut in zip(scored.answers, scored.cut, strict=True)]
