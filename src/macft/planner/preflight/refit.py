"""How a node computes its part of a run after nodes were lost or have joined, or stages have handed over blocks.

What the node has loaded stays: a node that holds all weights doesn't begin to stream. But it may compute in smaller
micro-batches, and keep fewer of the blocks in memory that it reads from disk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from macft.errors import ConfigError
from macft.model.execution import Execution
from macft.parallel.shares import DataShard
from macft.parallel.stage_layout import StageLayout
from macft.planner.memory_planner import MemoryPlanner
from macft.planner.stage import StagePlanner
from macft.planner.whole_model import WholeModelPlanner
from macft.planner.workload import StepRows
from macft.training.node_fit import Fitted

_STEPS = 8
"""Of the steps that were looked at, those with the most tokens decide."""

PlannerOf = Callable[[DataShard, Execution, Sequence[StepRows]], MemoryPlanner]
"""The prediction for a shard of the rows of some steps."""


def heaviest(steps: Sequence[StepRows]) -> list[StepRows]:
    """The few of ``steps`` that take the most memory."""
    return sorted(steps, key=lambda step: -int(step.lengths.sum()))[:_STEPS]


@dataclass(frozen=True)
class WholeModelRefit:
    """Of a node that computes all blocks for its rows, as ``execution`` says.

    ``steps`` have all rows. ``budget``: bytes it may take. ``resident``: ``topology.resident_blocks``. ``fixed``:
    micro-batches must stay as they are, for the sake of the result's bits (``training.deterministic``).
    """

    planner_of: PlannerOf
    execution: Execution
    steps: Sequence[StepRows]
    budget: float
    resident: int | str
    fixed: bool = False

    def __call__(self, layout: StageLayout, rank: int, world_size: int) -> Fitted:  # noqa: ARG002
        """How ``rank`` of ``world_size`` ranks computes; raises ConfigError where that doesn't fit."""
        planner = self.planner_of(DataShard(rank, world_size), self.execution, self.steps)
        if self.execution.placement == "stream":
            whole_model = WholeModelPlanner(planner, self.budget, "stream", self.resident, auto=not self.fixed)
            streamed = whole_model.decide()
            return Fitted(streamed, whole_model.parts(streamed).peak, self.budget)
        parts = planner.parts(self.execution)
        if parts.unknown or parts.peak <= self.budget:
            return Fitted(self.execution, self.budget if parts.unknown else parts.peak, self.budget)
        if self.fixed:
            raise ConfigError(
                f"topology.memory_budget: with the micro-batches that training.deterministic fixes the run would need "
                f"about {parts.peak / 1e9:.2f} GB, and {self.budget / 1e9:.2f} GB are available"
            )
        size = min(self.execution.micro_batch_size or planner.rows, planner.rows)
        while size > 1:
            size = -(-size // 2)
            smaller = self.execution.with_batch(size, self.execution.recompute)
            if (peak := planner.parts(smaller).peak) <= self.budget:
                return Fitted(smaller, peak, self.budget)
        least = planner.parts(self.execution.with_batch(1, self.execution.recompute)).peak
        raise ConfigError(
            f"topology.memory_budget: with one row at a time the run would need about {least / 1e9:.2f} GB, and "
            f"{self.budget / 1e9:.2f} GB are available"
        )


@dataclass(frozen=True)
class StageRefit:
    """Of a node of a pipeline. ``execution``: of no stage yet.

    For the others see :class:`StagePlanner` and :class:`WholeModelRefit`.
    """

    planner_of: PlannerOf
    execution: Execution
    steps: Sequence[StepRows]
    budget: float
    resident: int | str
    first_trained: int
    may_keep: bool
    fixed: bool = False

    def __call__(self, layout: StageLayout, rank: int, world_size: int) -> Fitted:  # noqa: ARG002
        """How ``rank`` computes its part of ``layout``; raises ConfigError where that doesn't fit."""
        place = layout.place_of(rank)
        rows = DataShard(place[0] if place is not None else 0, len(layout.pipelines))
        planner = self.planner_of(rows, self.execution, self.steps)
        if place is None or len(layout.pipelines[place[0]]) > 1:
            stages = self.planned(planner, layout, rank)
            chosen = stages.decide()
            return Fitted(chosen, stages.predicted(chosen).peak, self.budget)
        # A pipeline of one stage computes block by block, all of its rows before the next block.
        # Other micro-batches would add up gradients in another order, so they come second.
        whole_model = WholeModelPlanner(planner, self.budget, "stream", self.resident, auto=False)
        alone, obstacle = whole_model.choice()
        if obstacle is not None and self.fixed:
            raise ConfigError(obstacle)
        if obstacle is not None:
            alone = replace(whole_model, auto=True).decide()
        held = self.execution.pipelined(len(alone.resident_blocks), alone.resident_blocks)
        held = held.with_batch(alone.micro_batch_size, held.recompute)
        return Fitted(held, whole_model.parts(alone).peak, self.budget)

    def planned(self, planner: MemoryPlanner, layout: StageLayout, rank: int) -> StagePlanner:
        """The memory of ``rank``'s stage, which has the rows of ``planner``."""
        return StagePlanner(planner, self.budget, layout, rank, self.first_trained, self.resident, self.may_keep)
