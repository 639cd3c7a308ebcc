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
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear

from macft.model.backends.base import Loss, LossAndGradient
from macft.model.backends.cpu.layers import Kernel, kernel_for
from macft.model.backends.cpu.trees import put_together, take_apart
from macft.model.backends.operation import operation
from macft.model.module_classes import Members, ModuleCall, replaced_members
from macft.model.packing import PackedRope
from macft.model.parameter_refs import ParameterRefs

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
        if any(".layers." not in name for name, _ in tree_flatten(model.trainable_parameters())):
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

    @contextmanager
    def _building(self, is_building: bool) -> Iterator[None]:
        before, self._thread.is_building = self._thread.is_building, is_building
        try:
            yield
        finally:
            self._thread.is_building = before

    def _members(self, kind: type[nn.Module]) -> Members:
        call = kind.__call__

        def layer_call(layer: nn.Module, *given: Any, **named: Any) -> Any:
            if not self._thread.is_building:
                return call(layer, *given, **named)
            return self._call(call, layer, given, named)

        return {"__call__": layer_call}

    def _call(self, call: ModuleCall, layer: nn.Module, given: Sequence[Any], named: dict[str, Any]) -> Any:
        """``call(layer, *given, **named)`` as one operation to MLX."""
        if id(layer) in self._frozen:
            given, named = _detached_tree((given, named))
            return _detached_tree(call(layer, *given, **named))
        is_block = id(layer) in self._checkpointed
        if not is_block and not isinstance(layer, _KINDS):
            return call(layer, *given, **named)
        refs = self._trained[id(layer)]
        trained = refs.get()
        if not is_block and given and given[0].dtype == mx.float32:
            kernel = kernel_for(layer, refs.names, given[0])
            if kernel is not None:
                return _kernel_operation(kernel)(given[0], *trained)
        # Blocks may take and return more than one array: keys and values that later blocks share, for example. The
        # functions below hold nothing of the graph.
        frame, arrays = take_apart((given, named))
        count = len(arrays)
        frames: list[Any] = []

        def compute(*values: mx.array) -> list[mx.array]:
            refs.put(values[count:])
            given, named = put_together(frame, values[:count])
            output, outputs = take_apart(call(layer, *given, **named))
            frames[:] = [output]
            return outputs

        def forward(*values: mx.array) -> tuple[mx.array, ...]:
            with self._building(is_block):
                outputs = compute(*map(detached, values))
                if trained:  # evaluated alone, DoRA's result was seen to hold what led to it
                    return tuple(map(detached, outputs))
                mx.eval(outputs)
                return tuple(outputs)

        def backward(
            inputs: Sequence[mx.array], grad_outputs: Sequence[mx.array], _outputs: Sequence[mx.array]
        ) -> list[mx.array]:
            with self._building(is_block):
                _, gradients = mx.vjp(compute, list(map(detached, inputs)), list(map(detached, grad_outputs)))
                mx.eval(gradients)  # all at once: they have parts in common
                return list(map(detached, gradients))

        try:
            outputs = operation(forward, backward)(*arrays, *trained)
            return put_together(frames[0], outputs)
        finally:
            refs.put(trained)


def _detached_tree(tree: Any) -> Any:
    frame, arrays = take_apart(tree)
    return put_together(frame, list(map(detached, arrays)))


def _kernel_operation(kernel: Kernel) -> Callable[..., mx.array]:
    return operation(kernel.forward, lambda inputs, grad_output, _output: kernel.backward(grad_output, *inputs))


def detached(value: mx.array) -> mx.array:
    """The same numbers, of the same type, in an array that no graph leads to."""
    if value.dtype != mx.bfloat16:
        return mx.array(np.asarray(value))
    return mx.array(np.asarray(value.astype(mx.float32))).astype(value.dtype)  # NumPy has no bfloat16
