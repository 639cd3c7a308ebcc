"""Cross-entropy in chunks of target positions, so that [targets, vocabulary] is never held.

The head is frozen in LoRA, so all the backward pass needs is the gradient of the hidden states. It is computed with the
loss, chunk by chunk, while a chunk's logits are there (as in Liger Kernel, Hsu et al. 2024, and in the spirit of Cut
Cross-Entropy, Wijmans et al. 2024). Exact: nothing is sampled, filtered or rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from macft.device.mlx_device import numpy_may_compute, on_cpu
from macft.model.backends.cpu.activations import softmax_parts
from macft.model.backends.cpu.cross_entropy import available, cross_entropy
from macft.model.backends.cpu.eager import plain

_ELEMENTS_ON_CPU = 2**21
_ELEMENTS_ON_GPU = 2**25
"""Most logits in a chunk of automatic size, unless 64 targets have more: MLX holds about 12 arrays of that size."""


def chunk_size(vocabulary: int, wanted: int | None) -> int:
    """Target positions in a chunk: ``wanted``, or for None as many as are fast, at least 64."""
    if wanted is not None:
        return wanted
    return max(64, (_ELEMENTS_ON_CPU if on_cpu() else _ELEMENTS_ON_GPU) // vocabulary)


def _forward(logits: Any, targets: Any, weights: Any) -> tuple[Any, Any]:
    """Summed loss of ``logits`` (n, vocabulary) and its gradient with respect to them, in their dtype."""
    dtype, logits = logits.dtype, logits.astype(mx.float32)
    highest = logits.max(axis=-1, keepdims=True)
    if numpy_may_compute():
        powers, total = softmax_parts(logits)
    else:
        powers = mx.exp(logits - highest)
        total = powers.sum(axis=-1, keepdims=True)
    right = mx.take_along_axis(logits, targets[:, None], axis=-1) - highest
    loss = ((mx.log(total) - right)[:, 0] * weights).sum()
    gradient = powers * (weights[:, None] / total)
    at_target = mx.take_along_axis(gradient, targets[:, None], axis=-1) - weights[:, None]
    return loss, mx.put_along_axis(gradient, targets[:, None], at_target, axis=-1).astype(dtype)


def _same(value: Any) -> Any:
    return value


def chunked_cross_entropy(
    head: Callable[[Any], Any], hidden: Any, targets: Any, weights: Any, *, wanted_chunk: int | None
) -> Any:
    """``sum(weights * cross_entropy(head(hidden), targets))``, float32.

    ``hidden`` (n, d), ``targets`` (n,) int32, ``weights`` (n,) float32. The gradient reaches ``hidden`` only: ``head``
    must hold no trainable parameter.
    """
    vocabulary = head(hidden[:1][None]).shape[-1]
    size = chunk_size(vocabulary, wanted_chunk)

    @mx.custom_function
    def loss_and_gradient(hidden: Any) -> tuple[Any, Any]:
        # On a CPU logits are computed at once, and what leads to a result would be held as long as the graph.
        cut = plain if numpy_may_compute() else _same
        hidden = cut(hidden)
        value = loss = mx.zeros(())
        parts: list[Any] = []
        for start in range(0, hidden.shape[0], size):
            part = hidden[start : start + size]
            if parts:  # one chunk after the other, its loss included, so that only one's logits are there
                part = mx.depends([part], [parts[-1], value])[0]
            end = start + size
            value, by_logit = _forward(head(part[None])[0], targets[start:end], weights[start:end])
            parts.append(cut(mx.vjp(lambda part: head(part[None])[0], [part], [by_logit])[1][0]))
            value = cut(value)
            loss = loss + value
        return loss, mx.concatenate(parts, axis=0)

    @loss_and_gradient.vjp
    def _loss_vjp(_primals: Any, cotangents: Any, results: Any) -> Any:
        return cotangents[0].astype(results[1].dtype) * results[1]

    loss, _ = cast(tuple[Any, Any], loss_and_gradient(hidden))
    return loss


def fast_on_cpu(matrix: Any, hidden: Any) -> bool:
    """Whether :func:`blockwise_cross_entropy` can compute the loss."""
    return matrix is not None and hidden.dtype == mx.float32 and numpy_may_compute()


def blockwise_cross_entropy(
    matrix: Any, hidden: Any, targets: Any, weights: Any, *, at_once: int | None, with_gradient: bool
) -> Any:
    """:func:`chunked_cross_entropy` for a head that is a product with ``matrix`` (vocabulary, d), on a CPU.

    ``at_once``: at most so many positions; None for all. It runs as MLX builds the graph.
    """
    by_hidden: list[Any] = []

    @mx.custom_function
    def summed(hidden: Any) -> Any:
        values = np.ascontiguousarray(np.asarray(hidden))
        head, words, counted = np.asarray(matrix), np.asarray(targets), np.asarray(weights)
        step = at_once or max(1, len(values))
        parts = [
            cross_entropy(values[cut], head, words[cut], counted[cut], with_gradient=with_gradient)
            for cut in (slice(start, start + step) for start in range(0, len(values), step))
        ]
        by_hidden[:] = [mx.array(np.concatenate([gradient for _, gradient in parts]))] if with_gradient else []
        return mx.array(sum(loss for loss, _ in parts), mx.float32)

    @summed.vjp
    def _summed_vjp(_primal: Any, cotangent: Any, _output: Any) -> Any:
        return cotangent * by_hidden[0]

    return summed(hidden)


def head_matrix(model: nn.Module, head: Callable[[Any], Any]) -> Any:
    """The weights (vocabulary, d) of a float32 ``model``'s ``head`` where it is a product with them, else None.

    Heads that scale or cap their logits aren't.
    """
    if not available():
        return None
    layers = [getattr(model, "lm_head", None), getattr(getattr(model, "model", None), "embed_tokens", None)]
    for layer in layers:
        matrix: Any = layer.weight if isinstance(layer, nn.Linear | nn.Embedding) else None
        if matrix is None or matrix.dtype != mx.float32:
            continue
        probe = mx.random.normal((2, matrix.shape[1]), key=mx.random.key(0))
        found, expected = head(probe[None])[0], probe @ matrix.T
        if found.shape == expected.shape and mx.allclose(found, expected, rtol=1e-4, atol=1e-4).item():
            return matrix
    return None


def head_is_frozen(model: nn.Module) -> bool:
    """Whether no trainable parameter of an mlx-lm ``model`` lies in its head or (tied) embedding."""
    names = [name for name, _ in tree_flatten(model.trainable_parameters())]
    return all(name.startswith("model.") and "embed" not in name for name in names)
