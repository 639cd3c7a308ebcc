"""Generates answers to the test rows and scores them with the dataset's metric."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.nn as nn
import msgpack
from mlx_lm.generate import batch_generate

from macft.collective.base import Collective
from macft.data.formats import Record
from macft.data.template import Tokenizer
from macft.data.tokenize import prompt_tokens
from macft.evaluation.metrics import Metric

_PROMPTS_AT_ONCE = 32


@dataclass(frozen=True)
class Scored:
    """Generated answers with their score.

    Attributes:
        value: Share of right answers, 0 to 1.
        answers: The answers, in the order of the records.
        right: Whether each of them is right.
        seconds: Duration of generation and scoring.
    """

    value: float
    answers: list[str]
    right: list[bool]
    seconds: float


def score_answers(
    model: nn.Module,
    tokenizer: Tokenizer,
    records: Sequence[Record],
    metric: Metric,
    collective: Collective,
    *,
    max_tokens: int,
    progress: Callable[[int, int], None],
) -> Scored:
    """Generates answers greedily, on each rank for its share of ``records``; every rank returns the whole result.

    Args:
        max_tokens: Longest answer, in tokens.
        progress: Called with the numbers of this rank's finished records and of all its records.

    Raises:
        DataError: A record has no question or no right answer.
        CollectiveError: Another rank failed.
    """
    started = time.perf_counter()
    model.eval()
    mine = list(range(collective.rank, len(records), collective.world_size))
    # Prompts of similar length are batched together, which needs little padding.
    prompts = {index: prompt_tokens(records[index], tokenizer) for index in mine}
    mine.sort(key=lambda index: len(prompts[index]))
    generated: list[tuple[int, str]] = []
    for start in range(0, len(mine), _PROMPTS_AT_ONCE):
        chunk = mine[start : start + _PROMPTS_AT_ONCE]
        texts = batch_generate(model, tokenizer, [prompts[i] for i in chunk], max_tokens=max_tokens).texts
        generated += zip(chunk, texts, strict=True)
        progress(len(generated), len(mine))
    answers = [""] * len(records)
    for payload in collective.all_gather(msgpack.packb(generated)):
        for index, text in msgpack.unpackb(payload):
            answers[index] = text
    right = [metric.score(record, answer) for record, answer in zip(records, answers, strict=True)]
    return Scored(sum(right) / max(1, len(right)), answers, right, time.perf_counter() - started)
