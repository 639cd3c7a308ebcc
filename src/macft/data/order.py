"""Which rows make up a step's global batch: a pure function of (dataset, seed, step)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_CACHED_EPOCHS = 4


class RowOrder:
    """The endless stream of rows, cut into batches of ``batch_size``; a batch may straddle two epochs.

    An epoch of a single source visits each row once, in an order that depends only on (seed, epoch). With several
    sources an epoch is as long as all of them together, and source i fills a share of it proportional to
    ``sizes[i] * weights[i]``: a row of weight 2 is drawn twice as often as a row of weight 1. Every source fills at
    least one place an epoch, however small its weight, and runs through all its rows before it repeats one. Rows are
    numbered through the sources in order.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], *, batch_size: int, seed: int):
        if not sizes or min(sizes) < 1 or len(sizes) != len(weights) or min(weights) <= 0 or batch_size < 1:
            raise ValueError("every source needs rows and a weight above 0, and a batch at least one row")
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
        """Epoch length in batches; seldom a whole number."""
        return self._epoch_length / self._batch_size

    def epoch_of(self, step: int) -> float:
        """Epochs completed after ``step`` batches."""
        return step / self.steps_per_epoch

    def rows(self, step: int) -> NDArray[np.int64]:
        """Row numbers (batch_size,) of batch ``step``, from 0; any step directly, without those before it."""
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
        """``count`` rows of a source's own endless stream of permutations, from place ``first``."""
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
