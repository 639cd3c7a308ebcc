"""``topology.stages=auto``: the blocks of a pipeline are cut by what each node told of its speed and memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from macft.collective.base import Collective
from macft.collective.elastic import ElasticCollective
from macft.errors import ConfigError
from macft.parallel.stage_layout import Stage, StageLayout
from macft.planner.cluster_model import Node, NodeLink, RingLinks
from macft.planner.fit import MemoryPlanner
from macft.planner.layout_inputs import model_cost, step_work
from macft.planner.partition import choose_layout
from macft.planner.stages import pipeline_sizes

# Every cut sends the same hidden states, so the network doesn't decide between them.
_NO_LINK = NodeLink(float("inf"), 0.0)


Cut: TypeAlias = Callable[[int], StageLayout | None]
"""The layout of a number of ranks; None if nodes are to be taken as alike."""


@dataclass(frozen=True)
class NodeCuts:
    """Cuts by ``nodes``: by member, what it told at the start.

    ``pipelines``: ``topology.pipelines``. ``planner_of``: the prediction for a node that has the rows of one of so many
    pipelines.
    """

    nodes: Mapping[str, Node]
    pipelines: int
    planner_of: Callable[[int], MemoryPlanner]

    def layout(self, members: Sequence[str]) -> StageLayout | None:
        """The layout in which a step of ``members``, by rank, is fastest; None where these nodes give none.

        That is so for a node that joined later, a node that is alone, or if no cut fits.
        """
        nodes = [self.nodes[member] for member in members if member in self.nodes]
        if len(nodes) < max(2, len(members)):
            return None
        sizes = pipeline_sizes(self.pipelines, len(nodes))
        planner = self.planner_of(len(sizes))
        model, work = model_cost(planner), step_work(planner, planner.execution.micro_batch_size)
        made: list[tuple[Stage, ...]] = []
        rank = 0
        for size in sizes:
            own = nodes[rank : rank + min(size, model.blocks)]  # the other ranks have nothing to do
            ring = RingLinks.of_one_kind(_NO_LINK, len(own))
            try:
                layout = choose_layout(own, ring, model, work, wanted="pipeline", order="given").layout
            except ConfigError:  # each node's own plan says what it lacks
                return None
            made += [tuple(replace(each, rank=rank + each.rank) for each in stages) for stages in layout.pipelines]
            rank += size
        return StageLayout(tuple(made))


def agree(collective: Collective, cuts: NodeCuts) -> Cut:
    """Rank 0's layout for the members of now, and that of ``cuts`` for others later. A call of all ranks."""
    first = members_of(collective)
    own = cuts.layout(first) if collective.rank == 0 else None
    data = json.loads(collective.broadcast(json.dumps(own and own.to_data()).encode()))
    agreed = data and StageLayout.from_data(data)

    def cut(world_size: int) -> StageLayout | None:
        members = members_of(collective)
        if len(members) != world_size:
            return None
        return agreed if members == first else cuts.layout(members)

    return cut


def members_of(collective: Collective) -> list[str]:
    """The members' ids by rank; where there can't be others later, their numbers."""
    if isinstance(collective, ElasticCollective):
        return list(collective.members.ids)
    return list(map(str, range(collective.world_size)))
