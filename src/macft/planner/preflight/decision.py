"""A node's decision before its model is loaded: how it computes the run, and whether that fits its memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from macft.collective.base import Collective
from macft.collective.elastic import ElasticCollective
from macft.config.execution import execution_for
from macft.config.schema import TrainConfig
from macft.data.formats import Row
from macft.data.order import RowOrder
from macft.device.kind import Device
from macft.device.mlx_device import keep_within
from macft.errors import ConfigError, ModelError
from macft.model.execution import Execution
from macft.model.shape import read_weight_format
from macft.parallel.shares import DataShard
from macft.parallel.stage_layout import StageLayout
from macft.parallel.stage_places import Decide, LayoutChanges, whole_models
from macft.planner.memory import MemoryParts
from macft.planner.memory_planner import batch_overrides
from macft.planner.node_part import NodePart
from macft.planner.placement.configured_layout import block_costs, check_layout, decide_layout
from macft.planner.preflight.agreement import agree_on_placement, hand_over
from macft.planner.preflight.member_layouts import LayoutOf
from macft.planner.preflight.refit import StageRefit, WholeModelRefit, heaviest
from macft.planner.whole_model import WeightPlacement, obstacle_to_reading_blocks
from macft.planner.workload import steps_of
from macft.training.node_fit import Refit
from macft.training.settings import steps_for

_LONGEST_VERDICT = 2000


class Preflight(NamedTuple):
    """How a node computes a run: ``layout`` says in one line where its weights are, ``notes`` are lines for the user.

    ``config`` is the run's, with what the nodes have agreed on. ``decide`` makes the layout of a number of ranks.
    ``refit`` is how the node computes with other members or other blocks; None where memory isn't predicted.
    ``changes`` finds better layouts of a pipeline while the run goes on; None where there is nothing to find.
    """

    config: TrainConfig
    execution: Execution
    layout: str
    notes: list[str]
    decide: Decide = whole_models
    refit: Refit | None = None
    changes: LayoutChanges | None = None


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
    decision, refusal = None, None
    try:
        part = NodePart(config, model_folder, steps, shard)
        agreed = agree_on_placement(part, collective)
        if isinstance(collective, ElasticCollective):  # for those who join
            collective.contents = {**collective.contents, **agreed.settings}
        if agreed.config is not config:
            part = NodePart(agreed.config, model_folder, steps, shard)
        changes = hand_over(part, collective, agreed)
        # A pipeline that the nodes have chosen themselves leaves out those for which there is no block.
        is_wanted = config.topology.placement == "pipeline"
        decision = _decide(part, agreed.layout_of if changes is None else changes.layout_of, is_wanted=is_wanted)
        decision = decision._replace(notes=[*agreed.lines, *decision.notes], changes=changes)
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


def _decide(part: NodePart, layout_of: LayoutOf, *, is_wanted: bool) -> Preflight:
    """What this node decides; ``is_wanted``: the configuration asks for a pipeline.

    Raises ConfigError as :func:`preflight` does.
    """
    config, topology = part.config, part.config.topology
    try:
        shape = part.shape
    except ModelError as error:
        if topology.placement == "pipeline":
            raise ConfigError(f"topology.placement: pipeline can't tell this model's blocks: {error}") from None
        # mlx-lm may still know the model by code of its own; the run goes on without a prediction.
        execution = execution_for(config, None, read_weight_format(part.folder), Device.default())
        execution = execution.streamed(()) if topology.placement == "stream" else execution.unplanned()
        return Preflight(config, execution, execution.placement, [f"no memory plan: {error}"])
    if topology.placement == "pipeline":
        decision = _decide_stage(part, layout_of, is_wanted=is_wanted)
        return decision._replace(notes=[*decision.notes, *part.packing_notes])
    whole_model = part.whole_model
    chosen = whole_model.decide()
    note = _limited(whole_model.parts(chosen), part.budget)
    if whole_model.auto:
        note += f"; topology.batch=auto chose {batch_overrides(chosen)}"
    elif chosen.recompute != part.execution.recompute:
        note += f"; training.recompute=auto chose {chosen.recompute}"
    refit = WholeModelRefit(
        part.planner,
        chosen,
        heaviest(part.steps),
        part.budget,
        topology.resident_blocks,
        fixed=config.training.deterministic,
    )
    notes = [note, *part.packing_notes]
    return Preflight(
        config, chosen, WeightPlacement.of(shape, chosen, whole_model.first_trained).line, notes, refit=refit
    )


def _decide_stage(part: NodePart, layout_of: LayoutOf, *, is_wanted: bool) -> Preflight:
    """What a node of a pipeline decides."""
    config, topology, shape, execution = part.config, part.config.topology, part.shape, part.execution
    world_size = part.shard.world_size
    obstacle = obstacle_to_reading_blocks(execution, shape, config.adapter)
    if obstacle is not None:
        raise ConfigError(f"topology.placement: pipeline {obstacle}")
    if is_wanted or layout_of(world_size) is None:
        check_layout(topology, shape.blocks, world_size)
    may_keep, first_trained = execution.may_keep_activations, part.whole_model.first_trained
    costs = block_costs(shape, first_trained, keeps=may_keep)

    def decide(world_size: int) -> StageLayout:
        return layout_of(world_size) or decide_layout(topology, costs, world_size)

    layout, budget, execution = decide(world_size), part.budget, execution.pipelined(0)
    rank = part.shard.rank
    place = layout.place_of(rank)
    rows = DataShard(place[0] if place is not None else 0, len(layout.pipelines))
    steps, resident = heaviest(part.steps), topology.resident_blocks
    refit = StageRefit(
        part.planner,
        execution,
        steps,
        budget,
        resident,
        first_trained,
        may_keep,
        fixed=config.training.deterministic,
    )
    stages = refit.planned(part.planner(rows, execution, part.steps), layout, rank)
    chosen = stages.decide()
    notes = [_limited(stages.predicted(chosen), budget)]
    size = layout.blocks_of(rank)
    if chosen.block_capacity < len(size):
        notes.append(
            f"{chosen.block_capacity} of this stage's {len(size)} blocks stay in memory; the others are read from disk "
            f"for each micro-batch, {stages.read_bytes(chosen) / 1e9:.2f} GB a step"
        )
    return Preflight(config, chosen, f"pipeline: {layout.described(world_size)}", notes, decide, refit)


def _limited(parts: MemoryParts, budget: float) -> str:
    """Keeps MLX within what is expected of ``budget``; a line for the user."""
    if parts.unknown:
        keep_within(budget, budget)
        return f"memory: at least {parts.peak / 1e9:.2f} GB of {budget / 1e9:.1f} GB expected; {parts.unknown}"
    keep_within(budget, parts.peak)
    return f"memory: about {parts.peak / 1e9:.2f} GB of {budget / 1e9:.1f} GB expected"
