"""This rank's place in the layout of stages: what it computes, and whom it exchanges hidden states with."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from macft.collective.base import Channels, Collective
from macft.model.ends import ends_of
from macft.parallel.shares import DataShard
from macft.parallel.stage_layout import Stage, StageLayout, even_layout

Decide = Callable[[int], StageLayout]
"""The layout of a number of ranks."""


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
    """

    def __init__(self, collective: Collective, decide: Decide = whole_models):
        self.decide = decide
        self.layout = decide(collective.world_size)
        self._collective = collective
        self._channels: Channels | None = None

    def agree(self) -> None:
        """Takes rank 0's layout. A call of all ranks."""
        own = json.dumps(self.layout.to_data()).encode()
        self.change(StageLayout.from_data(json.loads(self._collective.broadcast(own))))

    def change(self, layout: StageLayout) -> None:
        """The ranks, or what they compute, have changed. Collective: every rank must call it."""
        self.layout, self._channels = layout, None

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
            pairs = [(one.rank, other.rank) for pipeline in self.layout.pipelines for one, other in pairwise(pipeline)]
            self._channels = self._collective.open_channels(pairs, "pipeline")
        return self._channels
