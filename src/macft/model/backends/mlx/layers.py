"""Norms and SwiGLU with gradients written out, so that they take fewer kernels and hold less than MLX's own.

MLX's gradient of a norm also computes that of its weights, which are frozen in LoRA. Its gradient of SwiGLU goes back
through each of the operations and holds their results; here a step holds what SwiGLU is given, and computes the rest
again in the kernels that make the gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn

from macft.model.backends.operation import after, operation
from macft.model.module_classes import Members, ModuleCall, replaced_members


@contextmanager
def frozen_norms(model: nn.Module) -> Iterator[None]:
    """Inside, RMS norms of ``model`` whose weights are frozen have no gradient by them."""
    norms = [module for module in model.modules() if _is_norm(module) and not module.trainable_parameters()]
    with replaced_members(norms, _norm_members):
        yield


def _is_norm(module: nn.Module) -> bool:
    return type(module).__call__ is nn.RMSNorm.__call__


def _norm_members(kind: type[nn.Module]) -> Members:
    call = kind.__call__

    def norm_call(norm: nn.RMSNorm, x: mx.array) -> mx.array:
        result: mx.array = rms_norm(x, norm.weight, norm.eps) if norm.training else call(norm, x)
        return result

    return {"__call__": norm_call}


def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """``mx.fast.rms_norm``; the gradient reaches ``x`` only."""

    def backward(inputs: Sequence[mx.array], grad: mx.array, _output: mx.array) -> list[mx.array]:
        scaled = grad * weight
        without: list[mx.array] = mx.vjp(lambda x: mx.fast.rms_norm(x, None, eps), after(inputs, [scaled]), [scaled])[1]
        return without

    return operation(lambda x: mx.fast.rms_norm(x, weight, eps), backward)(x)


def short_swiglu(original: ModuleCall) -> ModuleCall:
    """Takes the place of ``mlx_lm.models.activations.swiglu``, ``original``."""

    def backward(inputs: Sequence[mx.array], grad: mx.array, _output: mx.array) -> list[mx.array]:
        # Two of each: MLX would unite equal sigmoids, forward and backward, and make a kernel of what others share.
        (gate, x), (other, _) = after(inputs, [grad]), after(inputs, [grad])
        sigmoid = mx.sigmoid(gate)
        return [grad * x * (sigmoid + gate * sigmoid * (1 - sigmoid)), grad * (other * mx.sigmoid(other))]

    return operation(original, backward)
