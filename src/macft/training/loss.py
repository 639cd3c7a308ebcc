"""Next-token cross-entropy, summed over target positions only.

The loss is a (sum, count) pair, never a mean: sums of different nodes and micro-batches add up exactly to what one
machine would have computed. Positions that are padding or prompt get no head; see :mod:`macft.model.head`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from macft.model.backends.base import Backend
from macft.model.head import Backbone, split_head
from macft.model.packing import packed
from macft.training.batch_layout import DeviceBatch


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

    def of_batches(
        self, batches: Iterable[Sequence[DeviceBatch]], stopped: Callable[[], bool] = lambda: False
    ) -> Iterator[list[float]]:
        """See :class:`~macft.training.validation.Losses`."""

        def loss_of(lane: int, part: DeviceBatch) -> float:
            with packed(part.pack_layout()):
                return float(np.asarray(self(*part.loss_inputs(), lane=lane)))

        for parts in batches:
            if stopped():
                return
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
