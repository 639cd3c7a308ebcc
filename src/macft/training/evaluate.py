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
from macft.plan.shares import assign
from macft.training.loss import TokenLoss, target_positions


@dataclass(frozen=True)
class Validation:
    """Mean cross-entropy per target token, in nats, over ``target_tokens`` tokens; the same on every rank."""

    loss: float
    target_tokens: int
    seconds: float


def validation_loss(
    model: nn.Module,
    loss: TokenLoss,
    rows: Sequence[Row],
    collective: Collective,
    *,
    rows_at_once: int,
    shares: Sequence[float],
    progress: Callable[[int, int], None],
) -> Validation:
    """Evaluates ``rows``, given to the ranks by ``shares``; ``progress`` is told (done, total) rows of this rank."""
    started = time.perf_counter()
    model.eval()
    lengths = np.array([len(row.tokens) for row in rows], dtype=np.int64)
    mine = assign(lengths, collective.world_size, shares)[collective.rank]
    loss_sum, target_tokens, done = 0.0, 0, 0
    for batch in micro_batches([rows[i] for i in mine], mine, rows_at_once):
        positions, targets, weights = target_positions(batch)
        value = loss(mx.array(batch.tokens[:, :-1]), mx.array(positions), mx.array(targets), mx.array(weights))
        loss_sum += value.item()
        target_tokens += int(weights.sum())
        done += len(batch.row_ids)
        progress(done, len(mine))
    sums = np.array([loss_sum, target_tokens], dtype=np.float64)
    collective.all_reduce([sums])
    return Validation(float(sums[0] / max(sums[1], 1.0)), int(sums[1]), time.perf_counter() - started)
