"""The portable backend."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from macft.model.backends.base import CrossEntropy, Function, Lanes, Loss, LossAndGradient
from macft.model.backends.lanes import OneLane
from macft.model.backends.mlx.attention import row_attention
from macft.model.backends.mlx.cross_entropy import (
    chunked_cross_entropy,
    logits_of,
    loss_in_chunks,
    whole_cross_entropy,
)
from macft.model.backends.mlx.experts import SORTING_FUNCTION, sorted_by_expert
from macft.model.backends.mlx.layers import frozen_norms, short_swiglu
from macft.model.backends.mlx.long_products import products_in_parts
from macft.model.backends.mlx.low_rank import in_base_type, types_in_products
from macft.model.backends.mlx.plain_attention import plain_attention
from macft.model.backends.mlx.query_blocks import attention_in_blocks
from macft.model.backends.mlx.recompute import kept_attention, kept_products, recomputed_blocks
from macft.model.backends.mlx.recurrence import chunked_recurrences, find_recurrences
from macft.model.execution import Execution
from macft.model.head import Head
from macft.model.module_classes import ModuleCall, replaced_functions, replaced_members
from macft.model.packing import ATTENTION_FUNCTION, prepared_for_packs


class MlxBackend:
    """See :class:`~macft.model.backends.base.Backend`. Everything is lazy, and can be compiled."""

    name = "mlx"
    is_eager = False

    def __init__(self, execution: Execution):
        self._execution = execution

    @contextmanager
    def installed(self, model: nn.Module) -> Iterator[None]:
        """See :class:`~macft.model.backends.base.Backend`."""
        with ExitStack() as changes:
            changes.enter_context(chunked_recurrences(find_recurrences(model)))
            most = self._execution.max_operations
            changes.enter_context(replaced_members(model.modules(), products_in_parts(most)))
            changes.enter_context(replaced_members(model.modules(), partial(in_base_type, most)))
            changes.enter_context(frozen_norms(model))
            changes.enter_context(
                replaced_functions(model, {"swiglu": short_swiglu, SORTING_FUNCTION: sorted_by_expert})
            )
            attention = partial(self._attention, model)
            if self._execution.packing:
                changes.enter_context(prepared_for_packs(model, attention))
            else:
                changes.enter_context(replaced_functions(model, {ATTENTION_FUNCTION: attention}))
            if self._execution.recompute == "cheap":
                changes.enter_context(kept_products(model, most))
            if self._execution.recompute != "none":
                changes.enter_context(recomputed_blocks(model))
            yield

    def _recomputes_attention(self, model: nn.Module) -> bool:
        """Whether the backward pass computes attention again; not by sinks that are trained, which MLX has to see."""
        trained = (name for name, _ in tree_flatten(model.trainable_parameters()))
        execution = self._execution
        return (execution.recompute != "none" or execution.supplies_blocks) and not any(
            name.endswith("sinks") for name in trained
        )

    def _attention(self, model: nn.Module, original: ModuleCall) -> ModuleCall:
        """What stands in for mlx-lm's attention, ``original``."""
        execution, recomputes = self._execution, self._recomputes_attention(model)

        def is_training() -> bool:
            return bool(model.training)

        attention = attention_in_blocks(
            plain_attention(original, is_training, execution.device),
            is_training,
            training_scores=execution.max_scores if recomputes else None,
            evaluation_scores=execution.max_evaluation_scores,
            most_operations=execution.max_operations,
            device=execution.device,
        )
        if execution.packing:
            attention = row_attention(attention)
        return kept_attention(attention) if recomputes and execution.recompute == "cheap" else attention

    def lanes(self, model: nn.Module) -> Lanes:
        """See :class:`~macft.model.backends.base.Backend`."""
        return OneLane(model)

    def cross_entropy(self, head: Head | None) -> CrossEntropy:
        """See :class:`~macft.model.backends.base.Backend`."""

        is_frozen = head is not None and head.is_frozen
        execution = self._execution

        def loss(hidden: mx.array, targets: mx.array, weights: mx.array, *, with_gradient: bool) -> mx.array:
            if head is None:
                return whole_cross_entropy(hidden, targets, weights)
            if with_gradient and not is_frozen:
                return whole_cross_entropy(logits_of(head, hidden), targets, weights)
            vocabulary = head(hidden[:1][None]).shape[-1]
            chunk = execution.loss_chunk_for(vocabulary)
            if not with_gradient:
                return loss_in_chunks(head, hidden, targets, weights, chunk=chunk)
            return chunked_cross_entropy(head, hidden, targets, weights, chunk=chunk)

        return loss

    def types_in_products(self, model: nn.Module) -> Mapping[str, mx.Dtype]:
        """See :class:`~macft.model.backends.base.Backend`."""
        return types_in_products(model)

    def value_and_grad(self, model: nn.Module, loss: Loss) -> LossAndGradient:
        """See :class:`~macft.model.backends.base.Backend`."""
        function = nn.value_and_grad(model, loss)

        def value_and_grad(*inputs: mx.array) -> tuple[mx.array, dict[str, mx.array]]:
            value, gradient = function(*inputs)
            return value, dict(tree_flatten(gradient))

        return value_and_grad

    def value(self, function: Function, *inputs: mx.array) -> mx.array:
        """See :class:`~macft.model.backends.base.Backend`."""
        return function(*inputs)

    def vjp(
        self, function: Function, inputs: Sequence[mx.array], cotangent: mx.array
    ) -> tuple[mx.array, list[mx.array]]:
        """See :class:`~macft.model.backends.base.Backend`."""
        outputs, gradients = mx.vjp(function, list(inputs), [cotangent])
        return outputs[0], gradients
