"""The rows of each step's global batch: a pure function of (dataset, seed, step)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_CACHED_EPOCHS = 4


class RowOrder:
    """An endless stream of row numbers, in batches of ``batch_size``; a batch may contain rows of two epochs.

    An epoch of a single source has each row once, in an order that depends only on (seed, epoch). With several sources
    an epoch has as many rows as all of them together, and source i's share of it is proportional to
    ``sizes[i] * weights[i]``: a row of weight 2 is drawn twice as often as a row of weight 1. Every source has at least
    one row in an epoch, however small its weight, and repeats a row only after all its other rows. Rows are numbered
    from 0 through all sources in order.

    Args:
        sizes: Number of rows of each source.
        weights: Weight of each source, more than 0.
        batch_size: Rows of a global batch.

    Raises:
        ValueError: A source without rows or with weight 0, or a batch without rows.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], *, batch_size: int, seed: int):
        if not sizes or min(sizes) < 1 or len(sizes) != len(weights) or min(weights) <= 0 or batch_size < 1:
            raise ValueError("every source needs rows and a weight above 0, and a batch needs at least one row")
        self._sizes = list(sizes)
        self._starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        self._batch_size = batch_size
        self._seed = seed
        self._epoch_length = sum(sizes)
        self._quotas = _quotas(self._epoch_length, [size * weight for size, weight in zip(sizes, weights, strict=True)])
        self._epoch = lru_cache(_CACHED_EPOCHS)(self._make_epoch)
        self._pass = lru_cache(_CACHED_EPOCHS * len(sizes))(self._make_pass)

    @property
    def steps_per_epoch(self) -> float:
        """Length of an epoch in batches; usually not a whole number."""
        return self._epoch_length / self._batch_size

    def epoch_of(self, step: int) -> float:
        """Number of epochs, with fraction, after ``step`` batches."""
        return step / self.steps_per_epoch

    def rows(self, step: int) -> NDArray[np.int64]:
        """Row numbers (batch_size,) int64 of batch ``step``, counted from 0; any step can be asked for directly."""
        first = step * self._batch_size
        pieces, wanted = [], self._batch_size
        while wanted:
            epoch, offset = divmod(first, self._epoch_length)
            piece = self._epoch(epoch)[offset : offset + wanted]
            pieces.append(piece)
            first += len(piece)
            wanted -= len(piece)
        return np.concatenate(pieces)

    def _make_epoch(self, epoch: int) -> NDArray[np.int64]:
        drawn = [self._draw(source, epoch * quota, quota) for source, quota in enumerate(self._quotas)]
        return self._generator(0, epoch).permutation(np.concatenate(drawn))

    def _draw(self, source: int, first: int, count: int) -> NDArray[np.int64]:
        """``count`` rows of a source's own endless stream of permutations, from index ``first``."""
        pieces = [np.empty(0, dtype=np.int64)]
        while count:
            number, offset = divmod(first, self._sizes[source])
            piece = self._pass(source, number)[offset : offset + count]
            pieces.append(piece)
            first += len(piece)
            count -= len(piece)
        return np.concatenate(pieces)

    def _make_pass(self, source: int, number: int) -> NDArray[np.int64]:
        order: NDArray[np.int64] = self._starts[source] + self._generator(1 + source, number).permutation(
            self._sizes[source]
        )
        return order

    def _generator(self, stream: int, number: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(np.random.SeedSequence([self._seed, stream, number])))


def _quotas(total: int, shares: list[float]) -> list[int]:
    """``total`` in proportion to ``shares``, at least 1 each: rounded down, the rest to the largest remainders."""
    exact = [total * share / sum(shares) for share in shares]
    quotas = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: quotas[i] - exact[i])
    for index in by_remainder[: total - sum(quotas)]:
        quotas[index] += 1
    for index, quota in enumerate(quotas):
        if quota == 0:
            quotas[quotas.index(max(quotas))] -= 1
            quotas[index] = 1
    return quotas
