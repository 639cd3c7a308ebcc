"""The lengths of rows: percentiles, what ``dataset.max_seq_length`` cuts, and a histogram.

Shapes: R rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from macft.data.formats import Row

_MOST_BINS = 10
PERCENTILES = {"shortest": 0, "50%": 50, "90%": 90, "99%": 99, "longest": 100}
"""By the head of the column."""


@dataclass(frozen=True)
class Lengths:
    """Of R rows that are not cut yet, (R,) each: all their tokens, and how many are no targets, 1 or more."""

    tokens: NDArray[np.int64]
    masked: NDArray[np.int64]

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Lengths:
        """The lengths of ``rows``, one or more."""
        return cls(np.array([len(row.tokens) for row in rows]), np.array([max(row.prompt_length, 1) for row in rows]))

    @property
    def targets(self) -> NDArray[np.int64]:
        """Target tokens of each row (R,)."""
        return self.tokens - self.masked

    def cut_line(self, longest: int) -> str:
        """What is lost if rows are cut to ``longest`` tokens, in words."""
        cut = int((self.tokens > longest).sum())
        if not cut:
            return f"max_seq_length {longest:,} cuts no row"
        lost = int(np.maximum(self.tokens - longest, 0).sum()) / int(self.tokens.sum())
        dropped = int((self.masked >= longest).sum())
        line = f"max_seq_length {longest:,} cuts {cut:,} of {len(self.tokens):,} rows ({cut / len(self.tokens):.1%}) "
        line += f"and {lost:.1%} of all tokens"
        return line + (f"; no target is left in {dropped:,} of them, which a run drops" if dropped else "")


def percentile(values: NDArray[np.int64], percent: int) -> int:
    """The smallest of ``values`` (R,) that is not exceeded by this many of them."""
    return int(np.percentile(values, percent, method="inverted_cdf"))


def histogram(values: NDArray[np.int64]) -> list[tuple[str, int]]:
    """How many of ``values`` (R,) lie in which range.

    There are about 10 ranges, fewer for a few values; the last is open where single values are far off.
    """
    least, most, usual = int(values.min()), int(values.max()), percentile(values, 99)
    width = _round_width((usual - least) / min(_MOST_BINS, math.ceil(math.sqrt(len(values)))))
    start = least // width * width
    edges = list(range(start, usual + 1, width))
    edges.append(edges[-1] + width)
    counts = [int(((values >= low) & (values < high)).sum()) for low, high in pairwise(edges)]
    bins = [(_range(low, high - 1), count) for (low, high), count in zip(pairwise(edges), counts, strict=True)]
    if most >= edges[-1]:
        bins.append((f"{edges[-1]:,} or more", int((values >= edges[-1]).sum())))
    return bins


def _range(low: int, high: int) -> str:
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _round_width(width: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50 ... that is not below ``width``."""
    scale = 1
    while True:
        for factor in (1, 2, 5):
            if factor * scale >= width:
                return factor * scale
        scale *= 10
