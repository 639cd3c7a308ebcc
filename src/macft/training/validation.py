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
from macft.device.mlx_device import on_cpu
from macft.parallel.shares import DataShard, rows_of_shard
from macft.training.batch_layout import BatchLayout, laid_out
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
    rows: Sequence[Row],
    collective: Collective,
    *,
    rows_at_once: int,
    seat: DataShard,
    progress: Callable[[int, int], None],
    packs: bool = False,
) -> ValidationResult:
    """Evaluates ``rows``, this node those of its ``seat``; ``progress`` is told (done, total) of them.

    ``packs``: rows are laid end to end, which the model must have been prepared for.
    """
    started = time.perf_counter()
    model.eval()
    # No mask of dropout is a row's own here, so whatever rows begin with in common can be shared.
    division = BatchLayout(packs=packs, shares=packs, cpu=on_cpu())
    tokens = [row.tokens for row in rows]
    mine = rows_of_shard(seat, tokens, shared=division.shares)
    loss_sum, target_tokens, done = 0.0, 0, 0
    for batch in micro_batches([rows[i] for i in mine], mine, rows_at_once):
        for part in division.parts(batch):
            inputs = [mx.array(values) for values in (part.inputs, part.positions, part.targets, part.weights)]
            with laid_out([mx.array(values) for values in part.layout], part.lengths):
                loss_sum += loss(*inputs).item()
            target_tokens += int(part.weights.sum())
        done += len(batch.row_ids)
        progress(done, len(mine))
    sums = np.array([loss_sum, target_tokens], dtype=np.float64)
    collective.all_reduce([sums])
    return ValidationResult(float(sums[0] / max(sums[1], 1.0)), int(sums[1]), time.perf_counter() - started)
