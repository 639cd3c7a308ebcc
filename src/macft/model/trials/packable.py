"""Which models may be given packed rows: concluded from what a model does, not from its name or its settings.

In a pack the rows' tokens stand side by side. The linear layers and norms of a block don't notice. What could differ is
all that depends on a token's position or on its neighbours. :func:`may_pack` shows that attention is the only place
where tokens meet under a mask, at any length of a row; :func:`ignores_positions` that positions matter in rotary
embeddings only; and a trial pack, :func:`macft.model.backends.choose.can_pack`, that the numbers are right.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from macft.model.module_classes import ModuleCall, replaced_functions
from macft.model.packing import (
    MASK_FUNCTION,
    PackLayout,
    packed,
    prepared_for_packs,
    replaced_ropes,
)
from macft.model.trials.traceable import can_trace

_ROWS = (8, 1 << 16)
"""Tokens of the rows with which a model is traced. A mask that looks causal at the longer has no window below it; the
shorter comes first, since blocks that loop over time take long to trace, and show there that they don't attend."""
_POSITIONS = (3, 131_101)
"""Positions to compare with the first: the least, where learned ones show, and one beyond what scales that grow with
the position begin at. That is a prime, so that no period hides it."""


def may_pack(model: nn.Module) -> bool:
    """Whether the attention of ``model`` takes packed rows, as far as can be seen without computing anything.

    Every block must attend through mlx-lm's function, and the mask must be the one that mlx-lm's function makes for
    the rows, window or not. A mask that the architecture makes or changes by itself, as attention in chunks does, would
    be one for the pack as a whole.
    """
    return all(_attends_by_rows(model, length) for length in _ROWS)


def _attends_by_rows(model: nn.Module, length: int) -> bool:
    trace = _Trace(length)
    # Weights may not exist yet, and a long row could not be computed: MLX follows the code, and raises where the code
    # would need a value.
    is_followed = can_trace(lambda tokens: trace.follow(model, tokens), mx.zeros((1, 2 * length), mx.int32))
    return is_followed and trace.calls >= len(model.layers)


def ignores_positions(model: nn.Module) -> bool:
    """Whether ``model`` computes the same far behind the beginning of a row as at it, but for rotary embeddings.

    It is told by a cache that its tokens stand there, as in generation. A scale of the attention that grows with the
    position, as some architectures have from thousands of tokens on, shows here and in no short row.
    """
    tokens = mx.arange(1, 9)[None]
    try:
        with replaced_ropes(model, lambda _rope: _Unturned()):
            first, *others = ([_EmptyCache(at)] * len(model.layers) for at in (0, *_POSITIONS))
            expected = model(tokens, cache=first)
            return all(mx.array_equal(model(tokens, cache=cache), expected, equal_nan=True).item() for cache in others)
    except Exception:  # the code of an architecture may raise anything
        return False


class _Unfit(Exception):
    """What is traced can't be packed."""


class _Trace:
    """Follows a model through a pack of two rows of ``length`` tokens, and looks at the masks of its attention."""

    def __init__(self, length: int) -> None:
        self.calls = 0
        self._length = length
        self._masks: list[Any] = []

    def follow(self, model: nn.Module, tokens: mx.array) -> None:
        place = mx.zeros((tokens.shape[1],), mx.int32)
        layout = PackLayout(mx.zeros((2, self._length), mx.int32), owners=place, depths=place)
        with ExitStack() as inside:
            inside.enter_context(prepared_for_packs(model, self._attention))
            inside.enter_context(replaced_functions(model, {MASK_FUNCTION: self._mask}))
            inside.enter_context(packed(layout))
            model(tokens)

    def _mask(self, original: ModuleCall) -> ModuleCall:
        def mask(*arguments: Any, **named: Any) -> Any:
            self._masks.append(original(*arguments, **named))
            return self._masks[-1]

        return mask

    def _attention(self, _original: ModuleCall) -> ModuleCall:
        def attention(
            queries: mx.array,
            keys: mx.array,
            values: mx.array,
            cache: Any = None,
            scale: float = 1.0,
            mask: Any = None,
            **others: Any,
        ) -> mx.array:
            self.calls += 1
            is_of_rows = queries.shape[2] == keys.shape[2] and any(mask is made for made in self._masks)
            # Sinks, one for each head; what goes by token would need to be laid out as rows.
            by_head = all(not isinstance(value, mx.array) or value.ndim <= 1 for value in (scale, *others.values()))
            if cache is not None or not is_of_rows or not by_head:
                raise _Unfit
            return mx.zeros((*queries.shape[:3], values.shape[3]), queries.dtype)

        return attention


class _EmptyCache:
    """A cache that holds nothing, of tokens that stand at ``offset``."""

    def __init__(self, offset: int):
        self.offset = offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """What it was given."""
        return keys, values


class _Unturned(nn.Module):
    """In place of a rotary embedding: nothing is turned."""

    def __call__(self, x: mx.array, offset: Any = 0) -> mx.array:  # noqa: ARG002
        return x
