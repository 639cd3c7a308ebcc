"""Products of so many tokens that one kernel would run for seconds: computed in parts of the tokens.

Metal ends a command that runs longer than about five seconds. MLX ends a command buffer behind an operation on large
arrays, so that it holds one of the largest kernels at most; what has to have a limit is each kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from macft.model.backends.operation import after, operation
from macft.model.module_classes import Members, ModuleCall
from macft.model.parameter_refs import ParameterRefs


def products_in_parts(most_operations: int) -> Callable[[type[nn.Module]], Members | None]:
    """Members of linear layers that compute at most ``most_operations`` in one kernel; None for other modules.

    An addition and a multiplication count as two.
    """

    def members(kind: type[nn.Module]) -> Members | None:
        call = kind.__call__
        if call not in (nn.Linear.__call__, nn.QuantizedLinear.__call__):
            return None

        def layer_call(layer: nn.Module, x: mx.array) -> mx.array:
            parts = -(-2 * x.size * layer["weight"].shape[0] // most_operations)
            result: mx.array = call(layer, x) if parts < 2 else _in_parts(call, layer, x, parts)
            return result

        return {"__call__": layer_call}

    return members


def _in_parts(call: ModuleCall, layer: nn.Module, x: mx.array, parts: int) -> mx.array:
    refs = ParameterRefs(layer)
    tokens = x.reshape(-1, x.shape[-1])
    size = -(-len(tokens) // parts)
    borders = list(pairwise([*range(0, len(tokens), size), len(tokens)]))

    def compute(tokens: mx.array, *values: mx.array) -> mx.array:
        with refs.holding(values):
            result: mx.array = call(layer, tokens)
            return result

    def forward(tokens: mx.array, *values: mx.array) -> mx.array:
        return mx.concatenate([compute(tokens[start:end], *values) for start, end in borders])

    def backward(inputs: Sequence[mx.array], grad_output: Any, _output: mx.array) -> list[mx.array]:
        tokens, *values = after(inputs, [grad_output])
        grad_tokens: list[mx.array] = []
        sums: list[mx.array] = []
        for start, end in borders:
            _, (grad, *grads) = mx.vjp(compute, [tokens[start:end], *values], [grad_output[start:end]])
            grad_tokens.append(grad)
            sums = [total + one for total, one in zip(sums, grads, strict=True)] if sums else grads
        return [mx.concatenate(grad_tokens), *sums]

    result = operation(forward, backward)(tokens, *refs.get())
    return result.reshape(*x.shape[:-1], -1)
