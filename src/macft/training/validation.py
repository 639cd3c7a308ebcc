"""Validation loss over all nodes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from macft.collective.base import Collective
from macft.data.batch import micro_batches
from macft.data.formats import Row
from macft.model.execution import Execution
from macft.parallel.shares import DataShard, rows_of_shard
from macft.training.batch_layout import BatchLayout, DeviceBatch, laid_out
from macft.training.loss import TokenLoss


@dataclass(frozen=True)
class ValidationResult:
    """Mean cross-entropy per target token, in nats, over ``target_tokens`` tokens; the same on every rank."""

    loss: float
    target_tokens: int
    seconds: float


def validation_loss(
    model: nn.Module,
    loss: TokenLoss,
    execution: Execution,
    rows: Sequence[Row],
    collective: Collective,
    *,
    shard: DataShard,
    progress: Callable[[int, int], None],
) -> ValidationResult:
    """Evaluates ``rows``, this rank those of its ``shard``; ``progress`` is called with (done, total) of them.

    ``model`` must be installed in the backend of ``execution``.
    """
    started = time.perf_counter()
    model.eval()
    layout = BatchLayout.for_validation(execution)
    tokens = [row.tokens for row in rows]
    mine = rows_of_shard(shard, tokens, shared=layout.shared_prefixes)
    loss_sum, target_tokens, done = 0.0, 0, 0

    def loss_of(lane: int, part: DeviceBatch) -> float:
        inputs = [mx.array(values) for values in (part.inputs, part.positions, part.targets, part.weights)]
        with laid_out([mx.array(values) for values in part.layout], part.lengths):
            return float(np.asarray(loss(*inputs, lane=lane)))

    for batch in micro_batches([rows[i] for i in mine], mine, execution.evaluation_rows):
        parts = list(layout.parts(batch))
        for part, value in zip(parts, loss.lanes.map(loss_of, parts), strict=True):
            loss_sum += value
            target_tokens += int(part.weights.sum())
        done += len(batch.row_ids)
        progress(done, len(mine))
    sums = np.array([loss_sum, target_tokens], dtype=np.float64)
    collective.all_reduce([sums])
    return ValidationResult(float(sums[0] / max(sums[1], 1.0)), int(sums[1]), time.perf_counter() - started)
