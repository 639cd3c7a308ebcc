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

from macft.errors import MacftError
from macft.model.adapters.adapt import adapt
from macft.model.adapters.settings import AdapterConfig
from macft.model.backends.mlx.recurrence import loops_over_time
from macft.model.execution import Execution
from macft.model.files.weight_sizes import Quantization, StoredQuantization
from macft.model.head import Backbone, split_head
from macft.model.mlx_lm_tuner import LoRASwitchLinear
from macft.model.module_classes import Members, replaced_functions, replaced_members
from macft.planner.graph import graph_of

# Of the graph, what gradients of random models took: benchmarks/other_blocks.py, docs/plan.md.
_SHARE = 0.93
_DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
_ERRORS = (ValueError, TypeError, AttributeError, IndexError, RuntimeError, KeyError, ImportError, MacftError)


class Traced(NamedTuple):
    """Bytes that exist at once beside weights, adapter and optimizer states, in a step and in a validation of it."""

    step: float
    validation: float


def traced(
    config: dict[str, Any],
    execution: Execution,
    adapter: AdapterConfig,
    rows: int,
    length: int,
    *,
    logits: float,
    validation_logits: float,
) -> Traced | str:
    """Of the model of a config.json, with ``rows`` of ``length`` tokens at once.

    ``logits``: bytes that the loss holds at once in a step, and ``validation_logits`` in validation. A text where that
    isn't known: why, in a few words.
    """
    if execution.kernels != "mlx":
        return "training.kernels=cpu computes layer by layer"
    if execution.recompute != "none":
        return "parts of blocks are computed again in the backward pass"
    adapter_text = json.dumps(vars(adapter), sort_keys=True)
    loss_sizes = (int(logits), int(validation_logits))
    return _traced(json.dumps(config, sort_keys=True), execution, adapter_text, rows, length, loss_sizes)


@lru_cache(maxsize=256)
def _traced(
    config: str, execution: Execution, adapter: str, rows: int, length: int, loss_sizes: tuple[int, int]
) -> Traced | str:
    model = _adapted(config, execution, adapter)
    if isinstance(model, str):
        return model
    parts = split_head(model, evaluated=False)
    assert parts is not None
    gradient = nn.value_and_grad(model, partial(_loss, parts[0], loss_sizes[0]))

    def step(tokens: mx.array, **values: mx.array) -> list[mx.array]:
        model.update(tree_unflatten(list(values.items())))
        value, gradients = gradient(tokens)
        return [value, *(each for _, each in tree_flatten(gradients))]

    def validation(tokens: mx.array, **values: mx.array) -> list[mx.array]:
        model.update(tree_unflatten(list(values.items())))
        return [_loss(parts[0], loss_sizes[1], tokens)]

    tokens, parameters = mx.zeros((rows, length), mx.int32), dict(tree_flatten(model.parameters()))
    try:
        with (
            replaced_members(model.modules(), _exportable),
            replaced_functions(model, {"swiglu": lambda _original: _holds_its_inputs}),
        ):
            peaks = [graph_of(function, [tokens], parameters).peak() for function in (step, validation)]
    except _ERRORS as error:
        return " ".join(str(error).split())
    return Traced(*(_SHARE * (peak - size) + size for peak, size in zip(peaks, loss_sizes, strict=True)))


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
            stored = StoredQuantization.of(settings)
            if stored.base is None:
                stored = StoredQuantization(Quantization(execution.bits, execution.group_size), {})
            nn.quantize(model, class_predicate=stored.predicate)
        dtype = _DTYPES[execution.dtype]
        model.update(tree_map(lambda x: x.astype(dtype) if x.dtype in _DTYPES.values() else x, model.parameters()))
        adapt(model, AdapterConfig(**json.loads(adapter)), seed=0, evaluated=False)
        if split_head(model, evaluated=False) is None:
            return "its head can't be told apart"
    except _ERRORS as error:
        return " ".join(str(error).split())
    model.train()
    return model


def _loss(backbone: Backbone, size: int, tokens: mx.array) -> mx.array:
    """In place of the loss, whose gradient can't be exported: it needs the hidden states, and ``size`` bytes."""
    total = backbone(tokens).astype(mx.float32).sum()
    return (mx.broadcast_to(total, (max(1, size // 4),)) + 1.0).sum() * total


def _holds_its_inputs(gate: mx.array, x: mx.array) -> mx.array:
    """In place of SwiGLU, whose gradient can't be exported either: an operation that holds as much for its own."""
    return mx.maximum(gate, x)


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
