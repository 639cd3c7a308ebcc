"""SwiGLU that holds its two inputs for the backward pass, and computes it in one kernel.

MLX's own gradient holds the sigmoid of the gate and its product with the gate as well, and makes about ten arrays of
the feed-forward size, where it is not compiled as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import mlx.core as mx
from mlx_lm.models import activations

from macft.model.backends.operation import after, operation
from macft.model.module_classes import ModuleCall

SWIGLU_FUNCTION = "swiglu"
"""The function of mlx-lm that an architecture's feed-forward part calls."""


def lean_swiglu(original: ModuleCall) -> ModuleCall:
    """Takes the place of mlx-lm's ``swiglu``, ``original``; another function of that name stays."""
    return operation(original, _gradient) if original is activations.swiglu else original


def _gradient(inputs: Sequence[mx.array], grad_output: mx.array, _output: mx.array) -> list[mx.array]:
    # After the gradient, and each by itself: compiling unites what is computed twice from the same arrays, and what two
    # kernels need is an array.
    (gate, x), (again, _) = after(inputs, [grad_output]), after(inputs, [grad_output])
    return [_by_gate(gate, x, grad_output), _by_other(again, grad_output)]


@partial(mx.compile, shapeless=True)
def _by_gate(gate: mx.array, x: mx.array, grad_output: mx.array) -> mx.array:
    share = mx.sigmoid(gate)
    return grad_output * x * (share + gate * share * (1 - share))


@partial(mx.compile, shapeless=True)
def _by_other(gate: mx.array, grad_output: mx.array) -> mx.array:
    return grad_output * (gate * mx.sigmoid(gate))
