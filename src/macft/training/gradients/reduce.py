"""Turns every node's sums into the global mean gradient: the one place where nodes meet in a step.

Communication of a step, with N ranks:

1. Each bucket of gradients is summed over the ranks as soon as MLX has computed it, while MLX computes the next one.
2. One small all-reduce sums (loss, target tokens, tokens, wishes) and carries every rank's status in a slot of its own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from macft.device import fault_points
from macft.parallel.node_status import NodeStatus
from macft.training.clipping import clip_by_global_norm
from macft.training.gradients.exact_sums import ExactGradient, from_grid
from macft.training.gradients.gradient import LocalGradient
from macft.training.gradients.reducer import GradientReducer

_STILL_COMPUTING_SECONDS = 2e-4


@dataclass(frozen=True)
class StepMetrics:
    """Numbers of a step, the same on every rank but for ``seconds``.

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
    def is_finite(self) -> bool:
        """Whether loss and gradient norm are neither NaN nor infinite."""
        return math.isfinite(self.loss) and math.isfinite(self.norm)

    def describe_not_finite(self, step: int) -> str:
        """What is wrong with step ``step``, counted from 1."""
        return f"step {step}: the loss is {self.loss} and the gradient norm {self.norm}"


@dataclass(frozen=True)
class ReducedGradient:
    """The same on every rank: the summed gradient of the global batch.

    ``gradient`` maps names to float32 arrays, of parameters or joined under the name of the first. Times ``scale`` it
    is the gradient of the mean loss over all target tokens, clipped.
    """

    gradient: dict[str, mx.array]
    scale: float
    metrics: StepMetrics
    wants_stop: bool
    wants_change: bool


def reduce_gradient(
    reducer: GradientReducer,
    local: LocalGradient,
    *,
    max_norm: float,
    stop: bool,
    change: bool,
    computed: Callable[[], None],
    status: Callable[[float], NodeStatus],
) -> ReducedGradient:
    """Sums gradients, losses and counts over all ranks, to be divided once by the global count of target tokens.

    Nodes with more target tokens weigh more, exactly as if one machine had computed the batch. ``max_norm``: see
    :func:`~macft.training.clipping.clip_by_global_norm`. ``stop``: this rank wants the run to end after this step;
    ``change``: it wants to let a node join. One rank's wish is enough. ``computed`` is called once this rank's gradient
    is there and only the others' are waited for, ``status`` after that with the seconds it took.

    Gradients are summed in MLX's own memory. Raises as the collective does.
    """
    collective = reducer.collective
    if isinstance(local, ExactGradient):
        local, seconds = _sum_exactly(reducer, local, computed)
    else:
        local, seconds = _sum_buckets(reducer, local, computed)
    ready = time.perf_counter()
    fault_points.reach("reduce")
    slots = np.zeros((collective.world_size, NodeStatus.SIZE))
    slots[collective.rank] = status(seconds["compute"]).numbers()
    # float64 holds token counts exactly and costs nothing at this size.
    tokens = 0 if local.is_counted_elsewhere else local.tokens
    counts = np.array([local.loss_sum, local.target_tokens, tokens, float(stop), float(change)])
    sums = np.concatenate([counts, slots.ravel()])
    collective.all_reduce([sums])
    loss_sum, target_tokens, all_tokens, stops, changes = (float(value) for value in sums[: len(counts)])
    seconds["all_reduce"] += time.perf_counter() - ready
    scalars = clip_by_global_norm(loss_sum, _norm(local.gradient), target_tokens, max_norm, xp=np)
    metrics = StepMetrics(
        loss=float(scalars.loss),
        norm=float(scalars.norm),
        target_tokens=int(target_tokens),
        tokens=int(all_tokens),
        nodes=[NodeStatus.of_numbers(slot.tolist()) for slot in sums[len(counts) :].reshape(slots.shape)],
        seconds=seconds,
    )
    gradient = dict(local.gradient)
    for piece in (piece for bucket in local.buckets for piece in bucket):
        gradient |= piece.for_update(gradient.pop(piece.name))
    return ReducedGradient(gradient, float(scalars.scale), metrics, wants_stop=stops > 0, wants_change=changes > 0)


def _sum_buckets(
    reducer: GradientReducer, local: LocalGradient, computed: Callable[[], None]
) -> tuple[LocalGradient, dict[str, float]]:
    """``local`` with the sums as its gradient, which is taken from the one that is given, bucket after bucket.

    And seconds: of computing, and of all-reduce exposed and hidden behind it.
    """
    begun = time.perf_counter()
    compute = begun - local.started
    exposed = hidden = reducing = 0.0
    gradient: dict[str, mx.array] = {}
    for number, bucket in enumerate(local.buckets, 1):
        arrays = [piece.of(local.gradient) for piece in bucket]
        waited = time.perf_counter()
        mx.eval(arrays)
        for name in (name for piece in bucket for name in piece.names):
            local.gradient.pop(name, None)  # of what was joined now, the parts are of no use
        ready = time.perf_counter()
        if number == len(local.buckets):
            computed()
        compute += ready - waited
        # A wait shows that MLX was at work all through the all-reduce before. Without one, nobody knows: not counted.
        if ready - waited > _STILL_COMPUTING_SECONDS:
            hidden, compute = hidden + reducing, compute + reducing
        else:
            exposed += reducing
        reducer.all_reduce_pieces(bucket, arrays)
        gradient |= {piece.name: array for piece, array in zip(bucket, arrays, strict=True)}
        reducing = time.perf_counter() - ready
    seconds = {"compute": compute, "all_reduce": exposed + reducing, "all_reduce_hidden": hidden}
    return replace(local, gradient=gradient), seconds


def _sum_exactly(
    reducer: GradientReducer, local: ExactGradient, computed: Callable[[], None]
) -> tuple[LocalGradient, dict[str, float]]:
    """As :func:`_sum_buckets`."""
    ready = time.perf_counter()
    computed()
    gradient: dict[str, mx.array] = {}
    for bucket in local.names_in_buckets:
        reducer.collective.all_reduce([local.halves[name] for name in bucket])
        gradient |= {name: mx.array(from_grid(local.halves[name]).reshape(local.shapes[name])) for name in bucket}
    seconds = {"compute": ready - local.started, "all_reduce": time.perf_counter() - ready, "all_reduce_hidden": 0.0}
    return replace(local, gradient=gradient), seconds


def _norm(gradient: Mapping[str, mx.array]) -> float:
    """L2 norm over all arrays. Ranks get the same bits from the same values, whatever their GPUs are."""
    flat = (np.asarray(value).reshape(-1) for value in gradient.values())
    return math.sqrt(sum(float(np.einsum("i,i->", value, value, dtype=np.float64)) for value in flat))
