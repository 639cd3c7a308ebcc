"""A node's part of a step: the summed loss and gradient of the rows it was given."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner.trainer import grad_checkpoint
from numpy.typing import NDArray

from macft.data.batch import Batch
from macft.model.dropout import DropoutKeys
from macft.training.loss import TokenLoss, target_positions


@dataclass(frozen=True)
class LocalGradient:
    """Sums over this node's rows: ``gradient`` flat float32, ``loss_sum``, and counts of tokens."""

    gradient: NDArray[np.float32]
    loss_sum: float
    target_tokens: int
    tokens: int
    seconds: float


class GradientComputer:
    """Runs micro-batches forward and backward and adds up their gradients.

    ``layout`` lists the trainable parameters as (name, array) pairs in the order of the flat gradient.
    """

    def __init__(self, model: nn.Module, dropout_keys: DropoutKeys, *, seed: int, checkpoint_blocks: bool):
        self._model = model
        self._keys = dropout_keys
        self._seed = seed
        if checkpoint_blocks:
            grad_checkpoint(model.layers[0])
        self.loss = TokenLoss(model)
        self.layout: list[tuple[str, Any]] = tree_flatten(model.trainable_parameters())
        self.size = sum(int(value.size) for _, value in self.layout)
        self._loss_and_gradient = nn.value_and_grad(model, self._keyed_loss)

    def _keyed_loss(self, inputs: Any, positions: Any, targets: Any, weights: Any, keys: Any) -> Any:
        self._keys.value = keys
        return self.loss(inputs, positions, targets, weights)

    def __call__(self, step: int, batches: Iterable[Batch]) -> LocalGradient:
        """Computes ``batches``, this node's micro-batches of ``step``; there may be none."""
        started = time.perf_counter()
        self._model.train()
        total: Any = None
        loss_sum, target_tokens, tokens = 0.0, 0, 0
        for batch in batches:
            positions, targets, weights = target_positions(batch)
            keys = (
                DropoutKeys.for_rows(self._seed, step, batch.row_ids) if self._keys.in_use else np.zeros(1, np.uint32)
            )
            loss, gradient = self._loss_and_gradient(
                mx.array(batch.tokens[:, :-1]),
                mx.array(positions),
                mx.array(targets),
                mx.array(weights),
                mx.array(keys),
            )
            gradient = tree_map(lambda value: value.astype(mx.float32), gradient)
            total = gradient if total is None else tree_map(mx.add, total, gradient)
            mx.eval(loss, total)  # one micro-batch at a time: its activations are freed before the next begins
            loss_sum += loss.item()
            target_tokens += int(weights.sum())
            tokens += int(batch.lengths.sum())
        return LocalGradient(self._flatten(total), loss_sum, target_tokens, tokens, time.perf_counter() - started)

    def _flatten(self, tree: Any) -> NDArray[np.float32]:
        flat = np.zeros(self.size, dtype=np.float32)
        if tree is None:
            return flat
        start, values = 0, dict(tree_flatten(tree))
        for name, parameter in self.layout:
            flat[start : start + parameter.size] = np.array(values[name], copy=False).reshape(-1)
            start += parameter.size
        return flat
