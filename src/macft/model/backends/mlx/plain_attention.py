"""Attention in MLX's plain operations, where it has no fused gradient: the same sums in fewer kernels.

The product of queries and keys also scales and adds the mask, and going back, heads that share keys are rows of one
product. MLX's own takes a kernel for each of these, and makes a causal mask for each layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import mlx.core as mx
import numpy as np

from macft.model.backends.mlx.query_blocks import is_fused, takes_fused
from macft.model.backends.operation import after, operation
from macft.model.module_classes import ModuleCall

_LONGEST_MASK = 1024
"""Queries and keys of causal masks that are kept, 2 to 4 MB each; longer ones are made where they are used."""


def plain_attention(original: ModuleCall, is_training: Callable[[], bool], device: str) -> ModuleCall:
    """Takes the place of mlx-lm's ``scaled_dot_product_attention``, ``original``, while the model trains.

    Where that is fused going forward but not back, on ``device`` ("cpu", "metal" or "cuda"), it stays going forward,
    and the backward pass computes the probabilities, which else are held.
    """

    def attention(
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        cache: Any = None,
        scale: float = 1.0,
        mask: Any = None,
        **others: Any,
    ) -> mx.array:
        is_causal = isinstance(mask, str) and mask == "causal"
        is_array = isinstance(mask, mx.array) and mask.dtype == mx.bool_ and mask.ndim == 2
        has_others = any(value is not None for value in others.values())
        is_wide = queries.dtype in (mx.float32, mx.bfloat16)  # float16 ends at 65504, which scores may pass
        is_plain = cache is None and (is_causal or is_array) and not has_others and is_wide
        if not is_plain or not is_training() or is_fused(queries, device):
            result: mx.array = original(queries, keys, values, cache=cache, scale=scale, mask=mask, **others)
            return result
        bias = _causal(queries.shape[2], keys.shape[2], queries.dtype) if is_causal else _bias(mask, queries.dtype)
        if queries.dtype == mx.float32:  # rounded as by MLX: what large scores do with a last bit shows in a gradient
            return _attention(scale * queries, keys, values, bias, 1.0)
        if not takes_fused(queries, device):
            return _attention(queries, keys, values, bias, scale)
        return _attention(queries, keys, values, bias, scale, partial(original, cache=None, scale=scale, mask=mask))

    return attention


def _bias(mask: mx.array, dtype: mx.Dtype) -> mx.array:
    return mx.where(mask, mx.array(0, dtype), mx.array(mx.finfo(dtype).min, dtype))


def _causal(queries: int, keys: int, dtype: mx.Dtype) -> mx.array:
    """(queries, keys): 0 or, behind a query, the least value; the last query sees all keys."""
    if max(queries, keys) > _LONGEST_MASK:
        return _bias(mx.arange(keys - queries, keys)[:, None] >= mx.arange(keys), dtype)
    return _kept_causal(queries, keys, dtype)


@lru_cache(16)
def _kept_causal(queries: int, keys: int, dtype: mx.Dtype) -> mx.array:
    seen = np.arange(keys - queries, keys)[:, None] >= np.arange(keys)
    bias = _bias(mx.array(seen), dtype)
    mx.eval(bias)
    return bias


def _attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    bias: mx.array,
    scale: float,
    fused: Callable[..., mx.array] | None = None,
) -> mx.array:
    """``softmax(scale * queries @ keys.T + bias) @ values``; ``bias`` (queries, keys); ``fused`` computes the same."""

    def probabilities(queries: mx.array, keys: mx.array) -> mx.array:
        """(rows, heads of the keys, heads that share them * queries, keys)."""
        scores = mx.addmm(bias, _by_keys(queries, keys), keys[:, :, None].swapaxes(-1, -2), alpha=scale)
        return _together(mx.softmax(scores, axis=-1, precise=True))

    def forward(queries: mx.array, keys: mx.array, values: mx.array, *seen: mx.array) -> mx.array:
        if fused is not None:
            return fused(queries, keys, values)
        return (seen[0] @ values).reshape(*queries.shape[:-1], -1)

    def backward(inputs: Sequence[mx.array], grad: mx.array, _output: mx.array) -> list[mx.array]:
        queries, keys, values, *others = inputs
        rows = _together(_by_keys(grad, keys))
        seen = others[0] if others else probabilities(*after([queries, keys], [rows]))
        # The product takes the memory of the gradient, which nothing else needs.
        product = seen * (rows @ values.swapaxes(-1, -2))
        grad_scores = (product - seen * product.sum(axis=-1, keepdims=True)) * scale
        grad_values = seen.swapaxes(-1, -2) @ rows
        grad_keys = grad_scores.swapaxes(-1, -2) @ _together(_by_keys(queries, keys))
        gradients = [(grad_scores @ keys).reshape(queries.shape), grad_keys, grad_values]
        return gradients + [mx.zeros_like(other) for other in others]

    # As an input: as a result the probabilities would be computed again only together with the other one.
    seen = [] if fused is not None else [mx.stop_gradient(probabilities(queries, keys))]
    return operation(forward, backward)(queries, keys, values, *seen)


def _by_keys(x: mx.array, keys: mx.array) -> mx.array:
    """(rows, heads, length, d) to (rows, heads of the keys, heads that share them, length, d)."""
    return x.reshape(x.shape[0], keys.shape[1], -1, *x.shape[2:])


def _together(x: mx.array) -> mx.array:
    """(rows, heads of the keys, heads that share them, length, d) to (..., heads that share them * length, d)."""
    return x.flatten(2, 3)
