"""The pipelines of a run by what each node told of its speed and memory; after a loss, of those that are left."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from macft.collective.base import Collective
from macft.collective.elastic import ElasticCollective
from macft.errors import ConfigError, ModelError
from macft.parallel.stage_layout import StageLayout
from macft.planner.memory_planner import MemoryPlanner
from macft.planner.placement.candidates import FoundPipelines, find_pipelines, order_line, rank_names
from macft.planner.placement.cluster_model import Node
from macft.planner.preflight.node_report import ring_of

LayoutOf: TypeAlias = Callable[[int], StageLayout | None]
"""The layout of a number of ranks; None if nodes are to be taken as alike."""


@dataclass(frozen=True)
class MemberLayouts:
    """Cuts by ``nodes``: by member, what it told at the start.

    ``pipelines``: how many there are, if there are two nodes for each. ``planner_of``: the prediction for all rows, in
    the micro-batches of a run with this many pipelines. ``shares``: of the rows, by member; one that joined gets the
    mean of the others, as :class:`~macft.parallel.balance.ShareBalancer` gives it. None: by speed.
    """

    nodes: Mapping[str, Node]
    pipelines: int
    planner_of: Callable[[int], MemoryPlanner]
    shares: Mapping[str, float] | None = None

    def layout(self, members: Sequence[str]) -> StageLayout | None:
        """The layout in which a step of ``members``, by rank, is fastest; None where these nodes give none.

        That is so for a node that joined later, a node that is alone, or if no pipeline fits. Nodes may have no stage.
        """
        found = self.found(members)
        return None if found is None else found.best.layout

    def found(self, members: Sequence[str]) -> FoundPipelines | None:
        """The layouts of ``members``, by rank; None as for :meth:`layout`."""
        nodes = [self.nodes[member] for member in members if member in self.nodes]
        if len(nodes) < max(2, len(members)):
            return None
        planner = self.planner_of(self.pipelines)
        return find_pipelines(nodes, ring_of(nodes), planner, self.pipelines, self._shares_of(members))

    def _shares_of(self, members: Sequence[str]) -> tuple[float, ...] | None:
        if self.shares is None:
            return None
        known = [self.shares[member] for member in members if member in self.shares]
        mean = sum(known) / len(known) if sum(known) > 0 else 1.0
        return tuple(self.shares.get(member, mean) for member in members)


def followed(collective: Collective, layouts: MemberLayouts, agreed: StageLayout | None) -> LayoutOf:
    """``agreed`` for the current members, and the layout of ``layouts`` for others later."""
    first = members_of(collective)

    def layout_of(world_size: int) -> StageLayout | None:
        members = members_of(collective)
        if len(members) != world_size:
            return None
        return agreed if members == first else layouts.layout(members)

    return layout_of


def agree(collective: Collective, layouts: MemberLayouts) -> tuple[LayoutOf, str]:
    """Rank 0's layout for the current members, that of ``layouts`` for others later, and a line. A collective call.

    The line says why some nodes have no stage, or stages another order than ranks; it is empty where that isn't so.
    """
    found: FoundPipelines | None = None
    if collective.rank == 0:
        # Each node's own decision raises it again; here the others wait for an answer.
        with contextlib.suppress(ConfigError, ModelError):
            found = layouts.found(members_of(collective))
    own = None if found is None else [found.best.layout.to_data(), order_line(found, rank_names(collective.world_size))]
    data = json.loads(collective.broadcast(json.dumps(own).encode()))
    if data is None:
        return followed(collective, layouts, None), ""
    layout, line = data
    return followed(collective, layouts, StageLayout.from_data(layout)), str(line)


def members_of(collective: Collective) -> list[str]:
    """The members' ids by rank; where there can't be others later, their numbers."""
    if isinstance(collective, ElasticCollective):
        return list(collective.members.ids)
    return list(map(str, range(collective.world_size)))
