"""Causal attention for MLX's CPU backend on Linux: many times faster, exact, and nothing of [tokens, tokens] is held.

Rows of a pack are attended to together: a block of queries meets the keys that one of its tokens sees, and a mask
hides the others.

MLX computes attention on a CPU with whole score matrices, upper triangle included, and an exponential of 20 ns an
element. Here blocks of queries meet only keys that they see, in a buffer that fits the processor's cache, with NumPy's
exponential (40 times faster) and OpenBLAS. The backward pass computes the scores anew from their log-sum, as
FlashAttention does (Dao et al. 2022, Dao 2023). Sums that go along a matrix product are made by it: a column of ones
beside the values gives the softmax's denominators, columns beside queries and keys subtract the log-sums.

It runs as MLX builds the graph, which on a CPU makes no difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from macft.device import blas
from macft.model.backends.mlx.attention import row_attention
from macft.model.backends.operation import operation
from macft.model.module_classes import ModuleCall
from macft.model.packing import PackLayout, layout_of_pack

SHORTEST = 64
"""Tokens from which on this is faster than MLX's own."""
_QUERIES_AT_ONCE = 128
_MASKED = np.float32(-1e30)

Matrix = NDArray[np.float32]


@dataclass(frozen=True)
class Block:
    """Queries ``start`` to ``end`` of a sequence and the keys they see.

    Of ``columns``, places of keys, the first ``seen`` are seen by all of the queries; ``hidden`` (queries, other
    columns) says which of the others are not.
    """

    start: int
    end: int
    columns: slice | NDArray[np.intp]
    seen: int
    hidden: NDArray[np.bool_]
    _masks: dict[int, tuple[Matrix, Matrix]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def count(self) -> int:
        """Number of keys."""
        return self.seen + int(self.hidden.shape[1])

    def masks(self, group: int) -> tuple[Matrix, Matrix]:
        """For the ``group`` heads of query after query: what is added to scores; 0 or 1, times weights."""
        if group not in self._masks:
            hidden = np.repeat(self.hidden, group, axis=0)
            self._masks[group] = np.where(hidden, _MASKED, np.float32(0.0)), (~hidden).astype(np.float32)
        return self._masks[group]


def blocks_of(paths: Sequence[NDArray[np.int32]]) -> list[Block]:
    """The plan of attention for a pack in which row r's tokens stand at ``paths[r]``, those of its own side by side.

    Tokens that are in an earlier row's path as well see what they see there: the same.
    """
    return _one_row(len(paths[0])) if len(paths) == 1 else _blocks_of(paths)


def _blocks_of(paths: Sequence[NDArray[np.int32]]) -> list[Block]:
    blocks = []
    tokens = 1 + max(int(path.max()) for path in paths)
    owned = 0  # tokens before are some earlier row's
    spans = []
    for path in paths:
        common = int(np.searchsorted(path, owned))
        spans.append((path[:common], owned, owned + len(path) - common))
        owned += len(path) - common
    for start in range(0, tokens, _QUERIES_AT_ONCE):
        end = min(start + _QUERIES_AT_ONCE, tokens)
        sees = np.zeros((end - start, tokens), np.bool_)
        for before, first, last in spans:
            low, high = max(first, start), min(last, end)
            if low < high:
                sees[low - start : high - start, before] = True
                sees[low - start : high - start, first:high] = np.arange(low, high)[:, None] >= np.arange(first, high)
        by_all = sees.all(axis=0)
        first_columns, others = np.flatnonzero(by_all), np.flatnonzero(sees.any(axis=0) & ~by_all)
        columns = np.concatenate([first_columns, others])
        is_run = bool(np.all(np.diff(columns) == 1))
        blocks.append(
            Block(
                start,
                end,
                slice(int(columns[0]), int(columns[-1]) + 1) if is_run else columns,
                len(first_columns),
                ~sees[:, others],
            )
        )
    return blocks


@lru_cache(maxsize=64)
def _one_row(tokens: int) -> list[Block]:
    return _blocks_of([np.arange(tokens, dtype=np.int32)])


def fast_attention(original: ModuleCall) -> ModuleCall:
    """Takes the place of mlx-lm's ``scaled_dot_product_attention``, ``original``.

    Computes plain causal attention of float32 rows, padded or packed; all else goes to MLX: short rows, which this
    would not make faster, other masks, sinks, and generation, which has a cache.
    """
    portable = row_attention(original)

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
        is_long = queries.shape[2] == keys.shape[2] >= SHORTEST
        is_float32 = queries.dtype == keys.dtype == values.dtype == mx.float32
        if is_long and is_float32 and cache is None and is_plain_causal(scale, mask, others):
            return causal_attention(queries, keys, values, scale, None if layout is None else _blocks_of_pack(layout))
        result: mx.array = portable(queries, keys, values, cache=cache, scale=scale, mask=mask, **others)
        return result

    return attention


def is_plain_causal(scale: Any, mask: Any, others: Mapping[str, Any]) -> bool:
    """Whether these arguments of mlx-lm's ``scaled_dot_product_attention`` ask for causal attention, nothing else."""
    is_causal = isinstance(mask, str) and mask == "causal"
    return is_causal and isinstance(scale, int | float) and all(value is None for value in others.values())


def _blocks_of_pack(layout: PackLayout) -> list[Block]:
    if (blocks := layout.derived.get(Block)) is None:
        paths: NDArray[np.int32] = np.asarray(layout.paths)
        blocks = blocks_of([path[:length] for path, length in zip(paths, layout.lengths, strict=True)])
        layout.derived[Block] = blocks
    result: list[Block] = blocks
    return result


def causal_attention(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float, blocks: list[Block] | None = None
) -> mx.array:
    """softmax(scale * queries @ keys^T + causal mask) @ values, with gradients.

    ``queries`` (rows, heads, tokens, d), ``keys`` (rows, key heads, tokens, d), ``values`` (rows, key heads, tokens,
    e), float32; heads are a multiple of key heads. Returns (rows, heads, tokens, e), as
    ``mx.fast.scaled_dot_product_attention`` does with ``mask="causal"``. ``blocks``: the plan for a pack, of one
    sequence; None: each sequence is a row.
    """
    if queries.shape[0] > 1:
        places = range(queries.shape[0])
        cut = [slice(place, place + 1) for place in places]
        return mx.concatenate([causal_attention(queries[row], keys[row], values[row], scale) for row in cut])
    plan = blocks or _one_row(queries.shape[2])
    log_sums: list[Matrix] = []

    def attend(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        output, sums = _forward(np.asarray(queries), np.asarray(keys), np.asarray(values), scale, plan)
        log_sums[:] = [sums]
        return mx.array(output)

    def gradients(inputs: Sequence[mx.array], grad_output: mx.array, output: mx.array) -> list[mx.array]:
        q, k, v, gradient, out = (np.asarray(value) for value in (*inputs, grad_output, output))
        return [mx.array(part) for part in _backward(q, k, v, out, gradient, log_sums[0], scale, plan)]

    return operation(attend, gradients)(queries, keys, values)


def _forward(queries: Matrix, keys: Matrix, values: Matrix, scale: float, blocks: list[Block]) -> tuple[Matrix, Matrix]:
    """The output, (1, heads, tokens, e), and the log-sums of the scores, (key heads, tokens * group)."""
    _, heads, tokens, _ = queries.shape
    _, groups, _, width = values.shape
    group = heads // groups
    output = np.empty((1, heads, tokens, width), np.float32)
    log_sums = np.empty((groups, tokens * group), np.float32)
    buffer = np.empty(_largest(blocks) * group, np.float32)
    for number in range(groups):
        q = _by_token(queries, number, group)
        q *= np.float32(scale)
        k = np.ascontiguousarray(keys[0, number])
        v = _with_column(values[0, number], 1.0)
        sums = np.empty((tokens * group, width + 1), np.float32)
        for block in blocks:
            rows = slice(block.start * group, block.end * group)
            scores = _part(buffer, (block.end - block.start) * group, block.count)
            blas.product(q[rows], k[block.columns], scores, transposed=True)
            scores[:, block.seen :] += block.masks(group)[0]
            highest = scores.max(axis=1, keepdims=True)
            scores -= highest
            np.exp(scores, out=scores)
            blas.product(scores, v[block.columns], sums[rows])
            log_sums[number, rows] = highest[:, 0] + np.log(sums[rows, width])
        sums[:, :width] /= sums[:, width:]
        _from_token(output, number, group, sums[:, :width])
    return output, log_sums


def _backward(
    queries: Matrix,
    keys: Matrix,
    values: Matrix,
    output: Matrix,
    gradient: Matrix,
    log_sums: Matrix,
    scale: float,
    blocks: list[Block],
) -> tuple[Matrix, Matrix, Matrix]:
    """Gradients by queries, keys and values, of their shapes."""
    _, heads, tokens, d = queries.shape
    _, groups, _, width = values.shape
    group = heads // groups
    grad_queries, grad_keys, grad_values = (np.empty(value.shape, np.float32) for value in (queries, keys, values))
    buffers = [np.empty(_largest(blocks) * group, np.float32) for _ in range(2)]
    for number in range(groups):
        # Scores less their log-sums, and the softmax's own correction, come out of the products by a column more.
        q = _with_column(_by_token(queries, number, group) * np.float32(scale), -log_sums[number])
        all_k, all_v = _with_column(keys[0, number], 1.0), _with_column(values[0, number], 1.0)
        g = _by_token(gradient, number, group)
        correction = np.einsum("ij,ij->i", g, _by_token(output, number, group))
        g_less = _with_column(g, -correction)
        q_sums = np.empty((tokens * group, d), np.float32)
        k_sums, v_sums = np.zeros((tokens, d), np.float32), np.zeros((tokens, width), np.float32)
        for block in blocks:
            rows, columns = slice(block.start * group, block.end * group), block.columns
            k, v = all_k[columns], all_v[columns]
            weights, grad_scores = (_part(buffer, (block.end - block.start) * group, block.count) for buffer in buffers)
            blas.product(q[rows], k, weights, transposed=True)
            np.exp(np.minimum(weights, 0.0, out=weights), out=weights)
            weights[:, block.seen :] *= block.masks(group)[1]
            _product_added(weights, g[rows], v_sums, columns)
            blas.product(g_less[rows], v, grad_scores, transposed=True)
            grad_scores *= weights
            blas.product(grad_scores, k[:, :d], q_sums[rows])
            _product_added(grad_scores, q[rows, :d], k_sums, columns)
        q_sums *= np.float32(scale)
        _from_token(grad_queries, number, group, q_sums)
        grad_keys[0, number], grad_values[0, number] = k_sums, v_sums  # the scale is in q
    return grad_queries, grad_keys, grad_values


def _largest(blocks: list[Block]) -> int:
    return max((block.end - block.start) * block.count for block in blocks)


def _by_token(values: Matrix, number: int, group: int) -> Matrix:
    """The heads that share a key head, as rows (tokens * group, d) of their own memory."""
    heads = values[0, number * group : (number + 1) * group]
    return heads.transpose(1, 0, 2).reshape(-1, values.shape[3]).copy()


def _from_token(target: Matrix, number: int, group: int, rows: Matrix) -> None:
    tokens, d = target.shape[2:]
    target[0, number * group : (number + 1) * group] = rows.reshape(tokens, group, d).transpose(1, 0, 2)


def _with_column(matrix: Matrix, column: Matrix | float) -> Matrix:
    """``matrix`` with one more column."""
    wider = np.empty((matrix.shape[0], matrix.shape[1] + 1), np.float32)
    wider[:, :-1], wider[:, -1] = matrix, column
    return wider


def _part(buffer: Matrix, rows: int, columns: int) -> Matrix:
    return buffer[: rows * columns].reshape(rows, columns)


def _product_added(a: Matrix, b: Matrix, sums: Matrix, rows: slice | NDArray[np.intp]) -> None:
    """``sums[rows] += a^T @ b``; no row is named twice."""
    if isinstance(rows, slice):
        blas.product(a, b, sums[rows], first_transposed=True, add=True)
        return
    product = np.empty((a.shape[1], b.shape[1]), np.float32)
    blas.product(a, b, product, first_transposed=True)
    sums[rows] += product
