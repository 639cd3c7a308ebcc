"""Hands over blocks between the stages of a pipeline while the run goes on: from nodes that are slow or hot to others.

What each node told of itself is corrected by how long its stage takes, and by what heat and power let it do. The stages
keep their order, so that few blocks have to be read. A node that would slow down its pipeline gets none.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from macft.collective.base import Collective
from macft.parallel.stage_balance import StageSpeeds
from macft.parallel.stage_layout import Stage, StageLayout
from macft.parallel.stage_places import Improvement, LayoutChanges
from macft.planner.placement.cluster_model import ModelCost, Node, StepWork
from macft.planner.placement.compare import compare
from macft.planner.placement.inputs import model_cost, step_work
from macft.planner.placement.pipeline_search import PipelineSearch
from macft.planner.placement.stage_costs import StageChoice
from macft.planner.preflight.member_layouts import LayoutOf, MemberLayouts, members_of
from macft.planner.preflight.node_report import alike, from_payload, ring_of, to_payload

LEAST_GAIN = 0.10
"""The part of a step's time that another layout has to save, for blocks to be handed over."""
# A node without blocks can't be measured. Whenever another layout is looked for, its pace comes by this part nearer to
# the mean of the others.
_DRIFT = 0.25
# A pipeline of one node computes its blocks again in the backward pass.
_AGAIN = 4.0 / 3.0


class HandOver(LayoutChanges):
    """The layouts of a run's pipelines for its current members, better ones included.

    Args:
        collective: The members.
        layouts: Makes layouts for what members have told; it gets what is measured, too.
        own: What this node tells.
        first: The layout of the first members, and of others of which too little is known.
    """

    def __init__(self, collective: Collective, layouts: MemberLayouts, own: Node, first: LayoutOf):
        self._collective, self._own, self._first = collective, own, first
        self._first_members = members_of(collective)
        self._told = dict(layouts.nodes)
        self._nodes: dict[str, Node] = dict(layouts.nodes)
        self._layouts = replace(layouts, nodes=self._nodes, planner_of=functools.cache(layouts.planner_of))
        # By member, its measured speed as a multiple of what it told.
        self._paces: dict[str, float] = {}

    def layout_of(self, world_size: int) -> StageLayout | None:
        """The layout of the current members; None if nodes are to be taken as alike."""
        members, found = members_of(self._collective), None
        if len(members) == world_size and (self._paces or members != self._first_members):
            found = self._layouts.layout(members)
        return found or self._first(world_size)

    @property
    def report(self) -> bytes:
        """This node, as JSON."""
        return to_payload(self._own)

    def learn(self, reports: Sequence[bytes]) -> None:
        """Takes the reports of the current members: there may be new ones."""
        told = [node for report in reports if (node := from_payload(report)) is not None]
        if len(told) == len(reports):
            self._told = dict(zip(members_of(self._collective), alike(told), strict=True))
            self._apply_paces()

    def remember(self, paces: Sequence[float]) -> None:
        """Keeps what was measured."""
        self._paces |= dict(zip(members_of(self._collective), paces, strict=True))
        self._apply_paces()

    def improve(self, layout: StageLayout, speeds: StageSpeeds) -> Improvement | None:
        """A layout that saves ``LEAST_GAIN`` of a step or more; None if there is none."""
        members = members_of(self._collective)
        if not all(member in self._told for member in members):
            return None
        told = [self._told[member] for member in members]
        model, work = self._costs
        paces = self._measured(layout, speeds, told, members)
        nodes = [
            replace(node, speed=node.speed * pace * duty)
            for node, pace, duty in zip(told, paces, speeds.duties, strict=True)
        ]
        count = len(layout.pipelines)
        part = replace(work, tokens=work.tokens / count, micro_batches=-(-work.divisions()[0] // count))
        now = [_seconds(nodes, stages, model, part) for stages in layout.pipelines]
        spare = [rank for rank in range(len(nodes)) if layout.place_of(rank) is None]
        made: list[tuple[Stage, ...]] = []
        after: list[float] = []
        for stages, seconds in zip(layout.pipelines, now, strict=True):
            ranks = [stage.rank for stage in stages]
            if seconds == max(now):  # nodes without blocks may help the slowest pipeline
                ranks, spare = _in_order([*ranks, *spare], ranks), []
            best, least = _fastest(nodes, ranks, model, part)
            is_better = least < seconds * (1 - 1e-9)
            made.append(best if is_better else stages)
            after.append(min(least, seconds))
        gain = 1 - max(after) / max(now) if max(now) > 0 and math.isfinite(max(now)) else 0.0
        if gain < LEAST_GAIN:
            return None
        return Improvement(StageLayout(tuple(made)), gain, tuple(paces))

    def _measured(
        self, layout: StageLayout, speeds: StageSpeeds, told: Sequence[Node], members: Sequence[str]
    ) -> list[float]:
        """By rank, how fast it is, as a multiple of what it told."""
        search = _search(told, *self._costs)
        found: dict[int, float] = {}
        for stages in layout.pipelines:
            for stage, choice in zip(stages, search.pipeline(stages).choices, strict=True):
                seconds = speeds.seconds[stage.rank]
                if seconds is not None:
                    found[stage.rank] = _per_token(choice, search, alone=len(stages) == 1) / seconds
        mean = sum(found.values()) / len(found) if found else 1.0
        paces = []
        for rank, member in enumerate(members):
            known = self._paces.get(member, mean)
            paces.append(found[rank] if rank in found else known + _DRIFT * (mean - known))
        return paces

    def _apply_paces(self) -> None:
        """Nodes that were not measured count as the mean of the others."""
        mean = sum(self._paces.values()) / len(self._paces) if self._paces else 1.0
        self._nodes.clear()
        for member, node in self._told.items():
            self._nodes[member] = replace(node, speed=node.speed * self._paces.get(member, mean))

    @functools.cached_property
    def _costs(self) -> tuple[ModelCost, StepWork]:
        planner = self._layouts.planner_of(self._layouts.pipelines)
        return model_cost(planner), step_work(planner, planner.execution.micro_batch_size)


def _search(nodes: Sequence[Node], model: ModelCost, work: StepWork) -> PipelineSearch:
    """The one with the run's own number of micro-batches."""
    return PipelineSearch(nodes, ring_of(nodes), model, work, work.divisions()[0], "given", 1)


def _per_token(choice: StageChoice, search: PipelineSearch, *, alone: bool) -> float:
    return (_AGAIN if alone and not choice.recompute else 1.0) * choice.cost.busy / search.tokens


def _fastest(
    nodes: Sequence[Node], ranks: Sequence[int], model: ModelCost, work: StepWork
) -> tuple[tuple[Stage, ...], float]:
    """The fastest pipeline of ``ranks`` in this order, without the slowest where that is faster; and its seconds."""
    best: tuple[Stage, ...] = ()
    least = math.inf
    by_speed = sorted(ranks, key=lambda rank: -nodes[rank].speed)
    for count in range(min(len(ranks), model.blocks), 0, -1):
        chosen = _in_order(by_speed[:count], ranks)
        stages: Sequence[Stage] = (Stage(0, 0, model.blocks),)
        if count > 1:
            own = [nodes[rank] for rank in chosen]
            found = compare(own, ring_of(own), model, work, kinds=["pipeline"], order="given", pipelines=1)
            if "pipeline" not in found:
                continue
            (stages,) = found["pipeline"].layout.pipelines
        made = tuple(replace(stage, rank=chosen[stage.rank]) for stage in stages)
        seconds = _seconds(nodes, made, model, work)
        if seconds < least * (1 - 1e-9):
            best, least = made, seconds
    return best, least


def _seconds(nodes: Sequence[Node], stages: Sequence[Stage], model: ModelCost, work: StepWork) -> float:
    """Of a step with these stages."""
    if len(stages) > 1:
        search = _search(nodes, model, work)
        return search.pipeline(stages).simulated(search.micro_batches)
    node = nodes[stages[0].rank]
    computing = work.tokens * (sum(model.forward) + sum(model.backward) + model.loss_operations) / node.speed
    is_read = model.weights + model.state > node.memory
    return max(_AGAIN * computing, 2 * sum(model.file_bytes) / node.disk if is_read else 0.0)


def _in_order(ranks: Iterable[int], like: Sequence[int]) -> list[int]:
    """``ranks`` in the order of ``like``; those that it lacks where their number belongs among neighbours."""
    places = {rank: place for place, rank in enumerate(like)}

    def place(rank: int) -> float:
        lower = [places[other] for other in like if other < rank]
        return places.get(rank, max(lower, default=-1) + 0.5)

    return sorted(ranks, key=lambda rank: (place(rank), rank))
