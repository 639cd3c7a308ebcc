"""A node's last word before its model loads: does the run fit, and with which micro-batch."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from macft.collective.base import Collective
from macft.config.schema import TrainConfig
from macft.data.formats import Row
from macft.data.order import RowOrder
from macft.device.memory import usable_bytes
from macft.device.mlx_device import keep_within, on_cpu
from macft.errors import ConfigError, ModelError
from macft.model.shape import HeldWeights, ModelShape, held_weights, read_shape
from macft.parallel.shares import DataShard
from macft.planner.fit import BatchSettings, MemoryPlanner
from macft.planner.workload import StepRows, steps_of
from macft.topology.settings import parse_budget
from macft.training.batch_layout import BatchLayout
from macft.training.settings import TrainingConfig, compiles, steps_for

_LONGEST_VERDICT = 2000


def preflight(
    config: TrainConfig,
    model_folder: Path,
    rows: Sequence[Row],
    order: RowOrder,
    collective: Collective,
    *,
    world_size: int | None = None,
) -> tuple[TrainingConfig, list[str]]:
    """This node's training settings, ``topology.batch=auto`` made out, and lines for the user.

    All nodes tell each other whether they can, so that all end with the same message if one can't. ``world_size``: the
    number of nodes that there will be, if it isn't that of ``collective`` yet.

    Raises:
        ConfigError: the run doesn't fit a node's memory; the message names settings with which it would.
    """
    steps = steps_of(rows, order, steps_for(config.training, order.steps_per_epoch))
    shares = tuple(config.topology.shares) if isinstance(config.topology.shares, list) else None
    if world_size is None or world_size == collective.world_size:
        seat = DataShard(collective.rank, collective.world_size, shares)
    else:
        seat = DataShard(world_size - 1, world_size)
    training, notes, refusal = _settle_here(config, model_folder, steps, seat)
    verdicts = collective.all_gather(json.dumps(refusal).encode()[:_LONGEST_VERDICT])
    for rank, verdict in enumerate(verdicts):
        reason = json.loads(verdict)
        if reason is not None:
            where = f"rank {rank}: " if collective.world_size > 1 else ""
            raise ConfigError(f"topology.memory_budget: {where}{reason}")
    return training, notes


def _settle_here(
    config: TrainConfig, model_folder: Path, steps: Sequence[StepRows], seat: DataShard
) -> tuple[TrainingConfig, list[str], str | None]:
    """(settings, notes, refusal) of this node."""
    training, topology = config.training, config.topology
    auto = topology.batch == "auto"
    try:
        shape = read_shape(model_folder)
    except ModelError as error:
        # mlx-lm may still know the model by code of its own; the run goes on without a prediction.
        return training, [f"no memory plan: {error}"], None
    cpu = on_cpu()
    division = division_for(config, shape, cpu=cpu)
    mine = [step.at(seat, shared=division.shared_prefixes) for step in steps]
    held = held_weights(shape, config.model, cpu=cpu)
    fitter = fitter_for(config, shape=shape, held=held, steps=mine, division=division)
    on_this_machine = topology.nodes if topology.kind == "local" else 1
    budget = parse_budget(topology.memory_budget, usable_bytes() / on_this_machine)
    start = current_settings(training)
    if (reason := fitter.refusal(start, budget, auto=auto)) is not None:
        return training, [], reason
    chosen = (fitter.best(start, budget) if auto else None) or start
    peak = fitter.parts(chosen).peak
    keep_within(budget, peak)
    note = f"memory: about {peak / 1e9:.2f} GB of {budget / 1e9:.1f} GB expected"
    if auto:
        note += f"; topology.batch=auto chose {chosen}"
    return apply_settings(training, chosen), [note], None


def division_for(config: TrainConfig, shape: ModelShape, *, cpu: bool) -> BatchLayout:
    """How the trainer will divide its micro-batches, on a CPU or not."""
    training, adapter = config.training, config.adapter
    packs = training.packing.lower() != "false" and shape.packs
    has_masks = adapter.type != "full" and adapter.dropout > 0
    return BatchLayout(
        packs, packs and not has_masks, compiles(training.compile, cpu=cpu), 512 if packs and cpu else None
    )


def fitter_for(
    config: TrainConfig, *, shape: ModelShape, held: HeldWeights, steps: Sequence[StepRows], division: BatchLayout
) -> MemoryPlanner:
    """The prediction for ``config`` on a node that has ``steps``' rows."""
    return MemoryPlanner(
        shape=shape,
        held=held,
        adapter=config.adapter,
        optimizer=config.optimizer.name,
        steps=steps,
        validation_rows=_validation_rows(config.training),
        division=division,
        eager=on_cpu() and held.bits is None and held.float_bytes == 4 and not division.compiled,
    )


def _validation_rows(training: TrainingConfig) -> int:
    if not training.eval_every:
        return 0
    return training.eval_rows if training.eval_rows >= 0 else sys.maxsize


def current_settings(training: TrainingConfig) -> BatchSettings:
    """What the configuration asks for."""
    return BatchSettings(training.micro_batch_size, training.grad_checkpoint, training.loss_chunk or 0)


def apply_settings(training: TrainingConfig, settings: BatchSettings) -> TrainingConfig:
    """``training`` with ``settings``."""
    return replace(training, micro_batch_size=settings.micro_batch_size, grad_checkpoint=settings.grad_checkpoint)
