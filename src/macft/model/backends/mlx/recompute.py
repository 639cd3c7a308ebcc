"""Blocks that the backward pass computes again, from their input and from what was costly in them.

``blocks``: the backward pass holds a block's input only, and computes all the rest again (Chen et al. 2016), as
``mlx_lm.tuner.trainer.grad_checkpoint`` does, which changes a class, and with it every model of that architecture, for
the rest of the process. ``cheap``: it also holds the results of matrix products and of attention, and computes again
what lies between them: norms, activation functions, products, sums, rotary embeddings, casts, dropout (selective
recomputation, Korthikanti et al. 2022). No architecture is named: what is costly is known by the class of a layer.

A block is computed again when its gradient is there, not before: MLX goes through a graph in an order of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from macft.model.backends.mlx.kept import Kept, kept, recorded, replayed
from macft.model.backends.mlx.low_rank import KINDS, Product, dora, lora, matrices_first
from macft.model.backends.operation import after, operation
from macft.model.backends.trees import holds_state, put_together, take_apart
from macft.model.head import trains_only_blocks
from macft.model.mlx_lm_tuner import DoRALinear, LoRALinear
from macft.model.module_classes import Members, ModuleCall, replaced_members
from macft.model.packing import is_cheap_attention
from macft.model.parameter_refs import ParameterRefs

_PRODUCTS = (
    *(nn.Linear, nn.QuantizedLinear, SwitchLinear, QuantizedSwitchLinear, MultiLinear, QuantizedMultiLinear),
    *KINDS,
)


@contextmanager
def recomputed_blocks(model: nn.Module) -> Iterator[None]:
    """Inside, the blocks of ``model`` that a gradient reaches are computed again, whatever they keep."""
    blocks = list(model.layers)
    if trains_only_blocks(model):
        blocks = list(itertools.dropwhile(lambda block: not tree_flatten(block.trainable_parameters()), blocks))
    trained = {id(block): ParameterRefs(block) for block in blocks}

    def members(kind: type[nn.Module]) -> Members:
        call = kind.__call__

        def block_call(block: nn.Module, *arguments: Any, **named: Any) -> Any:
            # What it writes to a cache would be without a gradient.
            if not block.training or holds_state((arguments, named)):
                return call(block, *arguments, **named)
            return _recomputed(call, block, trained[id(block)], arguments, named)

        return {"__call__": block_call}

    with replaced_members(blocks, members):
        yield


def _recomputed(
    call: ModuleCall, block: nn.Module, refs: ParameterRefs, arguments: Sequence[Any], named: dict[str, Any]
) -> Any:
    frame, given = take_apart((arguments, named))
    count = len(given)
    frame_of_result: Any = None
    results = 0
    forms: list[tuple[Any, int]] = []

    def compute(*inputs: mx.array) -> list[mx.array]:
        nonlocal frame_of_result
        with refs.holding(inputs[count:]):
            arguments, named = put_together(frame, inputs[:count])
            frame_of_result, computed = take_apart(call(block, *arguments, **named))
            return computed

    def forward(*inputs: mx.array) -> tuple[mx.array, ...]:
        nonlocal results, forms
        with recorded() as made:
            outputs = compute(*inputs)
        results, forms = len(outputs), made.forms
        return (*outputs, *made.arrays)

    def backward(
        inputs: Sequence[mx.array], grad_outputs: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
    ) -> list[mx.array]:
        gradients = list(grad_outputs[:results])
        made = Kept(after(outputs[results:], gradients), forms)

        def again(*inputs: mx.array) -> list[mx.array]:
            with replayed(made):
                return compute(*inputs)

        found: list[mx.array] = mx.vjp(again, after(inputs, gradients), gradients)[1]
        # Parameters first: MLX computes last what nothing waits for, and would hold what their gradients need.
        return [*after(found[:count], found[count:]), *found[count:]] if found[count:] else found

    outputs = operation(forward, backward)(*given, *refs.get())
    return put_together(frame_of_result, outputs[:results])


@contextmanager
def kept_products(model: nn.Module, most_operations: int) -> Iterator[None]:
    """Inside, recomputed blocks of ``model`` keep the results of their matrix products.

    ``most_operations``: see :mod:`~macft.model.backends.mlx.long_products`.
    """
    adapters = [module for module in model.modules() if isinstance(module, KINDS)]
    inner = {id(module) for adapter in adapters for module in adapter.modules() if module is not adapter}
    layers = [
        module
        for block in model.layers
        for module in block.modules()
        if isinstance(module, _PRODUCTS) and id(module) not in inner
    ]
    trained = {id(layer): ParameterRefs(layer) for layer in layers}

    def members(kind: type[nn.Module]) -> Members:
        call = kind.__call__
        if issubclass(kind, DoRALinear):  # what its magnitudes are multiplied by is needed for their gradient
            return {"__call__": lambda layer, x: dora(layer, x, most_operations, _kept_matrices_first)}

        def layer_call(layer: nn.Module, *arguments: Any, **named: Any) -> Any:
            if isinstance(layer, LoRALinear) and layer.dropout(*arguments) is arguments[0]:
                return lora(layer, arguments[0], kept=_kept)
            return _kept_call(call, layer, trained[id(layer)], arguments, named)

        return {"__call__": layer_call}

    with replaced_members(layers, members):
        yield


def _kept(function: Product) -> Product:
    return lambda *arrays: kept(function, *arrays)


def _kept_matrices_first(function: Product) -> Product:
    return _kept(matrices_first(function))


def _kept_call(
    call: ModuleCall, layer: nn.Module, refs: ParameterRefs, arguments: Sequence[Any], named: dict[str, Any]
) -> Any:
    frame, given = take_apart((arguments, named))
    count = len(given)

    def compute(*inputs: mx.array) -> Any:
        with refs.holding(inputs[count:]):
            arguments, named = put_together(frame, inputs[:count])
            return call(layer, *arguments, **named)

    return kept(compute, *given, *refs.get())


def kept_attention(attention: ModuleCall) -> ModuleCall:
    """``attention``, a function of mlx-lm's arguments, whose result a recomputed block keeps where it is costly.

    Its gradient is that by queries, keys and values: where the mask is computed from the tokens, as in latent
    attention, nothing is kept. Nor are results for few keys (:func:`~macft.model.packing.is_cheap_attention`).
    """

    def call(
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        cache: Any = None,
        scale: float = 1.0,
        mask: Any = None,
        **others: Any,
    ) -> mx.array:
        def compute(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
            result: mx.array = attention(queries, keys, values, cache=cache, scale=scale, mask=mask, **others)
            return result

        is_constant = not isinstance(mask, mx.array) or mask.dtype == mx.bool_
        is_cheap = is_cheap_attention(queries.shape[1] * queries.shape[-1], keys.shape[2])
        if cache is not None or not is_constant or is_cheap:
            return compute(queries, keys, values)
        result: mx.array = kept(compute, queries, keys, values)
        return result

    return call
