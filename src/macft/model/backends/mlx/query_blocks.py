"""Attention in blocks of queries, forward and backward, so that [queries, keys] never exists as a whole.

The blocks are those of Rabe and Staats 2021 (arXiv:2112.05682) and Dao et al. 2022 (FlashAttention), but for one thing:
a block has all keys that its queries see, so that its softmax is computed at once, by MLX's own attention. The backward
pass computes a block's scores again. For Metal, whose attention is not fused in training, and for CUDA where MLX's
fused gradient can't take the rows. Without a gradient attention is cut too, so that no kernel runs long; and on Metal
where nothing is computed again, for scores that would take a kernel seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import mlx.core as mx

from macft.model.backends.operation import operation
from macft.model.module_classes import ModuleCall
from macft.model.packing import QUERY_TILE, queries_at_once


def attention_in_blocks(
    original: ModuleCall,
    is_training: Callable[[], bool],
    *,
    training_scores: int | None,
    evaluation_scores: int,
    most_operations: int,
    device: str,
) -> ModuleCall:
    """Takes the place of mlx-lm's ``scaled_dot_product_attention``, ``original``, where there is no cache.

    ``training_scores`` of queries and keys, of all rows and heads, are computed at once where the model trains, but for
    those of 32 queries at least, and again in the backward pass; None: they are held, with MLX's own gradient.
    ``evaluation_scores``: where it does not train. ``most_operations`` of a kernel where scores are held.
    ``device``: see :func:`is_fused`.
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
        is_causal = isinstance(mask, str) and mask == "causal" and keys.shape[2] == queries.shape[2]
        is_constant = mask is None or is_causal or (isinstance(mask, mx.array) and mask.dtype == mx.bool_)
        can_cut = is_constant or isinstance(mask, mx.array)
        in_blocks = _blockwise
        if not is_training():
            borders = _cut(queries, keys, evaluation_scores)
        elif training_scores is not None and is_constant:
            borders = _borders(queries, keys, training_scores, device)
        elif takes_fused(queries, device):
            borders = [0, queries.shape[2]]
        else:
            borders, in_blocks = _cut(queries, keys, most_operations // (2 * queries.shape[3])), _held
        if cache is not None or not can_cut or len(borders) == 2:
            result: mx.array = original(queries, keys, values, cache=cache, scale=scale, mask=mask, **others)
            return result

        def block(start: int, end: int, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
            """The queries from ``start`` to ``end``, with the keys that they may see."""
            part = mask[..., start:end, :] if isinstance(mask, mx.array) and mask.shape[-2] > 1 else mask
            result: mx.array = original(q, k, v, cache=None, scale=scale, mask=part, **others)
            return result

        return in_blocks(block, list(pairwise(borders)), is_causal=is_causal)(queries, keys, values)

    return attention


def _borders(queries: mx.array, keys: mx.array, most_scores: int, device: str) -> list[int]:
    """Where blocks of queries that are computed again begin and end."""
    length = queries.shape[2]
    if takes_fused(queries, device) and length >= QUERY_TILE:
        whole = length // QUERY_TILE * QUERY_TILE
        return [0, whole] if whole == length else [0, whole, length]
    return _cut(queries, keys, most_scores)


def _cut(queries: mx.array, keys: mx.array, most_scores: int) -> list[int]:
    """Blocks of at most so many scores."""
    rows, heads, length, _ = queries.shape
    size = queries_at_once(rows, heads, keys.shape[2], most_scores)
    return [*range(0, length, size), length]


def is_fused(queries: mx.array, device: str) -> bool:
    """Whether MLX has a fused gradient for ``queries`` (rows, heads, length, d) on ``device``, as in Device.kind."""
    return takes_fused(queries, device) and queries.shape[2] % QUERY_TILE == 0


def takes_fused(queries: mx.array, device: str) -> bool:
    """Whether attention of ``queries`` is fused there while a model trains, if not its gradient."""
    width = queries.shape[3]
    is_half = queries.dtype in (mx.bfloat16, mx.float16)
    return device == "cuda" and is_half and width <= QUERY_TILE and width % 8 == 0


def _held(
    block: Callable[..., mx.array], parts: Sequence[tuple[int, int]], *, is_causal: bool
) -> Callable[..., mx.array]:
    """As :func:`_blockwise`, with MLX's own gradient, also by what ``block`` uses beside its arguments."""

    def attention(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        outputs = [
            block(start, end, queries[:, :, start:end], *_seen(end if is_causal else None, keys, values))
            for start, end in parts
        ]
        return mx.concatenate(outputs, axis=2)

    return attention


def _blockwise(
    block: Callable[..., mx.array], parts: Sequence[tuple[int, int]], *, is_causal: bool
) -> Callable[..., mx.array]:
    """Queries, keys and values to what ``block`` makes of each of ``parts``, one after the other."""

    def seen(end: int, *values: mx.array) -> Iterator[mx.array]:
        return _seen(end if is_causal else None, *values)

    def forward(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        outputs: list[mx.array] = []
        for start, end in parts:
            q = _after(queries[:, :, start:end], outputs[-1:])
            outputs.append(block(start, end, q, *seen(end, keys, values)))
        return mx.concatenate(outputs, axis=2)

    def backward(inputs: Sequence[mx.array], grad_output: mx.array, _output: mx.array) -> list[mx.array]:
        queries, keys, values = inputs
        grad_queries: list[mx.array] = []
        # Sums of many blocks, in float32; a causal block's last keys are seen by no block before it.
        sums: list[mx.array] = []
        ended: list[list[mx.array]] = []
        for start, end in reversed(parts):
            q = _after(queries[:, :, start:end], sums)
            _, (grad_q, *grads) = mx.vjp(
                lambda q, k, v, start=start, end=end: block(start, end, q, k, v),
                [q, *seen(end, keys, values)],
                [grad_output[:, :, start:end]],
            )
            grad_queries.append(grad_q)
            grads = [grad.astype(mx.float32) for grad in grads]
            sums = [total + grad for total, grad in zip(sums, grads, strict=True)] if sums else grads
            if is_causal:
                ended.append([total[:, :, start:].astype(keys.dtype) for total in sums])
                sums = [total[:, :, :start] for total in sums]
        totals = [mx.concatenate(list(reversed(pieces)), axis=2) for pieces in zip(*ended, strict=True)]
        return [mx.concatenate(grad_queries[::-1], axis=2), *(totals or [total.astype(keys.dtype) for total in sums])]

    return operation(forward, backward)


def _seen(end: int | None, *values: mx.array) -> Iterator[mx.array]:
    """``values`` (rows, heads, keys, d) of the first keys."""
    return (value if end is None else value[:, :, :end] for value in values)


def _after(value: mx.array, others: Sequence[mx.array]) -> mx.array:
    """``value``, computed after ``others``."""
    return mx.depends([value], list(others))[0] if others else value
