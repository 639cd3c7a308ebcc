"""The pipelines of a run, cut by what each node told of its speed and memory; after a loss, for those that are left."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from macft.collective.base import Collective
from macft.collective.elastic import ElasticCollective
from macft.errors import ConfigError, ModelError
from macft.parallel.stage_layout import StageLayout
from macft.planner.fit import MemoryPlanner
from macft.planner.placement.cluster_model import Node, RingLinks
from macft.planner.placement.compare import LayoutDecision, best_pipelines
from macft.planner.placement.inputs import model_cost, step_work
from macft.planner.preflight.node_report import ring_of
from macft.planner.stage import pipeline_sizes

Cut: TypeAlias = Callable[[int], StageLayout | None]
"""The layout of a number of ranks; None if nodes are to be taken as alike."""


class FoundPipelines(NamedTuple):
    """``best``, and ``in_order``: that of all nodes in the order of ranks; None where there is none."""

    best: LayoutDecision
    in_order: LayoutDecision | None


@dataclass(frozen=True)
class NodeCuts:
    """Cuts by ``nodes``: by member, what it told at the start.

    ``pipelines``: how many there are, if there are two nodes for each. ``planner_of``: the prediction for all rows, in
    the micro-batches of a run with so many pipelines. ``shares``: of the rows, by member; one that joined gets the mean
    of the others, as :class:`~macft.parallel.balance.ShareBalancer` gives it. None: by speed.
    """

    nodes: Mapping[str, Node]
    pipelines: int
    planner_of: Callable[[int], MemoryPlanner]
    shares: Mapping[str, float] | None = None

    def layout(self, members: Sequence[str]) -> StageLayout | None:
        """The layout in which a step of ``members``, by rank, is fastest; None where these nodes give none.

        That is so for a node that joined later, a node that is alone, or if no cut fits. Nodes may have no stage.
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


def find_pipelines(
    nodes: Sequence[Node],
    ring: RingLinks,
    planner: MemoryPlanner,
    pipelines: int,
    shares: tuple[float, ...] | None,
) -> FoundPipelines | None:
    """Layouts of ``nodes``, by rank, for all rows of ``planner`` in its micro-batches; None if none fits."""
    count = len(pipeline_sizes(pipelines, len(nodes)))
    work = step_work(planner, planner.execution.micro_batch_size, shares)
    best, in_order = best_pipelines(nodes, ring, model_cost(planner), work, count)
    return None if best is None else FoundPipelines(best, in_order)


def followed(collective: Collective, cuts: NodeCuts, agreed: StageLayout | None) -> Cut:
    """``agreed`` for the members of now, and the layout of ``cuts`` for others later."""
    first = members_of(collective)

    def cut(world_size: int) -> StageLayout | None:
        members = members_of(collective)
        if len(members) != world_size:
            return None
        return agreed if members == first else cuts.layout(members)

    return cut


def agree(collective: Collective, cuts: NodeCuts) -> tuple[Cut, str]:
    """Rank 0's layout for the members of now, that of ``cuts`` for others later, and a line. A call of all ranks.

    The line says why some nodes have no stage, or stages another order than ranks; it is empty where that isn't so.
    """
    found: FoundPipelines | None = None
    if collective.rank == 0:
        # Each node's own decision raises it again; here the others wait for an answer.
        with contextlib.suppress(ConfigError, ModelError):
            found = cuts.found(members_of(collective))
    own = None if found is None else [found.best.layout.to_data(), order_line(found, ranks(collective.world_size))]
    data = json.loads(collective.broadcast(json.dumps(own).encode()))
    if data is None:
        return followed(collective, cuts, None), ""
    layout, line = data
    return followed(collective, cuts, StageLayout.from_data(layout)), str(line)


def order_line(found: FoundPipelines, names: Sequence[str]) -> str:
    """Why not all nodes have a stage in the order of ranks, for a person; empty where they have.

    ``names``: of the nodes, by rank.
    """
    best, in_order = found
    used = [stage.rank for stages in best.layout.pipelines for stage in stages]
    if used == list(range(len(names))):
        return ""
    spare = [name for rank, name in enumerate(names) if rank not in used]
    what = "stages in another order than the nodes"
    if spare:
        what = f"no stage for {', '.join(spare)}: a spare, which takes blocks when another node is lost"
    if best is in_order:
        return f"{what}; there are more nodes than blocks"
    if in_order is None:
        return f"{what}; all nodes in their order have no layout that fits"
    return f"{what}; {best.seconds:.2f} s a step expected, {in_order.seconds:.2f} s with all nodes in their order"


def ranks(count: int) -> list[str]:
    """The names of so many ranks."""
    return [f"rank {rank}" for rank in range(count)]


def members_of(collective: Collective) -> list[str]:
    """The members' ids by rank; where there can't be others later, their numbers."""
    if isinstance(collective, ElasticCollective):
        return list(collective.members.ids)
    return list(map(str, range(collective.world_size)))
