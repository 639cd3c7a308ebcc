"""Lets the model answer questions of the test set and scores the answers with the dataset's metric."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn
import msgpack
from mlx_lm.generate import batch_generate

from macft.collective.base import Collective
from macft.data.formats import prompt_tokens
from macft.evaluation.metrics import Metric

_PROMPTS_AT_ONCE = 32


@dataclass(frozen=True)
class Scored:
    """``value`` is the share of right answers, 0 to 1; ``answers`` and ``right`` stand in the order of the records."""

    value: float
    answers: list[str]
    right: list[bool]
    seconds: float


def score_answers(
    model: nn.Module,
    tokenizer: Any,
    records: Sequence[Mapping[str, Any]],
    metric: Metric,
    collective: Collective,
    *,
    max_tokens: int,
    progress: Callable[[int, int], None],
) -> Scored:
    """Generates greedily, each rank a share of ``records``; every rank gets the whole result.

    ``progress`` is told (done, total) records of this rank.
    """
    started = time.perf_counter()
    model.eval()
    mine = list(range(collective.rank, len(records), collective.world_size))
    # Prompts of like length go together, so that little is padded.
    prompts = {index: prompt_tokens(records[index], tokenizer) for index in mine}
    mine.sort(key=lambda index: len(prompts[index]))
    found: list[tuple[int, str]] = []
    for start in range(0, len(mine), _PROMPTS_AT_ONCE):
        chunk = mine[start : start + _PROMPTS_AT_ONCE]
        texts = batch_generate(model, tokenizer, [prompts[i] for i in chunk], max_tokens=max_tokens).texts
        found += zip(chunk, texts, strict=True)
        progress(len(found), len(mine))
    answers = [""] * len(records)
    for payload in collective.all_gather(msgpack.packb(found)):
        for index, text in msgpack.unpackb(payload):
            answers[index] = text
    right = [metric.score(record, answer) for record, answer in zip(records, answers, strict=True)]
    return Scored(sum(right) / max(1, len(right)), answers, right, time.perf_counter() - started)
