"""Causal attention for MLX's CPU backend, in blocks of queries and with a cheap exponential.

MLX's CPU attention computes all length x length scores, also those the causal mask removes, holds them for the backward
pass, and takes its exponentials at 20 ns each. Here a block of queries meets only the keys before its end, and the
backward pass computes the probabilities anew from the saved log-sum-exp (FlashAttention-2, Dao 2023, section 3.1), so
that no length x length matrix is kept.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx

from macft.model.cpu_activations import fast_exp

_BLOCK = 128
_MASKED = -1e30


def _scores(queries: Any, keys: Any, start: int, scale: float) -> Any:
    """Masked scaled scores (batch, groups, heads, block, keys) of the queries that begin at ``start``."""
    scores = (queries * scale) @ keys.swapaxes(-1, -2)
    block, seen = scores.shape[-2:]
    allowed = mx.arange(start, start + block)[:, None] >= mx.arange(seen)[None, :]
    return mx.where(allowed, scores, _MASKED)


@cache
def _attention(scale: float) -> Any:
    """(output, log-sum-exp) of grouped queries (b, g, h, n, d), keys and values (b, g, 1, n, d), all float32."""

    @mx.custom_function
    def attention(queries: Any, keys: Any, values: Any) -> tuple[Any, Any]:
        outputs, sums = [], []
        length = queries.shape[-2]
        for start in range(0, length, _BLOCK):
            end = min(start + _BLOCK, length)
            scores = _scores(queries[..., start:end, :], keys[..., :end, :], start, scale)
            highest = scores.max(axis=-1, keepdims=True)
            weights = fast_exp(scores - highest)
            total = weights.sum(axis=-1, keepdims=True)
            outputs.append((weights @ values[..., :end, :]) / total)
            sums.append(highest + mx.log(total))
        return mx.concatenate(outputs, axis=-2), mx.concatenate(sums, axis=-2)

    @attention.vjp
    def _attention_vjp(primals: tuple[Any, ...], cotangents: tuple[Any, ...], results: tuple[Any, ...]) -> Any:
        queries, keys, values = primals
        cotangent, (output, log_sum) = cotangents[0], results
        along = (cotangent * output).sum(axis=-1, keepdims=True)
        length = queries.shape[-2]
        query_parts = []
        key_gradient, value_gradient = mx.zeros_like(keys), mx.zeros_like(values)
        for start in range(0, length, _BLOCK):
            end = min(start + _BLOCK, length)
            block = (..., slice(start, end), slice(None))
            seen = (..., slice(0, end), slice(None))
            weights = fast_exp(_scores(queries[block], keys[seen], start, scale) - log_sum[block])
            by_score = weights * (cotangent[block] @ values[seen].swapaxes(-1, -2) - along[block]) * scale
            query_parts.append(by_score @ keys[seen])
            # All heads of a group share their keys and values.
            rest = [(0, 0)] * 3 + [(0, length - end), (0, 0)]
            key_part = (by_score.swapaxes(-1, -2) @ queries[block]).sum(axis=2, keepdims=True)
            value_part = (weights.swapaxes(-1, -2) @ cotangent[block]).sum(axis=2, keepdims=True)
            key_gradient = key_gradient + (mx.pad(key_part, rest) if end < length else key_part)
            value_gradient = value_gradient + (mx.pad(value_part, rest) if end < length else value_part)
        return mx.concatenate(query_parts, axis=-2), key_gradient, value_gradient

    return attention


def causal_attention(queries: Any, keys: Any, values: Any, scale: float) -> Any:
    """Causal attention of ``queries`` (batch, heads, n, d) over ``keys`` and ``values`` (batch, groups, n, d).

    All float32; ``heads`` is a multiple of ``groups``. Returns (batch, heads, n, d), as
    ``mx.fast.scaled_dot_product_attention`` with ``mask="causal"``.
    """
    batch, heads, length, width = queries.shape
    groups = keys.shape[1]
    grouped = queries.reshape(batch, groups, heads // groups, length, width)
    output, _ = _attention(float(scale))(grouped, keys[:, :, None], values[:, :, None])
    return output.reshape(batch, heads, length, output.shape[-1])
