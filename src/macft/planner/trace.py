"""Memory of a step of any architecture: from the graph of its own code, built with its real sizes and no values.

What the plan counts is the graph that MLX would evaluate, operation by operation (:mod:`macft.planner.graph`). So
mixtures, latent attention, windows and wrappers need no formula of their own. Weights are never made.
"""

from __future__ import annotations

import json
from functools import lru_cache, partial
from typing import Any, NamedTuple

# isort: split
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.tuner.lora import LoRASwitchLinear

from macft.errors import MacftError
from macft.model.adapt import adapt
from macft.model.adapter_settings import AdapterConfig
from macft.model.backends.mlx.cross_entropy import losses_and_gradients, whole_cross_entropy
from macft.model.backends.mlx.recurrence import loops_over_time
from macft.model.execution import Execution
from macft.model.head import split_head
from macft.model.module_classes import Members, replaced_members
from macft.planner.graph import graph_of

# Measured against predicted peaks of random models; see docs/plan.md.
_MARGIN = 1.06
_DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
_ERRORS = (ValueError, TypeError, AttributeError, IndexError, RuntimeError, KeyError, ImportError, MacftError)


class Traced(NamedTuple):
    """Bytes that exist at once beside weights, adapter and optimizer states, in a step and in a validation of it."""

    step: float
    validation: float


def traced(
    config: dict[str, Any], execution: Execution, adapter: AdapterConfig, rows: int, length: int, targets: int
) -> Traced | str:
    """Of the model of a config.json, with ``rows`` of ``length`` tokens at once, ``targets`` of them to be predicted.

    A text where that isn't known: why, in a few words.
    """
    if execution.kernels != "mlx":
        return "training.kernels=cpu computes layer by layer"
    if execution.recompute != "none":
        return "checkpointed blocks are computed twice"
    adapter_text = json.dumps(vars(adapter), sort_keys=True)
    return _traced(json.dumps(config, sort_keys=True), execution, adapter_text, rows, length, targets)


@lru_cache(maxsize=256)
def _traced(config: str, execution: Execution, adapter: str, rows: int, length: int, targets: int) -> Traced | str:
    model = _adapted(config, execution, adapter)
    if isinstance(model, str):
        return model
    inputs = [
        mx.zeros((rows, length), mx.int32),
        mx.zeros((targets,), mx.int32),
        mx.zeros((targets,), mx.int32),
        mx.zeros((targets,)),
    ]
    parameters = dict(tree_flatten(model.parameters()))
    gradient = nn.value_and_grad(model, partial(_loss, model, execution, True))
    loss = partial(_loss, model, execution, False)

    def step(*arrays: mx.array, **values: mx.array) -> list[mx.array]:
        model.update(tree_unflatten(list(values.items())))
        value, gradients = gradient(*arrays)
        return [value, *(each for _, each in tree_flatten(gradients))]

    def validation(*arrays: mx.array, **values: mx.array) -> list[mx.array]:
        model.update(tree_unflatten(list(values.items())))
        return [loss(*arrays)]

    try:
        with replaced_members(model.modules(), _exportable):
            peaks = [graph_of(function, inputs, parameters).peak() for function in (step, validation)]
    except _ERRORS as error:
        return " ".join(str(error).split())
    return Traced(*(_MARGIN * peak for peak in peaks))


@lru_cache(maxsize=4)
def _adapted(config: str, execution: Execution, adapter: str) -> nn.Module | str:
    """The model with its adapter, in training; no array has a value."""
    from mlx_lm.utils import _get_classes

    settings = json.loads(config)
    try:
        model_class, arguments = _get_classes(settings)
        model: nn.Module = model_class(arguments.from_dict(settings))
        if loops_over_time(model):
            return "some of its layers go through a row token by token"
        if execution.bits is not None:
            nn.quantize(model, execution.group_size, execution.bits)
        dtype = _DTYPES[execution.dtype]
        model.update(tree_map(lambda x: x.astype(dtype) if x.dtype in _DTYPES.values() else x, model.parameters()))
        adapt(model, AdapterConfig(**json.loads(adapter)), seed=0, evaluated=False)
        if split_head(model, evaluated=False) is None:
            return "its head can't be told apart"
    except _ERRORS as error:
        return " ".join(str(error).split())
    model.train()
    return model


def _loss(
    model: nn.Module,
    execution: Execution,
    with_gradient: bool,
    inputs: mx.array,
    positions: mx.array,
    targets: mx.array,
    weights: mx.array,
) -> mx.array:
    """As the trainer computes it, without operations that MLX can't export."""
    parts = split_head(model, evaluated=False)
    assert parts is not None
    backbone, head = parts
    hidden = backbone(inputs)
    hidden = hidden.reshape(-1, hidden.shape[-1])[positions]
    if not (with_gradient and head.is_frozen):
        return whole_cross_entropy(head(hidden[None])[0], targets, weights)
    vocabulary = head(hidden[:1][None]).shape[-1]
    chunk = execution.loss_chunk_for(vocabulary)
    loss, gradient = losses_and_gradients(head, mx.stop_gradient(hidden), targets, weights, chunk=chunk)
    # A number whose gradient is the one that was computed.
    return loss + (mx.stop_gradient(gradient) * hidden).sum()


def _exportable(kind: type[nn.Module]) -> Members | None:
    """In place of the low-rank paths of experts, whose gradient can't be exported: that of one expert, as large."""
    if not issubclass(kind, LoRASwitchLinear):
        return None

    def call(layer: Any, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        y: mx.array = layer.linear(x, indices, sorted_indices=sorted_indices)
        z = (layer.dropout(x) @ layer.lora_a[0].T) @ layer.lora_b[0].T
        result: mx.array = y + (layer.scale * z).astype(x.dtype)
        return result

    return {"__call__": call}
