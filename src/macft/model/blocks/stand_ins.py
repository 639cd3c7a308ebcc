"""Arrays that stand in for weights that are not in memory."""

from __future__ import annotations

import mlx.core as mx


def placeholder(array: mx.array) -> mx.array:
    """An array of this shape and type that takes no memory. Floating-point ones are NaN, so that no use is silent."""
    value = float("nan") if mx.issubdtype(array.dtype, mx.floating) else 0
    found = mx.broadcast_to(mx.array(value, array.dtype), array.shape)
    mx.eval(found)
    return found


def product(like: mx.array, one: mx.array, other: mx.array) -> mx.array:
    """A matrix of the shape and type of ``like``, made of two random vectors: that takes little time."""
    *_, rows, columns = (1, 1, *like.shape)
    if mx.issubdtype(like.dtype, mx.floating):
        left, right = mx.random.normal((rows, 1), key=one), mx.random.normal((columns,), key=other)
        values = (left * right * 0.1).astype(like.dtype)
    else:
        left, right = (
            mx.random.randint(0, 100, size, key=key) for size, key in (((rows, 1), one), ((columns,), other))
        )
        values = (left ^ right).astype(like.dtype)
    return mx.contiguous(mx.broadcast_to(values.reshape(values.shape[2 - min(like.ndim, 2) :]), like.shape))


def shifted(like: mx.array, one: mx.array, other: mx.array) -> mx.array:
    """As :func:`product`, but no two rows of a matrix have the same direction: tokens can be told apart."""
    if like.ndim != 2 or not mx.issubdtype(like.dtype, mx.floating):
        return product(like, one, other)
    rows, columns = like.shape
    values = (mx.random.normal((rows + columns,), key=one) * 0.1).astype(like.dtype)
    return mx.contiguous(mx.as_strided(values, like.shape, (1, 1)))
