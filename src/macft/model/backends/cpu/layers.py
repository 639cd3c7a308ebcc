"""The layers of a Llama-like block for MLX's CPU backend on Linux: NumPy and OpenBLAS, one call in place of many.

A step of a small model has some hundred layers, and MLX's operations on a CPU have a cost of their own, several times
that of the arithmetic in a norm, a rotary embedding or a low-rank product. Each layer here is its formula and the
gradient of it, for float32. :mod:`~macft.model.backends.cpu.eager` calls them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from macft.device import blas
from macft.model.mlx_lm_tuner import LoRALinear
from macft.model.module_classes import original_class
from macft.model.packing import PackedRope, PackLayout, layout_of_pack

Matrix = NDArray[np.float32]


class Kernel:
    """A layer's value, and the gradients by its input and by the values of its trained parameters, in their order."""

    def __init__(
        self, forward: Callable[..., Matrix], backward: Callable[..., tuple[Matrix, ...]], constants: tuple[Any, ...]
    ):
        self._forward, self._backward, self._constants = forward, backward, constants

    def forward(self, x: mx.array, *values: mx.array) -> mx.array:
        """The layer's result (..., out) for ``x`` (..., in) and the values of its trained parameters; float32."""
        return mx.array(self._forward(*self._constants, *map(np.asarray, (x, *values))))

    def backward(self, grad_output: mx.array, x: mx.array, *values: mx.array) -> tuple[mx.array, ...]:
        """The gradients by ``x`` (..., in) and by each of ``values``, from ``grad_output`` (..., out); float32."""
        gradients = self._backward(*self._constants, *map(np.asarray, (grad_output, x, *values)))
        return tuple(map(mx.array, gradients))


def kernel_for(layer: nn.Module, trained: list[str], x: mx.array) -> Kernel | None:
    """What computes ``layer`` for inputs like ``x``, float32 (..., in); None if no kernel does.

    ``trained``: names of its trained parameters.
    """
    kind = original_class(layer)
    if isinstance(layer, PackedRope):
        return _rope(layer, x)
    if kind is nn.RMSNorm and not trained:
        return Kernel(_norm, _norm_gradient, (np.asarray(layer.weight), layer.eps))
    if kind is nn.Linear and not trained:
        return Kernel(_linear, _linear_gradient, _frozen(layer))
    is_plain_lora = kind is LoRALinear and trained == ["lora_a", "lora_b"] and original_class(layer.linear) is nn.Linear
    if is_plain_lora and type(layer.dropout) is nn.Dropout and layer.dropout._p_1 == 1.0:
        return Kernel(_lora, _lora_gradient, (*_frozen(layer.linear), layer.scale))
    return None


def _frozen(linear: nn.Module) -> tuple[Matrix, Matrix | None]:
    return np.asarray(linear.weight), np.asarray(linear.bias) if "bias" in linear else None


def _rows(x: Matrix) -> Matrix:
    return np.ascontiguousarray(x.reshape(-1, x.shape[-1]))


def _norm(weight: Matrix, eps: float, x: Matrix) -> Matrix:
    output: Matrix = x * _root(eps, x)
    output *= weight
    return output


def _norm_gradient(weight: Matrix, eps: float, grad_output: Matrix, x: Matrix) -> tuple[Matrix]:
    root = _root(eps, x)
    grad_x: Matrix = grad_output * weight
    along = np.einsum("...i,...i->...", grad_x, x)[..., None] * (root**2 / np.float32(x.shape[-1]))
    grad_x -= x * along
    grad_x *= root
    return (grad_x,)


def _root(eps: float, x: Matrix) -> Matrix:
    squares = np.einsum("...i,...i->...", x, x)[..., None] / np.float32(x.shape[-1])
    root: Matrix = np.float32(1.0) / np.sqrt(squares + np.float32(eps))
    return root


def _linear(weight: Matrix, bias: Matrix | None, x: Matrix) -> Matrix:
    output = np.empty((*x.shape[:-1], len(weight)), np.float32)
    blas.product(_rows(x), weight, output.reshape(-1, len(weight)), transposed=True)
    if bias is not None:
        output += bias
    return output


def _linear_gradient(weight: Matrix, _bias: Matrix | None, grad_output: Matrix, x: Matrix) -> tuple[Matrix]:
    grad_x = np.empty(x.shape, np.float32)
    blas.product(_rows(grad_output), weight, grad_x.reshape(-1, x.shape[-1]))
    return (grad_x,)


def _lora(weight: Matrix, bias: Matrix | None, scale: float, x: Matrix, a: Matrix, b: Matrix) -> Matrix:
    output = _linear(weight, bias, x)
    blas.product(_low(x, a, scale), b, output.reshape(-1, b.shape[1]), add=True)
    return output


def _lora_gradient(
    weight: Matrix, bias: Matrix | None, scale: float, grad_output: Matrix, x: Matrix, a: Matrix, b: Matrix
) -> tuple[Matrix, Matrix, Matrix]:
    (grad_x,) = _linear_gradient(weight, bias, grad_output, x)
    rows, grad_rows = _rows(x), _rows(grad_output)
    grad_low = np.empty((len(rows), a.shape[1]), np.float32)
    blas.product(grad_rows, b, grad_low, transposed=True)
    grad_low *= np.float32(scale)
    blas.product(grad_low, a, grad_x.reshape(-1, x.shape[-1]), transposed=True, add=True)
    grad_a, grad_b = np.empty_like(a), np.empty_like(b)
    blas.product(rows, grad_low, grad_a, first_transposed=True)
    blas.product(_low(x, a, scale), grad_rows, grad_b, first_transposed=True)
    return grad_x, grad_a, grad_b


def _low(x: Matrix, a: Matrix, scale: float) -> Matrix:
    rows = _rows(x)
    low = np.empty((len(rows), a.shape[1]), np.float32)
    blas.product(rows, a, low)
    low *= np.float32(scale)
    return low


def _rope(layer: PackedRope, x: mx.array) -> Kernel | None:
    layout = layout_of_pack()
    tables = None if layout is None else _rope_tables(layer, layout, x.shape[-1])
    return None if tables is None else Kernel(_turned, _turned_back, tables)


def _rope_tables(layer: PackedRope, layout: PackLayout, width: int) -> tuple[Matrix, Matrix] | None:
    """Cosines and sines, (tokens, width / 2), by which a pack's elements are turned with those half a width on.

    None where this embedding pairs others, or not all of them.
    """
    rope: Any = layer.rope
    is_plain = original_class(rope) is nn.RoPE
    key = ("rope", width, (rope.dims, rope.traditional, rope.base, rope.scale) if is_plain else id(rope))
    if key not in layout.derived:
        layout.derived[key] = _computed_rope_tables(layer, layout, width)
    tables: tuple[Matrix, Matrix] | None = layout.derived[key]
    return tables


def _computed_rope_tables(layer: PackedRope, layout: PackLayout, width: int) -> tuple[Matrix, Matrix] | None:
    half = width // 2
    ones = np.repeat(np.eye(2, dtype=np.float32), half, axis=1)  # in the first half; in the second
    probe = mx.broadcast_to(mx.array(ones)[None, :, None], (1, 2, layout.depths.shape[0], 2 * half))
    first, second = np.array(layer.by_token(probe, layout))[0]
    cosines, sines = first[:, :half], first[:, half:]
    turns = np.array_equal(second[:, half:], cosines) and np.array_equal(second[:, :half], -sines)
    return (cosines, sines) if turns and width == 2 * half else None


def _turned(cosines: Matrix, sines: Matrix, x: Matrix) -> Matrix:
    """Each pair of an element and the one half the width further, turned by its token's angle."""
    turned = np.empty(x.shape, np.float32)
    half = cosines.shape[1]
    first, second = x[..., :half], x[..., half:]
    np.multiply(first, cosines, out=turned[..., :half])
    turned[..., :half] -= second * sines
    np.multiply(second, cosines, out=turned[..., half:])
    turned[..., half:] += first * sines
    return turned


def _turned_back(cosines: Matrix, sines: Matrix, grad_output: Matrix, _x: Matrix) -> tuple[Matrix]:
    return (_turned(cosines, -sines, grad_output),)
