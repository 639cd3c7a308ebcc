"""The results of one model on rows of a dataset, and the comparison of two models."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from macft.collective.solo import Solo
from macft.data.formats import Row
from macft.evaluation.answers import Answers, Scored, score_answers
from macft.evaluation.batched import greedy_answers
from macft.evaluation.metrics import Metric
from macft.evaluation.question import RowQuestion
from macft.model.backends.choose import make_backend
from macft.model.confirm import confirm
from macft.model.execution import Execution
from macft.model.load import LoadedModel
from macft.parallel.shares import DataShard
from macft.training.gradients.step_gradient import make_losses
from macft.training.validation import Losses, validation_loss

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Result:
    """``loss`` is the mean cross-entropy per target token, in nats; ``scored`` is None without a metric."""

    loss: float
    target_tokens: int
    scored: Scored | None

    @property
    def perplexity(self) -> float:
        """The exponential of the loss; infinite where that is too large for a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def numbers(self) -> dict[str, float]:
        """Loss, perplexity, and the metrics that score answers, by name."""
        values = {"loss": self.loss, "perplexity": self.perplexity}
        return values | (self.scored.values if self.scored else {})


@dataclass(frozen=True)
class Asked:
    """What both models are asked: the loss over ``rows``, and, with ``metrics``, greedy answers to their ``questions``.

    ``max_tokens``: of an answer.
    """

    rows: Sequence[Row]
    questions: Sequence[RowQuestion]
    metrics: Mapping[str, Metric]
    max_tokens: int


def evaluate(loaded: LoadedModel, asked: Asked, progress: Progress) -> Result:
    """The results of the model, computed as ``loaded.execution`` says.

    ``progress`` is called with (what, done, total).
    """
    model = loaded.model
    execution, _ = confirm(loaded.execution, loaded)
    backend = make_backend(execution)
    with backend.installed(model):
        losses = make_losses(model, backend, loaded.streamed)
        return measure(losses, partial(greedy_answers, model, loaded.tokenizer), loaded, execution, asked, progress)


def measure(
    losses: Losses, answers_to: Answers, loaded: LoadedModel, execution: Execution, asked: Asked, progress: Progress
) -> Result:
    """As :func:`evaluate`, with ``losses`` and ``answers_to`` of any kind; ``loaded`` is the model or a part of it."""
    with Solo() as alone:
        validation = validation_loss(
            loaded.model,
            losses,
            execution,
            asked.rows,
            alone,
            shard=DataShard(0, 1),
            progress=lambda done, total: progress("loss", done, total),
        )
        scored = None
        if asked.metrics:
            scored = score_answers(
                answers_to,
                loaded.tokenizer,
                asked.questions,
                asked.metrics,
                alone,
                max_tokens=asked.max_tokens,
                progress=lambda done, total: progress("answers", done, total),
            )
    return Result(validation.loss, validation.target_tokens, scored)


def answers(questions: Sequence[RowQuestion], base: Result, tuned: Result) -> list[dict[str, Any]]:
    """RowQuestion, right answer and both models' answers with their scores, row by row; empty without a metric."""
    if base.scored is None or tuned.scored is None:
        return []
    right = {"base": base.scored.right, "tuned": tuned.scored.right}
    return [
        {
            "question": asked.text,
            "expected": tuned.scored.expected[i],
            "base": base.scored.answers[i],
            "base_right": right["base"][i],
            "base_scores": {name: values[i] for name, values in base.scored.scores.items()},
            "tuned": tuned.scored.answers[i],
            "tuned_right": right["tuned"][i],
            "tuned_scores": {name: values[i] for name, values in tuned.scored.scores.items()},
        }
        for i, asked in enumerate(questions)
    ]


def agreement(base: Result, tuned: Result) -> dict[str, int]:
    """How many questions both, only one, or neither answers right; empty where no metric says right or wrong."""
    if base.scored is None or tuned.scored is None:
        return {}
    pairs = list(zip(base.scored.right, tuned.scored.right, strict=True))
    if any(None in pair for pair in pairs):
        return {}
    return {
        "both": pairs.count((True, True)),
        "only_tuned": pairs.count((False, True)),
        "only_base": pairs.count((True, False)),
        "neither": pairs.count((False, False)),
    }
