"""Turns every node's sums into the global mean gradient: the one place where nodes meet in a step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from macft.parallel.node_status import NodeStatus
from macft.training.gradient import LocalGradient
from macft.training.gradient_reducer import GradientReducer

_STILL_COMPUTING_SECONDS = 2e-4


@dataclass(frozen=True)
class StepMetrics:
    """What a step tells of itself, the same on every rank but for ``seconds``.

    ``loss`` is the mean over all target tokens, in nats, and ``norm`` the L2 norm of its gradient. ``nodes`` holds
    every rank's status of the step. ``seconds`` are this rank's own: ``compute`` until its gradient was there,
    ``all_reduce`` on top of that, and ``all_reduce_hidden``, which is a part of compute.
    """

    loss: float
    norm: float
    target_tokens: int
    tokens: int
    nodes: list[NodeStatus]
    seconds: Mapping[str, float]

    @property
    def finite(self) -> bool:
        """Whether loss and gradient are free of NaN and infinity."""
        return math.isfinite(self.loss) and math.isfinite(self.norm)


@dataclass(frozen=True)
class GlobalGradient:
    """The same on every rank: the summed gradient of the global batch.

    ``gradient`` maps parameter names to float32 MLX arrays; times ``factor`` it is that of the mean loss over all
    target tokens.
    """

    gradient: dict[str, Any]
    factor: float
    metrics: StepMetrics
    stop_requested: bool
    change_requested: bool


def reduce_gradient(
    exchange: GradientReducer,
    local: LocalGradient,
    *,
    stop: bool,
    change: bool,
    computed: Callable[[], None],
    status: Callable[[float], NodeStatus],
) -> GlobalGradient:
    """Sums gradients, losses and counts over all ranks, to be divided once by the global count of target tokens.

    Nodes with more target tokens weigh more, exactly as if one machine had computed the batch. ``stop`` is this
    rank's wish to end after this step, ``change`` that to let a node in; one rank's wish is enough. ``computed`` is
    called once this rank's gradient is there and only the others' are waited for. ``status`` is asked after that, with
    the seconds it took; the answer travels along in a slot of its own, which the other ranks leave at 0.

    Gradients are summed in MLX's own memory, a bucket at a time: while one is on the wire MLX computes the next.
    """
    collective = exchange.collective
    seconds = _sum_buckets(exchange, local, computed)
    ready = time.perf_counter()
    slots = np.zeros((collective.world_size, NodeStatus.SIZE))
    slots[collective.rank] = status(seconds["compute"]).numbers()
    # float64 holds token counts exactly and costs nothing at this size.
    counts = np.array([local.loss_sum, local.target_tokens, local.tokens, float(stop), float(change)])
    sums = np.concatenate([counts, slots.ravel()])
    collective.all_reduce([sums])
    loss_sum, target_tokens, tokens, stops, changes = (float(value) for value in sums[: len(counts)])
    factor = 1.0 / max(target_tokens, 1.0)
    seconds["all_reduce"] += time.perf_counter() - ready
    metrics = StepMetrics(
        loss=loss_sum / max(target_tokens, 1.0),
        norm=factor * _norm(local.gradient),
        target_tokens=int(target_tokens),
        tokens=int(tokens),
        nodes=[NodeStatus.of_numbers(slot.tolist()) for slot in sums[len(counts) :].reshape(slots.shape)],
        seconds=seconds,
    )
    return GlobalGradient(local.gradient, factor, metrics, stop_requested=stops > 0, change_requested=changes > 0)


def _sum_buckets(exchange: GradientReducer, local: LocalGradient, computed: Callable[[], None]) -> dict[str, float]:
    """Sums bucket after bucket; returns the seconds of computing, and of all-reduce exposed and hidden behind it."""
    begun = time.perf_counter()
    compute = begun - local.started
    exposed = hidden = reducing = 0.0
    for number, bucket in enumerate(local.buckets, 1):
        arrays = [local.gradient[name] for name in bucket]
        waited = time.perf_counter()
        mx.eval(arrays)
        ready = time.perf_counter()
        if number == len(local.buckets):
            computed()
        compute += ready - waited
        # A wait shows that MLX was at work all through the all-reduce before. Without one, nobody knows: not counted.
        if ready - waited > _STILL_COMPUTING_SECONDS:
            hidden, compute = hidden + reducing, compute + reducing
        else:
            exposed += reducing
        exchange.all_reduce(bucket, arrays)
        reducing = time.perf_counter() - ready
    return {"compute": compute, "all_reduce": exposed + reducing, "all_reduce_hidden": hidden}


def _norm(gradient: Mapping[str, Any]) -> float:
    """L2 norm over all arrays. Ranks get the same bits from the same values, whatever their GPUs are."""
    flat = (np.asarray(value).reshape(-1) for value in gradient.values())
    return math.sqrt(sum(float(np.einsum("i,i->", value, value, dtype=np.float64)) for value in flat))
