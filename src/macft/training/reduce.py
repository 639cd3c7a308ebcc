"""Turns every node's sums into the global mean gradient: the one place where nodes meet in a step."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from macft.collective.base import Collective
from macft.plan.node_status import NodeStatus
from macft.training.gradient import LocalGradient


@dataclass(frozen=True)
class GlobalGradient:
    """The same on every rank: gradient of the mean loss over all target tokens of the global batch, and its norm.

    ``nodes`` holds every rank's status of the step.
    """

    gradient: NDArray[np.float32]
    norm: float
    loss: float
    target_tokens: int
    tokens: int
    stop_requested: bool
    nodes: list[NodeStatus]
    seconds: float

    @property
    def finite(self) -> bool:
        """Whether loss and gradient are free of NaN and infinity."""
        return math.isfinite(self.loss) and math.isfinite(self.norm)


def reduce_gradient(collective: Collective, local: LocalGradient, *, stop: bool, status: NodeStatus) -> GlobalGradient:
    """Sums gradients, losses and counts over all ranks and divides once by the global count of target tokens.

    Nodes with more target tokens weigh more, exactly as if one machine had computed the batch. ``stop`` is this
    rank's wish to end after this step; one rank's wish is enough. ``status`` travels along in a slot of its own, which
    the other ranks leave at 0.
    """
    started = time.perf_counter()
    # float64 holds token counts exactly and costs nothing at this size.
    slots = np.zeros((collective.world_size, NodeStatus.SIZE))
    slots[collective.rank] = status.numbers()
    counts = np.array([local.loss_sum, local.target_tokens, local.tokens, float(stop)])
    sums = np.concatenate([counts, slots.ravel()])
    collective.all_reduce([local.gradient, sums])
    loss_sum, target_tokens, tokens, stops = (float(value) for value in sums[: len(counts)])
    slots = sums[len(counts) :].reshape(slots.shape)
    gradient = local.gradient
    gradient /= np.float32(max(target_tokens, 1.0))
    norm = math.sqrt(float(np.einsum("i,i->", gradient, gradient, dtype=np.float64)))
    return GlobalGradient(
        gradient=gradient,
        norm=norm,
        loss=loss_sum / max(target_tokens, 1.0),
        target_tokens=int(target_tokens),
        tokens=int(tokens),
        stop_requested=stops > 0,
        nodes=[NodeStatus.of_numbers(slot.tolist()) for slot in slots],
        seconds=time.perf_counter() - started,
    )
