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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from macft.model.backends.base import Function, Loss, LossAndGradient
from macft.model.backends.cpu.layers import Kernel, kernel_for
from macft.model.backends.operation import operation
from macft.model.backends.trees import holds_state, put_together, take_apart
from macft.model.head import trains_only_blocks
from macft.model.mlx_lm_tuner import DoRALinear, LoRALinear
from macft.model.module_classes import Members, ModuleCall, replaced_members
from macft.model.packing import PackedRope
from macft.model.parameter_refs import ParameterRefs

Arrays = tuple[mx.array, ...]
_KINDS = (nn.Linear, LoRALinear, DoRALinear, nn.RMSNorm, nn.LayerNorm, nn.RoPE, PackedRope)


class _Thread(threading.local):
    """Whether this thread builds the graph of a gradient, outside of any layer."""

    is_building = False


class EagerLayers:
    """Computes the layers of an installed model one by one while a gradient is built, as described above.

    Of blocks below all that is trained nothing is held, and with ``checkpoint_blocks`` of the others their input only.
    Outside of a gradient the layers are computed as they always are.
    """

    def __init__(self, *, checkpoint_blocks: bool):
        self._checkpoint_blocks = checkpoint_blocks
        self._thread = _Thread()
        # By id: blocks that no gradient reaches, and those that are computed again in the backward pass.
        self._frozen: set[int] = set()
        self._checkpointed: set[int] = set()
        # The trained parameters of each layer.
        self._trained: dict[int, ParameterRefs] = {}

    @contextmanager
    def installed(self, model: nn.Module) -> Iterator[None]:
        """Inside, the layers of ``model``, whose parameters are all float32, are computed this way.

        Several models can be inside at the same time.
        """
        blocks = list(getattr(model, "layers", []))
        below = list(itertools.takewhile(lambda block: not tree_flatten(block.trainable_parameters()), blocks))
        if not trains_only_blocks(model):
            below = []  # an embedding perhaps
        above = blocks[len(below) :] if self._checkpoint_blocks else []
        layers = [layer for layer in model.modules() if isinstance(layer, _KINDS)]
        frozen, checkpointed = set(map(id, below)), set(map(id, above))
        trained = {id(layer): ParameterRefs(layer) for layer in [*layers, *blocks]}
        self._frozen |= frozen
        self._checkpointed |= checkpointed
        self._trained |= trained
        try:
            with replaced_members([*layers, *blocks], self._members):
                yield
        finally:
            self._frozen -= frozen
            self._checkpointed -= checkpointed
            for key in trained:
                del self._trained[key]

    def value_and_grad(self, model: nn.Module, loss: Loss) -> LossAndGradient:
        """See :class:`~macft.model.backends.base.Backend`."""
        function = nn.value_and_grad(model, loss)

        def value_and_grad(*inputs: mx.array) -> tuple[mx.array, dict[str, mx.array]]:
            with self._building(True):
                value, gradient = function(*inputs)
            # Evaluated while the graph was built, they would hold all of it.
            return detached(value), {name: detached(grad) for name, grad in tree_flatten(gradient)}

        return value_and_grad

    def value(self, function: Function, *inputs: mx.array) -> mx.array:
        """See :class:`~macft.model.backends.base.Backend`."""
        with self._building(True):
            return detached(function(*inputs))

    def vjp(
        self, function: Function, inputs: Sequence[mx.array], cotangent: mx.array
    ) -> tuple[mx.array, list[mx.array]]:
        """See :class:`~macft.model.backends.base.Backend`."""
        with self._building(True):
            outputs, gradients = mx.vjp(function, list(map(detached, inputs)), [detached(cotangent)])
            mx.eval(gradients)  # all at once: they have parts in common
        return detached(outputs[0]), list(map(detached, gradients))

    def recomputed(self, function: Callable[..., Arrays], trained: ParameterRefs) -> Callable[..., Arrays]:
        """See :data:`macft.model.backends.mlx.recurrence.Recomputed`."""

        def call(*arrays: mx.array) -> Arrays:
            if not self._thread.is_building:
                return function(*arrays)
            return self._operation(function, arrays, trained, within=True)

        return call

    @contextmanager
    def _building(self, is_building: bool) -> Iterator[None]:
        before, self._thread.is_building = self._thread.is_building, is_building
        try:
            yield
        finally:
            self._thread.is_building = before

    def _members(self, kind: type[nn.Module]) -> Members:
        call = kind.__call__

        def layer_call(layer: nn.Module, *arguments: Any, **named: Any) -> Any:
            if not self._thread.is_building:
                return call(layer, *arguments, **named)
            return self._call(call, layer, arguments, named)

        return {"__call__": layer_call}

    def _call(self, call: ModuleCall, layer: nn.Module, arguments: Sequence[Any], named: dict[str, Any]) -> Any:
        """``call(layer, *arguments, **named)`` as one operation to MLX."""
        if id(layer) in self._frozen:
            frame, given = take_apart((arguments, named))
            arguments, named = put_together(frame, list(map(detached, given)))
            frame, outputs = take_apart(call(layer, *arguments, **named))
            return put_together(frame, list(map(detached, outputs)))
        is_block = id(layer) in self._checkpointed and not holds_state((arguments, named))
        if not is_block and not isinstance(layer, _KINDS):
            return call(layer, *arguments, **named)
        refs = self._trained[id(layer)]
        if not is_block:
            x: mx.array = arguments[0] if arguments else next(iter(named.values()))
            kernel = kernel_for(layer, refs.names, x) if x.dtype == mx.float32 else None
            if kernel is not None:
                return _kernel_operation(kernel)(x, *refs.get())
        frame, given = take_apart((arguments, named))
        return self._on_arrays(call, layer, frame, given, within=is_block)

    def _on_arrays(
        self, call: ModuleCall, layer: nn.Module, frame: Any, given: Sequence[mx.array], *, within: bool
    ) -> Any:
        """The layer for the arguments ``given`` in ``frame``, as one operation.

        Blocks may take and return more than one array: keys and values that later blocks share, for example. What the
        operation keeps holds nothing of the graph.
        """
        frame_of_result: Any = None

        def function(*arrays: mx.array) -> Arrays:
            nonlocal frame_of_result
            arguments, named = put_together(frame, arrays)
            frame_of_result, outputs = take_apart(call(layer, *arguments, **named))
            return tuple(outputs)

        outputs = self._operation(function, tuple(given), self._trained[id(layer)], within=within)
        return put_together(frame_of_result, outputs)

    def _operation(
        self, function: Callable[..., Arrays], arrays: Arrays, refs: ParameterRefs, *, within: bool
    ) -> Arrays:
        """``function(*arrays)``, which uses the parameters of ``refs``, as one operation to MLX.

        ``within``: layers that it calls are computed one by one, too.
        """
        trained, count = refs.get(), len(arrays)
        is_trained = bool(trained)  # the functions below hold no array of the graph

        def compute(*inputs: mx.array) -> Arrays:
            refs.put(inputs[count:])
            return function(*inputs[:count])

        def forward(*inputs: mx.array) -> Arrays:
            with self._building(within):
                outputs = compute(*map(detached, inputs))
                if is_trained:  # evaluated alone, DoRA's result was seen to hold what led to it
                    return tuple(map(detached, outputs))
                mx.eval(outputs)
                return outputs

        def backward(inputs: Sequence[mx.array], grad_outputs: Arrays, _outputs: Arrays) -> list[mx.array]:
            with self._building(within):
                _, gradients = mx.vjp(compute, list(map(detached, inputs)), list(map(detached, grad_outputs)))
                mx.eval(gradients)  # all at once: they have parts in common
                return list(map(detached, gradients))

        try:
            return operation(forward, backward)(*arrays, *trained)
        finally:
            refs.put(trained)


def _kernel_operation(kernel: Kernel) -> Callable[..., mx.array]:
    return operation(kernel.forward, lambda inputs, grad_output, _output: kernel.backward(grad_output, *inputs))


def detached(value: mx.array) -> mx.array:
    """The same numbers, of the same type, in an array that no graph leads to."""
    if value.dtype != mx.bfloat16:
        return mx.array(np.asarray(value))
    return mx.array(np.asarray(value.astype(mx.float32))).astype(value.dtype)  # NumPy has no bfloat16
