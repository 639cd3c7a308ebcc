"""Exponentials for MLX's CPU backend.

MLX's CPU wheel computes ``exp`` at about 20 ns an element, 40 times the cost of a multiplication, and with it a model's
activation function and its loss. NumPy's takes half a nanosecond (SIMD). Here it runs over blocks that stay in the
processor's cache, on all cores, as MLX builds the graph; on a CPU that makes no difference.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from macft.device.blas import available_cores
from macft.device.mlx_device import numpy_may_compute
from macft.model.architecture import namespaces_with

_BLOCK = 32_768
"""Elements at once: several arrays of them fit a core's cache."""
_WORTH_A_THREAD = 262_144

Values = NDArray[np.float32]


def swiglu(gate: Any, x: Any) -> Any:
    """silu(gate) * x, float32, as mlx_lm.models.activations.swiglu."""
    by_numpy = numpy_may_compute() and gate.dtype == mx.float32
    return _swiglu_by_numpy(gate, x) if by_numpy else nn.silu(gate) * x


@mx.custom_function
def _swiglu_by_numpy(gate: Any, x: Any) -> Any:
    return mx.array(_computed(_swiglu, 1, np.asarray(gate), np.asarray(x))[0])


@_swiglu_by_numpy.vjp
def _swiglu_vjp(primals: tuple[Any, Any], cotangent: Any, _output: Any) -> tuple[Any, Any]:
    gate, x = primals
    by_gate, by_x = _computed(_swiglu_gradients, 2, np.asarray(gate), np.asarray(x), np.asarray(cotangent))
    return mx.array(by_gate), mx.array(by_x)


def _swiglu(gate: Values, x: Values, out: Values) -> None:
    np.negative(gate, out=out)
    np.exp(out, out=out)
    out += 1.0
    np.divide(gate, out, out=out)
    out *= x


def _swiglu_gradients(gate: Values, x: Values, cotangent: Values, by_gate: Values, by_x: Values) -> None:
    sigmoid = np.negative(gate)
    np.exp(sigmoid, out=sigmoid)
    sigmoid += 1.0
    np.reciprocal(sigmoid, out=sigmoid)
    silu = gate * sigmoid
    np.multiply(cotangent, silu, out=by_x)
    # silu' = sigmoid + silu * (1 - sigmoid)
    np.subtract(1.0, sigmoid, out=by_gate)
    by_gate *= silu
    by_gate += sigmoid
    by_gate *= cotangent
    by_gate *= x


def softmax_parts(logits: Any) -> tuple[Any, Any]:
    """exp(logits - their highest), and the sums of those, of float32 ``logits`` (n, vocabulary). No gradient."""
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
    found = [np.empty(inputs[0].shape, np.float32) for _ in range(results)]
    flat += [values.reshape(-1) for values in found]
    size = flat[0].size

    def work(blocks: slice) -> None:
        with np.errstate(over="ignore"):  # exp of a very negative gate; its silu is 0
            for block in range(*blocks.indices(-(-size // _BLOCK))):
                kernel(*(values[block * _BLOCK : (block + 1) * _BLOCK] for values in flat))

    _share(work, -(-size // _BLOCK), size)
    return found


def _share(work: Callable[[slice], None], count: int, elements: int) -> None:
    """Gives ``count`` pieces of work to the cores."""
    cores = available_cores() if elements >= _WORTH_A_THREAD else 1
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


def use_fast_activations(model: nn.Module) -> bool:
    """Lets ``model``'s architecture use the faster SwiGLU from now on; returns whether it has one to replace."""
    found = namespaces_with(model, "swiglu")
    for namespace in found:
        namespace["swiglu"] = swiglu
    return bool(found)
