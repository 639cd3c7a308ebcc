"""One optimizer step, from the rows of the global batch to the updated adapter.

Two ways to run it. :class:`SynchronousStepper` waits for a step's numbers before it makes the update, which several
nodes have to. :class:`QueuedStepper`, for one node, hands the whole step to the device and begins the next one before
the numbers are read. Both use the same gradient, mean, clipping, finite check and update.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, Protocol

import mlx.core as mx
import numpy as np

from macft.errors import NonFiniteLoss
from macft.parallel.node_status import NodeStatus
from macft.parallel.shares import DataShard
from macft.training.batch_loader import BatchLoader
from macft.training.coordination import NodeCoordinator
from macft.training.gradients.gradient import LocalGradient, StepGradient
from macft.training.gradients.reduce import StepMetrics, reduce_gradient
from macft.training.optimizer import OptimizerStep
from macft.training.stop_request import StopRequest
from macft.training.synchronization import Agreement, Synchronization


@dataclass(frozen=True)
class StepResult:
    """A step whose numbers are known. ``step`` counts from 1; ``phase_seconds`` are the seconds of its phases."""

    step: int
    learning_rate: float
    metrics: StepMetrics
    # Tokens of this node's rows.
    node_tokens: int
    seconds: float
    phase_seconds: Mapping[str, float]
    bytes_sent: int
    # Every rank's status, by rank; empty between two synchronizations.
    statuses: Sequence[NodeStatus]
    # How often this node has traced a gradient so far; see LocalGradient.
    traces: int = 0


class StepOutcome(NamedTuple):
    """What :meth:`Stepper.step` returns: the newest step whose numbers are known, if any, and what nodes agree on."""

    result: StepResult | None
    agreement: Agreement


class Stepper(Protocol):
    """Makes optimizer steps, in order."""

    def step(self, step: int, shard: DataShard) -> StepOutcome:
        """Makes the update ``step`` (from 0), for which this node computes the rows of ``shard``.

        Raises:
            NonFiniteLoss: loss or gradient of a step is NaN or infinite; its update was not made.
            MembershipChanged: a node was lost; the update was not made.
        """
        ...

    def flush(self) -> StepResult | None:
        """Waits for the step that has not been returned yet, if there is one, and returns it."""
        ...


@dataclass(frozen=True)
class StepContext:
    """The objects that both steppers use. ``learning_rate`` is a function of the step, from 0."""

    loader: BatchLoader
    compute: StepGradient
    update: OptimizerStep
    nodes: NodeCoordinator
    stop: StopRequest
    learning_rate: Callable[[int], float]
    max_grad_norm: float
    # Whether a node that is alone makes its steps as several would, with the same bits.
    waits_for_numbers: bool = False


class SynchronousStepper:
    """Computes a step, sums it over the nodes, reads its numbers, and makes the update."""

    def __init__(self, context: StepContext, synchronization: Synchronization):
        self._context, self._synchronization = context, synchronization

    def step(self, step: int, shard: DataShard) -> StepOutcome:
        """See :class:`Stepper`."""
        context, nodes, sync = self._context, self._context.nodes, self._synchronization
        started, sent = time.perf_counter(), nodes.collective.bytes_sent
        batches = context.loader.batches(step, shard)
        loaded = time.perf_counter()
        nodes.begin_step(len(batches))
        local = context.compute(step, batches, nodes.before_micro_batch, form="buckets")
        context.loader.prepare(step + 1, shard)  # while MLX computes
        reduced = reduce_gradient(
            sync.reducer,
            local,
            max_norm=context.max_grad_norm,
            stop=context.stop.requested,
            change=nodes.wants_change,
            computed=nodes.step_computed,
            status=partial(_status, nodes, local),
        )
        metrics, rate = reduced.metrics, context.learning_rate(step)
        updating = time.perf_counter()
        if sync.accepts(step, metrics):
            context.update(reduced.gradient, rate, reduced.scale)
        updated = time.perf_counter()
        agreement = sync.after_update(step, reduced)
        ended = time.perf_counter()
        seconds = {"data": loaded - started, **metrics.seconds, "update": updated - updating}
        if local.waited_for_weights is not None:
            seconds["disk"] = local.waited_for_weights
        if local.waited_for_stages is not None and local.sent_to_stages is not None:
            seconds |= {"wait": local.waited_for_stages, "wire": local.sent_to_stages}
        if sync.has_rounds:
            seconds["sync"] = ended - updated
        result = StepResult(
            step=step + 1,
            learning_rate=rate,
            metrics=metrics,
            node_tokens=local.tokens,
            seconds=ended - started,
            phase_seconds=seconds,
            bytes_sent=nodes.collective.bytes_sent - sent,
            statuses=agreement.statuses,
            traces=local.traces,
        )
        return StepOutcome(result, agreement)

    def flush(self) -> None:
        """Returns None: a step is completed when :meth:`step` returns."""


def _status(nodes: NodeCoordinator, local: LocalGradient, seconds: float) -> NodeStatus:
    """This node's status after its part of a step, which took ``seconds``."""
    return replace(
        nodes.status(local.tokens, seconds),
        disk_seconds=local.waited_for_weights,
        wait_seconds=local.waited_for_stages,
        wire_seconds=local.sent_to_stages,
        peak_memory=mx.get_peak_memory(),
    )


@dataclass(frozen=True)
class _Queued:
    """A step that the device is computing. It holds no gradient, so that MLX can reuse the memory."""

    step: int
    learning_rate: float
    loss: mx.array
    norm: mx.array
    tokens: int
    target_tokens: int
    started: float
    traces: int


class QueuedStepper:
    """The steps of a node that trains alone, with at most one that the device is still computing.

    No other node's numbers are needed, so nothing has to wait for them: loss, gradient norm, clipping and update are
    computed where the gradient is, and an update that is not finite leaves the parameters as they are.
    """

    def __init__(self, context: StepContext):
        self._context = context
        self._queued: _Queued | None = None
        self._computed: StepResult | None = None
        self._awaits_first_micro_batch = True
        self._begun = self._ended = 0.0

    def step(self, step: int, shard: DataShard) -> StepOutcome:
        """See :class:`Stepper`; the result is that of the step before."""
        context, nodes = self._context, self._context.nodes
        batches = context.loader.batches(step, shard)
        nodes.begin_step(len(batches))
        self._awaits_first_micro_batch = True
        local = context.compute(step, batches, self._before_micro_batch, form="joined")
        previous = self.flush()
        rate = context.learning_rate(step)
        loss_sum = sum(local.losses, mx.array(0.0))
        loss, norm = context.update.queue(local.gradient, rate, loss_sum, local.target_tokens, context.max_grad_norm)
        self._queued = _Queued(
            step + 1, rate, loss, norm, local.tokens, local.target_tokens, local.started, local.traces
        )
        agreement = Agreement(
            is_synced=True,
            stop=context.stop.requested,
            change=nodes.wants_change,
            target_tokens=local.target_tokens,
        )
        return StepOutcome(previous, agreement)

    def flush(self) -> StepResult | None:
        """See :class:`Stepper`."""
        self._finish()
        computed, self._computed = self._computed, None
        if computed is not None and not computed.metrics.is_finite:
            text = f"{computed.metrics.describe_not_finite(computed.step)}; no update was made"
            raise NonFiniteLoss(text, updates=computed.step - 1)
        return computed

    def _before_micro_batch(self) -> None:
        if self._awaits_first_micro_batch:  # all earlier work is finished, the step before included
            self._awaits_first_micro_batch = False
            self._finish()
            self._begun = time.perf_counter()
        self._context.nodes.before_micro_batch()

    def _finish(self) -> None:
        if (queued := self._queued) is None:
            return
        self._queued = None
        loss, norm = float(np.asarray(queued.loss)), float(np.asarray(queued.norm))
        self._context.nodes.step_computed()
        ended = time.perf_counter()
        compute, since = ended - self._begun, max(queued.started, self._ended)
        # The device was idle while the host prepared the batch.
        seconds = {"data": max(ended - since - compute, 0.0), "compute": compute, "all_reduce": 0.0, "update": 0.0}
        metrics = StepMetrics(
            loss=loss,
            norm=norm,
            target_tokens=queued.target_tokens,
            tokens=queued.tokens,
            nodes=[self._context.nodes.status(queued.tokens, compute)],
            seconds=seconds,
        )
        self._computed = StepResult(
            step=queued.step,
            learning_rate=queued.learning_rate,
            metrics=metrics,
            node_tokens=queued.tokens,
            seconds=ended - since,
            phase_seconds=seconds,
            bytes_sent=0,
            statuses=metrics.nodes,
            traces=queued.traces,
        )
        self._ended = ended


def make_stepper(context: StepContext, synchronization: Synchronization) -> Stepper:
    """The stepper for the nodes that there are now: a node that compiles its steps queues them while it is alone."""
    alone = context.nodes.collective.world_size == 1 and not synchronization.has_rounds
    if alone and context.compute.execution.compiled and not context.waits_for_numbers:
        return QueuedStepper(context)
    return SynchronousStepper(context, synchronization)
