"""Generates answers to the test rows and scores them with the dataset's metric."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgpack

from macft.collective.base import Collective
from macft.data.formats import Record
from macft.data.tokenize import prompt_tokens
from macft.evaluation.answer_form import AnswerForm, AnswerTokenizer
from macft.evaluation.batched import Prompt
from macft.evaluation.metrics import Metric
from macft.evaluation.record import expected_text, with_answer
from macft.training.stop_request import Stopped


@dataclass(frozen=True)
class Scored:
    """Generated answers with their score.

    Attributes:
        value: Share of right answers, 0 to 1.
        expected: The right answers, in the order of the records, without thinking.
        answers: The generated answers, without thinking and what else the chat template writes around an answer; empty
            where the model was still thinking.
        right: Whether each of them is right.
        unanswered: How many answers ran out of tokens within the model's thinking.
        seconds: Duration of generation and scoring.
    """

    value: float
    expected: list[str]
    answers: list[str]
    right: list[bool]
    unanswered: int
    seconds: float


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
    records: Sequence[Record],
    metric: Metric,
    collective: Collective,
    *,
    max_tokens: int,
    progress: Callable[[int, int], None],
    stopped: Callable[[], bool] = lambda: False,
) -> Scored:
    """Generates answers greedily, on each rank for its share of ``records``; every rank returns the whole result.

    Args:
        answers_to: What answers; :func:`~macft.evaluation.batched.greedy_answers` of a model, for instance.
        max_tokens: Longest answer, in tokens.
        progress: Called with the numbers of this rank's finished records and of all its records.
        stopped: Asked between two batches; once it is true on any rank, there is no result.

    Raises:
        DataError: A record has no question or no right answer.
        CollectiveError: Another rank failed.
        Stopped: On all ranks alike.
    """
    started = time.perf_counter()
    mine = list(range(collective.rank, len(records), collective.world_size))
    prompts = [prompt_tokens(records[index], tokenizer) for index in mine]
    form = AnswerForm.of(tokenizer, records[0]) if records else AnswerForm()
    found = answers_to(prompts, max_tokens=max_tokens, progress=lambda done: progress(done, len(mine)), stopped=stopped)
    generated: list[tuple[int, str | None]] = []
    for index, prompt, tokens in zip(mine, prompts, found, strict=True):
        # A model that ends its turn in a block that its prompt began has learned to answer without thinking.
        is_thinking = len(tokens) == max_tokens and form.opens_thinking(tokenizer.decode(prompt))
        generated.append((index, form.answer(tokenizer.decode(tokens), is_thinking=is_thinking)))
    payloads = [msgpack.unpackb(payload) for payload in collective.all_gather(msgpack.packb([stopped(), generated]))]
    if any(is_stopped for is_stopped, _ in payloads):
        raise Stopped
    gathered = [pair for _, pairs in payloads for pair in pairs]
    answers: list[str | None] = [answer for _, answer in sorted(gathered, key=lambda pair: int(pair[0]))]
    expected = [form.answer(expected_text(record)) for record in records]
    right = [
        wanted is not None and answer is not None and metric.score(with_answer(record, wanted), answer)
        for record, wanted, answer in zip(records, expected, answers, strict=True)
    ]
    return Scored(
        value=sum(right) / max(1, len(right)),
        expected=[wanted or "" for wanted in expected],
        answers=[answer or "" for answer in answers],
        right=right,
        unanswered=answers.count(None),
        seconds=time.perf_counter() - started,
    )
