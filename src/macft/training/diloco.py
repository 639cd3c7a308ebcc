"""DiLoCo: nodes train apart for some steps and synchronize only then (Douillard et al. 2023, arXiv:2311.08105).

A synchronization, with N ranks: an all-reduce of the token counts, one of what the parameters have moved since the last
synchronization, weighted by each rank's share of the tokens, and the same outer step on all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import msgpack
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from numpy.typing import NDArray

from macft.checkpoint.tensors import pack_tensors, unpack_tensors
from macft.collective.solo import Solo
from macft.errors import CheckpointError, NonFiniteLoss
from macft.parallel.node_status import NodeStatus
from macft.training.gradients.reduce import ReducedGradient, StepMetrics
from macft.training.gradients.reducer import GradientReducer
from macft.training.stop_request import StopRequest
from macft.training.synchronization import Agreement


class OuterOptimizer:
    """Nesterov's method, on the mean of what the nodes' parameters have moved since the last synchronization.

    Args:
        model: Its trainable parameters are the same on all ranks now.
        learning_rate, momentum: 0.7 and 0.9 in the paper; 1 and 0 give the mean of the nodes' parameters.
    """

    def __init__(self, model: nn.Module, *, learning_rate: float, momentum: float):
        self._rate, self._momentum = np.float32(learning_rate), np.float32(momentum)
        self._start = _values(model)
        self._velocity = {name: np.zeros_like(value) for name, value in self._start.items()}
        self.target_tokens = 0
        """Target tokens of this node since the last synchronization: its weight in the mean."""

    def restart(self, model: nn.Module) -> None:
        """Takes ``model``'s parameters, which have been replaced, as those of the last synchronization."""
        self._start = _values(model)

    def step(self, model: nn.Module, reducer: GradientReducer) -> int:
        """Synchronizes: afterwards all nodes have the same parameters, bit for bit.

        Collective: every rank must call it.

        Returns the target tokens of all nodes since the last synchronization. Raises as the collective does.
        """
        weight = np.array([float(self.target_tokens)])
        reducer.collective.all_reduce([weight])
        own = np.float32(self.target_tokens / max(float(weight[0]), 1.0))
        moved = {name: (self._start[name] - value) * own for name, value in _values(model).items()}
        reducer.all_reduce(list(moved), list(moved.values()))
        # Element by element and from equal bits, so that all ranks get the same result.
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
        self._start = _values(model)  # in the parameters' own type, or a resume would differ
        self.target_tokens = 0
        return int(weight[0])

    def capture(self, optimizer: optim.Optimizer, reducer: GradientReducer) -> list[bytes]:
        """Every rank's inner optimizer, and the outer velocity, for a checkpoint.

        Collective: every rank must call it.
        """
        velocity = {name: mx.array(value) for name, value in self._velocity.items()}
        own: bytes = msgpack.packb({"inner": pack_tensors(optimizer.state), "velocity": pack_tensors(velocity)})
        return reducer.collective.all_gather(own)

    def restore(self, blobs: Sequence[bytes], model: nn.Module, optimizer: optim.Optimizer, rank: int) -> None:
        """Restores what :meth:`capture` gave; with another number of ranks some inner optimizers are used twice or not.

        Raises:
            CheckpointError: ``blobs`` are damaged.
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


class DiLoCo:
    """The nodes train apart for ``inner_steps`` steps and synchronize then, or at the last step of the run.

    Between two synchronizations a step is each node's own: its gradient is summed over nobody, and loss or gradient
    that are not finite stop this node's updates only, until all nodes learn of it. See
    :class:`~macft.training.synchronization.Synchronization`.
    """

    has_rounds = True

    def __init__(
        self,
        model: nn.Module,
        outer: OuterOptimizer,
        across_nodes: GradientReducer,
        stop: StopRequest,
        *,
        inner_steps: int,
        total_steps: int,
    ):
        self._model, self._outer, self._across_nodes, self._stop = model, outer, across_nodes, stop
        self._inner_steps, self._total_steps = inner_steps, total_steps
        self._own = GradientReducer(Solo())
        self._not_finite = ""

    @property
    def reducer(self) -> GradientReducer:
        """Of this node alone."""
        return self._own

    def accepts(self, step: int, metrics: StepMetrics) -> bool:
        """False from the first step on that is not finite, and for a step without target tokens."""
        if not metrics.is_finite and not self._not_finite:
            self._not_finite = metrics.describe_not_finite(step + 1)
        return not self._not_finite and metrics.target_tokens > 0

    def after_update(self, step: int, reduced: ReducedGradient) -> Agreement:
        """Synchronizes the nodes when it is time to.

        Raises:
            NonFiniteLoss: a step of some node was not finite.
        """
        metrics, collective = reduced.metrics, self._across_nodes.collective
        self._outer.target_tokens += metrics.target_tokens
        if (step + 1) % self._inner_steps and step + 1 < self._total_steps:
            return Agreement(False, stop=False, change=False, target_tokens=metrics.target_tokens)
        for rank, description in enumerate(collective.all_gather(self._not_finite.encode())):
            if description:
                raise NonFiniteLoss(
                    f"rank {rank}, {description.decode()}; that rank has made no update since", updates=step + 1
                )
        own_before = self._outer.target_tokens
        of_all = self._outer.step(self._model, self._across_nodes)
        values = np.array([float(self._stop.requested), *metrics.nodes[0].numbers()])
        answers = [np.frombuffer(answer) for answer in collective.all_gather(values.tobytes())]
        return Agreement(
            is_synced=True,
            stop=any(answer[0] for answer in answers),
            change=False,
            target_tokens=metrics.target_tokens + of_all - own_before,
            statuses=[NodeStatus.of_numbers(answer[1:].tolist()) for answer in answers],
        )


def _values(model: nn.Module) -> dict[str, NDArray[np.float32]]:
    values: list[tuple[str, mx.array]] = tree_flatten(model.trainable_parameters())
    return {name: np.array(value.astype(mx.float32)) for name, value in values}
