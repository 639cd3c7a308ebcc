"""Generates answers to questions and scores them with the dataset's metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple, Protocol

import msgpack

from macft.collective.base import Collective
from macft.data.formats import Record
from macft.errors import DataError
from macft.evaluation.answer_form import AnswerForm, AnswerTokenizer
from macft.evaluation.batched import Prompt
from macft.evaluation.metrics import Metric, right_answers
from macft.evaluation.own_metric import OwnMetric
from macft.evaluation.question import RowQuestion
from macft.training.stop_request import Stopped


@dataclass(frozen=True)
class Scored:
    """Generated answers with their scores.

    Attributes:
        values: Each metric's mean score, by name.
        scores: Its score of each answer.
        expected: The right answers, in the order of the questions, without thinking.
        answers: The generated answers, without thinking and what else the chat template writes around an answer; empty
            where the model was still thinking.
        cut: Which of them have the most tokens that were allowed.
        unanswered: How many answers ran out of tokens within the model's thinking.
        failures: Why a metric of the user's own has no value, by name.
        seconds: Duration of generation and scoring.
    """

    values: dict[str, float]
    scores: dict[str, list[float | bool]]
    expected: list[str]
    answers: list[str]
    cut: list[bool]
    unanswered: int
    failures: dict[str, str]
    seconds: float

    @property
    def right(self) -> list[bool | None]:
        """Whether each answer is right, by the first metric that says so; None where none does."""
        return right_answers(self.scores, len(self.answers))


class Answers(Protocol):
    """Computes the most likely answer to each of some prompts."""

    def __call__(
        self,
        prompts: Sequence[Prompt],
        *,
        max_tokens: int,
        progress: Callable[[int], None],
        stopped: Callable[[], bool],
    ) -> list[list[int]]:
        """The tokens of each answer, at most ``max_tokens``, without the one that ends it.

        ``progress`` is called with the number of finished answers. Once ``stopped()`` is true, the rest may be empty.
        """
        ...


def score_answers(
    answers_to: Answers,
    tokenizer: AnswerTokenizer,
    questions: Sequence[RowQuestion],
    metrics: Mapping[str, Metric],
    collective: Collective,
    *,
    max_tokens: int,
    progress: Callable[[int, int], None],
    stopped: Callable[[], bool] = lambda: False,
    mine: range | None = None,
) -> Scored:
    """Answers greedily and scores, on each rank its share of ``questions``; every rank returns the whole result.

    Args:
        answers_to: What answers; :func:`~macft.evaluation.batched.greedy_answers` of a model, for instance.
        metrics: By name; there may be none.
        max_tokens: Longest answer, in tokens.
        progress: Called with the numbers of this rank's finished questions and of all its questions.
        stopped: Asked between two batches; once it is true on any rank, there is no result.
        mine: Which questions this rank asks, each question on one rank; None: the ranks take turns.

    Raises:
        DataError: A record has not what a metric needs.
        CollectiveError: Another rank failed.
        Stopped: On all ranks alike.
    """
    started = time.perf_counter()
    mine = range(collective.rank, len(questions), collective.world_size) if mine is None else mine
    form = AnswerForm.of(tokenizer, questions[0].record) if questions else AnswerForm()
    prompts, expected = [questions[index].prompt for index in mine], [form.answer(item.expected) for item in questions]
    progress(0, len(mine))
    found = answers_to(prompts, max_tokens=max_tokens, progress=lambda done: progress(done, len(mine)), stopped=stopped)
    answered: list[_Answered] = []
    for index, prompt, tokens in zip(mine, prompts, found, strict=True):
        is_cut = len(tokens) >= max_tokens
        # A model that ends its turn in a block that its prompt began has learned to answer without thinking.
        is_thinking = is_cut and form.opens_thinking(tokenizer.decode(prompt))
        answered.append(_Answered(index, form.answer(tokenizer.decode(tokens), is_thinking=is_thinking), is_cut))
    scores, failures = _own_scores(metrics, answered, expected, questions)
    own = msgpack.packb([stopped(), answered, scores, failures])
    shares = [_Share(*msgpack.unpackb(payload)) for payload in collective.all_gather(own)]
    if any(share.is_stopped for share in shares):
        raise Stopped
    failures = {name: text for share in reversed(shares) for name, text in share.failures.items()}
    if unusable := [text for name, text in failures.items() if not isinstance(metrics[name], OwnMetric)]:
        raise DataError(unusable[0])
    everything = [_Answered(*item) for share in shares for item in share.answered]
    order = [item.question for item in everything]
    gathered = {
        name: _in_order(order, [score for share in shares for score in share.scores[name]])
        for name in metrics
        if name not in failures
    }
    everything.sort(key=lambda item: item.question)
    return Scored(
        values={name: fmean(values) for name, values in gathered.items() if values},
        scores=gathered,
        expected=[wanted or "" for wanted in expected],
        answers=[item.text or "" for item in everything],
        cut=[item.is_cut for item in everything],
        unanswered=sum(item.text is None for item in everything),
        failures=failures,
        seconds=time.perf_counter() - started,
    )


class _Answered(NamedTuple):
    """The answer to a question, by its number; no ``text`` where the model was still thinking at its last token."""

    question: int
    text: str | None
    is_cut: bool


class _Share(NamedTuple):
    """What a rank tells the others: its answers, each metric's scores of them, and why a metric has none."""

    is_stopped: bool
    answered: list[tuple[int, str | None, bool]]
    scores: dict[str, list[float | bool]]
    failures: dict[str, str]


def _own_scores(
    metrics: Mapping[str, Metric],
    answered: Sequence[_Answered],
    expected: Sequence[str | None],
    questions: Sequence[RowQuestion],
) -> tuple[dict[str, list[float | bool]], dict[str, str]]:
    """Each metric's scores of this rank's answers, and why a metric has none, by name."""
    scores: dict[str, list[float | bool]] = {}
    failures: dict[str, str] = {}
    for name, metric in metrics.items():
        try:
            scores[name] = [
                _score(metric, item.text, expected[item.question], questions[item.question].record) for item in answered
            ]
        except DataError as error:
            failures[name] = str(error)
    return scores, failures


def _score(metric: Metric, answer: str | None, expected: str | None, record: Record) -> float | bool:
    """The score of an answer; None is that of a model that was still thinking, or a right answer that is no text."""
    if isinstance(metric, OwnMetric):
        return metric.score(answer or "", expected or "", record)
    if answer is None or expected is None:
        return False
    return metric.score(answer, expected, record)


def _in_order(order: Sequence[int], values: Sequence[float | bool]) -> list[float | bool]:
    """``values`` sorted by the numbers in ``order``, which belong to them."""
    return [value for _, value in sorted(zip(order, values, strict=True), key=lambda pair: pair[0])]
