"""Exponentials for MLX's CPU backend.

MLX's CPU wheel computes ``exp`` at about 20 ns an element, 40 times the cost of a multiplication, and with it a model's
activation function and its loss. NumPy's takes half a nanosecond (SIMD). Here it runs over blocks that stay in the
processor's cache, on all cores, as MLX builds the graph; on a CPU that makes no difference.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from macft.device import blas
from macft.model.backends.operation import operation
from macft.model.module_classes import ModuleCall

_BLOCK = 32_768
"""Elements at once: several arrays of them fit a core's cache."""
_WORTH_A_THREAD = 262_144

Values = NDArray[np.float32]


def fast_swiglu(original: ModuleCall) -> ModuleCall:
    """Takes the place of ``mlx_lm.models.activations.swiglu``, ``original``, for float32."""

    def function(gate: mx.array, x: mx.array) -> mx.array:
        if not gate.dtype == x.dtype == mx.float32:
            result: mx.array = original(gate, x)
            return result
        return swiglu(gate, x)

    return function


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """silu(gate) * x, float32, of one shape."""
    return _swiglu_operation(gate, x)


def _swiglu_forward(gate: mx.array, x: mx.array) -> mx.array:
    return mx.array(_computed(_swiglu, 1, np.asarray(gate), np.asarray(x))[0])


def _swiglu_backward(inputs: Sequence[mx.array], grad_output: mx.array, _output: mx.array) -> list[mx.array]:
    return [mx.array(part) for part in _computed(_swiglu_gradients, 2, *map(np.asarray, (*inputs, grad_output)))]


_swiglu_operation = operation(_swiglu_forward, _swiglu_backward)


def _swiglu(gate: Values, x: Values, out: Values) -> None:
    np.negative(gate, out=out)
    np.exp(out, out=out)
    out += 1.0
    np.divide(gate, out, out=out)
    out *= x


def _swiglu_gradients(gate: Values, x: Values, cotangent: Values, grad_gate: Values, grad_x: Values) -> None:
    sigmoid = np.negative(gate)
    np.exp(sigmoid, out=sigmoid)
    sigmoid += 1.0
    np.reciprocal(sigmoid, out=sigmoid)
    silu = gate * sigmoid
    np.multiply(cotangent, silu, out=grad_x)
    # silu' = sigmoid + silu * (1 - sigmoid)
    np.subtract(1.0, sigmoid, out=grad_gate)
    grad_gate *= silu
    grad_gate += sigmoid
    grad_gate *= cotangent
    grad_gate *= x


def softmax_parts(logits: mx.array, _maxima: mx.array | None = None) -> tuple[mx.array, mx.array]:
    """exp(logits - their maximum) (n, V), and the sums of those (n, 1), of float32 ``logits`` (n, V). No gradient."""
    values = np.asarray(logits)
    powers = np.empty(values.shape, np.float32)
    sums = np.empty((len(values), 1), np.float32)

    def work(rows: slice) -> None:
        for row in range(*rows.indices(len(values))):
            np.subtract(values[row], values[row].max(), out=powers[row])
            np.exp(powers[row], out=powers[row])
            sums[row] = powers[row].sum()

    _share(work, len(values), values.size)
    return mx.array(powers), mx.array(sums)


def _computed(kernel: Callable[..., None], results: int, *inputs: Values) -> list[Values]:
    """``kernel(*blocks of inputs, *blocks of results)`` over arrays of equal shapes."""
    flat = [np.ascontiguousarray(values).reshape(-1) for values in inputs]
    outputs = [np.empty(inputs[0].shape, np.float32) for _ in range(results)]
    flat += [values.reshape(-1) for values in outputs]
    size = flat[0].size

    def work(blocks: slice) -> None:
        with np.errstate(over="ignore"):  # exp of a very negative gate; its silu is 0
            for block in range(*blocks.indices(-(-size // _BLOCK))):
                kernel(*(values[block * _BLOCK : (block + 1) * _BLOCK] for values in flat))

    _share(work, -(-size // _BLOCK), size)
    return outputs


def _share(work: Callable[[slice], None], count: int, elements: int) -> None:
    """Gives ``count`` pieces of work to as many threads as a matrix product has."""
    cores = blas.threads() if elements >= _WORTH_A_THREAD else 1
    if cores == 1:
        return work(slice(0, count))
    ends = [count * core // cores for core in range(cores + 1)]
    parts = [slice(a, b) for a, b in itertools.pairwise(ends)]
    others = [_threads(cores).submit(work, part) for part in parts[1:]]
    work(parts[0])
    for other in others:
        other.result()
    return None


@lru_cache(1)
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="cpu")
