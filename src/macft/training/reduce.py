"""Turns every node's sums into the global mean gradient: the one place where nodes meet in a step."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from macft.collective.base import Collective
from macft.training.gradient import LocalGradient

_STILL_COMPUTING_SECONDS = 2e-4


@dataclass(frozen=True)
class GlobalGradient:
    """The same on every rank: gradient of the mean loss over all target tokens of the global batch, and its norm.

    ``gradient`` maps parameter names to float32 MLX arrays. ``seconds`` are this rank's: ``compute`` until its own
    gradient was there, ``all_reduce`` after that, and ``all_reduce_hidden`` of the former, while MLX went on computing.
    """

    gradient: dict[str, Any]
    norm: float
    loss: float
    target_tokens: int
    tokens: int
    stop_requested: bool
    seconds: Mapping[str, float]

    @property
    def finite(self) -> bool:
        """Whether loss and gradient are free of NaN and infinity."""
        return math.isfinite(self.loss) and math.isfinite(self.norm)


def reduce_gradient(collective: Collective, local: LocalGradient, *, stop: bool) -> GlobalGradient:
    """Sums gradients, losses and counts over all ranks and divides once by the global count of target tokens.

    Nodes with more target tokens weigh more, exactly as if one machine had computed the batch. ``stop`` is this
    rank's wish to end after this step; one rank's wish is enough.

    Gradients are summed in MLX's own memory, a bucket at a time: while one is on the wire MLX computes the next.
    """
    ready, hidden = _sum_buckets(collective, local)
    # float64 holds token counts exactly and costs nothing at this size.
    sums = np.array([local.loss_sum, local.target_tokens, local.tokens, float(stop)], dtype=np.float64)
    collective.all_reduce([sums])
    loss_sum, target_tokens, tokens, stops = (float(value) for value in sums)
    scale(local.gradient, 1.0 / max(target_tokens, 1.0))
    norm = math.sqrt(sum(_sum_of_squares(value) for value in local.gradient.values()))
    seconds = {
        "compute": ready - local.started,
        "all_reduce": time.perf_counter() - ready,
        "all_reduce_hidden": hidden,
    }
    loss = loss_sum / max(target_tokens, 1.0)
    return GlobalGradient(local.gradient, norm, loss, int(target_tokens), int(tokens), stops > 0, seconds)


def scale(gradient: Mapping[str, Any], factor: float) -> None:
    """Multiplies evaluated float32 MLX arrays in place."""
    for value in gradient.values():
        memory = np.asarray(value)
        np.multiply(memory, np.float32(factor), out=memory)


def _sum_buckets(collective: Collective, local: LocalGradient) -> tuple[float, float]:
    """Returns when the last bucket was computed, and the seconds of all-reduce while MLX was still at a later one."""
    hidden = reducing = 0.0
    ready = time.perf_counter()
    for bucket in local.buckets:
        arrays = [local.gradient[name] for name in bucket]
        waited = time.perf_counter()
        mx.eval(arrays)
        ready = time.perf_counter()
        # A wait shows that MLX was at work all through the all-reduce before. Without one, nobody knows: not counted.
        hidden += reducing if ready - waited > _STILL_COMPUTING_SECONDS else 0.0
        collective.all_reduce(arrays)
        reducing = time.perf_counter() - ready
    return ready, hidden


def _sum_of_squares(value: Any) -> float:
    flat = np.asarray(value).reshape(-1)
    return float(np.einsum("i,i->", flat, flat, dtype=np.float64))
