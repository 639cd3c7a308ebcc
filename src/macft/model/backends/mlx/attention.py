"""Attention of a pack's rows with MLX operations: under a mask, or row by row.

Under a mask, the tokens stay where they are, and each sees those before it in its row only. This is chosen where it
costs few scores more (:func:`~macft.model.packing.attends_under_mask`), or fewer, as where rows share most of their
tokens. Otherwise the tokens are laid out as rows, attended to, and put back. Padding is behind a row's tokens, where
none of them sees it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from macft.model.backends.operation import operation
from macft.model.module_classes import ModuleCall
from macft.model.packing import PackLayout, attends_under_mask, layout_of_pack


def row_attention(original: ModuleCall) -> ModuleCall:
    """Takes the place of mlx-lm's ``scaled_dot_product_attention``, ``original``, and attends row by row in a pack.

    The mask of a pack is that of its longest row (:func:`~macft.model.packing.row_mask`). All that is not packed goes
    to the original: padded rows, and generation, which has a cache.
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
        layout = layout_of_pack()
        if layout is None:
            result: mx.array = original(queries, keys, values, cache=cache, scale=scale, mask=mask, **others)
            return result
        if cache is not None:
            raise ValueError("a pack has no cache")
        own_mask = _mask_of_pack(layout, mask, queries)
        if own_mask is not None:
            seen: mx.array = original(queries, keys, values, cache=None, scale=scale, mask=own_mask, **others)
            return seen
        q, k, v = (rows_from_tokens(x, layout) for x in (queries, keys, values))
        return tokens_from_rows(original(q, k, v, cache=None, scale=scale, mask=mask, **others), layout)

    return attention


def _mask_of_pack(layout: PackLayout, mask: Any, queries: mx.array) -> Any:
    """The mask of the pack's tokens for ``mask``, that of its longest row; None where they are laid out as rows."""
    rows, longest = layout.paths.shape
    tokens, head_dim = queries.shape[2:]
    if not attends_under_mask(tokens, rows, longest, head_dim):
        return None
    if not isinstance(mask, mx.array):  # causal, or None for rows of one token
        return "causal" if rows == 1 else layout.sees()
    is_plain = mask.dtype == mx.bool_ and mask.shape[-2:] == (longest, longest) and mask.size == longest**2
    return layout.sees(mask.reshape(longest, longest)) if is_plain else None


def rows_from_tokens(x: mx.array, layout: PackLayout) -> mx.array:
    """(1, heads, tokens, d) to (rows, heads, longest, d).

    A token's gradient is the sum of its rows'. They all have it at the same position, so that the sum is a small matrix
    product: the same in each run, as additions of many rows to the same memory on a GPU are not.
    """

    def gather(x: mx.array) -> mx.array:
        return x[0][:, layout.paths].swapaxes(0, 1)

    def grad_x(_inputs: Sequence[mx.array], grad_rows: mx.array, _output: mx.array) -> list[mx.array]:
        rows, heads, longest, d = grad_rows.shape
        by_position = grad_rows.transpose(2, 0, 1, 3).reshape(longest, rows, heads * d)
        sums = (layout.owned_by.astype(by_position.dtype) @ by_position).reshape(longest * rows, heads, d)
        grad_tokens = sums[layout.depths * rows + layout.owners].swapaxes(0, 1)[None]
        return [mx.where(layout.is_token[:, None], grad_tokens, mx.zeros((), grad_tokens.dtype))]

    return operation(gather, grad_x)(x)


def tokens_from_rows(x: mx.array, layout: PackLayout) -> mx.array:
    """(rows, heads, longest, d) to (1, heads, tokens, d): of each token, what its owner has."""

    def scatter(x: mx.array) -> mx.array:
        rows, heads, longest, d = x.shape
        return x.swapaxes(0, 1).reshape(heads, rows * longest, d)[:, layout.slots][None]

    def grad_x(_inputs: Sequence[mx.array], grad_tokens: mx.array, _output: mx.array) -> list[mx.array]:
        grad_rows = grad_tokens[0][:, layout.paths].swapaxes(0, 1)
        return [mx.where(layout.is_own[:, None, :, None], grad_rows, mx.zeros((), grad_rows.dtype))]

    return operation(scatter, grad_x)(x)
