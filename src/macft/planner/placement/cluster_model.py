"""What the placement of a model over nodes follows from: nodes, links, the model's costs, the work of a step.

Sizes are bytes, times seconds, work floating-point operations. Nothing here reads a file or asks a device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from macft.training.gradients.pipeline_schedule import in_flight

CHOICES = ("replicate", "stream", "pipeline")
"""Placements that :func:`~macft.planner.placement.compare.compare` can return."""


@dataclass(frozen=True)
class Alone:
    """How a node computes with the whole model: a step of ``t`` tokens takes max(t x per_token, reading)."""

    per_token: float
    reading: float = 0.0
    streams: bool = False


@dataclass(frozen=True)
class Node:
    """``speed`` in operations a second that training reaches, ``memory`` that a run may take, ``disk`` bytes a second.

    ``alone``: how it computes with the whole model, for each way that fits; empty if none does. ``link``: what connects
    it to the others, as far as it knows. ``trained``: its speed as ``macft bench --training`` measured it, if it did.
    """

    name: str
    speed: float
    memory: float
    disk: float
    alone: tuple[Alone, ...] = ()
    link: NodeLink | None = None
    trained: float | None = None


@dataclass(frozen=True)
class NodeLink:
    """Between two nodes, the same in both directions: bytes a second, and seconds that a message takes besides."""

    bandwidth: float
    latency: float

    def seconds(self, size: float) -> float:
        """To send ``size`` bytes."""
        return self.latency + size / self.bandwidth


@dataclass(frozen=True)
class ModelCost:
    """Costs of a model, of each block where there are several values.

    ``forward`` and ``backward``: operations a token; ``backward`` is 0 below ``first_trained`` and counts no second
    forward pass. ``block_bytes`` in memory, ``file_bytes`` on disk. ``saved``: bytes a token that a trained block keeps
    for its backward pass; ``inside``: that exist only while a block is computed, and ``inside_again`` where it is
    recomputed; ``hidden``: of hidden states. ``loss_operations`` a token, ``loss_bytes`` a token and ``loss_most`` at
    most. ``state``: adapter, optimizer and gradients, which every node holds, ``update``: these during an update, when
    there are no activations. ``exchanged``: size of the gradient.
    ``trial``: what each node needs while it tries the model's code, both ends and two blocks.
    The first stage holds the embedding and the last one the head; ``tied_bytes`` of these are one and the same, which a
    node with both holds once.
    """

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    block_bytes: tuple[float, ...]
    file_bytes: tuple[float, ...]
    embedding_bytes: float
    head_bytes: float
    hidden: float
    saved: float
    inside: float
    inside_again: float
    loss_operations: float
    loss_bytes: float
    loss_most: float
    state: float
    update: float
    exchanged: float
    first_trained: int
    tied_bytes: float = 0.0
    trial: float = 0.0

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return len(self.forward)

    @property
    def weights(self) -> float:
        """Bytes of all weights."""
        return sum(self.block_bytes) + self.embedding_bytes + self.head_bytes - self.tied_bytes


@dataclass(frozen=True)
class StepWork:
    """``tokens`` of ``rows`` rows in a step; the longest row has ``longest``.

    ``micro_batches``: of how many equal parts the step is to consist; None: as many as are best. Where it is given,
    ``longest`` is that of a micro-batch. ``recompute``: whether trained blocks are computed again in the backward pass:
    "auto" where memory asks for it, or "always". ``shares``: of the rows, by rank; None: rows are dealt by speed.
    """

    tokens: float
    rows: int
    longest: float
    micro_batches: int | None = None
    recompute: str = "auto"
    shares: tuple[float, ...] | None = None

    def divisions(self) -> list[int]:
        """Numbers of micro-batches to compare."""
        if self.micro_batches is not None:
            return [min(self.rows, self.micro_batches)]
        numbers = [max(1, self.rows)]
        while numbers[-1] > 1 and len(numbers) < _DIVISIONS:
            numbers.append(-(-numbers[-1] // 2))
        return numbers


_DIVISIONS = 4


@dataclass(frozen=True)
class RingLinks:
    """The links of the nodes in ring order: ``links[i]`` is between node i and its next one, circularly."""

    links: tuple[NodeLink, ...]

    @classmethod
    def of_one_kind(cls, link: NodeLink, nodes: int) -> RingLinks:
        """All links alike."""
        return cls((link,) * nodes)

    def between(self, first: int, second: int) -> NodeLink:
        """What node ``first`` sends to ``second`` over: as slow as the slowest link on the shorter way round."""
        count = len(self.links)
        if (first - second) % count < (second - first) % count:
            first, second = second, first
        way = [self.links[(first + step) % count] for step in range((second - first) % count)]
        return NodeLink(min(link.bandwidth for link in way), max(link.latency for link in way))

    def all_reduce(self, size: float, nodes: int) -> float:
        """Seconds of a ring all-reduce of ``size`` bytes over ``nodes``: 2(n-1) rounds of a part each."""
        if nodes < 2:
            return 0.0
        slowest = min(link.bandwidth for link in self.links)
        return 2 * (nodes - 1) * (max(link.latency for link in self.links) + size / nodes / slowest)


@dataclass(frozen=True)
class StageCost:
    """A stage's seconds for one micro-batch; ``wire``: to send its hidden states on (0 for the last stage).

    ``bound``: its micro-batches in flight are limited. A stage without a backward pass may run ahead.
    """

    forward: float
    backward: float
    wire: float = 0.0
    bound: bool = True

    @property
    def busy(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward


@dataclass(frozen=True)
class PipelineClock:
    """When a pipeline ends: ``fill`` for the first micro-batch, there and back, ``period`` for each further one.

    ``floor``: what a step takes at least, however little there is to do.
    """

    fill: float
    period: float
    floor: float = 0.0

    def seconds(self, micro_batches: int) -> float:
        """Of a step of this many micro-batches."""
        return max(self.floor, self.fill + (micro_batches - 1) * self.period) if micro_batches else 0.0


def clock_of(stages: Sequence[StageCost]) -> PipelineClock:
    """The time of 1F1B with ``stages`` (PipeDream-Flush, Narayanan et al. 2021, arXiv:2104.04473).

    Stage s of p has at most 2(p - s) - 1 micro-batches in flight. So a micro-batch is begun no faster than the slowest
    stage works, and no faster than so many come back from the stages behind, the links there and back included. With
    equal stages and no links m micro-batches take (m + p - 1) times a stage's time. See
    :mod:`macft.planner.placement.pipeline_simulator` for how good this is with unequal ones.
    """
    count = len(stages)
    fill = sum(stage.busy + stage.wire * (2 if stage.bound else 1) for stage in stages)
    period = max(stage.busy for stage in stages)
    behind = 0.0
    for place in range(count - 1, -1, -1):
        behind += stages[place].busy + 2 * stages[place].wire
        if stages[place].bound:
            period = max(period, behind / in_flight(count - place)[1])
        else:
            behind = -math.inf
    return PipelineClock(fill, period)
