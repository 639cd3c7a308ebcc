"""Training on MLX's CPU backend operation by operation, without holding what the backward pass doesn't need.

The fast attention and exponentials of the CPU (:mod:`~macft.model.backends.cpu.attention`,
:mod:`~macft.model.backends.cpu.activations`) need their inputs while MLX still builds the graph of a gradient, and as
long as it does, MLX holds all that has led to an evaluated array. So here each linear layer, norm and rotary
embedding is one operation to MLX: it gets its inputs as plain arrays, outside of the graph, and its gradient is taken
by itself. Held are inputs and outputs of the layers only, and nothing is computed twice but a low-rank product.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear

from macft.device.mlx_device import on_cpu
from macft.model.backends.cpu.layers import Kernel, kernel_for
from macft.model.packing import PackedRope, use_row_attention
from macft.model.parameter_refs import ParameterRefs

_KINDS = (nn.Linear, LoRALinear, DoRALinear, nn.RMSNorm, nn.LayerNorm, nn.RoPE, PackedRope)


@dataclass(frozen=True)
class Plan:
    """Ids of blocks: those that no gradient reaches, and those that are computed anew in the backward pass."""

    frozen: frozenset[int]
    checkpointed: frozenset[int]
    # The trained parameters of each layer, by its id.
    trained: dict[int, ParameterRefs] = field(default_factory=dict)


class _State(threading.local):
    """Whether this thread builds the graph of a gradient, outside of any layer."""

    is_building = False
    plan = Plan(frozenset(), frozenset())


_state = _State()


@contextmanager
def eager(plan: Plan) -> Iterator[None]:
    """Inside, this thread's layers are computed one by one, as described above; ``plan`` is what ``prepare`` gave."""
    _state.is_building, _state.plan = True, plan
    try:
        yield
    finally:
        _state.is_building = False


def prepare(model: nn.Module, *, checkpoint_blocks: bool) -> Plan | None:
    """Prepares ``model`` to be trained this way; None where it can't be: only on a CPU, in float32.

    Of blocks below all that is trained nothing is held, and with ``checkpoint_blocks`` of the others their input only.
    """
    dtypes = {value.dtype for _, value in tree_flatten(model.parameters())}
    if not on_cpu() or dtypes != {mx.float32}:
        return None
    use_row_attention(model)
    blocks = list(getattr(model, "layers", []))
    for kind in (*_KINDS, *{type(block) for block in blocks}):
        if not isinstance(kind.__call__, _Layer):
            kind.__call__ = _Layer(kind.__call__)
    trained = [name for name, _ in tree_flatten(model.trainable_parameters())]
    below = list(itertools.takewhile(lambda block: not tree_flatten(block.trainable_parameters()), blocks))
    if any(".layers." not in name for name in trained):
        below = []  # an embedding perhaps
    others = blocks[len(below) :] if checkpoint_blocks else []
    places = {id(layer): ParameterRefs(layer) for layer in model.modules()}
    return Plan(frozenset(map(id, below)), frozenset(map(id, others)), places)


class _Layer:
    """Takes the place of a layer's ``__call__``."""

    def __init__(self, call: Callable[..., Any]):
        self._call = call

    def __get__(self, layer: Any, _kind: type | None = None) -> Any:
        return self if layer is None else lambda *arguments, **named: self(layer, *arguments, **named)

    def __call__(self, layer: nn.Module, x: Any, *rest: Any, **named: Any) -> Any:
        if not _state.is_building:
            return self._call(layer, x, *rest, **named)
        if id(layer) in _state.plan.frozen:
            return plain(self._call(layer, plain(x), *rest, **named))
        is_block = id(layer) in _state.plan.checkpointed
        if not is_block and not isinstance(layer, _KINDS):
            return self._call(layer, x, *rest, **named)
        places = _state.plan.trained[id(layer)]
        trained = places.get()
        kernel = None if is_block else kernel_for(layer, places.names, x)
        if kernel is not None:
            return _by(kernel)(x, *trained)

        def plainly(x: Any, *values: Any) -> Any:
            places.put(values)
            return self._call(layer, x, *rest, **named)

        @mx.custom_function
        def whole(x: Any, *values: Any) -> Any:
            with _building(is_block):
                found = plainly(plain(x), *map(plain, values))
                if trained:  # evaluated alone, DoRA's result was seen to hold what led to it
                    return plain(found)
                mx.eval(found)
                return found

        @whole.vjp
        def _whole_vjp(primals: Any, cotangent: Any, _output: Any) -> Any:
            inputs = [plain(value) for value in (primals if isinstance(primals, list | tuple) else [primals])]
            with _building(is_block):
                _, gradients = mx.vjp(plainly, inputs, [plain(cotangent)])
                mx.eval(gradients)  # all at once: they have parts in common
                found = tuple(map(plain, gradients))
            return found if len(found) > 1 else found[0]

        try:
            return whole(x, *trained)
        finally:
            places.put(trained)


def _by(kernel: Kernel) -> Callable[..., Any]:
    """``kernel`` as one operation to MLX."""
    whole = mx.custom_function(kernel.forward)

    @whole.vjp
    def _whole_vjp(primals: Any, cotangent: Any, _output: Any) -> Any:
        found = kernel.backward(cotangent, *(primals if isinstance(primals, list | tuple) else [primals]))
        return found if len(found) > 1 else found[0]

    return whole


@contextmanager
def _building(is_building: bool) -> Iterator[None]:
    before, _state.is_building = _state.is_building, is_building
    try:
        yield
    finally:
        _state.is_building = before


def plain(value: Any) -> Any:
    """The same numbers, of the same type, in an array that no graph leads to."""
    if value.dtype == mx.float32:
        return mx.array(np.asarray(value))
    return mx.array(np.asarray(value.astype(mx.float32))).astype(value.dtype)
