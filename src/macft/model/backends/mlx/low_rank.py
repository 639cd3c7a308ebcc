"""LoRA and DoRA layers in the type of their base, so that no activation exists in float32.

mlx-lm holds the low-rank matrices in float32, and so does macft, for they are what is trained. mlx-lm also multiplies
in float32, for which MLX makes a float32 copy of a layer's input and result, and holds that of the input until the
backward pass. Here the matrices, which are small, take the type of the activations; MLX's matrix products add up in
float32 all the same. In a float32 model nothing changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from macft.model.backends.mlx.long_products import by_token, matrix_size
from macft.model.backends.operation import after, operation
from macft.model.mlx_lm_tuner import DoRALinear, LoRALinear, LoRASwitchLinear
from macft.model.module_classes import Members

KINDS = (LoRALinear, LoRASwitchLinear, DoRALinear)
"""The adapter layers of blocks."""
Product = Callable[..., mx.array]
"""Arrays to an array."""


def in_base_type(most_operations: int, kind: type[nn.Module]) -> Members | None:
    """Members of adapter layers that compute this way; None for other modules.

    ``most_operations``: see :mod:`~macft.model.backends.mlx.long_products`.
    """
    if issubclass(kind, DoRALinear):
        return {"__call__": lambda layer, x: dora(layer, x, most_operations)}
    if not issubclass(kind, KINDS):
        return None
    call = kind.__call__
    has_experts = issubclass(kind, LoRASwitchLinear)

    def layer_call(layer: nn.Module, x: mx.array, *arguments: Any, **named: Any) -> Any:
        if not has_experts and layer.dropout(x) is x:
            return lora(layer, x)

        def compute(x: mx.array, *values: mx.array) -> mx.array:
            before = layer["lora_a"], layer["lora_b"]
            try:
                layer["lora_a"], layer["lora_b"] = (value.astype(x.dtype) for value in values)
                result: mx.array = call(layer, x, *arguments, **named)
                return result
            finally:
                layer["lora_a"], layer["lora_b"] = before

        # What goes to which expert is known while the layer is called, and not when a gradient is computed.
        product = compute if has_experts else matrices_first(compute)
        return product(x, layer["lora_a"], layer["lora_b"])

    return {"__call__": layer_call}


def types_in_products(model: nn.Module) -> dict[str, mx.Dtype]:
    """By name, low-rank matrices of ``model`` that are multiplied in another type than their own, and that type.

    It is that of their base's results. DoRA also uses its matrices as they are.
    """
    types: dict[str, mx.Dtype] = {}
    for name, module in model.named_modules():
        if isinstance(module, KINDS) and not isinstance(module, DoRALinear):
            base = module.linear
            kind = (base["scales"] if "scales" in base else base["weight"]).dtype
            wanted = {f"{name}.{matrix}": kind for matrix in ("lora_a", "lora_b") if module[matrix].dtype != kind}
            types |= wanted if mx.issubdtype(kind, mx.floating) else {}
    return types


def lora(layer: Any, x: mx.array, kept: Callable[[Product], Product] = lambda product: product) -> mx.array:
    """``LoRALinear.__call__`` without dropout: three products going forward, and five going back.

    ``kept`` is given the functions whose results are costly.
    """
    scale = layer.scale
    a, b = (value.astype(x.dtype) for value in (layer["lora_a"], layer["lora_b"]))

    def forward(x: mx.array, _a: mx.array, b: mx.array, low: mx.array) -> mx.array:
        return plus(layer.linear(x), low, b, scale)

    def backward(inputs: Sequence[mx.array], grad: mx.array, _output: mx.array) -> list[mx.array]:
        x, a, b, low = inputs
        grad_low = grad @ b.T
        grad_a, grad_b = (_matrix_gradient(one, other, scale) for one, other in ((x, grad_low), (low, grad)))
        # The gradient of a product with frozen weights does not depend on its input.
        of_base = mx.vjp(layer.linear, [mx.zeros(x.shape, x.dtype)], [grad])[1][0]
        grad_x = plus(of_base, grad_low, a.T, scale)
        return [mx.depends([grad_x], [grad_a, grad_b])[0], grad_a, grad_b, mx.zeros_like(low)]

    # The low-rank product is an input: as a result it would be computed again only together with the other one.
    low = mx.stop_gradient(kept(lambda x, a: x @ a)(x, a))
    return kept(operation(forward, backward))(x, a, b, low)


def _matrix_gradient(x: mx.array, grad: mx.array, scale: float) -> mx.array:
    """``scale * x.T @ grad`` over all tokens, in one kernel."""
    return mx.addmm(mx.zeros(grad.shape[-1:], grad.dtype), _rows(x).T, _rows(grad), alpha=scale)


def plus(values: mx.array, x: mx.array, matrix: mx.array, scale: float) -> mx.array:
    """``values + scale * (x @ matrix)`` in one kernel, of ``values`` (..., n), ``x`` (..., k) and ``matrix`` (k, n)."""
    return mx.addmm(_rows(values), _rows(x), matrix, alpha=scale).reshape(values.shape)


def _rows(x: mx.array) -> mx.array:
    return x.reshape(-1, x.shape[-1])


def matrices_first(function: Product) -> Product:
    """``function`` of an input and matrices, whose input's gradient is computed after that of the matrices.

    MLX computes last what nothing else waits for: the matrices' gradients, for which it would hold the inputs, and the
    gradients of the outputs, of several layers.
    """

    def backward(inputs: Sequence[mx.array], grad_output: mx.array, _output: mx.array) -> list[mx.array]:
        _, (grad, *of_matrices) = mx.vjp(function, after(inputs, [grad_output]), [grad_output])
        return [mx.depends([grad], of_matrices)[0], *of_matrices]

    return operation(function, backward)


def dora(
    layer: Any, x: mx.array, most_operations: int, product: Callable[[Product], Product] = matrices_first
) -> mx.array:
    """``DoRALinear.__call__``; ``product`` is given the function of input and matrices that is costly.

    That with the frozen matrix takes at most ``most_operations`` at once.
    """

    def adapted(x: mx.array, a: mx.array, b: mx.array) -> mx.array:
        low: mx.array = (layer.dropout(x) @ a.astype(x.dtype)) @ b.astype(x.dtype)
        base = by_token(lambda x: x @ _weight_after(layer, x).T, x, matrix_size(layer.linear), most_operations)
        result: mx.array = base + (layer.scale * low).astype(x.dtype)
        return result

    output: mx.array = product(adapted)(x, layer.lora_a, layer.lora_b)
    a, b = after([layer.lora_a, layer.lora_b], [output])
    weight = _weight_after(layer, output) + (layer.scale * b.T) @ a.T
    length = mx.stop_gradient(mx.linalg.norm(weight, axis=1))
    output = (layer.m / length).astype(x.dtype) * output
    if "bias" in layer.linear:
        output = output + layer.linear.bias
    return output


def _weight_after(layer: Any, x: mx.array) -> mx.array:
    """The weights of a DoRA layer's base, dequantised when ``x`` is there: else MLX makes those of all layers first."""
    stored = layer.linear.weight
    try:
        (layer.linear.weight,) = after([stored], [x])
        weight: mx.array = layer._dequantized_weight()
        return weight
    finally:
        layer.linear.weight = stored
