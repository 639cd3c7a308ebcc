"""The tokens of a mixture, laid out by expert: the gradient of a token is summed over its experts in a fixed order.

mlx-lm's ``_gather_sort`` takes each token once for each of its experts. MLX's gradient of that adds to the same memory
from many threads, in another order each time, and so with other bits. Here a token's gradients are first put side by
side, by the order that puts the results back, and then summed: as many kernels, and the same bits each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from macft.model.backends.operation import operation
from macft.model.module_classes import ModuleCall

SORTING_FUNCTION = "_gather_sort"
"""The function of mlx-lm that lays out the tokens of a mixture by expert."""


def sorted_by_expert(original: ModuleCall) -> ModuleCall:
    """Takes the place of :data:`SORTING_FUNCTION`, ``original``."""

    def gather_sort(x: mx.array, indices: mx.array) -> tuple[mx.array, ...]:
        """``x`` (..., 1, 1, d) and ``indices`` (..., experts) to (tokens * experts, 1, d) and what puts them back."""
        sorted_x, sorted_indices, back = original(mx.stop_gradient(x), indices)

        def backward(inputs: Sequence[mx.array], grad: mx.array, _output: Any) -> list[mx.array]:
            x, sorted_x, back = inputs
            of_tokens = grad[back].reshape(-1, indices.shape[-1], x.shape[-1]).sum(axis=1)
            return [of_tokens.reshape(x.shape), mx.zeros_like(sorted_x), mx.zeros_like(back)]

        as_sorted = operation(lambda _x, sorted_x, _back: sorted_x, backward)
        return as_sorted(x, sorted_x, back), sorted_indices, back

    return gather_sort
