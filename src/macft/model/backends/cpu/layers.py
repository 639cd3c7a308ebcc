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
from mlx_lm.tuner.lora import LoRALinear
from numpy.typing import NDArray

from macft.device import blas
from macft.model.packing import PackedRope, layout_of_pack

Matrix = NDArray[np.float32]


class Kernel:
    """A layer's value, and the gradients by its input and by the values of its trained parameters, in their order."""

    def __init__(
        self, forward: Callable[..., Matrix], backward: Callable[..., tuple[Matrix, ...]], constants: tuple[Any, ...]
    ):
        self._forward, self._backward, self._constants = forward, backward, constants

    def forward(self, x: Any, *values: Any) -> Any:
        """Arrays with values, the layer's input and its trained parameters, to an array."""
        return mx.array(self._forward(*self._constants, *map(np.asarray, (x, *values))))

    def backward(self, gradient: Any, x: Any, *values: Any) -> tuple[Any, ...]:
        """As forward, with the gradient by its result."""
        found = self._backward(*self._constants, *map(np.asarray, (gradient, x, *values)))
        return tuple(map(mx.array, found))


def kernel_for(layer: nn.Module, trained: list[str], x: Any) -> Kernel | None:
    """What computes ``layer`` for the float32 ``x``, if anything does; ``trained``: names of its trained parameters."""
    if blas.library() is None:
        return None
    kind = type(layer)
    if kind is PackedRope:
        return _rope(layer, x)
    if kind is nn.RMSNorm and not trained:
        return Kernel(_norm, _norm_gradient, (np.asarray(layer.weight), layer.eps))
    if kind is nn.Linear and not trained:
        return Kernel(_linear, _linear_gradient, _frozen(layer))
    is_plain_lora = kind is LoRALinear and trained == ["lora_a", "lora_b"] and type(layer.linear) is nn.Linear
    if is_plain_lora and type(layer.dropout) is nn.Dropout and layer.dropout._p_1 == 1.0:
        return Kernel(_lora, _lora_gradient, (*_frozen(layer.linear), layer.scale))
    return None


def _frozen(linear: nn.Module) -> tuple[Matrix, Matrix | None]:
    return np.asarray(linear.weight), np.asarray(linear.bias) if "bias" in linear else None


def _rows(x: Matrix) -> Matrix:
    return np.ascontiguousarray(x.reshape(-1, x.shape[-1]))


def _norm(weight: Matrix, eps: float, x: Matrix) -> Matrix:
    found: Matrix = x * _root(eps, x)
    found *= weight
    return found


def _norm_gradient(weight: Matrix, eps: float, gradient: Matrix, x: Matrix) -> tuple[Matrix]:
    root = _root(eps, x)
    found: Matrix = gradient * weight
    along = np.einsum("...i,...i->...", found, x)[..., None] * (root**2 / np.float32(x.shape[-1]))
    found -= x * along
    found *= root
    return (found,)


def _root(eps: float, x: Matrix) -> Matrix:
    squares = np.einsum("...i,...i->...", x, x)[..., None] / np.float32(x.shape[-1])
    root: Matrix = np.float32(1.0) / np.sqrt(squares + np.float32(eps))
    return root


def _linear(weight: Matrix, bias: Matrix | None, x: Matrix) -> Matrix:
    found = np.empty((*x.shape[:-1], len(weight)), np.float32)
    blas.product(_rows(x), weight, found.reshape(-1, len(weight)), transposed=True)
    if bias is not None:
        found += bias
    return found


def _linear_gradient(weight: Matrix, _bias: Matrix | None, gradient: Matrix, x: Matrix) -> tuple[Matrix]:
    found = np.empty(x.shape, np.float32)
    blas.product(_rows(gradient), weight, found.reshape(-1, x.shape[-1]))
    return (found,)


def _lora(weight: Matrix, bias: Matrix | None, scale: float, x: Matrix, a: Matrix, b: Matrix) -> Matrix:
    found = _linear(weight, bias, x)
    blas.product(_low(x, a, scale), b, found.reshape(-1, b.shape[1]), add=True)
    return found


def _lora_gradient(
    weight: Matrix, bias: Matrix | None, scale: float, gradient: Matrix, x: Matrix, a: Matrix, b: Matrix
) -> tuple[Matrix, Matrix, Matrix]:
    (by_x,) = _linear_gradient(weight, bias, gradient, x)
    rows, by_rows = _rows(x), _rows(gradient)
    by_low = np.empty((len(rows), a.shape[1]), np.float32)
    blas.product(by_rows, b, by_low, transposed=True)
    by_low *= np.float32(scale)
    blas.product(by_low, a, by_x.reshape(-1, x.shape[-1]), transposed=True, add=True)
    by_a, by_b = np.empty_like(a), np.empty_like(b)
    blas.product(rows, by_low, by_a, first_transposed=True)
    blas.product(_low(x, a, scale), by_rows, by_b, first_transposed=True)
    return by_x, by_a, by_b


def _low(x: Matrix, a: Matrix, scale: float) -> Matrix:
    rows = _rows(x)
    low = np.empty((len(rows), a.shape[1]), np.float32)
    blas.product(rows, a, low)
    low *= np.float32(scale)
    return low


def _rope(layer: PackedRope, x: Any) -> Kernel | None:
    layout = layout_of_pack()
    tables = None if layout is None else layer.tables(layout, x.shape[-1])
    return None if tables is None else Kernel(_turned, _turned_back, tables)


def _turned(cosines: Matrix, sines: Matrix, x: Matrix) -> Matrix:
    """Each pair of an element and the one half the width further, turned by its token's angle."""
    found = np.empty(x.shape, np.float32)
    half = cosines.shape[1]
    first, second = x[..., :half], x[..., half:]
    np.multiply(first, cosines, out=found[..., :half])
    found[..., :half] -= second * sines
    np.multiply(second, cosines, out=found[..., half:])
    found[..., half:] += first * sines
    return found


def _turned_back(cosines: Matrix, sines: Matrix, gradient: Matrix, _x: Matrix) -> tuple[Matrix]:
    return (_turned(cosines, -sines, gradient),)
