"""Rows laid end to end: no padding, no attention or position that crosses from one row into another.

A pack is one sequence (1, tokens). Linear layers, norms and activations work on each token alone and need no change.
Each token has the rotary position it has in its row, and attends to the tokens before it in its row. Rows that begin
alike share these tokens, as requests to a server share a cache (RadixAttention, Zheng et al. 2024): what a token
computes depends on the tokens before it only, so it is the same for all rows, and their gradients add up in it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from macft.model.architecture import namespaces_with
from macft.model.backends.cpu import attention

_ATTENTION = "scaled_dot_product_attention"


class Layout:
    """Where the rows of a pack are; see :class:`macft.data.batch.Pack`.

    ``paths`` (rows, longest), ``owners`` (tokens,) and ``depths`` (tokens,) are integer MLX arrays, and may have no
    values yet where they are inputs of a compiled function. ``lengths`` of the rows are for the CPU's attention only.
    """

    def __init__(self, paths: Any, owners: Any, depths: Any, lengths: Sequence[int] = ()):
        self.paths = paths
        self.owners = owners
        self.depths = depths
        self._lengths = lengths
        # Of rotary embeddings, by their settings; see PackedRope.
        self.rope_tables: dict[Any, Any] = {}

    @cached_property
    def slots(self) -> Any:
        """Where each token is found among the rows' (rows * longest) places."""
        return self.owners * self.paths.shape[1] + self.depths

    @cached_property
    def is_token(self) -> Any:
        """(tokens,): false for filling behind the tokens."""
        return self.paths[self.owners, self.depths] == mx.arange(self.owners.shape[0])

    @cached_property
    def _owners_by_place(self) -> Any:
        """Owner of the token at each row's each place (rows, longest); -1 for filling."""
        is_filling = self.depths[self.paths] != mx.arange(self.paths.shape[1])
        return mx.where(is_filling, -1, self.owners[self.paths])

    @cached_property
    def is_own(self) -> Any:
        """Whether a row owns the token at a place, (rows, longest)."""
        return self._owners_by_place == mx.arange(self.paths.shape[0])[:, None]

    @cached_property
    def owned_by(self) -> Any:
        """At (place, owner, row): whether the row's token at this place is that owner's."""
        return self._owners_by_place.T[:, None] == mx.arange(self.paths.shape[0])[:, None]

    @cached_property
    def blocks(self) -> list[attention.Block]:
        """The CPU's plan of attention."""
        paths: NDArray[np.int32] = np.asarray(self.paths)
        return attention.blocks_of([path[:length] for path, length in zip(paths, self._lengths, strict=True)])


class _Pack(threading.local):
    """Layout of the sequence that this thread computes; None where rows aren't packed."""

    layout: Layout | None = None


_pack = _Pack()


@contextmanager
def packed(layout: Layout | None) -> Iterator[None]:
    """Inside, this thread's sequences are packs with this layout; None: they are not packed."""
    before, _pack.layout = _pack.layout, layout
    try:
        yield
    finally:
        _pack.layout = before


def layout_of_pack() -> Layout | None:
    """The layout given to ``packed``."""
    return _pack.layout


class PackedRope(nn.Module):
    """A model's own rotary embedding, with the positions that the tokens of a pack have in their rows."""

    def __init__(self, rope: nn.Module):
        super().__init__()
        self._rope = rope

    def __call__(self, x: Any, offset: Any = 0) -> Any:
        layout = layout_of_pack()
        return self._rope(x, offset=offset) if layout is None else self._by_token(x, layout)

    def _by_token(self, x: Any, layout: Layout) -> Any:
        # Each token as a sequence of its own, for offsets go by sequence.
        return self._rope(x.transpose(2, 1, 0, 3), offset=layout.depths).transpose(2, 1, 0, 3)

    def tables(self, layout: Layout, width: int) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
        """Cosines and sines, (tokens, width / 2), by which a pack's elements are turned with those half a width on.

        None where this embedding pairs others, or not all of them.
        """
        rope: Any = self._rope
        settings = (rope.dims, rope.traditional, rope.base, rope.scale) if type(rope) is nn.RoPE else id(rope)
        if (settings, width) not in layout.rope_tables:
            layout.rope_tables[settings, width] = self._tables(layout, width)
        found: tuple[NDArray[np.float32], NDArray[np.float32]] | None = layout.rope_tables[settings, width]
        return found

    def _tables(self, layout: Layout, width: int) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
        half = width // 2
        ones = np.repeat(np.eye(2, dtype=np.float32), half, axis=1)  # in the first half; in the second
        probe = mx.broadcast_to(mx.array(ones)[None, :, None], (1, 2, layout.depths.shape[0], 2 * half))
        first, second = np.array(self._by_token(probe, layout))[0]
        cosines, sines = first[:, :half], first[:, half:]
        turns = np.array_equal(second[:, half:], cosines) and np.array_equal(second[:, :half], -sines)
        return (cosines, sines) if turns and width == 2 * half else None


class RowAttention:
    """Takes the place of mlx-lm's ``scaled_dot_product_attention`` in an architecture's module.

    Generation, with a cache, goes to mlx-lm's function; so does all that isn't plain causal attention.
    """

    def __init__(self, original: Callable[..., Any]):
        self._original = original

    def __call__(
        self, queries: Any, keys: Any, values: Any, cache: Any = None, scale: float = 1.0, mask: Any = None, **rest: Any
    ) -> Any:
        layout = layout_of_pack()
        is_causal = mask is None if queries.shape[2] == 1 else isinstance(mask, str) and mask == "causal"
        plain = cache is None and is_causal and not any(rest.values())
        if plain and attention.suits(queries, keys):
            blocks = None if layout is None else layout.blocks
            return attention.causal_attention(queries, keys, values, scale, blocks)
        if layout is None:
            return self._original(queries, keys, values, cache=cache, scale=scale, mask=mask, **rest)
        if not plain:
            raise ValueError("this model's attention has a mask of its own, so its rows can't be packed")
        return self._by_rows(queries, keys, values, scale, layout)

    def _by_rows(self, queries: Any, keys: Any, values: Any, scale: float, layout: Layout) -> Any:
        """As rows again, with filling behind, where none of their tokens sees it."""
        q, k, v = (_rows_of(x, layout) for x in (queries, keys, values))
        return _tokens_of(self._original(q, k, v, cache=None, scale=scale, mask="causal"), layout)


def _rows_of(x: Any, layout: Layout) -> Any:
    """(1, heads, tokens, d) as (rows, heads, longest, d).

    A token's gradient is the sum of its rows'. They all have it at the same place, so that the sum is a small matrix
    product: the same in each run, as additions of many rows to the same memory on a GPU are not.
    """

    @mx.custom_function
    def cut(x: Any) -> Any:
        return x[0][:, layout.paths].swapaxes(0, 1)

    @cut.vjp
    def _cut_vjp(_primals: Any, cotangent: Any, _output: Any) -> Any:
        rows, heads, longest, d = cotangent.shape
        by_place = cotangent.transpose(2, 0, 1, 3).reshape(longest, rows, heads * d)
        sums = (layout.owned_by.astype(by_place.dtype) @ by_place).reshape(longest * rows, heads, d)
        found = sums[layout.depths * rows + layout.owners].swapaxes(0, 1)[None]
        return mx.where(layout.is_token[:, None], found, mx.zeros((), found.dtype))

    return cut(x)


def _tokens_of(x: Any, layout: Layout) -> Any:
    """(rows, heads, longest, d) as (1, heads, tokens, d): of each token, what its owner has."""

    @mx.custom_function
    def join(x: Any) -> Any:
        rows, heads, longest, d = x.shape
        return x.swapaxes(0, 1).reshape(heads, rows * longest, d)[:, layout.slots][None]

    @join.vjp
    def _join_vjp(_primals: Any, cotangent: Any, _output: Any) -> Any:
        cut = cotangent[0][:, layout.paths].swapaxes(0, 1)
        return mx.where(layout.is_own[:, None, :, None], cut, mx.zeros((), cut.dtype))

    return join(x)


def use_row_attention(model: nn.Module) -> None:
    """Lets ``model``'s architecture attend row by row from now on, where its attention can be replaced."""
    for namespace in namespaces_with(model, _ATTENTION):
        if not isinstance(namespace[_ATTENTION], RowAttention):
            namespace[_ATTENTION] = RowAttention(namespace[_ATTENTION])


def may_pack(model: nn.Module) -> bool:
    """Whether every block of ``model`` attends with a rotary embedding to all tokens before; computes nothing."""
    blocks = [getattr(layer, "self_attn", None) for layer in getattr(model, "layers", [])]
    ropes = [isinstance(getattr(block, "rope", None), nn.Module) for block in blocks]
    arguments = getattr(model, "args", None)
    slides = getattr(arguments, "sliding_window", None) or getattr(arguments, "use_sliding_window", False)
    return bool(blocks) and all(ropes) and not slides and bool(namespaces_with(model, _ATTENTION))


def enable_packing(model: nn.Module) -> bool:
    """Prepares ``model`` for packed rows in place; returns whether it can take them.

    It can where it is built for it, and where a trial pack of two rows, with what they have in common there once, comes
    out as the rows do alone. Other models (sliding windows, state spaces, learned positions) are padded instead.
    """
    if not may_pack(model):
        return False
    use_row_attention(model)
    blocks = [layer.self_attn for layer in model.layers]
    before = [block.rope for block in blocks]
    for block in blocks:
        if not isinstance(block.rope, PackedRope):
            block.rope = PackedRope(block.rope)
    if _trial(model):
        return True
    for block, rope in zip(blocks, before, strict=True):
        block.rope = rope
    return False


def _trial(model: nn.Module) -> bool:
    first, second = mx.array([[1, 2, 3, 4, 5]]), mx.array([[1, 2, 6, 7, 8, 9, 10]])
    layout = Layout(
        paths=mx.array([[0, 1, 2, 3, 4, 0, 0], [0, 1, 5, 6, 7, 8, 9]]),
        owners=mx.array([0] * 5 + [1] * 5),
        depths=mx.array([0, 1, 2, 3, 4, 2, 3, 4, 5, 6]),
        lengths=(5, 7),
    )
    was_training = model.training
    model.eval()
    try:
        alone = mx.concatenate([model(first), model(second)[:, 2:]], axis=1)
        with packed(layout):
            together = model(mx.concatenate([first, second[:, 2:]], axis=1))
        return alone.shape == together.shape and bool(mx.allclose(alone, together, rtol=1e-2, atol=1e-2).item())
    except (TypeError, ValueError, AttributeError, RuntimeError):
        return False
    finally:
        model.train(was_training)
