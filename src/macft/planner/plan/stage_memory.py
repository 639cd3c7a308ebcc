"""What the stages of a planned pipeline take of their nodes' memories: what each node would decide in the run."""

from __future__ import annotations

from collections.abc import Sequence

from macft.config.schema import TrainConfig
from macft.errors import ConfigError
from macft.parallel.shares import DataShard
from macft.parallel.stage_layout import StageLayout
from macft.planner.memory import MemoryParts
from macft.planner.memory_planner import MemoryPlanner
from macft.planner.node_part import planner_for, steps_of_shard
from macft.planner.placement.cluster_model import Node
from macft.planner.stage import StagePlanner
from macft.planner.workload import StepRows


def stage_memory(
    config: TrainConfig, layout: StageLayout, whole: MemoryPlanner, steps: Sequence[StepRows], nodes: Sequence[Node]
) -> dict[int, MemoryParts]:
    """The peak by part, by rank, of the stages of pipelines that have several.

    ``whole``: the prediction for all rows of ``steps`` in the pipelines' micro-batches; ``nodes`` by rank.

    Raises:
        ConfigError: a stage doesn't fit its node.
    """
    may_keep, execution = whole.execution.may_keep_activations, whole.execution.pipelined(0)
    resident, count = config.topology.resident_blocks, len(layout.pipelines)
    found: dict[int, MemoryParts] = {}
    for number, stages in enumerate(layout.pipelines):
        if len(stages) < 2:
            continue
        own = [step for step in steps_of_shard(config, steps, DataShard(number, count), execution) if step.rows]
        planner = planner_for(config, whole.shape, execution, own or steps)
        for stage in stages:
            memory = nodes[stage.rank].memory
            planned = StagePlanner(planner, memory, layout, stage.rank, whole.first_trained, resident, may_keep)
            try:
                found[stage.rank] = planned.predicted(planned.decide())
            except ConfigError as error:
                key, _, text = str(error).partition(": ")
                raise ConfigError(f"{key}: {nodes[stage.rank].name}: {text}") from None
    return found
