"""Cross-entropy of a linear head for MLX's CPU backend on Linux, with the gradient of the hidden states.

The gradient of a position is softmax(hidden @ head^T) @ head less its target's row of the head: attention of the hidden
states over the vocabulary. So it is computed as FlashAttention computes attention (Dao et al. 2022), in blocks of the
vocabulary with a running maximum: the head passes once, whatever the number of targets, and what is held of
[targets, vocabulary] fits the processor's cache, as in Cut Cross-Entropy (Wijmans et al. 2024). Exact.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from macft.device import blas
from macft.model.backends.operation import operation

_LOGITS_AT_ONCE = 2**20
_BLOCKS = 256, 2048
"""Fewest and most words of the vocabulary at once."""
_HIDDEN = np.float32(-1e30)

Matrix = NDArray[np.float32]


def blockwise_cross_entropy(
    matrix: mx.array,
    hidden: mx.array,
    targets: mx.array,
    weights: mx.array,
    *,
    chunk: int | None,
    with_gradient: bool,
) -> mx.array:
    """``sum(weights * cross_entropy(hidden @ matrix^T, targets))`` in nats, a float32 scalar.

    ``matrix`` (V, D) and ``hidden`` (N, D) are float32, ``targets`` (N,) int32, ``weights`` (N,) float32. ``chunk``: at
    most this many positions at once; None for all. The gradient reaches ``hidden`` only, and only ``with_gradient``. It
    runs as MLX builds the graph.
    """
    gradients: list[mx.array] = []

    def summed(hidden: mx.array) -> mx.array:
        values = np.ascontiguousarray(np.asarray(hidden))
        head, words, counted = np.asarray(matrix), np.asarray(targets), np.asarray(weights)
        step = chunk or max(1, len(values))
        parts = [
            cross_entropy(values[cut], head, words[cut], counted[cut], with_gradient=with_gradient)
            for cut in (slice(start, start + step) for start in range(0, len(values), step))
        ]
        gradients[:] = [mx.array(np.concatenate([gradient for _, gradient in parts]))] if with_gradient else []
        return mx.array(sum(loss for loss, _ in parts), mx.float32)

    def grad_hidden(_inputs: Sequence[mx.array], cotangent: mx.array, _output: mx.array) -> list[mx.array]:
        return [cotangent * gradients[0]]

    return operation(summed, grad_hidden)(hidden)


def cross_entropy(
    hidden: Matrix, head: Matrix, targets: NDArray[np.int32], weights: NDArray[np.float32], *, with_gradient: bool
) -> tuple[float, Matrix]:
    """``sum(weights * cross_entropy(hidden @ head^T, targets))`` in nats, and its gradient by ``hidden``.

    ``hidden`` (n, d), ``head`` (vocabulary, d), contiguous float32; ``targets`` and ``weights`` (n,). Without
    ``with_gradient`` the second result is all zeros.
    """
    count, vocabulary = len(hidden), len(head)
    size = min(max(_LOGITS_AT_ONCE // max(count, 1), _BLOCKS[0]), _BLOCKS[1], vocabulary)
    buffer = np.empty(count * size, np.float32)
    sums = np.zeros_like(hidden)  # of the other words' rows, weighted by their powers
    highest, others = np.full((count, 1), _HIDDEN), np.zeros((count, 1), np.float32)
    at_target = np.empty((count, 1), np.float32)
    by_target = np.argsort(targets, kind="stable")
    in_order = targets[by_target]
    with np.errstate(all="ignore"):  # a loss that isn't finite is found by the caller
        for start in range(0, vocabulary, size):
            words = head[start : start + size]
            logits = buffer[: count * len(words)].reshape(count, len(words))
            blas.product(hidden, words, logits, transposed=True)
            first, last = np.searchsorted(in_order, (start, start + len(words)))
            rows = by_target[first:last]
            columns = targets[rows] - start
            # Left out of the sums, a target close to certain costs them no digits.
            at_target[rows, 0], logits[rows, columns] = logits[rows, columns], _HIDDEN
            higher = np.maximum(highest, logits.max(axis=1, keepdims=True))
            if not np.array_equal(higher, highest):
                scale = np.exp(highest - higher)
                others *= scale
                if with_gradient:
                    sums *= scale
                highest = higher
            logits -= highest
            np.exp(logits, out=logits)
            others += logits.sum(axis=1, keepdims=True)
            if with_gradient:
                blas.product(logits, words, sums, add=True)
        higher = np.maximum(highest, at_target)
        scale = np.exp(highest - higher)
        others *= scale
        total = others + np.exp(at_target - higher)
        losses = (np.log(total) + higher - at_target)[:, 0] * weights
        if with_gradient:
            sums *= scale / total * weights[:, None]
            sums -= head[targets] * (others / total * weights[:, None])
    return float(losses.sum(dtype=np.float64)), sums
