"""Dropout whose mask depends on the row, not on who computes it.

macft lets any node compute any row of a step, alone or beside other rows, padded to any length. A mask drawn from a
shared random stream would change with all of these. Here each element's fate is a hash of (row key, layer, position,
feature), so a row meets the same mask on every node, in every micro-batch and after a resume; there is no random state.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten
from numpy.typing import NDArray

from macft.model.packing import layout_of_pack

_FEATURE = np.uint32(0x85EBCA77)


class _Current(threading.local):
    """Keys of the rows that this thread computes."""

    def __init__(self) -> None:
        self.keys = mx.zeros((1,), dtype=mx.uint32)


class _FirstPosition(threading.local):
    """Position in its row of the first token that this thread computes; not 0 where it computes rows in chunks."""

    value = 0


_first = _FirstPosition()


@contextmanager
def positions_from(first: int) -> Iterator[None]:
    """Inside, this thread's sequences are the part of each row that begins at position ``first``."""
    before, _first.value = _first.value, first
    try:
        yield
    finally:
        _first.value = before


class DropoutKeys:
    """The keys of the rows that a thread computes, shared by all dropout layers of a model and of its replicas."""

    def __init__(self) -> None:
        self._current = _Current()
        self.in_use = False

    @property
    def value(self) -> mx.array:
        """(rows,) uint32: those of this thread's rows."""
        return self._current.keys

    def __deepcopy__(self, _memo: object) -> DropoutKeys:
        return self

    @contextmanager
    def using(self, keys: mx.array) -> Iterator[None]:
        """Inside, ``keys`` (rows,) uint32 are those of the rows being computed."""
        before, self._current.keys = self._current.keys, keys
        try:
            yield
        finally:
            self._current.keys = before

    @staticmethod
    def for_rows(seed: int, step: int, row_ids: NDArray[np.int64]) -> NDArray[np.uint32]:
        """Keys (rows,) uint32 of the rows ``row_ids`` (rows,) of a step; the same on every node.

        A row that stands twice in a global batch gets the same mask twice.
        """
        keys = [np.random.SeedSequence([seed, step, int(row)]).generate_state(1)[0] for row in row_ids]
        return np.asarray(keys, dtype=np.uint32)


class RowDropout(nn.Module):
    """Drops elements of ``x`` with probability ``p`` and rescales the rest by 1 / (1 - p).

    ``x`` is (rows, length, features), or (1, tokens, features) where rows are packed.
    """

    def __init__(self, p: float, layer: int, keys: DropoutKeys):
        super().__init__()
        self._p = p
        self._layer = layer
        self._keys = keys

    def __call__(self, x: mx.array) -> mx.array:
        if not self.training:
            return x
        rows, length, features = x.shape
        layout = layout_of_pack()
        if layout is None:
            place = mx.arange(_first.value, _first.value + length, dtype=mx.uint32)
            keys = _mix(self._keys.value)[:rows, None, None]
        else:
            place = layout.depths.astype(mx.uint32)
            keys = _mix(self._keys.value)[layout.owners][None, :, None]
        position = place[:, None] * 0x9E3779B1
        # An array, for a number would become a part of the compiled code, and make it another one for each layer.
        layer = np.uint32(self._layer * 0xC2B2AE3D % 2**32)
        feature = mx.array(np.arange(features, dtype=np.uint32) * _FEATURE + layer)
        bits = _mix((position + feature[None])[None] ^ keys)
        keep = bits >= int(self._p * 2**32)
        return mx.where(keep, x * (1.0 / (1.0 - self._p)), 0.0).astype(x.dtype)


def _mix(value: mx.array) -> mx.array:
    """The finaliser of MurmurHash3 (Appleby): every input bit changes every output bit with probability 1/2."""
    value = value ^ (value >> 16)
    value = value * 0x85EBCA6B
    value = value ^ (value >> 13)
    value = value * 0xC2B2AE35
    return value ^ (value >> 16)


def make_dropout_reproducible(model: nn.Module) -> DropoutKeys:
    """Replaces the ``nn.Dropout`` of each adapter layer in place; returns the keys to set before each micro-batch."""
    keys = DropoutKeys()
    replaced: list[tuple[str, RowDropout]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module._p_1 < 1.0:
            replaced.append((name, RowDropout(1.0 - module._p_1, len(replaced), keys)))
    if replaced:
        model.update_modules(tree_unflatten(replaced))
        keys.in_use = True
    return keys
