"""This rank's place in the layout of stages: what it computes, and whom it exchanges hidden states with."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from macft.collective.base import Channels, Collective
from macft.model.blocks.ends import ends_of
from macft.parallel.shares import DataShard
from macft.parallel.stage_balance import StageSpeeds
from macft.parallel.stage_layout import Stage, StageLayout, even_layout

Decide = Callable[[int], StageLayout]
"""The layout of a number of ranks."""


@dataclass(frozen=True)
class Improvement:
    """A layout whose step is predicted to take ``gain`` less, as a part of what it takes now.

    ``paces``: by rank, how fast it was measured to be, as a multiple of what was expected.
    """

    layout: StageLayout
    gain: float
    paces: tuple[float, ...]

    def pack(self) -> bytes:
        """As JSON."""
        return json.dumps([self.layout.to_data(), self.gain, self.paces]).encode()

    @classmethod
    def unpack(cls, payload: bytes) -> Improvement:
        """The inverse of :meth:`pack`."""
        layout, gain, paces = json.loads(payload)
        return cls(StageLayout.from_data(layout), gain, tuple(paces))


class LayoutChanges(Protocol):
    """What a run knows of its nodes, for the layouts that come after the first one."""

    @property
    def report(self) -> bytes:
        """What this node tells the others whenever the members change; empty if it knows nothing."""
        ...

    def learn(self, reports: Sequence[bytes]) -> None:
        """Takes the members' reports, by rank."""
        ...

    def improve(self, layout: StageLayout, speeds: StageSpeeds) -> Improvement | None:
        """A clearly faster layout for these speeds, if there is one."""
        ...

    def remember(self, paces: Sequence[float]) -> None:
        """Keeps what was measured, by rank, for layouts of other members."""
        ...


@dataclass(frozen=True)
class StagePlace:
    """Stage ``number`` of ``stages``, those of one pipeline."""

    number: int
    stages: tuple[Stage, ...]

    @property
    def stage(self) -> Stage:
        """This rank's."""
        return self.stages[self.number]

    @property
    def before(self) -> int | None:
        """The rank of the stage before; None for the first."""
        return self.stages[self.number - 1].rank if self.number else None

    @property
    def after(self) -> int | None:
        """The rank of the stage after; None for the last."""
        return self.stages[self.number + 1].rank if self.number + 1 < len(self.stages) else None

    @property
    def ends(self) -> frozenset[str]:
        """The ends of the model that it computes: what is before the blocks, on the first stage, and after them."""
        return ends_of(is_first=self.before is None, is_last=self.after is None)


def whole_models(world_size: int) -> StageLayout:
    """Each rank computes whole models: what a pipeline of one stage does. Blocks are not counted."""
    return even_layout(1, range(world_size), world_size)


class StagePlaces:
    """The layout of the ranks of ``collective``, which may change with them.

    Args:
        collective: The ranks.
        decide: Makes the layout. One rank's answer counts.
        changes: Finds better layouts while the run goes on. None: there are none.
    """

    def __init__(self, collective: Collective, decide: Decide = whole_models, changes: LayoutChanges | None = None):
        self.decide, self._changes = decide, changes
        self.layout = decide(collective.world_size)
        self.waiting: Callable[[], AbstractContextManager[None]] = nullcontext
        """Surrounds the time in which this rank waits for another stage."""
        self._collective = collective
        self._channels: Channels | None = None

    def agree(self) -> None:
        """Takes rank 0's layout. A collective call."""
        own = json.dumps(self.layout.to_data()).encode()
        self.change(StageLayout.from_data(json.loads(self._collective.broadcast(own))))

    def change(self, layout: StageLayout) -> None:
        """The ranks, or what they compute, have changed. Collective: every rank must call it."""
        self.layout, self._channels = layout, None

    def hand_over(self, layout: StageLayout) -> None:
        """The same ranks have other blocks from now on. Collective: every rank must call it."""
        if self._channels is not None and _neighbours(layout) != _neighbours(self.layout):
            self._channels.close()
            self._channels = None
        self.layout = layout

    def tell(self) -> None:
        """All ranks tell what is needed to decide on layouts. A collective call."""
        reports = self._collective.all_gather(b"" if self._changes is None else self._changes.report)
        if self._changes is not None:
            self._changes.learn(reports)

    def improvement(self, speeds: StageSpeeds) -> Improvement | None:
        """Rank 0's answer to whether another layout is clearly faster. A collective call."""
        own = None
        if self._changes is not None and self._collective.rank == 0:
            own = self._changes.improve(self.layout, speeds)
        payload = self._collective.broadcast(b"" if own is None else own.pack())
        if not payload:
            return None
        found = Improvement.unpack(payload)
        if self._changes is not None:
            self._changes.remember(found.paces)
        return found

    @property
    def own(self) -> StagePlace | None:
        """This rank's place; None if it computes nothing."""
        place = self.layout.place_of(self._collective.rank)
        return None if place is None else StagePlace(place[1], self.layout.pipelines[place[0]])

    def shard(self, shares: Sequence[float]) -> DataShard:
        """Which rows this rank's pipeline computes; ``shares`` are those of the ranks.

        A pipeline is as fast as its slowest stage. A rank without a stage gets none.
        """
        pipelines = [min(shares[stage.rank] for stage in pipeline) for pipeline in self.layout.pipelines]
        if not any(pipelines):
            pipelines = [1.0] * len(pipelines)
        place = self.layout.place_of(self._collective.rank)
        if place is None:
            return DataShard(len(pipelines), len(pipelines) + 1, (*pipelines, 0.0))
        return DataShard(place[0], len(pipelines), tuple(pipelines))

    def channels(self) -> Channels:
        """Between neighbouring stages. The first call after a change is one of all ranks."""
        if self._channels is None:
            self._channels = self._collective.open_channels(_neighbours(self.layout), "pipeline")
            self._channels.waiting = self.waiting
        return self._channels


def _neighbours(layout: StageLayout) -> list[tuple[int, int]]:
    """The ranks of stages that follow each other."""
    return [(one.rank, other.rank) for pipeline in layout.pipelines for one, other in pairwise(pipeline)]
