"""A node's part of a run, as far as it is known before anything is loaded."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from macft.config.execution import execution_for
from macft.config.schema import TrainConfig
from macft.device.kind import Device
from macft.device.memory import usable_bytes
from macft.model.execution import Execution
from macft.model.shape import ModelShape, read_shape
from macft.parallel.shares import DataShard
from macft.planner.memory_planner import MemoryPlanner
from macft.planner.packing import choose_packing
from macft.planner.whole_model import WholeModelPlanner
from macft.planner.workload import StepRows
from macft.topology.settings import TopologyConfig, parse_budget
from macft.training.settings import TrainingConfig

# Steps from which the average one is made.
_STEPS = 32


@dataclass(frozen=True)
class NodePart:
    """The part of the node at ``shard`` in a run of ``config``, with the model in ``folder`` and all rows of ``steps``.

    Raises:
        ModelError: the model's shape isn't known.
        ConfigError: the device doesn't support a setting.
    """

    config: TrainConfig
    folder: Path
    steps: Sequence[StepRows]
    shard: DataShard

    @cached_property
    def shape(self) -> ModelShape:
        """The model's."""
        return read_shape(self.folder)

    @cached_property
    def _packed_or_padded(self) -> tuple[Execution, list[str]]:
        return packed_or_padded(self.config, self.shape, self.steps, Device.default())

    @property
    def execution(self) -> Execution:
        """As the configuration has it, with packs or padded rows, before anything else is decided."""
        return self._packed_or_padded[0]

    @property
    def packing_notes(self) -> list[str]:
        """Lines for the user; the same for all nodes of a kind."""
        return self._packed_or_padded[1]

    @cached_property
    def budget(self) -> float:
        """Bytes that this node may take; looked up once, since the process takes more with time."""
        return budget_of(self.config.topology)

    @cached_property
    def whole_model(self) -> WholeModelPlanner:
        """What decides where its weights are, if it has the whole model."""
        return whole_model_planner(self.config, self.planner(self.shard, self.execution, self.steps), self.budget)

    def planner(self, shard: DataShard, execution: Execution, steps: Sequence[StepRows]) -> MemoryPlanner:
        """The prediction for the rows of ``steps`` that ``shard`` gets."""
        return planner_for(self.config, self.shape, execution, steps_of_shard(self.config, steps, shard, execution))

    def of_pipelines(self, count: int) -> MemoryPlanner:
        """The prediction for all rows, in the micro-batches of a run with this many pipelines."""
        return pipelines_planner(self.config, self.shape, self.steps[:_STEPS], Device.default(), count)


def budget_of(topology: TopologyConfig) -> float:
    """Bytes that a node of this machine may take."""
    return parse_budget(topology.memory_budget, usable_bytes(1 / topology.nodes_here))


def packed_or_padded(
    config: TrainConfig, shape: ModelShape, steps: Sequence[StepRows], device: Device
) -> tuple[Execution, list[str]]:
    """How ``device`` computes ``config``, with packs or padded rows, before memory is looked at; lines for the user.

    The same on all nodes of a kind: ``steps`` have all rows.
    """
    asked = execution_for(config, shape, shape.checkpoint, device)
    return choose_packing(planner_for(config, shape, asked, steps))


def pipelines_planner(
    config: TrainConfig, shape: ModelShape, steps: Sequence[StepRows], device: Device, pipelines: int
) -> MemoryPlanner:
    """The prediction for all rows of ``steps``, in the micro-batches of a run with this many ``pipelines``."""
    topology = replace(config.topology, placement="pipeline", pipelines=pipelines)
    config = replace(config, topology=topology)
    execution = replace(packed_or_padded(config, shape, steps, device)[0], lanes=1)
    return planner_for(config, shape, execution, steps_of_shard(config, steps, DataShard(0, 1), execution))


def whole_model_planner(config: TrainConfig, planner: MemoryPlanner, budget: float) -> WholeModelPlanner:
    """What decides the placement of a node of ``config`` that may take ``budget`` bytes."""
    topology = config.topology
    return WholeModelPlanner(planner, budget, topology.placement, topology.resident_blocks, topology.batch == "auto")


def steps_of_shard(
    config: TrainConfig, steps: Sequence[StepRows], shard: DataShard, execution: Execution
) -> list[StepRows]:
    """The rows of each of ``steps`` from which the micro-batches of the trainer at ``shard`` are made.

    With ``training.deterministic`` they are made from all rows, and the trainer gets some of them.
    """
    shard = DataShard(0, 1) if config.training.deterministic else shard
    return [step.of_shard(shard, shared=execution.shared_prefixes) for step in steps]


def planner_for(
    config: TrainConfig, shape: ModelShape, execution: Execution, steps: Sequence[StepRows]
) -> MemoryPlanner:
    """The prediction for ``config`` on a node that computes ``steps``' rows as ``execution`` says."""
    return MemoryPlanner(
        shape=shape,
        execution=execution,
        adapter=config.adapter,
        optimizer=config.optimizer.name,
        steps=steps,
        validation_rows=_validation_rows(config.training),
        one_by_one=config.training.deterministic,
    )


def _validation_rows(training: TrainingConfig) -> int:
    if not training.eval_every:
        return 0
    return training.eval_rows if training.eval_rows >= 0 else sys.maxsize
