"""The steps of a node that trains alone: the device has the next one in hand before the last one's metrics are read.

With nobody to meet, nothing of a step has to wait for its numbers: loss, gradient norm, clipping and the update are
computed where the gradient is, and the update leaves the parameters alone where they aren't finite.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from macft.data.batch import Batch
from macft.parallel.node_status import NodeStatus
from macft.training.gradient import LocalGradient
from macft.training.optimizer import OptimizerStep
from macft.training.reduce import StepMetrics


@dataclass(frozen=True)
class QueuedStep:
    """A step whose update is made: its number from 1, learning rate, metrics, and what it took, seconds."""

    step: int
    learning_rate: float
    metrics: StepMetrics
    seconds: float


@dataclass(frozen=True)
class _UnderWay:
    step: int
    learning_rate: float
    paced: Generator[Batch]
    loss: Any
    norm: Any
    # Of its LocalGradient, whose arrays the update may have.
    tokens: int
    target_tokens: int
    started: float


class StepQueue:
    """At most one step that the device is still computing.

    ``status`` is asked for the node's status with (tokens, seconds) of a step that has just been computed.
    """

    def __init__(self, apply: OptimizerStep, status: Callable[[int, float], NodeStatus]):
        self._apply, self._status = apply, status
        self._under_way: _UnderWay | None = None
        self._computed: QueuedStep | None = None
        self._begun = self._ended = 0.0

    def begin(self) -> None:
        """To be called when a step is about to be computed, and the one before is."""
        self._finish()
        self._begun = time.perf_counter()

    def queue(
        self, step: int, local: LocalGradient, paced: Generator[Batch], learning_rate: float, max_norm: float
    ) -> None:
        """Has the device make the update ``step`` once it has computed ``local``."""
        loss_sum = sum(local.losses, mx.array(0.0))
        loss, norm = self._apply.queue(local.gradient, learning_rate, loss_sum, local.target_tokens, max_norm)
        self._under_way = _UnderWay(
            step, learning_rate, paced, loss, norm, local.tokens, local.target_tokens, local.started
        )

    def take(self) -> QueuedStep | None:
        """The last step that was queued, None if it has been taken already. Waits if it is still being computed."""
        self._finish()
        computed, self._computed = self._computed, None
        return computed

    def _finish(self) -> None:
        if (now := self._under_way) is None:
            return
        self._under_way = None
        loss, norm = float(now.loss.item()), float(now.norm.item())
        now.paced.close()
        ended = time.perf_counter()
        compute, since = ended - self._begun, max(now.started, self._ended)
        metrics = StepMetrics(
            loss=loss,
            norm=norm,
            target_tokens=now.target_tokens,
            tokens=now.tokens,
            nodes=[self._status(now.tokens, compute)],
            # What the device waited for is the host with its next batch.
            seconds={"data": max(ended - since - compute, 0.0), "compute": compute, "all_reduce": 0.0, "update": 0.0},
        )
        self._computed = QueuedStep(now.step, now.learning_rate, metrics, ended - since)
        self._ended = ended
