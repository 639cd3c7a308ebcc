"""A node's decision before its model is loaded: how it computes the run, and whether that fits its memory."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from macft.collective.base import Collective
from macft.config.execution import execution_for
from macft.config.schema import TrainConfig
from macft.data.formats import Row
from macft.data.order import RowOrder
from macft.device.kind import Device
from macft.device.memory import usable_bytes
from macft.device.mlx_device import keep_within
from macft.errors import ConfigError, ModelError
from macft.model.adapter_layers import select_layers
from macft.model.execution import Execution
from macft.model.shape import ModelShape, read_shape, read_weight_format
from macft.model.weight_files import check_weight_files
from macft.parallel.shares import DataShard
from macft.parallel.stage_layout import StageLayout
from macft.parallel.stage_places import Decide, whole_models
from macft.planner.fit import MemoryPlanner, batch_overrides
from macft.planner.memory import MemoryParts
from macft.planner.node_cuts import Cut, NodeCuts, agree, members_of
from macft.planner.node_report import alike, gather_reports, own_node
from macft.planner.packing import choose_packing
from macft.planner.placement import Layout, Placer, obstacle_to_reading_blocks
from macft.planner.stages import StagePlanner, block_costs, check_layout, decide_layout
from macft.planner.workload import StepRows, steps_of
from macft.topology.settings import TopologyConfig, parse_budget
from macft.training.settings import TrainingConfig, steps_for

_LONGEST_VERDICT = 2000


class Preflight(NamedTuple):
    """How a node computes a run: ``layout`` says in one line where its weights are, ``notes`` are lines for the user.

    ``decide`` makes the layout of stages of a number of ranks.
    """

    execution: Execution
    layout: str
    notes: list[str]
    decide: Decide = whole_models


def preflight(
    config: TrainConfig,
    model_folder: Path,
    rows: Sequence[Row],
    order: RowOrder,
    collective: Collective,
    *,
    world_size: int | None = None,
) -> Preflight:
    """How this node computes the run.

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
    cut = _agreed_cut(config, model_folder, steps, collective, shard)
    decision, refusal = None, None
    try:
        decision = _decide(config, model_folder, steps, shard, cut)
    except ConfigError as error:
        refusal = str(error)
    verdicts = collective.all_gather(json.dumps(refusal and refusal[:_LONGEST_VERDICT]).encode())
    for rank, verdict in enumerate(verdicts):
        reason = json.loads(verdict)
        if reason is not None:
            key, _, text = reason.partition(": ")
            where = f"rank {rank}: " if collective.world_size > 1 else ""
            raise ConfigError(f"{key}: {where}{text}")
    assert decision is not None
    return decision


def _agreed_cut(
    config: TrainConfig, model_folder: Path, steps: Sequence[StepRows], collective: Collective, shard: DataShard
) -> Cut:
    """How a pipeline is cut by the speeds and memories of its nodes. A call of all ranks.

    With topology=local all nodes are alike. A newcomer knows nothing of the others, whose layout it is given.
    """
    topology, own, planner_of = config.topology, None, None
    wanted = topology.placement == "pipeline" and topology.stages == "auto" and topology.kind != "local"
    if wanted and shard.world_size == collective.world_size > 1:
        with contextlib.suppress(ConfigError, ModelError):  # raised once more by the node's own decision
            shape = read_shape(model_folder)
            execution, _ = _packed_or_padded(config, shape, steps, Device.default())
            planner_of = partial(_planner_of_pipeline, config, shape, execution, steps)
            own = own_node(_budget(topology))
    nodes = gather_reports(collective, own)
    if planner_of is None or not nodes:
        return lambda _: None
    known = dict(zip(members_of(collective), alike(nodes), strict=True))
    return agree(collective, NodeCuts(known, topology.pipelines, planner_of))


def _planner_of_pipeline(
    config: TrainConfig, shape: ModelShape, execution: Execution, steps: Sequence[StepRows], pipelines: int
) -> MemoryPlanner:
    """The prediction for the rows of one of ``pipelines``."""
    own = [step_of_shard(step, DataShard(0, pipelines), execution) for step in steps]
    return planner_for(config, shape, execution, own)


def _decide(
    config: TrainConfig, model_folder: Path, steps: Sequence[StepRows], shard: DataShard, cut: Cut
) -> Preflight:
    """What this node decides. Raises ConfigError as :func:`preflight` does."""
    topology, device = config.topology, Device.default()
    check_weight_files(model_folder)
    try:
        shape = read_shape(model_folder)
    except ModelError as error:
        if topology.placement == "pipeline":
            raise ConfigError(f"topology.placement: pipeline can't tell this model's blocks: {error}") from None
        # mlx-lm may still know the model by code of its own; the run goes on without a prediction.
        execution = execution_for(config, None, read_weight_format(model_folder), device)
        execution = execution.streamed(()) if topology.placement == "stream" else execution.unplanned()
        return Preflight(execution, execution.placement, [f"no memory plan: {error}"])
    execution, packing_notes = _packed_or_padded(config, shape, steps, device)
    if topology.placement == "pipeline":
        decision = _decide_stage(config, shape, execution, steps, shard, cut)
        return decision._replace(notes=[*decision.notes, *packing_notes])
    planner = planner_for(config, shape, execution, [step_of_shard(step, shard, execution) for step in steps])
    budget = _budget(topology)
    placer = placer_for(config, planner, budget)
    chosen = placer.decide()
    note = _limited(placer.parts(chosen), budget)
    if placer.auto:
        note += f"; topology.batch=auto chose {batch_overrides(chosen)}"
    elif chosen.recompute != execution.recompute:
        note += f"; training.recompute=auto chose {chosen.recompute}"
    return Preflight(chosen, Layout.of(shape, chosen, placer.first_trained).line, [note, *packing_notes])


def _decide_stage(
    config: TrainConfig,
    shape: ModelShape,
    execution: Execution,
    steps: Sequence[StepRows],
    shard: DataShard,
    cut: Cut,
) -> Preflight:
    """What a node of a pipeline decides; ``shard`` has its rank and their number."""
    topology, world_size = config.topology, shard.world_size
    obstacle = obstacle_to_reading_blocks(execution, shape, config.adapter)
    if obstacle is not None:
        raise ConfigError(f"topology.placement: pipeline {obstacle}")
    check_layout(topology, shape.blocks, world_size)
    may_keep = execution.recompute == "none" and execution.kernels == "mlx"
    first_trained = min(select_layers(config.adapter, shape.adaptable).blocks, default=shape.blocks)
    costs = block_costs(shape, first_trained, keeps=may_keep)

    def decide(world_size: int) -> StageLayout:
        return cut(world_size) or decide_layout(topology, costs, world_size)

    layout, budget, execution = decide(world_size), _budget(topology), execution.pipelined(0)
    place = layout.place_of(shard.rank)
    rows = DataShard(place[0] if place is not None else 0, len(layout.pipelines))
    planner = planner_for(config, shape, execution, [step_of_shard(step, rows, execution) for step in steps])
    stages = StagePlanner(planner, budget, layout, shard.rank, first_trained, topology.resident_blocks, may_keep)
    chosen = stages.decide()
    notes = [_limited(stages.predicted(chosen), budget)]
    size = layout.blocks_of(shard.rank)
    if chosen.block_capacity < len(size):
        notes.append(
            f"{chosen.block_capacity} of this stage's {len(size)} blocks stay in memory; the others are read from disk "
            "for each micro-batch"
        )
    return Preflight(chosen, stages.line, notes, decide)


def _packed_or_padded(
    config: TrainConfig, shape: ModelShape, steps: Sequence[StepRows], device: Device
) -> tuple[Execution, list[str]]:
    """How ``device`` computes ``config``, and lines for the user; the same for all nodes of a kind."""
    return choose_packing(planner_for(config, shape, execution_for(config, shape, shape.checkpoint, device), steps))


def _budget(topology: TopologyConfig) -> float:
    """Bytes that this node may take."""
    nodes_here = topology.nodes if topology.kind == "local" else 1
    return parse_budget(topology.memory_budget, usable_bytes(1 / nodes_here))


def _limited(parts: MemoryParts, budget: float) -> str:
    """Keeps MLX within what is expected of ``budget``; a line for the user."""
    if parts.unknown:
        keep_within(budget, budget)
        return f"memory: at least {parts.peak / 1e9:.2f} GB of {budget / 1e9:.1f} GB expected; {parts.unknown}"
    keep_within(budget, parts.peak)
    return f"memory: about {parts.peak / 1e9:.2f} GB of {budget / 1e9:.1f} GB expected"


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
