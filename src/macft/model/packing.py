"""Rows laid end to end: no padding, and no attention or position that crosses from one row into another.

A pack is one sequence (1, tokens of all rows). Linear layers, norms and activations work on each token alone and need
no change. Rotary positions begin anew in each row, and attention runs row by row: exactly the products a block-diagonal
mask would leave, without computing the others.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from macft.model import cpu_attention

_ATTENTION = "scaled_dot_product_attention"


class _Pack(threading.local):
    """Lengths of the rows in the sequence that this thread computes; None where rows aren't packed."""

    lengths: tuple[int, ...] | None = None


_pack = _Pack()


@contextmanager
def packed(lengths: tuple[int, ...] | None) -> Iterator[None]:
    """Inside, this thread's sequences are rows of ``lengths`` tokens laid end to end; None: they are not packed."""
    before, _pack.lengths = _pack.lengths, lengths
    try:
        yield
    finally:
        _pack.lengths = before


def row_lengths() -> tuple[int, ...] | None:
    """The lengths given to ``packed``."""
    return _pack.lengths


def _rows_of(x: Any, lengths: tuple[int, ...]) -> list[Any]:
    """``x`` (1, heads, tokens, d) cut into its rows."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    return [x[:, :, a:b] for a, b in pairwise(starts)]


class PackedRope(nn.Module):
    """A model's own rotary embedding, beginning anew at position 0 in each row of a pack."""

    def __init__(self, rope: nn.Module):
        super().__init__()
        self._rope = rope

    def __call__(self, x: Any, offset: Any = 0) -> Any:
        lengths = row_lengths()
        if lengths is None:
            return self._rope(x, offset=offset)
        return mx.concatenate([self._rope(row) for row in _rows_of(x, lengths)], axis=2)


class RowAttention:
    """Takes the place of mlx-lm's ``scaled_dot_product_attention`` in an architecture's module.

    Generation, with a cache, goes to mlx-lm's function; so does all that isn't plain causal attention.
    """

    def __init__(self, original: Callable[..., Any]):
        self._original = original

    def __call__(
        self, queries: Any, keys: Any, values: Any, cache: Any = None, scale: float = 1.0, mask: Any = None, **rest: Any
    ) -> Any:
        lengths = row_lengths()
        plain = cache is None and isinstance(mask, str) and mask == "causal" and not any(rest.values())
        if lengths is None or len(lengths) == 1:
            if plain and cpu_attention.suits(queries, keys):
                return cpu_attention.causal_attention(queries, keys, values, scale)
            return self._original(queries, keys, values, cache=cache, scale=scale, mask=mask, **rest)
        if not plain:
            raise ValueError("this model's attention has a mask of its own, so its rows can't be packed")
        rows = zip(_rows_of(queries, lengths), _rows_of(keys, lengths), _rows_of(values, lengths), strict=True)
        with packed(None):
            return mx.concatenate([self(q, k, v, scale=scale, mask="causal") for q, k, v in rows], axis=2)


def use_row_attention(model: nn.Module) -> bool:
    """Lets ``model``'s architecture attend row by row from now on; returns whether its attention can be replaced."""
    architecture = vars(sys.modules[type(model).__module__])
    original = architecture.get(_ATTENTION)
    if original is None:
        return False
    if not isinstance(original, RowAttention):
        architecture[_ATTENTION] = RowAttention(original)
    return True


def enable_packing(model: nn.Module) -> bool:
    """Prepares ``model`` for packed rows in place; returns whether it can take them.

    It can where every block attends with a rotary embedding to all tokens before, and where a trial pack of two rows
    comes out as the rows do alone. Other models (sliding windows, state spaces, learned positions) are padded instead.
    """
    blocks = [getattr(layer, "self_attn", None) for layer in getattr(model, "layers", [])]
    ropes = [block is not None and isinstance(getattr(block, "rope", None), nn.Module) for block in blocks]
    if not blocks or not all(ropes) or not use_row_attention(model):
        return False
    arguments = getattr(model, "args", None)
    if getattr(arguments, "sliding_window", None) or getattr(arguments, "use_sliding_window", False):
        return False
    before = [block.rope for block in blocks if block is not None]
    for block in blocks:
        if block is not None and not isinstance(block.rope, PackedRope):
            block.rope = PackedRope(block.rope)
    if _trial(model):
        return True
    for block, rope in zip(blocks, before, strict=True):
        if block is not None:
            block.rope = rope
    return False


def _trial(model: nn.Module) -> bool:
    first, second = mx.arange(1, 6)[None], mx.arange(3, 10)[None]
    was_training = model.training
    model.eval()
    try:
        alone = mx.concatenate([model(first), model(second)], axis=1)
        with packed((5, 7)):
            together = model(mx.concatenate([first, second], axis=1))
        return alone.shape == together.shape and bool(mx.allclose(alone, together, rtol=1e-2, atol=1e-2).item())
    except (TypeError, ValueError, AttributeError, RuntimeError):
        return False
    finally:
        model.train(was_training)
