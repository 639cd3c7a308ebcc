"""Products of so many tokens that one kernel would run for seconds: computed in parts of the tokens.

Metal ends a command that runs longer than about five seconds. MLX ends a command buffer behind an operation on large
arrays, so that it holds one of the largest kernels at most; what has to have a limit is each kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from macft.model.backends.operation import after, operation
from macft.model.backends.trees import put_together, take_apart
from macft.model.module_classes import Members, ModuleCall
from macft.model.parameter_refs import ParameterRefs

Product = Callable[..., Any]


def products_in_parts(most_operations: int) -> Callable[[type[nn.Module]], Members | None]:
    """Members of linear layers that compute at most ``most_operations`` in one kernel; None for other modules.

    An addition and a multiplication count as two. Of linear layers, embeddings as heads, experts, and those of latent
    attention; fused layers, which split their result, too.
    """

    def members(kind: type[nn.Module]) -> Members | None:
        if issubclass(kind, nn.Embedding | nn.QuantizedEmbedding):
            return {"as_linear": _linear(kind.as_linear, most_operations)}
        if issubclass(kind, nn.Linear | nn.QuantizedLinear):
            return {"__call__": _linear(kind.__call__, most_operations)}
        if issubclass(kind, SwitchLinear | QuantizedSwitchLinear):
            return {"__call__": _experts(kind.__call__, most_operations)}
        if issubclass(kind, MultiLinear | QuantizedMultiLinear):
            return {"__call__": _heads(kind.__call__, most_operations)}
        return None

    return members


def in_parts(
    product: Product,
    arrays: Sequence[mx.array],
    operations: int,
    most_operations: int,
    *,
    values: Sequence[mx.array] = (),
    axis: int = 0,
) -> Any:
    """``product(*arrays, *values)``, in parts of ``axis`` of ``arrays`` where it takes more than ``most_operations``.

    Its result, an array or a tree of arrays, has that axis too. The gradient is that by ``arrays`` of floating-point
    numbers, and by ``values``, of which each part has the whole.
    """
    count = -(-operations // most_operations)
    length = arrays[0].shape[axis]
    if count < 2 or length < 2:
        return product(*arrays, *values)
    borders = list(pairwise([*range(0, length, -(-length // count)), length]))
    before: tuple[slice, ...] = (slice(None),) * axis
    form: Any = None

    def cut(values: Sequence[mx.array], start: int, end: int) -> list[mx.array]:
        return [value[(*before, slice(start, end))] for value in values]

    def forward(*inputs: mx.array) -> tuple[mx.array, ...]:
        nonlocal form
        parts: list[list[mx.array]] = []
        for start, end in borders:
            form, part = take_apart(product(*cut(inputs[: len(arrays)], start, end), *inputs[len(arrays) :]))
            parts.append(part)
        return tuple(mx.concatenate(list(each), axis=axis) for each in zip(*parts, strict=True))

    def backward(inputs: Sequence[mx.array], grads: tuple[mx.array, ...], _outputs: Any) -> list[mx.array]:
        inputs = after(inputs, grads)
        cut_inputs, whole = inputs[: len(arrays)], inputs[len(arrays) :]
        floats = [mx.issubdtype(array.dtype, mx.floating) for array in cut_inputs]
        by_part: list[list[mx.array]] = []
        sums: list[mx.array] = []
        for start, end in borders:
            part = cut(cut_inputs, start, end)

            def of_floats(*given: mx.array, part: Sequence[mx.array] = part) -> list[mx.array]:
                rest = iter(given)
                filled = [next(rest) if is_float else one for one, is_float in zip(part, floats, strict=True)]
                return take_apart(product(*filled, *rest))[1]

            given = [one for one, is_float in zip(part, floats, strict=True) if is_float]
            found = mx.vjp(of_floats, [*given, *whole], cut(grads, start, end))[1]
            by_part.append(found[: len(given)])
            of_whole = found[len(given) :]
            sums = [total + one for total, one in zip(sums, of_whole, strict=True)] if sums else of_whole
        together = iter([mx.concatenate(list(each), axis=axis) for each in zip(*by_part, strict=True)])
        gradients = [
            next(together) if is_float else mx.zeros_like(array)
            for array, is_float in zip(cut_inputs, floats, strict=True)
        ]
        return [*gradients, *sums]

    results = operation(forward, backward)(*arrays, *values)
    return put_together(form, results)


def matrix_size(layer: nn.Module) -> int:
    """Values of a linear layer's matrix, or of that of one expert or head."""
    weight = layer["weight"]
    width: int = layer["scales"].shape[-1] * layer.group_size if "scales" in layer else weight.shape[-1]
    return int(weight.shape[-2] * width)


def by_token(
    product: Product, x: mx.array, matrix: int, most_operations: int, *, values: Sequence[mx.array] = ()
) -> Any:
    """``product(x, *values)`` of tokens (..., n), each multiplied by a matrix of so many numbers."""
    tokens = x.reshape(-1, x.shape[-1])
    operations = 2 * len(tokens) * matrix
    if operations <= most_operations:
        return product(x, *values)
    form, results = take_apart(in_parts(product, [tokens], operations, most_operations, values=values))
    return put_together(form, [result.reshape(*x.shape[:-1], -1) for result in results])


def _linear(call: ModuleCall, most_operations: int) -> ModuleCall:
    def layer_call(layer: nn.Module, x: mx.array) -> Any:
        matrix = matrix_size(layer)
        if 2 * x.size // x.shape[-1] * matrix <= most_operations:
            return call(layer, x)
        product, values = _of_values(layer, lambda x: call(layer, x))
        return by_token(product, x, matrix, most_operations, values=values)

    return layer_call


def _experts(call: ModuleCall, most_operations: int) -> ModuleCall:
    def layer_call(layer: nn.Module, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> Any:
        """``x`` (tokens, ..., m, n) and ``indices`` (tokens or 1, ...)."""
        tokens = np.broadcast_shapes(x.shape[:-2], indices.shape)
        operations = 2 * math.prod(tokens) * x.shape[-2] * matrix_size(layer)
        if operations <= most_operations or tokens != x.shape[:-2] or indices.ndim != len(tokens):
            return call(layer, x, indices, sorted_indices=sorted_indices)

        def product(x: mx.array, indices: mx.array = indices) -> Any:
            return call(layer, x, indices, sorted_indices=sorted_indices)

        arrays = [x, indices] if len(indices) == len(x) else [x]
        product_of_values, values = _of_values(layer, product)
        return in_parts(product_of_values, arrays, operations, most_operations, values=values)

    return layer_call


def _heads(call: ModuleCall, most_operations: int) -> ModuleCall:
    def layer_call(layer: nn.Module, x: mx.array, transpose: bool = True) -> Any:
        """``x`` (rows, heads or 1, length, n)."""
        operations = 2 * x.shape[0] * x.shape[-2] * len(layer["weight"]) * matrix_size(layer)
        if operations <= most_operations or x.ndim != 4:
            return call(layer, x, transpose=transpose)
        product, values = _of_values(layer, lambda x: call(layer, x, transpose=transpose))
        return in_parts(product, [x], operations, most_operations, values=values, axis=2)

    return layer_call


def _of_values(layer: nn.Module, product: Product) -> tuple[Product, list[mx.array]]:
    """``product`` with the trainable parameters of ``layer`` as its last arguments, and these."""
    refs = ParameterRefs(layer)
    values = refs.get()

    def product_of_values(*inputs: mx.array) -> Any:
        arrays = len(inputs) - len(values)
        with refs.holding(inputs[arrays:]):
            return product(*inputs[:arrays])

    return product_of_values, values
