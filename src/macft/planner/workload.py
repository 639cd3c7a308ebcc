"""What a node computes at once of its rows of a step: what its peak memory and its work follow from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from macft.data.batch import micro_batches
from macft.data.formats import Row
from macft.data.order import RowOrder
from macft.parallel.shares import DataShard, rows_of_shard
from macft.training.batch_layout import BatchLayout, DeviceBatch

_STEPS_LOOKED_AT = 256
_ROWS_LOOKED_AT = 8192


@dataclass(frozen=True)
class DeviceBatchShape:
    """``tokens`` computed at once, of ``rows`` that have up to ``length`` each, and ``targets`` among them.

    Filling counts. Padded rows have rows * length tokens; those of a pack fewer, for what they share is there once.
    ``pairs`` are those of a token and one that it sees, or itself.
    """

    rows: int
    length: int
    tokens: int
    targets: int
    pairs: int
    # Parts of a micro-batch that are computed at the same time, and whose sizes are summed here.
    parts: int = 1

    @classmethod
    def from_batch(cls, batch: DeviceBatch) -> DeviceBatchShape:
        """The size of what the trainer computes at once."""
        if batch.layout:
            paths, _, depths = batch.layout
            (rows, length), tokens, pairs = paths.shape, len(depths), int(depths.sum()) + len(depths)
        else:
            rows, length = batch.inputs.shape
            tokens, pairs = rows * length, rows * length * (length + 1) // 2
        return cls(rows, length, tokens, len(batch.targets), pairs)

    @classmethod
    def from_parts(cls, shapes: Sequence[DeviceBatchShape]) -> DeviceBatchShape:
        """That of parts computed at the same time."""
        return cls(
            rows=sum(shape.rows for shape in shapes),
            length=max(shape.length for shape in shapes),
            tokens=sum(shape.tokens for shape in shapes),
            targets=sum(shape.targets for shape in shapes),
            pairs=sum(shape.pairs for shape in shapes),
            parts=len(shapes),
        )


@dataclass(frozen=True)
class StepRows:
    """Rows of one global batch, and their numbers in the dataset (rows,)."""

    rows: Sequence[Row]
    ids: NDArray[np.int64]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row (rows,)."""
        return np.array([len(row.tokens) for row in self.rows], dtype=np.int64)

    @property
    def targets(self) -> int:
        """Target tokens of all rows."""
        return sum(row.target_tokens for row in self.rows)

    def of_shard(self, shard: DataShard, *, shared: bool = False) -> StepRows:
        """Those of ``shard``; ``shared``: rows that begin alike share these tokens."""
        mine = rows_of_shard(shard, [row.tokens for row in self.rows], shared=shared)
        return StepRows([self.rows[place] for place in mine], self.ids[mine])

    def divided(self, micro_batch_size: int | None) -> list[StepRows]:
        """The rows of each micro-batch, made as the trainer makes it."""
        places = {int(number): place for place, number in enumerate(self.ids)}
        batches = micro_batches(self.rows, self.ids, micro_batch_size)
        return [StepRows([self.rows[places[int(number)]] for number in each.row_ids], each.row_ids) for each in batches]

    def device_batches(self, micro_batch_size: int | None, layout: BatchLayout) -> list[DeviceBatchShape]:
        """What is computed one after the other, made as the trainer makes it."""
        shapes: list[DeviceBatchShape] = []
        for batch in micro_batches(self.rows, self.ids, micro_batch_size):
            parts = [DeviceBatchShape.from_batch(part) for part in layout.parts(batch)]
            groups = [parts[start : start + layout.lanes] for start in range(0, len(parts), layout.lanes)]
            shapes += map(DeviceBatchShape.from_parts, groups)
        return shapes


def steps_of(rows: Sequence[Row], order: RowOrder, total_steps: int) -> list[StepRows]:
    """The global batches of a run's first steps, as the trainer will draw them; of at most 256, or about 8,192 rows."""
    steps: list[StepRows] = []
    seen = 0
    for step in range(min(total_steps, _STEPS_LOOKED_AT)):
        if seen >= _ROWS_LOOKED_AT:
            break
        ids = order.rows(step)
        steps.append(StepRows([rows[place] for place in ids], ids))
        seen += len(ids)
    return steps


def unlike_rows(count: int, length: int, targets: int) -> StepRows:
    """``count`` rows of ``length`` tokens that have nothing in common, each with ``targets`` at its end."""
    rows = [Row(np.full(length, number, dtype=np.int32), length - targets) for number in range(count)]
    return StepRows(rows, np.arange(count))


def assumed_steps(batch_size: int, length: int) -> list[StepRows]:
    """One step of rows that all have ``length`` tokens: for data that can't be read here."""
    return [unlike_rows(batch_size, length, length - 1)]
