"""The arrays among the arguments and results of a module, which may be nested in lists, tuples and dictionaries."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map


def floats_of(tree: Any) -> list[mx.array]:
    """The floating-point arrays in ``tree``, in its order."""
    return [leaf for _, leaf in tree_flatten(tree) if _is_float(leaf)]


def with_floats(tree: Any, values: Iterable[mx.array]) -> Any:
    """``tree`` with ``values`` in place of its floating-point arrays."""
    rest = iter(values)
    return tree_map(lambda leaf: next(rest) if _is_float(leaf) else leaf, tree)


def holds_state(tree: Any) -> bool:
    """Whether ``tree`` has an object that a module could write arrays to, a cache say."""
    plain = mx.array | str | int | float | None
    return any(not isinstance(leaf, plain) for _, leaf in tree_flatten(tree))


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, mx.array) and mx.issubdtype(leaf.dtype, mx.floating)
