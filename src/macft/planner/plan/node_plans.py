"""What each node of a planned run would hold if it had the whole model, and how it would compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from macft.config.schema import TrainConfig
from macft.model.execution import Execution
from macft.model.shape import ModelShape
from macft.parallel.shares import DataShard
from macft.planner.memory import MemoryParts
from macft.planner.memory_planner import MemoryPlanner
from macft.planner.node_part import (
    packed_or_padded,
    pipelines_planner,
    planner_for,
    steps_of_shard,
    whole_model_planner,
)
from macft.planner.placement.cluster_model import Node
from macft.planner.placement.inputs import alone
from macft.planner.plan.machines import Machines
from macft.planner.whole_model import WeightPlacement
from macft.planner.workload import StepRows

_ALL_ROWS = DataShard(0, 1)


@dataclass(frozen=True)
class NodePlan:
    """One node with the whole model: ``execution`` is what it would run with, ``refusal`` says why it can't.

    ``node``: the same for the comparison of placements. ``smaller_batch_fits``: a smaller micro-batch than the
    configured one would fit where this is refused. ``watts``: power of its chip, None where it isn't known.
    """

    node: Node
    rows: int
    execution: Execution
    layout: WeightPlacement
    parts: MemoryParts
    refusal: str | None
    smaller_batch_fits: bool
    watts: float | None

    @property
    def name(self) -> str:
        """The node's."""
        return self.node.name

    @property
    def budget(self) -> float:
        """Bytes that it may take."""
        return self.node.memory


@dataclass(frozen=True)
class PlannedWork:
    """The work of a planned run: the model's ``shape`` and all rows of its ``steps``, computed on ``machines``."""

    config: TrainConfig
    shape: ModelShape
    steps: Sequence[StepRows]
    machines: Machines

    def execution(self) -> tuple[Execution, list[str]]:
        """How nodes of this kind compute before memory is looked at, and lines for the user."""
        return packed_or_padded(self.config, self.shape, self.steps, self.machines.device)

    def whole(self, execution: Execution) -> MemoryPlanner:
        """The prediction for all rows."""
        return self._planner(_ALL_ROWS, execution)

    def in_pipelines(self, pipelines: int) -> MemoryPlanner:
        """The prediction for all rows, in the micro-batches of a run with this many pipelines."""
        return pipelines_planner(self.config, self.shape, self.steps, self.machines.device, pipelines)

    def node_plan(self, shard: DataShard, execution: Execution, *, speed: float, disk: float) -> NodePlan:
        """The plan of the node at ``shard``; ``speed`` in operations a second, ``disk`` in bytes a second."""
        machines = self.machines
        budget = machines.budget(shard.rank)
        whole_model = whole_model_planner(self.config, self._planner(shard, execution), budget)
        chosen, refusal = whole_model.choice()
        ways = () if refusal is not None else (alone(whole_model, chosen, speed=speed, disk=disk),)
        return NodePlan(
            node=Node(machines.name(shard.rank), speed, budget, disk, ways),
            rows=whole_model.planner.rows,
            execution=chosen,
            layout=WeightPlacement.of(self.shape, chosen, whole_model.first_trained),
            parts=whole_model.parts(chosen),
            refusal=refusal,
            smaller_batch_fits=refusal is not None and whole_model.planner.best(budget) is not None,
            watts=machines.watts(shard.rank),
        )

    def _planner(self, shard: DataShard, execution: Execution) -> MemoryPlanner:
        steps = self.steps
        own = [step for step in steps_of_shard(self.config, steps, shard, execution) if step.rows]
        # A node far slower than the others may be left without a row; it still holds the model.
        own = own or [StepRows(steps[0].rows[:1], steps[0].ids[:1])]
        return planner_for(self.config, self.shape, execution, own)
