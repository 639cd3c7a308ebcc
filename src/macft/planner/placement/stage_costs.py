"""What a stage of a pipeline costs a node: seconds and bytes, for every range of blocks at once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from macft.planner.placement.cluster_model import ModelCost, Node, StageCost

Table = NDArray[np.float64]
"""A value for each range of blocks: [first, end], (blocks + 1, blocks + 1)."""

# On what is predicted and not counted: activations are within 15% where they were measured.
_MARGIN = 1.15
# Part of a node's memory that no layout uses: graphs that are being built, buffers of the network.
_RESERVE = 0.03
# Hidden states of micro-batches on their way in and out, beside those that are computed.
_ON_THE_WIRE = 4
# Blocks in memory beside the resident ones where the others are read from disk.
_IN_FLIGHT = 2
KEEP, RECOMPUTE, STREAM = range(3)
"""Ways to hold a stage, the fastest first: see :class:`StageChoice`."""


@dataclass(frozen=True)
class StageMemory:
    """Bytes of a stage at its peak, by part; ``activations`` or, where that is more, what an update takes."""

    weights: float
    state: float
    activations: float
    reserve: float

    @property
    def peak(self) -> float:
        """All of it."""
        return self.weights + self.state + self.activations + self.reserve


@dataclass(frozen=True)
class StageChoice:
    """How a node holds its stage: ``resident`` of its blocks in memory, the others read for each micro-batch.

    ``recompute``: trained blocks are computed again in the backward pass. ``reading``: seconds that a micro-batch
    reads, forward and backward. For a node that computes alone (see :class:`Node`) it is that of a step, and ``memory``
    is None.
    """

    resident: int
    recompute: bool
    cost: StageCost
    reading: float = 0.0
    memory: StageMemory | None = None


@dataclass(frozen=True)
class _Way:
    """A way to hold a stage, for all ranges of blocks: seconds of a micro-batch, bytes, blocks that stay in memory."""

    fits: NDArray[np.bool_]
    forward: Table
    backward: Table
    activations: Table
    resident: Table
    reading: Table


class StageTables:
    """Costs of ``node`` for micro-batches of ``tokens``, of which memory has to hold ``held`` tokens.

    ``recompute``: "auto" or "always". ``streams``: blocks that don't fit may be read from disk.
    """

    def __init__(self, model: ModelCost, node: Node, tokens: float, held: float, *, recompute: str, streams: bool):
        self._model, self._node, self._tokens, self._held = model, node, tokens, held
        self._ways = [*([KEEP] if recompute == "auto" else []), RECOMPUTE, *([STREAM] if streams else [])]
        self._best: dict[int, tuple[Table, NDArray[np.int64]]] = {}
        self._of_ways: dict[tuple[int, int], _Way] = {}

    def seconds(self, in_flight: int) -> Table:
        """Of a micro-batch forward and backward, where the stage holds up to ``in_flight``; infinite if none fits."""
        return self._table(in_flight)[0]

    def choice(self, first: int, end: int, in_flight: int, wire: float) -> StageChoice:
        """The fastest way that fits; where none does, though the node computes it, blocks are computed again."""
        at = first, end
        way = int(self._table(in_flight)[1][at])
        found = self._way(way, in_flight)
        resident, weights, reading = end - first, float(self._weights[at]), 0.0
        if way == STREAM:
            resident = int(found.resident[at])
            weights = float(self._outside[at]) + min(resident + _IN_FLIGHT, end - first) * self._largest
            reading = float(found.reading[at])
        return StageChoice(
            resident=resident,
            recompute=way != KEEP,
            cost=StageCost(
                float(found.forward[at]), float(found.backward[at]), wire, bound=end > self._model.first_trained
            ),
            reading=reading,
            memory=StageMemory(weights, self._model.state, float(found.activations[at]), self._reserve),
        )

    def _table(self, in_flight: int) -> tuple[Table, NDArray[np.int64]]:
        if in_flight not in self._best:
            best = np.full_like(self._weights, np.inf)
            chosen = np.full(best.shape, RECOMPUTE, dtype=np.int64)
            for number in self._ways:
                way = self._way(number, in_flight)
                busy = way.forward + way.backward
                better = way.fits & self._is_range & (busy < best)
                best[better], chosen[better] = busy[better], number
            self._best[in_flight] = best, chosen
        return self._best[in_flight]

    def _way(self, way: int, in_flight: int) -> _Way:
        if (way, in_flight) not in self._of_ways:
            self._of_ways[way, in_flight] = self._make_way(way, in_flight)
        return self._of_ways[way, in_flight]

    def _make_way(self, way: int, in_flight: int) -> _Way:
        activations = self._activations(way, in_flight)
        forward, backward = self._compute
        others = activations + self._model.state + self._reserve
        if way == KEEP:
            fits = self._weights + others <= self._node.memory
            return _Way(fits, forward, backward, activations, self._count, np.zeros_like(others))
        backward = backward + self._again
        if way == RECOMPUTE:
            fits = self._weights + others <= self._node.memory
            return _Way(fits, forward, backward, activations, self._count, np.zeros_like(others))
        free = self._node.memory - others - self._outside
        resident = np.minimum(np.floor(free / self._largest) - _IN_FLIGHT, self._count)
        share = (1 - np.clip(resident / self._count, 0, 1)) / self._node.disk
        read_forward, read_backward = share * self._file, share * self._trained_file
        return _Way(
            np.asarray(resident >= 0),
            np.maximum(forward, read_forward),
            np.maximum(backward, read_backward),
            activations,
            resident,
            read_forward + read_backward,
        )

    def _activations(self, way: int, in_flight: int) -> Table:
        model, held = self._model, self._held
        kept = model.saved if way == KEEP else model.hidden
        inside = np.where(self._trained > 0, model.inside if way == KEEP else model.inside_again, model.hidden)
        loss = np.zeros_like(inside)
        loss[:, -1] = min(model.loss_bytes * held, model.loss_most)
        kept_bytes = in_flight * held * kept * self._trained
        step: Table = _MARGIN * (kept_bytes + held * inside + loss) + _ON_THE_WIRE * held * model.hidden
        activations: Table = np.maximum(step, model.update - model.state)
        return activations

    @property
    def _reserve(self) -> float:
        return _RESERVE * self._node.memory

    @cached_property
    def _compute(self) -> tuple[Table, Table]:
        """Seconds forward, and backward with the loss and without a second forward pass."""
        scale = self._tokens / self._node.speed
        forward, backward = scale * _sums(self._model.forward), scale * _sums(self._model.backward)
        backward[:, -1] += scale * self._model.loss_operations
        return forward, backward

    @cached_property
    def _again(self) -> Table:
        """Seconds to compute trained blocks once more."""
        trained = [
            operations if number >= self._model.first_trained else 0.0
            for number, operations in enumerate(self._model.forward)
        ]
        again: Table = self._tokens / self._node.speed * _sums(trained)
        return again

    @cached_property
    def _count(self) -> Table:
        return np.maximum(1.0, _sums([1.0] * self._model.blocks))

    @cached_property
    def _trained(self) -> Table:
        """Blocks that a gradient passes through."""
        return _sums([float(number >= self._model.first_trained) for number in range(self._model.blocks)])

    @cached_property
    def _is_range(self) -> NDArray[np.bool_]:
        """Ranges of blocks; none where the node can't even try the model."""
        can_try = self._model.trial <= self._node.memory
        return np.asarray(np.triu(np.ones_like(self._weights), 1) > 0) & can_try

    @cached_property
    def _outside(self) -> Table:
        """Bytes of embedding and head, for the stages that hold them."""
        outside = np.zeros((self._model.blocks + 1,) * 2)
        outside[0, :] += self._model.embedding_bytes
        outside[:, -1] += self._model.head_bytes
        outside[0, -1] -= self._model.tied_bytes
        return outside

    @cached_property
    def _weights(self) -> Table:
        weights: Table = _sums(self._model.block_bytes) + self._outside
        return weights

    @cached_property
    def _largest(self) -> float:
        """Bytes of the largest block."""
        return max(self._model.block_bytes)

    @cached_property
    def _file(self) -> Table:
        return _sums(self._model.file_bytes)

    @cached_property
    def _trained_file(self) -> Table:
        first = self._model.first_trained
        return _sums([size if number >= first else 0.0 for number, size in enumerate(self._model.file_bytes)])


def _sums(values: list[float] | tuple[float, ...]) -> Table:
    """Of each range of blocks the sum of ``values``; negative or 0 where ``end`` is not above ``first``."""
    ends = np.concatenate([[0.0], np.cumsum(values)])
    table: Table = ends[None, :] - ends[:, None]
    return table
