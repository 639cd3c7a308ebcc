"""Trees of lists, tuples and dicts, as modules take and return them, and the floating-point arrays in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map


class _Hole:
    """Where an array of a tree is."""


def take_apart(tree: Any) -> tuple[Any, list[mx.array]]:
    """``tree`` without its floating-point arrays, and these; :func:`put_together` is the inverse."""
    arrays: list[mx.array] = []

    def take(leaf: Any) -> Any:
        if not isinstance(leaf, mx.array) or not mx.issubdtype(leaf.dtype, mx.floating):
            return leaf
        arrays.append(leaf)
        return _Hole

    return tree_map(take, tree), arrays


def put_together(tree: Any, arrays: Sequence[mx.array]) -> Any:
    """See :func:`take_apart`."""
    rest = iter(arrays)
    return tree_map(lambda leaf: next(rest) if leaf is _Hole else leaf, tree)


def holds_state(tree: Any) -> bool:
    """Whether ``tree`` has an object that a module could write arrays to, a cache say."""
    plain = mx.array | str | int | float | None
    return any(not isinstance(leaf, plain) for _, leaf in tree_flatten(tree))
