"""The CPU backend: NumPy and OpenBLAS for float32 models on Linux."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from macft.device import blas
from macft.device.kind import Device
from macft.model.backends.base import CrossEntropy, Function, Lanes, Loss, LossAndGradient
from macft.model.backends.cpu.activations import fast_swiglu, softmax_parts
from macft.model.backends.cpu.attention import fast_attention
from macft.model.backends.cpu.cross_entropy import blockwise_cross_entropy
from macft.model.backends.cpu.eager import EagerLayers, detached
from macft.model.backends.cpu.lanes import ThreadLanes, replica_of
from macft.model.backends.lanes import OneLane
from macft.model.backends.mlx.backend import MlxBackend
from macft.model.backends.mlx.cross_entropy import (
    chunked_cross_entropy,
    loss_and_gradient_of,
    whole_cross_entropy,
)
from macft.model.backends.mlx.recurrence import chunked_recurrences, find_recurrences
from macft.model.execution import Execution, require_cpu_kernels
from macft.model.head import Head
from macft.model.module_classes import replaced_functions
from macft.model.packing import ATTENTION_FUNCTION, prepared_for_packs


class CpuBackend:
    """See :class:`~macft.model.backends.base.Backend`.

    Operations run in NumPy while MLX builds the graph, so nothing here can be compiled.

    Raises:
        ConfigError: ``execution`` or this machine is not what these kernels are for.
    """

    name = "cpu"
    is_eager = True

    def __init__(self, execution: Execution):
        device = Device(execution.device, openblas=blas.library() is not None)
        require_cpu_kernels(execution.weight_format, device, compiled=execution.compiled)
        self._execution = execution
        self._layers = EagerLayers(checkpoint_blocks=execution.recompute == "blocks")
        self._lanes: dict[int, ThreadLanes] = {}

    @contextmanager
    def installed(self, model: nn.Module) -> Iterator[None]:
        """See :class:`~macft.model.backends.base.Backend`."""
        lanes = self._execution.lanes
        models = [model, *(replica_of(model) for _ in range(lanes) if lanes > 1)]
        with ExitStack() as changes:
            for each in models:
                changes.enter_context(self._one_installed(each))
            if len(models) > 1:
                self._lanes[id(model)] = ThreadLanes(models)
                changes.callback(self._lanes.pop, id(model))
            yield

    def lanes(self, model: nn.Module) -> Lanes:
        """See :class:`~macft.model.backends.base.Backend`."""
        return self._lanes.get(id(model)) or OneLane(model)

    @contextmanager
    def _one_installed(self, model: nn.Module) -> Iterator[None]:
        with ExitStack() as changes:
            if any(value.dtype != mx.float32 for _, value in tree_flatten(model.parameters())):
                # The architecture keeps some of its weights in a type of its own.
                changes.enter_context(MlxBackend(self._execution).installed(model))
            else:
                functions = {"swiglu": fast_swiglu}
                recurrences = find_recurrences(model)
                if self._execution.packing:
                    changes.enter_context(prepared_for_packs(model, fast_attention))
                else:
                    functions[ATTENTION_FUNCTION] = fast_attention
                changes.enter_context(replaced_functions(model, functions))
                changes.enter_context(chunked_recurrences(recurrences, self._layers.recomputed))
                changes.enter_context(self._layers.installed(model))
            yield

    def cross_entropy(self, head: Head | None) -> CrossEntropy:
        """See :class:`~macft.model.backends.base.Backend`."""
        is_frozen = head is not None and head.is_frozen
        matrix = head.matrix if head is not None and is_frozen else None
        execution = self._execution

        def loss(hidden: mx.array, targets: mx.array, weights: mx.array, *, with_gradient: bool) -> mx.array:
            if head is None:
                return whole_cross_entropy(hidden, targets, weights)
            if matrix is not None and hidden.dtype == mx.float32:
                return blockwise_cross_entropy(
                    matrix, hidden, targets, weights, chunk=execution.loss_chunk, with_gradient=with_gradient
                )
            if not (with_gradient and is_frozen):
                return whole_cross_entropy(head(hidden[None])[0], targets, weights)
            chunk = execution.loss_chunk_for(head(hidden[:1][None]).shape[-1])
            return chunked_cross_entropy(
                head,
                hidden,
                targets,
                weights,
                chunk=chunk,
                loss_and_gradient=loss_and_gradient_of(softmax_parts),
                detached=detached,
            )

        return loss

    def types_in_products(self, model: nn.Module) -> Mapping[str, mx.Dtype]:  # noqa: ARG002
        """None: all is float32."""
        return {}

    def value_and_grad(self, model: nn.Module, loss: Loss) -> LossAndGradient:
        """See :class:`~macft.model.backends.base.Backend`."""
        return self._layers.value_and_grad(model, loss)

    def value(self, function: Function, *inputs: mx.array) -> mx.array:
        """See :class:`~macft.model.backends.base.Backend`."""
        return self._layers.value(function, *inputs)

    def vjp(
        self, function: Function, inputs: Sequence[mx.array], cotangent: mx.array
    ) -> tuple[mx.array, list[mx.array]]:
        """See :class:`~macft.model.backends.base.Backend`."""
        return self._layers.vjp(function, inputs, cotangent)
