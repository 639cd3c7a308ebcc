"""``topology.stages=auto``: the blocks of a pipeline are cut by what each node told of its speed and memory.

While the run goes on, its stages are measured. Where another cut is clearly faster with what was measured, and with
what heat and power let the nodes do, blocks are handed over.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from macft.collective.base import Collective
from macft.collective.elastic import ElasticCollective
from macft.errors import ConfigError
from macft.parallel.stage_balance import StageSpeeds
from macft.parallel.stage_layout import Stage, StageLayout
from macft.parallel.stage_places import Improvement, LayoutChanges
from macft.planner.cluster_model import ModelCost, Node, NodeLink, RingLinks, StepWork
from macft.planner.fit import MemoryPlanner
from macft.planner.layout_inputs import model_cost, step_work
from macft.planner.node_report import alike, from_payload, to_payload
from macft.planner.partition import choose_layout
from macft.planner.pipeline_search import PipelineSearch
from macft.planner.stages import pipeline_sizes

# Every cut sends the same hidden states, so the network doesn't decide between them.
_NO_LINK = NodeLink(float("inf"), 0.0)
# The part of a step's time that another layout has to save, for blocks to be handed over.
LEAST_GAIN = 0.10
# A node without blocks can't be measured. Whenever another layout is looked for, it counts as this much nearer to what
# was expected of it.
_DRIFT = 0.25
# A pipeline of one node computes its blocks again in the backward pass.
_AGAIN = 4.0 / 3.0


Cut: TypeAlias = Callable[[int], StageLayout | None]
"""The layout of a number of ranks; None if nodes are to be taken as alike."""


@dataclass
class NodeCuts(LayoutChanges):
    """Cuts for the members of ``collective``.

    ``nodes``: by member, what it told at the start. ``pipelines``: ``topology.pipelines``. ``planner_of``: the
    prediction for a node that has the rows of one of so many pipelines. ``own``: this node.
    """

    collective: Collective
    nodes: dict[str, Node]
    pipelines: int
    planner_of: Callable[[int], MemoryPlanner]
    own: Node | None = None
    # By member, its measured speed as a multiple of what it told.
    paces: dict[str, float] = field(default_factory=dict)
    _known_costs: dict[int, tuple[ModelCost, StepWork]] = field(default_factory=dict, init=False, repr=False)

    def layout(self, members: Sequence[str]) -> StageLayout | None:
        """The layout in which a step of ``members``, by rank, is fastest; None where these nodes give none.

        That is so if a node has told nothing, for a node that is alone, or if no cut fits.
        """
        nodes = self._paced(members)
        if len(nodes) < max(2, len(members)):
            return None
        sizes = pipeline_sizes(self.pipelines, len(nodes))
        model, work = self._costs(len(sizes))
        made: list[tuple[Stage, ...]] = []
        rank = 0
        for size in sizes:
            own = nodes[rank : rank + min(size, model.blocks)]  # the other ranks have nothing to do
            stages = _fastest(own, model, work)
            if stages is None:  # each node's own plan says what it lacks
                return None
            made.append(_shifted(stages, range(rank, rank + len(own))))
            rank += size
        return StageLayout(tuple(made))

    @property
    def report(self) -> bytes:
        """This node, as JSON."""
        return b"" if self.own is None else to_payload(self.own)

    def learn(self, reports: Sequence[bytes]) -> None:
        """Takes what the members of now tell: there may be new ones."""
        told = [from_payload(report) for report in reports]
        nodes = [node for node in told if node is not None]
        if len(nodes) == len(told):
            self.nodes = dict(zip(members_of(self.collective), alike(nodes), strict=True))

    def remember(self, paces: Sequence[float]) -> None:
        """Keeps what was measured."""
        self.paces |= dict(zip(members_of(self.collective), paces, strict=True))

    def improve(self, layout: StageLayout, speeds: StageSpeeds) -> Improvement | None:
        """A layout that is faster by ``LEAST_GAIN``; nodes that would slow down their pipeline get no blocks."""
        members = members_of(self.collective)
        told = [self.nodes[member] for member in members if member in self.nodes]
        if len(told) < max(2, len(members)):
            return None
        sizes = pipeline_sizes(self.pipelines, len(members))
        model, work = self._costs(len(sizes))
        paces = self._measured(layout, speeds, members, model, work)
        nodes = [
            replace(node, speed=node.speed * pace * duty)
            for node, pace, duty in zip(told, paces, speeds.duties, strict=True)
        ]
        made: list[tuple[Stage, ...]] = []
        before = after = 0.0
        rank = 0
        for size, stages in zip(sizes, layout.pipelines, strict=True):
            ranks = range(rank, rank + size)
            now = [replace(stage, rank=stage.rank - rank) for stage in stages]
            own = nodes[rank : rank + size]
            best, seconds = _with_some_left_out(own, model, work)
            current = _seconds(own, now, model, work)
            if seconds > current * (1 - LEAST_GAIN):
                best, seconds = now, current
            made.append(_shifted(best, ranks))
            before, after = max(before, current), max(after, seconds)
            rank += size
        gain = 1 - after / before if before and math.isfinite(before) else 0.0
        return Improvement(StageLayout(tuple(made)), gain, tuple(paces)) if gain >= LEAST_GAIN else None

    def _measured(
        self,
        layout: StageLayout,
        speeds: StageSpeeds,
        members: Sequence[str],
        model: ModelCost,
        work: StepWork,
    ) -> list[float]:
        """By rank, how fast it is, as a multiple of what it told."""
        found: dict[int, float] = {}
        for stages in layout.pipelines:
            search = _search([self.nodes[members[stage.rank]] for stage in stages], model, work)
            choices = search.pipeline([replace(stage, rank=place) for place, stage in enumerate(stages)]).choices
            for stage, choice in zip(stages, choices, strict=True):
                seconds = speeds.seconds[stage.rank]
                if seconds is not None:
                    found[stage.rank] = choice.cost.busy * search.micro_batches / work.tokens / seconds
        mean = sum(found.values()) / len(found) if found else 1.0
        paces = []
        for rank, member in enumerate(members):
            known = self.paces.get(member, mean)
            paces.append(found[rank] if rank in found else known + _DRIFT * (mean - known))
        return paces

    def _paced(self, members: Sequence[str]) -> list[Node]:
        """Those of ``members`` that have told something, with the speeds that were measured."""
        mean = sum(self.paces.values()) / len(self.paces) if self.paces else 1.0
        nodes = [(self.nodes[member], self.paces.get(member, mean)) for member in members if member in self.nodes]
        return [replace(node, speed=node.speed * pace) for node, pace in nodes]

    def _costs(self, pipelines: int) -> tuple[ModelCost, StepWork]:
        if pipelines not in self._known_costs:
            planner = self.planner_of(pipelines)
            costs = model_cost(planner), step_work(planner, planner.execution.micro_batch_size)
            self._known_costs[pipelines] = costs
        return self._known_costs[pipelines]


def agree(cuts: NodeCuts) -> Cut:
    """Rank 0's layout for the members of now, and that of ``cuts`` for others later. A call of all ranks."""
    collective = cuts.collective
    first = members_of(collective)
    own = cuts.layout(first) if collective.rank == 0 else None
    data = json.loads(collective.broadcast(json.dumps(own and own.to_data()).encode()))
    agreed = data and StageLayout.from_data(data)

    def cut(world_size: int) -> StageLayout | None:
        members = members_of(collective)
        if len(members) != world_size:
            return None
        return agreed if members == first and not cuts.paces else cuts.layout(members)

    return cut


def members_of(collective: Collective) -> list[str]:
    """The members' ids by rank; where there can't be others later, their numbers."""
    if isinstance(collective, ElasticCollective):
        return list(collective.members.ids)
    return list(map(str, range(collective.world_size)))


def _search(nodes: Sequence[Node], model: ModelCost, work: StepWork) -> PipelineSearch:
    """The one with the run's own number of micro-batches."""
    return PipelineSearch(nodes, _ring(nodes), model, work, work.divisions()[0], "given")


def _ring(nodes: Sequence[Node]) -> RingLinks:
    return RingLinks.of_one_kind(_NO_LINK, len(nodes))


def _fastest(nodes: Sequence[Node], model: ModelCost, work: StepWork) -> tuple[Stage, ...] | None:
    """The stages of one pipeline of all ``nodes``; None if no cut fits."""
    try:
        found = choose_layout(nodes, _ring(nodes), model, work, wanted="pipeline", order="given")
    except ConfigError:
        return None
    (stages,) = found.layout.pipelines
    return stages


def _with_some_left_out(nodes: Sequence[Node], model: ModelCost, work: StepWork) -> tuple[Sequence[Stage], float]:
    """The fastest pipeline of ``nodes``, without the slowest of them where that is faster; and its seconds."""
    best: Sequence[Stage] = ()
    least = math.inf
    by_speed = sorted(range(len(nodes)), key=lambda rank: -nodes[rank].speed)
    for count in range(min(len(nodes), model.blocks), 0, -1):
        ranks = sorted(by_speed[:count])
        own = [nodes[rank] for rank in ranks]
        stages = _fastest(own, model, work) if count > 1 else (Stage(0, 0, model.blocks),)
        if stages is None:
            continue
        seconds = _seconds(own, stages, model, work)
        if seconds < least * (1 - 1e-9):
            best, least = _shifted(stages, ranks), seconds
    return best, least


def _seconds(nodes: Sequence[Node], stages: Sequence[Stage], model: ModelCost, work: StepWork) -> float:
    """Of a step with these stages, whose ranks are places in ``nodes``."""
    if len(stages) > 1:
        search = _search(nodes, model, work)
        return search.pipeline(stages).simulated(search.micro_batches)
    node = nodes[stages[0].rank]
    computing = work.tokens * (sum(model.forward) + sum(model.backward) + model.loss_operations) / node.speed
    is_read = model.weights + model.state > node.memory
    return max(_AGAIN * computing, 2 * sum(model.file_bytes) / node.disk if is_read else 0.0)


def _shifted(stages: Sequence[Stage], ranks: Sequence[int]) -> tuple[Stage, ...]:
    """``stages``, whose ranks are places in ``ranks``, with those."""
    return tuple(replace(stage, rank=ranks[stage.rank]) for stage in stages)
