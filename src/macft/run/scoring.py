"""Metrics and samples before and after training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from macft.errors import DataError
from macft.evaluation.answers import Answers, Scored, score_answers
from macft.evaluation.batched import greedy_answers, quick_answers
from macft.evaluation.metrics import PERPLEXITY
from macft.parallel.shares import DataShard
from macft.report.events import MetricScored, Noted, PhaseProgress, Sample, SamplesShown
from macft.run.prepare import Run
from macft.run.stage_answers import StageAnswers
from macft.training.validation import validation_loss

_SAMPLE_SECONDS = 10.0
"""Samples stop there, before and after training: a large model is not to be waited for."""


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
            "rows": len(run.held_out.rows),
            "questions": [asked.text for asked in run.held_out.questions] if scored else [],
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
    values_before = before.get("values", {}) if before.get("rows") == len(run.held_out.rows) else {}
    for name, value in values.items():
        if name in values_before:
            final[f"{name}_before"] = float(values_before[name])
        final[name] = value
    if scored is None:
        return final
    for reason in scored.failures.values():
        run.reporter.handle(Noted(reason, "warning"))
    asked, answers, right = run.held_out.questions, _shown(scored), scored.right
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
    """The value of each metric, and the answers; a collective call."""
    asked, values, seconds = run.held_out, dict[str, float](), 0.0
    scored: Scored | None = None
    if asked.questions:
        answers_to, mine = _answers(run)
        scored = score_answers(
            answers_to,
            run.model.loaded.tokenizer,
            asked.questions,
            asked.metrics,
            run.collective,
            max_tokens=asked.max_tokens,
            progress=lambda done, total: run.reporter.handle(PhaseProgress(f"answering, {when}", done, total)),
            stopped=lambda: run.stop.requested,
            mine=mine,
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


def _answers(run: Run) -> tuple[Answers, range | None]:
    """What answers, and which questions this rank asks; None for those of its turn."""
    asked, loaded = run.held_out, run.model.loaded
    if run.computation.gradient.execution.placement == "pipeline" and run.trainer.nodes.collective is run.collective:
        seconds = math.inf if asked.metrics else _SAMPLE_SECONDS
        stages = StageAnswers(loaded, run.computation.backend, run.trainer.nodes.places, run.collective, seconds)
        return stages, stages.questions(len(asked.questions))
    if asked.metrics:
        return partial(greedy_answers, loaded.model, loaded.tokenizer), None
    return partial(quick_answers, loaded.model, loaded.tokenizer, seconds=_SAMPLE_SECONDS), None


def _perplexity(run: Run, when: str) -> tuple[float | None, float]:
    """exp of the loss of the rows, in nats per target token over all of them; and the seconds that it took."""
    nodes, compute = run.trainer.nodes, run.computation.gradient
    # At the end a rank may be alone, with the shares of the others.
    is_alone = nodes.collective is not run.collective
    if is_alone and compute.execution.placement == "pipeline":
        run.reporter.handle(Noted(f"{PERPLEXITY}, {when}: not measured, the other stages are gone", "warning"))
        return None, 0.0
    shard = DataShard(0, 1) if is_alone else nodes.shard
    with nodes.working():
        result = validation_loss(
            run.model.loaded.model,
            compute.loss,
            compute.execution,
            run.held_out.rows,
            run.collective,
            shard=shard,
            progress=lambda done, total: run.reporter.handle(PhaseProgress(f"perplexity, {when}", done, total)),
            stopped=lambda: run.stop.requested,
            fixed=run.config.training.deterministic,
        )
    return (math.exp(result.loss) if result.loss < 700 else math.inf), result.seconds


def _shown(scored: Scored) -> list[str]:
    """The answers, with a mark where they would go on."""
    return [f"{text} ..." if is_cut else text for text, is_cut in zip(scored.answers, scored.cut, strict=True)]
