"""The one place where a decided execution may be revised: the loaded model turns out not to be as its files say."""

from __future__ import annotations

from dataclasses import replace

# isort: split
import mlx.core as mx
from mlx.utils import tree_flatten

from macft.errors import ModelError
from macft.model.backends.choose import can_pack
from macft.model.execution import Execution, cannot_pack
from macft.model.fitness import obstacle_to_training
from macft.model.load import LoadedModel
from macft.model.traceable import is_traceable


def confirm(execution: Execution, loaded: LoadedModel) -> tuple[Execution, list[str]]:
    """``execution`` as ``loaded`` can really be computed, and a line for the user for each revision.

    :func:`~macft.model.execution.resolve` decides from config.json, before weights are loaded. That is right for the
    architectures of mlx-lm; a model with code of its own may differ: its rows are then padded, its kernels portable.

    Raises:
        ConfigError: ``execution`` requires packing, and the model can't take packed rows.
        ModelError: training the model would make no sense.
    """
    if (obstacle := obstacle_to_training(loaded.model)) is not None:
        raise ModelError(obstacle)
    notes: list[str] = []
    types = {value.dtype for _, value in tree_flatten(loaded.model.parameters())}
    if execution.kernels == "cpu" and types != {mx.float32}:
        execution = replace(execution, kernels="mlx")
        notes.append("the model isn't wholly float32, so MLX's own operations compute it, more slowly")
    if execution.packing and not can_pack(loaded.model, execution):
        if execution.requires_packing:
            raise cannot_pack()
        execution = execution.padded()
        notes.append("this model's attention can't take packed rows, so rows are padded")
    if execution.compiled and not is_traceable(loaded.model):
        execution = replace(execution, compiled=False)
        notes.append("this model's code needs values of arrays, so its steps aren't compiled")
    return execution, notes
