"""From a run's configuration to the record of how a node computes it. Everybody who needs that record gets it here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from macft.config.schema import TrainConfig
from macft.device.kind import Device
from macft.errors import ConfigError, ModelError
from macft.model.execution import Execution, WeightFormat, resolve
from macft.model.settings import ModelConfig
from macft.model.shape import ModelShape, read_shape, read_weight_format
from macft.training.settings import TrainingConfig, fixed_micro_batch

_MICRO_BATCHES = 16
"""Micro-batches that a pipeline computes in a step, unless told otherwise: four for each of four stages."""


def execution_for(config: TrainConfig, shape: ModelShape | None, checkpoint: WeightFormat, device: Device) -> Execution:
    """How ``device`` computes ``config``; ``shape`` is None where the architecture isn't known before it is loaded.

    Raises:
        ConfigError: the model or the device does not support a setting; one line.
    """
    training, adapter = _without_choices(config.training), config.adapter
    placement = config.topology.placement
    if placement in ("stream", "pipeline") and insists_on_compiling(config):
        raise ConfigError(
            f"training.compile: a step with topology.placement={placement} can't be compiled; use auto or false"
        )
    has_dropout = adapter.type != "full" and adapter.dropout > 0
    execution = resolve(
        config.model,
        checkpoint,
        device,
        packing=training.packing,
        can_pack=None if shape is None else shape.packs,
        dropout=has_dropout or (shape is not None and shape.has_dropout),
        compile=training.compile,
        kernels=training.kernels,
        recompute=training.recompute,
        loss_chunk=training.loss_chunk,
        micro_batch_size=training.micro_batch_size or _micro_batch_of_pipelines(config),
    )
    return replace(execution, lanes=1) if training.deterministic else execution


def _without_choices(training: TrainingConfig) -> TrainingConfig:
    """``training``; with ``deterministic`` nothing is left open that a node's memory, kind of part or threads decide.

    Kernels are MLX's, which compute the same whether a node has all blocks, reads them from disk, or has some of them.
    """
    if not training.deterministic:
        return training
    return replace(
        training,
        micro_batch_size=fixed_micro_batch(training),
        recompute="none" if training.recompute == "auto" else training.recompute,
        compile="false" if training.compile.lower() == "auto" else training.compile,
        kernels="mlx" if training.kernels == "auto" else training.kernels,
    )


def insists_on_compiling(config: TrainConfig) -> bool:
    """Whether a step must be compiled, so that the whole model must be in memory."""
    return config.training.compile.lower() == "true"


def _micro_batch_of_pipelines(config: TrainConfig) -> int | None:
    """Rows of a micro-batch in a pipeline, so that there are ``_MICRO_BATCHES``; None without pipelines.

    It does not depend on the number of nodes, which may change: what is computed in a step stays the same.
    """
    topology = config.topology
    if topology.placement != "pipeline":
        return None
    return max(1, config.training.batch_size // (topology.pipelines * _MICRO_BATCHES))


def inference_execution(model: ModelConfig, folder: Path, *, micro_batch_size: int | None = None) -> Execution:
    """How this machine evaluates or generates with the model in ``folder``; of a run's wishes for training none apply.

    Raises:
        ModelError: ``folder`` has no config.json.
        ConfigError: the weights can't be held as ``model`` wants.
    """
    try:
        shape = read_shape(folder)
        checkpoint, can_pack = shape.checkpoint, shape.packs
    except ModelError:  # an architecture of its own; it must be loaded to know it
        checkpoint, can_pack = read_weight_format(folder), None
    return resolve(
        model, checkpoint, Device.default(), can_pack=can_pack, compile="false", micro_batch_size=micro_batch_size
    )


def with_execution(config: TrainConfig, execution: Execution) -> TrainConfig:
    """``config`` with the batch settings that ``topology.batch=auto`` chose, for the records of the run."""
    training = replace(
        config.training,
        micro_batch_size=execution.micro_batch_size,
        recompute=config.training.recompute if execution.supplies_blocks else execution.recompute,
    )
    return replace(config, training=training)
