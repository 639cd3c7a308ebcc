"""The plan of a whole run: what each node would hold, whether it fits, how fast it would be. Nothing is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field

from macft.config.schema import TrainConfig
from macft.model.execution import Execution
from macft.model.shape import ModelShape
from macft.parallel.shares import DataShard
from macft.planner.known_models import find_shape
from macft.planner.memory import MemoryParts, trained_part
from macft.planner.placement.candidates import order_line
from macft.planner.placement.compare import LayoutDecision
from macft.planner.placement.configured_layout import check_layout
from macft.planner.plan.advice import advice
from macft.planner.plan.expected_steps import Progress, expected_steps
from macft.planner.plan.machines import Machines
from macft.planner.plan.node_plans import NodePlan, PlannedWork
from macft.planner.plan.planned_placements import PlacementPlanner, choose_placement
from macft.planner.speed import work_of


@dataclass(frozen=True)
class RunPlan:
    """All nodes, and the best layout of each placement that fits; ``chosen`` is that of the run, None if it can't be.

    ``stages``: by rank, the memory of its stage in the best pipelines, as a run predicts it; of nodes that have one.
    ``tokens`` of all rows in each of ``steps``. ``advice`` says what would help, ``notes`` what the figures rest on.
    ``refusal``: why there is no pipeline, where one was asked for.
    """

    model: str
    shape: ModelShape
    trainable: int
    nodes: list[NodePlan]
    placements: dict[str, LayoutDecision]
    chosen: str | None
    steps: int
    tokens: float
    notes: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)
    refusal: str | None = None
    stages: dict[int, MemoryParts] = field(default_factory=dict)

    @property
    def fits(self) -> bool:
        """Whether the run can be made."""
        return self.chosen is not None


def plan_run(config: TrainConfig, *, progress: Progress | None = None) -> RunPlan:
    """Plans ``config`` for ``plan.chips``, or for as many nodes like this machine as its topology has.

    ``progress`` is called with what is done, and how many of how many rows; 0 of 0 where there is no count.

    Raises:
        ConfigError: the nodes, the model or the device can't do what ``config`` asks for.
        ModelError: nothing is known of the model's shape.
        DataError: the dataset can't be read.
    """
    notes: list[str] = []
    tell = progress or (lambda *_: None)
    machines = Machines.from_config(config)
    tell(f"finding the model {config.model.path}", 0, 0)
    shape, folder = find_shape(config, notes)
    if config.topology.placement == "pipeline":
        check_layout(config.topology, shape.blocks, machines.count)
    steps, total_steps = expected_steps(config, folder, notes, tell)
    tell("measuring this machine", 0, 0)
    work = PlannedWork(config, shape, steps, machines)
    execution, packing_notes = work.execution()  # the same for all nodes, which are of a kind
    notes += packing_notes
    plans = _node_plans(work, execution, notes)
    nodes, ring = [plan.node for plan in plans], machines.ring()
    planner = PlacementPlanner(work, execution)
    found = planner.placements(nodes, ring)
    chosen = choose_placement(config.topology.placement, plans, found.decisions)
    if found.pipelines is not None and (line := order_line(found.pipelines, [node.name for node in nodes])):
        notes.append(f"pipeline: {line}")
    return RunPlan(
        model=config.model.path,
        shape=shape,
        trainable=trained_part(shape, config.adapter).parameters,
        nodes=plans,
        placements=found.decisions,
        chosen=chosen,
        steps=total_steps,
        tokens=sum(float(step.lengths.sum()) for step in steps) / len(steps),
        notes=notes,
        advice=advice(
            nodes,
            ring,
            found.decisions,
            chosen,
            planner.best_pipelines,
            is_quantized=execution.bits is not None,
            is_batch_too_large=any(plan.smaller_batch_fits for plan in plans),
        ),
        refusal=found.refusal,
        stages=found.stages,
    )


def _node_plans(work: PlannedWork, execution: Execution, notes: list[str]) -> list[NodePlan]:
    """Each node with the whole model, for its share of the rows; ``notes`` gets lines on what the figures rest on."""
    machines, shares = work.machines, work.config.topology.shares
    speeds = machines.speeds(work_of(work.whole(execution)), execution, notes)
    disks = machines.disks(notes)
    notes += machines.link_notes(speeds)
    by_rank = tuple(map(float, shares if isinstance(shares, list) else speeds))
    return [
        work.node_plan(DataShard(rank, machines.count, by_rank), execution, speed=speed, disk=disk)
        for rank, (speed, disk) in enumerate(zip(speeds, disks, strict=True))
    ]
