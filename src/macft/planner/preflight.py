"""A node's decision before its model is loaded: how it computes the run, and whether that fits its memory."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from macft.collective.base import Collective
from macft.config.execution import execution_for
from macft.config.schema import TrainConfig
from macft.data.formats import Row
from macft.data.order import RowOrder
from macft.device.kind import Device
from macft.device.memory import usable_bytes
from macft.device.mlx_device import keep_within
from macft.errors import ConfigError, ModelError
from macft.model.execution import Execution
from macft.model.shape import ModelShape, read_shape, read_weight_format
from macft.model.weight_files import check_weight_files
from macft.parallel.shares import DataShard
from macft.planner.fit import MemoryPlanner, batch_overrides
from macft.planner.placement import Layout, Placer
from macft.planner.workload import StepRows, steps_of
from macft.topology.settings import parse_budget
from macft.training.settings import TrainingConfig, steps_for

_LONGEST_VERDICT = 2000


def preflight(
    config: TrainConfig,
    model_folder: Path,
    rows: Sequence[Row],
    order: RowOrder,
    collective: Collective,
    *,
    world_size: int | None = None,
) -> tuple[Execution, str, list[str]]:
    """How this node computes the run, where its weights are in one line, and lines for the user.

    All nodes tell each other whether they can, so that all end with the same message if one can't. ``world_size``: the
    number of nodes that there will be, if it isn't that of ``collective`` yet.

    Raises:
        ConfigError: this device or model can't do what the configuration asks for, or the run doesn't fit a node's
            memory; the message names settings that would work.
    """
    steps = steps_of(rows, order, steps_for(config.training, order.steps_per_epoch))
    shares = tuple(config.topology.shares) if isinstance(config.topology.shares, list) else None
    if world_size is None or world_size == collective.world_size:
        shard = DataShard(collective.rank, collective.world_size, shares)
    else:
        shard = DataShard(world_size - 1, world_size)
    execution, refusal, layout, notes = None, None, "", list[str]()
    try:
        execution, layout, notes = _decide(config, model_folder, steps, shard)
    except ConfigError as error:
        refusal = str(error)
    verdicts = collective.all_gather(json.dumps(refusal and refusal[:_LONGEST_VERDICT]).encode())
    for rank, verdict in enumerate(verdicts):
        reason = json.loads(verdict)
        if reason is not None:
            key, _, text = reason.partition(": ")
            where = f"rank {rank}: " if collective.world_size > 1 else ""
            raise ConfigError(f"{key}: {where}{text}")
    assert execution is not None
    return execution, layout, notes


def _decide(
    config: TrainConfig, model_folder: Path, steps: Sequence[StepRows], shard: DataShard
) -> tuple[Execution, str, list[str]]:
    """This node's execution, its layout and its notes. Raises ConfigError as :func:`preflight` does."""
    topology, device = config.topology, Device.default()
    check_weight_files(model_folder)
    try:
        shape = read_shape(model_folder)
    except ModelError as error:
        # mlx-lm may still know the model by code of its own; the run goes on without a prediction.
        execution = execution_for(config, None, read_weight_format(model_folder), device)
        execution = execution.streamed(()) if topology.placement == "stream" else execution.unplanned()
        return execution, execution.placement, [f"no memory plan: {error}"]
    execution = execution_for(config, shape, shape.checkpoint, device)
    planner = planner_for(config, shape, execution, [step_of_shard(step, shard, execution) for step in steps])
    nodes_here = topology.nodes if topology.kind == "local" else 1
    budget = parse_budget(topology.memory_budget, usable_bytes() / nodes_here)
    placer = placer_for(config, planner, budget)
    chosen = placer.decide()
    parts = placer.parts(chosen)
    if parts.unknown:
        keep_within(budget, budget)
        note = f"memory: at least {parts.peak / 1e9:.2f} GB of {budget / 1e9:.1f} GB expected; {parts.unknown}"
    else:
        keep_within(budget, parts.peak)
        note = f"memory: about {parts.peak / 1e9:.2f} GB of {budget / 1e9:.1f} GB expected"
    if placer.auto:
        note += f"; topology.batch=auto chose {batch_overrides(chosen)}"
    elif chosen.recompute != execution.recompute:
        note += f"; training.recompute=auto chose {chosen.recompute}"
    return chosen, Layout.of(shape, chosen, placer.first_trained).line, [note]


def placer_for(config: TrainConfig, planner: MemoryPlanner, budget: float) -> Placer:
    """What decides the placement of a node of ``config`` that may take ``budget`` bytes."""
    topology = config.topology
    return Placer(planner, budget, topology.placement, topology.resident_blocks, topology.batch == "auto")


def step_of_shard(step: StepRows, shard: DataShard, execution: Execution) -> StepRows:
    """The rows of ``step`` that the trainer at ``shard`` will be given."""
    return step.of_shard(shard, shared=execution.shared_prefixes)


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
    )


def _validation_rows(training: TrainingConfig) -> int:
    if not training.eval_every:
        return 0
    return training.eval_rows if training.eval_rows >= 0 else sys.maxsize
