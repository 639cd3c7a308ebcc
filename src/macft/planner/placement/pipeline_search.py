"""Searches the fastest pipelines of several stages, and the best division of the nodes into pipelines.

Cuts are made for several longest times of a stage, from the smallest that can be upwards: a layout with a slower stage
and fewer stages has less to fill and drain (:mod:`macft.planner.placement.pipeline_cuts`). Nodes may be left out. Then
the nodes are divided into pipelines in all ways, and micro-batches are dealt to these by speed. The best few by the
closed formula are simulated, and the borders of the best are moved as long as that helps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from macft.parallel.stage_layout import Stage
from macft.planner.placement.cluster_model import (
    Alone,
    ModelCost,
    Node,
    PipelineClock,
    RingLinks,
    StageCost,
    StepWork,
    clock_of,
)
from macft.planner.placement.configured_layout import pipeline_sizes
from macft.planner.placement.pipeline_cuts import Cuts, Group, KindStage
from macft.planner.placement.pipeline_simulator import simulate
from macft.planner.placement.stage_costs import StageChoice, StageTables
from macft.training.gradients.pipeline_schedule import in_flight

MOST_NODES = 8
"""Of more, only equal groups of neighbours are compared."""
_EXACT_TIMES = 400
_TIMES = 14
_LARGEST_TIME = 2.5
_SIMULATED = 12


@dataclass(frozen=True)
class Pipeline:
    """Stages from the first to the last; ``alone``: the whole model on one node, which has its own way to compute."""

    stages: tuple[Stage, ...]
    choices: tuple[StageChoice, ...]
    clock: PipelineClock
    alone: bool = False

    def simulated(self, micro_batches: int) -> float:
        """Seconds of a step, event by event."""
        if self.alone or not micro_batches:
            return self.clock.seconds(micro_batches)
        return simulate([choice.cost for choice in self.choices], micro_batches).seconds


def alone_pipeline(rank: int, way: Alone, model: ModelCost, tokens: float) -> Pipeline:
    """Node ``rank`` with the whole model, for parts of ``tokens``."""
    seconds = way.per_token * tokens
    choice = StageChoice(model.blocks, way.streams, StageCost(seconds / 3, 2 * seconds / 3), reading=way.reading)
    stage = Stage(rank, 0, model.blocks)
    return Pipeline((stage,), (choice,), PipelineClock(seconds, seconds, way.reading), alone=True)


def deal(clocks: Sequence[PipelineClock], count: int, shares: Sequence[float] | None = None) -> list[int]:
    """``count`` equal parts over pipelines, in proportion to ``shares``.

    None: each to the one that would end it first, which is best for equal parts.
    """
    if shares is not None and any(shares):
        borders = [round(count * end / sum(shares)) for end in itertools.accumulate(shares, initial=0.0)]
        return [end - start for start, end in itertools.pairwise(borders)]
    dealt = [0] * len(clocks)
    for _ in range(count):
        ends = [clock.seconds(number + 1) for clock, number in zip(clocks, dealt, strict=True)]
        dealt[ends.index(min(ends))] += 1
    return dealt


class PipelineSearch:
    """Layouts with a pipeline of several stages, for a step of ``count`` micro-batches.

    For ``order`` and ``pipelines`` see :func:`~macft.planner.placement.compare.compare`.
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        ring: RingLinks,
        model: ModelCost,
        step: StepWork,
        count: int,
        order: str,
        pipelines: int | None = None,
    ):
        self._nodes, self._ring, self._model, self._count = nodes, ring, model, count
        self._shares, self._pipelines = step.shares, pipelines
        self._is_given = order == "given"
        self._any_order = order == "free" and len(nodes) <= MOST_NODES
        self._tokens = step.tokens / count
        self._kind_of = _kinds(nodes, ring)
        held = max(self._tokens, step.longest)
        self._tables = {
            kind: StageTables(model, nodes[rank], self._tokens, held, recompute=step.recompute, streams=True)
            for rank, kind in reversed(list(enumerate(self._kind_of)))
        }

    def best(self) -> tuple[list[Pipeline], list[int]] | None:
        """The fastest pipelines, with the micro-batches of each; None if none fits."""
        ranked = sorted(self._divisions(), key=lambda found: found[0])[:_SIMULATED]
        best: tuple[float, list[Pipeline], list[int]] | None = None
        for _, pipelines, dealt in ranked:
            seconds = max(each.simulated(count) for each, count in zip(pipelines, dealt, strict=True))
            if best is None or seconds < best[0]:
                best = seconds, pipelines, dealt
        if best is None:
            return None
        return [self._polished(each, count) for each, count in zip(best[1], best[2], strict=True)], best[2]

    @cached_property
    def pipelines(self) -> dict[int, list[Pipeline]]:
        """Of each set of nodes, as bits, its pipelines of several stages that no other one beats in all respects."""
        sequences: dict[Group, list[list[int]]] = {}
        for ranks in self._sequences():
            group = tuple(self._kind_of[rank] for rank in ranks)
            sequences.setdefault(tuple(sorted(group)) if self._any_order else group, []).append(ranks)
        found: dict[int, list[Pipeline]] = {}
        for group, layouts in self._layouts(list(sequences)).items():
            for ranks in sequences.get(group, []):
                made = [self.pipeline(_with_ranks(layout, ranks, self._kind_of)) for layout in layouts]
                found.setdefault(_bits(ranks), []).extend(made)
        return {mask: _undominated(pipelines) for mask, pipelines in found.items()}

    @property
    def _groups(self) -> list[list[int]]:
        """All nodes in their order, as pipelines of neighbours; more than there are blocks have nothing to do."""
        sizes = pipeline_sizes(self._pipelines or 1, len(self._nodes))
        starts = itertools.accumulate(sizes[:-1], initial=0)
        return [
            list(range(start, start + min(size, self._model.blocks))) for start, size in zip(starts, sizes, strict=True)
        ]

    def _sequences(self) -> Iterator[list[int]]:
        """Nodes that may form a pipeline, in the order of its stages."""
        count = len(self._nodes)
        if self._is_given:
            yield from self._groups
            return
        if count > MOST_NODES:
            for size in range(2, count + 1):
                if count % size == 0:
                    yield from (list(range(start, start + size)) for start in range(0, count, size))
            return
        for mask in _subsets((1 << count) - 1):
            ranks = _ranks(mask)
            if len(ranks) > 1:
                turns = 1 if self._any_order else len(ranks)
                yield from (ranks[turn:] + ranks[:turn] for turn in range(turns))

    def _layouts(self, groups: Sequence[Group]) -> dict[Group, list[tuple[KindStage, ...]]]:
        """Cuts of each group: those with the least sum, for several longest times of a stage."""
        cuts = Cuts(groups, self._model.blocks, self._seconds, any_order=self._any_order)
        values = cuts.values()
        values = values[cuts.shortest(values) :]
        if len(values) > _EXACT_TIMES:
            last = min(values[-1], _LARGEST_TIME * values[0])
            values = np.array([values[0], *np.geomspace(values[0], last, _TIMES)[1:]])
        found: dict[Group, dict[tuple[KindStage, ...], None]] = {}
        for longest in values:
            for layout in cuts.layouts(float(longest)):
                group = tuple(stage.kind for stage in layout)
                found.setdefault(tuple(sorted(group)) if self._any_order else group, {})[layout] = None
        return {group: list(layouts) for group, layouts in found.items()}

    def _divisions(self) -> Iterator[tuple[float, list[Pipeline], list[int]]]:
        """Divisions of the nodes into pipelines, with seconds by the formula and the micro-batches of each."""
        several = self.pipelines
        speeds = [node.speed for node in self._nodes]
        seen = set()
        for division in self._partitions(several):
            kinds = tuple(sorted(tuple(self._kind(rank) for rank in _ranks(mask)) for mask in division))
            if kinds in seen or not any(mask in several for mask in division):
                continue
            seen.add(kinds)
            options = [several[mask] if mask in several else self._singles(mask) for mask in division]
            shares = [sum(speeds[rank] for rank in _ranks(mask)) for mask in division]
            parts = [self._count * share / sum(shares) for share in shares]
            for _ in range(2):  # the best pipeline of a set depends on how much it gets, and the other way round
                chosen = [
                    min(each, key=lambda one, part=part: one.clock.seconds(max(1, round(part))))  # type: ignore[misc]
                    for each, part in zip(options, parts, strict=True)
                ]
                shares_of_rows = self.shares_of([_ranks(mask) for mask in division])
                dealt = deal([pipeline.clock for pipeline in chosen], self._count, shares_of_rows)
                parts = [float(number) for number in dealt]
            if all(dealt):
                ends = [each.clock.seconds(number) for each, number in zip(chosen, dealt, strict=True)]
                yield max(ends), chosen, dealt

    def _partitions(self, several: dict[int, list[Pipeline]]) -> Iterator[list[int]]:
        """Divisions of the nodes into sets that have a pipeline; nodes may be left out."""
        count = len(self._nodes)
        if self._is_given:
            masks = [_bits(ranks) for ranks in self._groups]
            if all(mask in several for mask in masks):
                yield masks
            return
        if count > MOST_NODES:
            for size in range(2, count + 1):
                masks = [mask for mask in several if mask.bit_count() == size]
                if masks and size * len(masks) == count and self._pipelines in (None, len(masks)):
                    yield masks
            return
        if self._pipelines is not None:
            yield from (each for each in _divide((1 << count) - 1, set(several)) if len(each) == self._pipelines)
            return
        single = {1 << rank for rank, node in enumerate(self._nodes) if node.alone}
        yield from _divide((1 << count) - 1, several.keys() | single)

    def shares_of(self, pipelines: Sequence[Sequence[int]]) -> list[float] | None:
        """Of the rows, by pipeline (its ranks): as much as its stage with the smallest share gets; None: by speed."""
        if self._shares is None:
            return None
        return [min(self._shares[rank] for rank in ranks) for ranks in pipelines]

    def _kind(self, rank: int) -> tuple[int, float]:
        """What tells ``rank`` from nodes that could stand in for it."""
        return self._kind_of[rank], 0.0 if self._shares is None else self._shares[rank]

    def _singles(self, mask: int) -> list[Pipeline]:
        (rank,) = _ranks(mask)
        return [alone_pipeline(rank, way, self._model, self._tokens) for way in self._nodes[rank].alone]

    def _seconds(self, kind: int, from_end: int) -> np.ndarray:
        return self._tables[kind].seconds(self._window(from_end))

    def _window(self, from_end: int) -> int:
        """Micro-batches that a stage needs room for which ``from_end - 1`` others follow; it takes more if it can."""
        return min(self._count, in_flight(from_end)[0])

    @property
    def micro_batches(self) -> int:
        """Those of a step."""
        return self._count

    @property
    def tokens(self) -> float:
        """Of a micro-batch."""
        return self._tokens

    def pipeline(self, stages: Sequence[Stage]) -> Pipeline:
        """These stages, whose ranks are places among the nodes."""
        choices = []
        for place, stage in enumerate(stages):
            wire = 0.0
            if place + 1 < len(stages):
                link = self._ring.between(stage.rank, stages[place + 1].rank)
                wire = link.seconds(self._tokens * self._model.hidden)
            table = self._tables[self._kind_of[stage.rank]]
            choices.append(table.choice(stage.first, stage.end, self._window(len(stages) - place), wire))
        return Pipeline(tuple(stages), tuple(choices), clock_of([choice.cost for choice in choices]))

    def _polished(self, pipeline: Pipeline, micro_batches: int) -> Pipeline:
        """Moves borders between stages by a block as long as the simulated step gets shorter."""
        best, seconds = pipeline, pipeline.simulated(micro_batches)
        improved = True
        while improved:
            improved = False
            for border, move in itertools.product(range(len(best.stages) - 1), (-1, 1)):
                stages = list(best.stages)
                stages[border] = replace(stages[border], end=stages[border].end + move)
                stages[border + 1] = replace(stages[border + 1], first=stages[border + 1].first + move)
                if not self.fits(stages):
                    continue
                other = self.pipeline(stages)
                taken = other.simulated(micro_batches)
                if taken < seconds * (1 - 1e-9):
                    best, seconds, improved = other, taken, True
        return best

    def fits(self, stages: Sequence[Stage]) -> bool:
        """Whether each of a pipeline's stages has a block, and fits its node's memory."""
        return all(
            stage.first < stage.end
            and math.isfinite(self._seconds(self._kind_of[stage.rank], len(stages) - place)[stage.first, stage.end])
            for place, stage in enumerate(stages)
        )


def _kinds(nodes: Sequence[Node], ring: RingLinks) -> list[int]:
    """A number for each node, the same for nodes that are alike; all differ where links do."""
    if len(set(ring.links)) > 1:
        return list(range(len(nodes)))
    alike = [(node.speed, node.memory, node.disk, node.alone) for node in nodes]
    return [alike.index(each) for each in alike]


def _with_ranks(layout: Sequence[KindStage], ranks: Sequence[int], kind_of: Sequence[int]) -> list[Stage]:
    """``layout`` with nodes of ``ranks``, those of a kind in this order."""
    free = list(ranks)
    stages = []
    for stage in layout:
        rank = next(rank for rank in free if kind_of[rank] == stage.kind)
        free.remove(rank)
        stages.append(Stage(rank, stage.first, stage.end))
    return stages


def _undominated(pipelines: Sequence[Pipeline]) -> list[Pipeline]:
    """Without those that another one equals or beats in filling and in each further micro-batch."""
    kept: list[Pipeline] = []
    for pipeline in sorted(pipelines, key=lambda each: (each.clock.fill, each.clock.period)):
        if not kept or pipeline.clock.period < kept[-1].clock.period:
            kept.append(pipeline)
    return kept


def _divide(rest: int, sets: set[int]) -> Iterator[list[int]]:
    """Divisions of the nodes ``rest`` into ``sets``; nodes may be left out."""
    if not rest:
        yield []
        return
    lowest = rest & -rest
    without = rest & ~lowest
    for others in itertools.chain(_subsets(without), [0]):
        mask = lowest | others
        if mask in sets:
            for further in _divide(rest & ~mask, sets):
                yield [mask, *further]
    yield from _divide(without, sets)


def _subsets(mask: int) -> Iterator[int]:
    """All sets within ``mask`` but the empty one."""
    subset = mask
    while subset:
        yield subset
        subset = (subset - 1) & mask


def _ranks(mask: int) -> list[int]:
    return [rank for rank in range(mask.bit_length()) if mask >> rank & 1]


def _bits(ranks: Sequence[int]) -> int:
    return sum(1 << rank for rank in ranks)
