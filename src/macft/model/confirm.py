"""The one place where a decided execution may be revised: the loaded model turns out not to be as its files say."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

# isort: split
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from macft.errors import ConfigError, ModelError
from macft.model.backends.choose import can_pack
from macft.model.blocks.block_weights import BlockWeights
from macft.model.blocks.cut_model import CutModel, arguments_need_values
from macft.model.execution import Execution, cannot_pack
from macft.model.load import LoadedModel, load_without_blocks
from macft.model.settings import ModelConfig
from macft.model.trials.fitness import obstacle_to_training
from macft.model.trials.traceable import is_traceable

_TRIAL_TOKENS = 8


def confirm(execution: Execution, loaded: LoadedModel) -> tuple[Execution, list[str]]:
    """``execution`` as ``loaded`` can really be computed, and a line for the user for each revision.

    :func:`~macft.model.execution.resolve` decides from config.json, before weights are loaded. That is right for the
    architectures of mlx-lm; a model with code of its own may differ: its rows are then padded, its kernels portable.

    Raises:
        ConfigError: ``execution`` requires packing, and the model can't take packed rows; or its weights are streamed,
            and it can't be cut into its blocks.
        ModelError: training the model would make no sense, or its weights are streamed and can't be read.
    """
    if loaded.streamed is None or execution.placement != "pipeline":
        return _confirm(execution, loaded)
    with loaded.streamed.standing_in():  # a stage does not read the blocks of others
        found = _confirm(execution, loaded)
    if obstacle := _needs_embedding(loaded.model, loaded.streamed):
        raise _cannot_cut(execution, obstacle)
    return found


def _needs_embedding(model: nn.Module, weights: BlockWeights) -> str | None:
    """Why a stage without the embedding can't make its blocks' arguments; None if it can."""
    with weights.left_out():
        return arguments_need_values(CutModel(model).enter(_trial()))


def _cannot_cut(execution: Execution, obstacle: str) -> ConfigError:
    return ConfigError(
        f"topology.placement: {execution.placement} can't cut this model into its blocks ({obstacle}); "
        "use topology.placement=replicate"
    )


def obstacle_to_cutting(config: ModelConfig, path: Path, execution: Execution) -> str | None:
    """Why the model in ``path`` can't be cut into stages, tried without reading its blocks; None if it can."""
    try:
        model, weights = load_without_blocks(config, path, execution.pipelined(0))
    except ModelError as error:
        return str(error)
    with weights.standing_in():
        obstacle = CutModel(model, same_form=True).obstacle(_trial())
    return obstacle or _needs_embedding(model, weights)


def _trial() -> mx.array:
    """Tokens to try a model with (1, 8)."""
    return mx.arange(1, 1 + _TRIAL_TOKENS)[None]


def _confirm(execution: Execution, loaded: LoadedModel) -> tuple[Execution, list[str]]:
    notes: list[str] = []
    traced = loaded.streamed.left_out if loaded.streamed is not None else nullcontext
    cut = CutModel(loaded.model, same_form=execution.placement == "pipeline")
    if loaded.streamed is not None and (obstacle := cut.obstacle(_trial())):
        raise _cannot_cut(execution, obstacle)
    if (obstacle := obstacle_to_training(loaded.model)) is not None:
        raise ModelError(obstacle)
    types = {value.dtype for _, value in tree_flatten(loaded.model.parameters())}
    if execution.kernels == "cpu" and types != {mx.float32}:
        execution = replace(execution, kernels="mlx")
        notes.append("the model isn't wholly float32, so MLX's own operations compute it, more slowly")
    if execution.packing and not can_pack(loaded.model, execution, traced=traced):
        if execution.requires_packing:
            raise cannot_pack()
        execution = execution.padded()
        notes.append("this model's attention can't take packed rows, so rows are padded")
    if execution.compiled and not is_traceable(loaded.model):
        execution = replace(execution, compiled=False)
        notes.append("this model's code needs values of arrays, so its steps aren't compiled")
    return execution, notes
