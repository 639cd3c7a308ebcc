"""Validation loss over all nodes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.nn as nn
import numpy as np

from macft.collective.base import Collective
from macft.data.batch import micro_batches
from macft.data.formats import Row
from macft.model.execution import Execution
from macft.parallel.shares import DataShard, batches_of_shard, rows_of_shard
from macft.training.batch_layout import BatchLayout, DeviceBatch
from macft.training.gradients.exact_loss import exact_loss
from macft.training.stop_request import Stopped


class Losses(Protocol):
    """What computes the losses of rows."""

    def of_batches(
        self, batches: Iterable[Sequence[DeviceBatch]], stopped: Callable[[], bool] = lambda: False
    ) -> Iterator[list[float]]:
        """The loss of each part of each of ``batches``, in nats, without a gradient; in their order.

        Of a batch whose end another rank computes there are none here. Once ``stopped()``, which is asked between
        batches, it may end early; of ranks that compute together one decides.
        """
        ...


@dataclass(frozen=True)
class ValidationResult:
    """Mean cross-entropy per target token, in nats, over ``target_tokens`` tokens; the same on every rank."""

    loss: float
    target_tokens: int
    seconds: float


def validation_loss(
    model: nn.Module,
    losses: Losses,
    execution: Execution,
    rows: Sequence[Row],
    collective: Collective,
    *,
    shard: DataShard,
    progress: Callable[[int, int], None],
    stopped: Callable[[], bool] = lambda: False,
    fixed: bool = False,
) -> ValidationResult:
    """Evaluates ``rows``, this rank those of its ``shard``; ``progress`` is called with (done, total) of them.

    ``fixed``: batches are those of all rows, whoever computes them, and the sum of their losses is exact.

    ``model`` must be installed in the backend of ``execution``. Once ``stopped()`` on any rank, which is asked between
    two batches, there is no result.

    Raises:
        Stopped: on all ranks alike.
    """
    started = time.perf_counter()
    model.eval()
    layout = BatchLayout.for_validation(execution)
    loss_sum, target_tokens, done = 0.0, 0, 0
    if fixed:
        everything = micro_batches(rows, np.arange(len(rows)), execution.evaluation_rows)
        batches = batches_of_shard(shard, everything)
    else:
        mine = rows_of_shard(shard, [row.tokens for row in rows], shared=layout.shared_prefixes)
        batches = micro_batches([rows[i] for i in mine], mine, execution.evaluation_rows)
    own_rows = sum(len(batch.row_ids) for batch in batches)
    parts = [list(layout.parts(batch)) for batch in batches]
    for batch, items, values in zip(batches, parts, losses.of_batches(parts, stopped), strict=False):
        loss_sum += sum(map(exact_loss, values)) if fixed else sum(values)
        target_tokens += sum(int(part.weights.sum()) for part in items[: len(values)])
        done += len(batch.row_ids)
        progress(done, own_rows)
    sums = np.array([loss_sum, target_tokens, float(stopped())], dtype=np.float64)
    collective.all_reduce([sums])
    if sums[2]:
        raise Stopped
    assert done == own_rows, "nobody has stopped, and losses are missing"
    return ValidationResult(float(sums[0] / max(sums[1], 1.0)), int(sums[1]), time.perf_counter() - started)
