"""A rank's micro-batches of each step, made ahead of time."""

from __future__ import annotations

from collections.abc import Sequence

from macft.data.batch import Batch, micro_batches
from macft.data.formats import Row
from macft.data.order import RowOrder
from macft.parallel.shares import DataShard, rows_of_shard


class BatchLoader:
    """Micro-batches of at most ``micro_batch_size`` of the training ``rows``; None: all of a node's rows at once.

    ``shared``: rows that begin alike share these tokens, which counts when rows are given to nodes.
    """

    def __init__(self, rows: Sequence[Row], order: RowOrder, micro_batch_size: int | None, *, shared: bool):
        self._rows, self._order = rows, order
        self._micro_batch_size, self._shared = micro_batch_size, shared
        self._prepared: tuple[int, DataShard, list[Batch]] | None = None

    def prepare(self, step: int, seat: DataShard) -> None:
        """Makes the batches of ``step``, to be asked for next, at a time when there is some to spare."""
        self._prepared = (step, seat, self._made(step, seat))

    def batches(self, step: int, seat: DataShard) -> list[Batch]:
        """The micro-batches of ``step``'s global batch for the node at ``seat``."""
        if self._prepared is not None and self._prepared[:2] == (step, seat):
            return self._prepared[2]
        return self._made(step, seat)

    def _made(self, step: int, seat: DataShard) -> list[Batch]:
        ids = self._order.rows(step)
        tokens = [self._rows[i].tokens for i in ids]
        mine = ids[rows_of_shard(seat, tokens, shared=self._shared)]
        return micro_batches([self._rows[i] for i in mine], mine, self._micro_batch_size)
