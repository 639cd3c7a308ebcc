"""The rows that are trained: from the SQL dataset that macft generates, the same each time."""

from __future__ import annotations

import itertools
import json
import math
import random
from dataclasses import dataclass
from typing import Any

import numpy as np

from macft.data.formats import Row
from macft.data.settings import SourceConfig
from macft.data.sources import read_source


@dataclass(frozen=True)
class RowKind:
    """``batch_size`` rows a step, of ``tokens`` (least, most); None: rows of the SQL dataset, their prompts masked."""

    batch_size: int
    tokens: tuple[int, int] | None = None

    @property
    def masked(self) -> bool:
        """Whether prompts are no targets."""
        return self.tokens is None


ROW_KINDS = {"sql": RowKind(4), "mixed": RowKind(4, (16, 384)), "long": RowKind(2, (1000, 1020))}


def records_of(kind: str, tokenizer: Any, count: int, *, split: str = "train") -> list[dict[str, Any]]:
    """``count`` records of a kind of rows."""
    records = [dict(row.record) for row in read_source(SourceConfig(path="builtin:sql"))[split]]
    tokens = ROW_KINDS[kind].tokens
    return records[:count] if tokens is None else _texts(records, tokenizer, *tokens, count)


def random_rows(kind: str, count: int) -> list[Row]:
    """Rows of the same lengths without a tokenizer, of random tokens below 4,096; for a machine without a network.

    Those of ``sql`` begin with the same 12 tokens; prompts and answers have the lengths of the SQL dataset's in
    SmolLM2's tokens (37 to 59 and 9 to 26, on average 43 and 14).
    """
    generator, tokens = np.random.default_rng(0), ROW_KINDS[kind].tokens
    start = generator.integers(1, 4096, 12 if tokens is None else 0)
    rows = []
    for _ in range(count):
        if tokens is None:
            prompt, answer = (
                int(min(max(generator.gamma(form, scale), least), most)) for form, scale, least, most in _SQL_LENGTHS
            )
        else:
            prompt, answer = 0, round(math.exp(generator.uniform(math.log(tokens[0]), math.log(tokens[1]))))
        own = generator.integers(1, 4096, prompt + answer - len(start))
        rows.append(Row(np.concatenate([start, own]).astype(np.int32), prompt))
    return rows


# Of prompts and answers: the form and scale of a gamma distribution, and the least and most tokens.
_SQL_LENGTHS = ((100, 0.44, 37, 59), (16, 0.93, 9, 26))


def _texts(records: list[dict[str, Any]], tokenizer: Any, least: int, most: int, count: int) -> list[dict[str, Any]]:
    """``count`` texts of ``least`` to ``most`` tokens, evenly spread on a log scale, cut from the SQL dataset."""
    pieces = (tokenizer.encode(f"{json.dumps(record)}\n", add_special_tokens=False) for record in records)
    stream = list(itertools.islice(itertools.chain.from_iterable(pieces), count * most + 1))
    generator = random.Random(0)
    found, start = [], 0
    for _ in range(count):
        length = round(math.exp(generator.uniform(math.log(least), math.log(most))))
        start = start if start + length < len(stream) else 0
        found.append({"text": tokenizer.decode(stream[start : start + length])})
        start += length
    return found
