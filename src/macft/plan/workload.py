"""The micro-batches that a node's rows of a step become: what its peak memory and its work follow from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from macft.data.batch import PAD_TO, coarse_length, coarse_targets
from macft.data.formats import Row
from macft.data.order import RowOrder
from macft.plan.shares import assign

_STEPS_LOOKED_AT = 256


@dataclass(frozen=True)
class StepRows:
    """The rows of one global batch: tokens and target tokens of each, (rows,)."""

    lengths: NDArray[np.int64]
    targets: NDArray[np.int64]

    def of_rank(self, rank: int, world_size: int, shares: Sequence[float] | None = None) -> StepRows:
        """Those that ``rank`` computes."""
        mine = assign(self.lengths, world_size, shares)[rank]
        return StepRows(self.lengths[mine], self.targets[mine])

    def micro_batches(self, size: int | None, *, compiled: bool = False) -> Iterable[tuple[int, int, int]]:
        """(rows, padded length, targets) of each micro-batch of at most ``size`` rows, split as the trainer does."""
        order = np.argsort(self.lengths, kind="stable")
        step = size or max(1, len(order))
        for start in range(0, len(order), step):
            group = order[start : start + step]
            longest = int(self.lengths[group].max())
            targets = int(self.targets[group].sum())
            if compiled:
                length = coarse_length(longest)
                yield len(group), length, coarse_targets(targets, len(group) * (length - 1))
            else:
                yield len(group), 1 + -(-(longest - 1) // PAD_TO) * PAD_TO, targets


def steps_of(rows: Sequence[Row], order: RowOrder, total_steps: int) -> list[StepRows]:
    """The global batches of the first steps of a run, as the trainer will draw them; at most 256 of them."""
    lengths = np.array([len(row.tokens) for row in rows], dtype=np.int64)
    prompts = np.array([max(row.prompt_length, 1) for row in rows], dtype=np.int64)
    targets = np.maximum(lengths - prompts, 0)
    found = []
    for step in range(min(total_steps, _STEPS_LOOKED_AT)):
        ids = order.rows(step)
        found.append(StepRows(lengths[ids], targets[ids]))
    return found


def assumed_steps(batch_size: int, length: int) -> list[StepRows]:
    """One step of rows that all have ``length`` tokens: for data that can't be read here."""
    return [StepRows(np.full(batch_size, length), np.full(batch_size, length - 1))]
