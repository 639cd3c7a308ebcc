"""Next-token cross-entropy, summed over target positions only.

The loss is a (sum, count) pair, never a mean: sums of different nodes and micro-batches add up exactly to what one
machine would have computed. Positions that are padding or prompt get no head; see :mod:`macft.model.head`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from macft.data.batch import Batch, coarse_targets
from macft.model.backends.base import Backend
from macft.model.head import Backbone, split_head

if TYPE_CHECKING:
    from macft.training.batch_layout import DeviceBatch

_TARGET_MULTIPLE = 32
"""Target counts are padded to a multiple of this, so that few shapes occur and freed buffers are used again."""


def target_positions(
    batch: Batch, *, coarse: bool = False
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]:
    """Where a batch has targets: flat input positions (n,), target tokens (n,) and weights (n,), 1 or, for filling, 0.

    The input of a batch (rows, length) is its tokens without the last column; positions count over that, row by row.
    ``coarse``: n is one of few sizes, for compiled steps.
    """
    rows, length = batch.tokens.shape
    column = np.arange(1, length)[None, :]
    is_target = (column >= np.maximum(batch.prompt_lengths, 1)[:, None]) & (column < batch.lengths[:, None])
    positions = np.flatnonzero(is_target).astype(np.int32)
    count = len(positions)
    filled = max(_TARGET_MULTIPLE, -(-count // _TARGET_MULTIPLE) * _TARGET_MULTIPLE)
    filled = coarse_targets(count, rows * (length - 1)) if coarse else filled
    index = np.zeros(filled, dtype=np.int32)
    index[:count] = positions
    weights = np.zeros(filled, dtype=np.float32)
    weights[:count] = 1.0
    return index, np.ascontiguousarray(batch.tokens[:, 1:]).reshape(rows * (length - 1))[index], weights


class TokenLoss:
    """The summed cross-entropy of ``model``, installed in ``backend``.

    ``lanes`` are the backend's, which can compute several parts of a batch at the same time.
    """

    def __init__(self, model: nn.Module, backend: Backend):
        self.lanes = backend.lanes(model)
        self._by_lane = [_ModelLoss(each, backend) for each in self.lanes.models]

    def __call__(
        self, inputs: mx.array, positions: mx.array, targets: mx.array, weights: mx.array, *, lane: int = 0
    ) -> mx.array:
        """Nats, a float32 scalar.

        ``inputs`` (rows, length) int32 are tokens, ``positions`` (n,) int32 flat indices into them, ``targets`` (n,)
        int32 and ``weights`` (n,) float32 the tokens that follow there and how much each of them counts. ``lane``:
        whose model computes.
        """
        return self._by_lane[lane](inputs, positions, targets, weights)

    def of_batches(self, batches: Iterable[Sequence[DeviceBatch]]) -> Iterator[list[float]]:
        """The loss of each part of each of ``batches``, in nats, without a gradient."""

        def loss_of(lane: int, part: DeviceBatch) -> float:
            inputs = [mx.array(values) for values in (part.inputs, part.positions, part.targets, part.weights)]
            with part.laid_out():
                return float(np.asarray(self(*inputs, lane=lane)))

        for parts in batches:
            yield list(self.lanes.map(loss_of, parts))


class _ModelLoss:
    def __init__(self, model: nn.Module, backend: Backend):
        self._model = model
        parts = split_head(model)
        self._backbone: Backbone = parts[0] if parts is not None else model
        self._cross_entropy = backend.cross_entropy(parts[1] if parts is not None else None)

    def __call__(self, inputs: mx.array, positions: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
        hidden = self._backbone(inputs)
        hidden = hidden.reshape(-1, hidden.shape[-1])[positions]
        return self._cross_entropy(hidden, targets, weights, with_gradient=self._model.training)
