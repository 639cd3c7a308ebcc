"""DiLoCo: nodes train apart for some steps and meet only then (Douillard et al. 2023, arXiv:2311.08105)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import msgpack
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from numpy.typing import NDArray

from macft.checkpoint.snapshot import pack_tensors, unpack_tensors
from macft.errors import CheckpointError
from macft.training.gradient_reducer import GradientReducer


class OuterOptimizer:
    """Nesterov's method on what the nodes have moved on average since they last met.

    Args:
        model: Its trainable parameters are the same on all ranks now.
        learning_rate, momentum: 0.7 and 0.9 in the paper; 1 and 0 take the mean of the nodes' parameters.
    """

    def __init__(self, model: nn.Module, *, learning_rate: float, momentum: float):
        self._rate, self._momentum = np.float32(learning_rate), np.float32(momentum)
        self._start = _values(model)
        self._velocity = {name: np.zeros_like(value) for name, value in self._start.items()}
        self.target_tokens = 0
        """Target tokens of this node since the nodes last met: its weight in the mean."""

    def step(self, model: nn.Module, exchange: GradientReducer) -> int:
        """Lets the nodes meet: afterwards all have the same parameters, bit for bit. A call of all ranks.

        Returns the target tokens of all nodes since they last met. Raises as the collective does.
        """
        weight = np.array([float(self.target_tokens)])
        exchange.collective.all_reduce([weight])
        own = np.float32(self.target_tokens / max(float(weight[0]), 1.0))
        moved = {name: (self._start[name] - value) * own for name, value in _values(model).items()}
        exchange.all_reduce(list(moved), list(moved.values()))
        # Element by element and from equal bits, so that all ranks come to the same.
        for name, mean in moved.items():
            velocity = self._velocity[name]
            velocity *= self._momentum
            velocity += mean
            self._start[name] -= self._rate * (mean + self._momentum * velocity)
        parameters = dict(tree_flatten(model.trainable_parameters()))
        model.update(
            tree_unflatten([(name, mx.array(self._start[name]).astype(p.dtype)) for name, p in parameters.items()])
        )
        mx.eval(model.trainable_parameters())
        self._start = _values(model)  # as the parameters' own type holds them, or a resume would differ
        self.target_tokens = 0
        return int(weight[0])

    def capture(self, optimizer: optim.Optimizer, exchange: GradientReducer) -> list[bytes]:
        """Every rank's inner optimizer, and the outer velocity, for a checkpoint. A call of all ranks."""
        velocity = {name: mx.array(value) for name, value in self._velocity.items()}
        own: bytes = msgpack.packb({"inner": pack_tensors(optimizer.state), "velocity": pack_tensors(velocity)})
        return exchange.collective.all_gather(own)

    def restore(self, blobs: Sequence[bytes], model: nn.Module, optimizer: optim.Optimizer, rank: int) -> None:
        """Takes back what :meth:`capture` gave; on another number of ranks some inner optimizers come twice or not.

        Raises:
            CheckpointError: it is not that.
        """
        blob = blobs[rank % len(blobs)]
        try:
            stored = msgpack.unpackb(blob, max_bin_len=len(blob))
            optimizer.state = tree_unflatten(list(unpack_tensors(stored["inner"]).items()))
            velocity = {name: np.array(value) for name, value in unpack_tensors(stored["velocity"]).items()}
        except (ValueError, TypeError, KeyError, RuntimeError, msgpack.UnpackException):
            raise CheckpointError("the checkpoint's outer optimizer is damaged") from None
        mx.eval(optimizer.state)
        self._velocity = velocity
        self._start = _values(model)


def _values(model: nn.Module) -> dict[str, NDArray[np.float32]]:
    values: list[tuple[str, Any]] = tree_flatten(model.trainable_parameters())
    return {name: np.array(value.astype(mx.float32)) for name, value in values}
