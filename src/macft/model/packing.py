"""Rows laid end to end: no padding, no attention or position that crosses from one row into another.

A pack is one sequence (1, tokens). Linear layers, norms and activations work on each token alone and need no change.
Each token has the rotary position it has in its row, and attends to the tokens before it in its row. Rows that begin
alike share these tokens, as requests to a server share a cache (RadixAttention, Zheng et al. 2024): what a token
computes depends on the tokens before it only, so it is the same for all rows, and their gradients add up in it.

The attention itself is a backend's; see :mod:`macft.model.backends`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from macft.errors import ConfigError
from macft.model.module_classes import ModuleCall, calls_function, replaced_functions

ATTENTION_FUNCTION = "scaled_dot_product_attention"
"""The function of mlx-lm that an architecture's attention calls."""
MASK_FUNCTION = "create_attention_mask"
"""The function of mlx-lm that makes the mask which an architecture gives its attention."""

_ROPE_NAMES = ("rope", "rotary_emb")
"""What the architectures of mlx-lm call the rotary embedding in a module that has one."""


class PackLayout:
    """Where the rows of a pack are; see :class:`macft.data.batch.Pack`.

    ``paths`` (rows, longest), ``owners`` (tokens,) and ``depths`` (tokens,) are int32. They may have no values yet
    where they are inputs of a compiled function; there ``lengths``, those of the rows in tokens, is empty.
    """

    def __init__(self, paths: mx.array, owners: mx.array, depths: mx.array, lengths: Sequence[int] = ()):
        self.paths = paths
        self.owners = owners
        self.depths = depths
        self.lengths = lengths
        # What kernels derive from the layout once for all layers, by a key of their own.
        self.derived: dict[Any, Any] = {}

    @cached_property
    def slots(self) -> mx.array:
        """(tokens,): index of each token among the rows' (rows * longest) positions."""
        return self.owners * self.paths.shape[1] + self.depths

    def sees(self, mask: mx.array | None = None) -> mx.array:
        """(tokens, tokens) bool: whether a token attends to another, which comes before it in its row, or to itself.

        ``mask`` (longest, longest) bool: what a row's positions see of each other; None: all before them.
        """
        key = ("sees", id(mask))
        if key not in self.derived:
            before = self.depths[None] <= self.depths[:, None]
            on_path = self.paths[self.owners][:, self.depths] == mx.arange(self.owners.shape[0])
            seen = before & on_path
            if mask is not None:
                seen = seen & mask[self.depths][:, self.depths]
            self.derived[key] = seen, mask  # which keeps the mask's identity
        return self.derived[key][0]  # type: ignore[no-any-return]

    @cached_property
    def is_token(self) -> mx.array:
        """(tokens,) bool: false for padding behind the tokens."""
        return self.paths[self.owners, self.depths] == mx.arange(self.owners.shape[0])

    @cached_property
    def _owners_by_position(self) -> mx.array:
        """(rows, longest): owner of the token at each position of each row; -1 for padding."""
        is_padding = self.depths[self.paths] != mx.arange(self.paths.shape[1])
        return mx.where(is_padding, -1, self.owners[self.paths])

    @cached_property
    def is_own(self) -> mx.array:
        """(rows, longest) bool: whether a row owns the token at a position."""
        return self._owners_by_position == mx.arange(self.paths.shape[0])[:, None]

    @cached_property
    def owned_by(self) -> mx.array:
        """(longest, rows, rows) bool: at (position, owner, row), whether the row's token there is that owner's."""
        return self._owners_by_position.T[:, None] == mx.arange(self.paths.shape[0])[:, None]


def attends_under_mask(tokens: int, rows: int, longest: int, head_dim: int) -> bool:
    """Whether the tokens of a pack attend to each other under a mask, with MLX's operations; else they are laid out as
    rows and put back.

    The mask has tokens^2 scores, the rows have rows * longest^2. A score is written and read about 8 times forward and
    backward, where attention is not fused. Laying out and putting back moves the hidden states, queries and values
    about 16 times: as much as 2 * head_dim scores for each token. So this is a count of bytes.
    """
    return rows == 1 or tokens - rows * longest**2 / tokens <= 2 * head_dim


def is_cheap_attention(width: int, keys: int) -> bool:
    """Whether attention to this many ``keys`` takes fewer operations than a product of its result, of ``width`` values,
    with a square matrix, as that with the output projection: then its result is not worth being kept.
    """
    return 2 * keys < width


QUERY_TILE = 128
"""MLX's fused gradient on CUDA takes multiples of this many queries (mlx 0.32)."""
FEWEST_QUERIES = 32


class AttentionSize(NamedTuple):
    """``queries`` of all rows or of a pack, and the ``keys`` with which each is multiplied, for each head.

    ``is_causal``: a block of queries is multiplied with the keys up to its own end only, not with all of them.
    """

    queries: int
    keys: int
    is_causal: bool = True

    @property
    def scores(self) -> int:
        """Pairs of a query and a key: whole squares."""
        return self.queries * self.keys


def attention_size(tokens: int, rows: int, longest: int, head_dim: int) -> AttentionSize:
    """What MLX's operations compute at once of a pack, or of padded rows, which have rows * longest tokens."""
    if tokens != rows * longest and attends_under_mask(tokens, rows, longest, head_dim):
        return AttentionSize(tokens, tokens, is_causal=False)
    return AttentionSize(rows * longest, longest)


def queries_at_once(rows: int, heads: int, keys: int, most_scores: int) -> int:
    """Queries in a block of attention that computes at most this many scores, but for those of 32 queries at least."""
    most = most_scores // (rows * heads * keys)
    return most // QUERY_TILE * QUERY_TILE or max(FEWEST_QUERIES, most // FEWEST_QUERIES * FEWEST_QUERIES)


class _CurrentPack(threading.local):
    """Layout of the sequence that this thread computes; None where rows aren't packed.

    mlx-lm's models have no argument for it.
    """

    layout: PackLayout | None = None


_current = _CurrentPack()


@contextmanager
def packed(layout: PackLayout | None) -> Iterator[None]:
    """Inside, this thread's sequences are packs with this layout; None: they are not packed."""
    before, _current.layout = _current.layout, layout
    try:
        yield
    finally:
        _current.layout = before


def layout_of_pack() -> PackLayout | None:
    """The layout given to ``packed``."""
    return _current.layout


class PackedRope(nn.Module):
    """A model's own rotary embedding, with the positions that the tokens of a pack have in their rows."""

    def __init__(self, rope: nn.Module):
        super().__init__()
        self._rope = rope

    @property
    def rope(self) -> nn.Module:
        """The model's own."""
        return self._rope

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        """``x`` and the result are (rows, heads, tokens, head size)."""
        layout = layout_of_pack()
        return self._rope(x, offset=offset) if layout is None else self.by_token(x, layout)

    def by_token(self, x: mx.array, layout: PackLayout) -> mx.array:
        """``x`` (1, heads, tokens, head size): each token as a sequence of its own, since offsets go by sequence."""
        turned: mx.array = self._rope(x.transpose(2, 1, 0, 3), offset=layout.depths)
        return turned.transpose(2, 1, 0, 3)


def row_mask(original: ModuleCall) -> ModuleCall:
    """Takes the place of mlx-lm's ``create_attention_mask``, ``original``: in a pack, the mask of its longest row.

    So a window slides over each row as it does over padded rows, and where all rows are shorter than it there is none.
    """

    def mask(h: mx.array, cache: Any = None, *rest: Any, **named: Any) -> Any:
        layout = layout_of_pack()
        if layout is None or cache is not None:
            return original(h, cache, *rest, **named)
        return original(mx.zeros((1, layout.paths.shape[1], 1), h.dtype), None, *rest, **named)

    return mask


@contextmanager
def replaced_ropes(model: nn.Module, make: Callable[[nn.Module], nn.Module]) -> Iterator[None]:
    """Inside, ``make`` of it stands in for each rotary embedding of ``model``."""
    places = [(module, name) for module in model.modules() for name in _ROPE_NAMES]
    ropes = [(module, name, module[name]) for module, name in places if isinstance(module.get(name), nn.Module)]
    try:
        for module, name, rope in ropes:
            module[name] = make(rope)
        yield
    finally:
        for module, name, rope in ropes:
            module[name] = rope


@contextmanager
def prepared_for_packs(model: nn.Module, attention: Callable[[ModuleCall], ModuleCall]) -> Iterator[None]:
    """Inside, ``model`` computes packs: rotary embeddings know the positions of tokens, masks are those of rows.

    ``attention`` makes what attends row by row in a pack out of mlx-lm's ``scaled_dot_product_attention``. Whether
    the results are right is another question: see :mod:`macft.model.trials.packable`.

    Raises:
        ConfigError: this model's attention is not mlx-lm's function.
    """
    if not calls_function(model, ATTENTION_FUNCTION):
        raise ConfigError("training.packing: this model's attention can't take packed rows; use auto or false")
    functions = {ATTENTION_FUNCTION: attention, MASK_FUNCTION: row_mask}
    with replaced_ropes(model, PackedRope), replaced_functions(model, functions):
        yield


def takes_packs(model: nn.Module) -> bool:
    """Whether ``model`` is inside :func:`prepared_for_packs`."""
    return any(isinstance(module, PackedRope) for module in model.modules())
