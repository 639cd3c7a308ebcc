"""Trees of lists, tuples and dicts, as blocks take and return them, and the floating-point arrays in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map


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
