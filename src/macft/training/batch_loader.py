"""A rank's micro-batches of each step, made ahead of time."""

from __future__ import annotations

from collections.abc import Sequence

from macft.data.batch import Batch, micro_batches
from macft.data.formats import Row
from macft.data.order import RowOrder
from macft.parallel.shares import DataShard, batches_of_shard, rows_of_shard


class BatchLoader:
    """Makes the micro-batches of a rank's rows of a step.

    Args:
        micro_batch_size: At most this many rows in a micro-batch; None: all of the rank's rows.
        shared: Rows that begin alike share these tokens, which counts when rows are assigned to ranks.
        fixed: The micro-batches are those of the whole step, whoever computes them: ranks get whole ones.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        order: RowOrder,
        micro_batch_size: int | None,
        *,
        shared: bool,
        fixed: bool = False,
    ):
        self._rows, self._order = rows, order
        self._micro_batch_size, self._shared, self._fixed = micro_batch_size, shared, fixed
        self._prepared: tuple[int, DataShard, list[Batch]] | None = None

    @property
    def micro_batch_size(self) -> int | None:
        """Most rows in a micro-batch; None: all of the rank's rows. It may be changed between two steps."""
        return self._micro_batch_size

    @micro_batch_size.setter
    def micro_batch_size(self, size: int | None) -> None:
        if size != self._micro_batch_size:
            self._micro_batch_size, self._prepared = size, None

    def prepare(self, step: int, shard: DataShard) -> None:
        """Makes the batches of ``step`` now, because they will be needed next."""
        self._prepared = (step, shard, self._make(step, shard))

    def batches(self, step: int, shard: DataShard) -> list[Batch]:
        """The micro-batches of the rows of ``shard`` in the global batch of ``step``."""
        if self._prepared is not None and self._prepared[:2] == (step, shard):
            return self._prepared[2]
        return self._make(step, shard)

    def _make(self, step: int, shard: DataShard) -> list[Batch]:
        ids = self._order.rows(step)
        if self._fixed:
            return batches_of_shard(shard, micro_batches([self._rows[i] for i in ids], ids, self._micro_batch_size))
        tokens = [self._rows[i].tokens for i in ids]
        mine = ids[rows_of_shard(shard, tokens, shared=self._shared)]
        return micro_batches([self._rows[i] for i in mine], mine, self._micro_batch_size)
