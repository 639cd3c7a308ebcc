"""Dropout whose mask depends on the row, not on who computes it.

macft lets any node compute any row of a step, alone or beside other rows, padded to any length. A mask drawn from a
shared random stream would change with all of these. Here each element's fate is a hash of (row key, layer, position,
feature), so a row meets the same mask on every node, in every micro-batch and after a resume; there is no random state.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten
from numpy.typing import NDArray

from macft.errors import ConfigError
from macft.model.mlx_lm_tuner import LoRASwitchLinear
from macft.model.module_classes import Members, ModuleCall, change_functions, change_members
from macft.model.packing import layout_of_pack

_FEATURE, _EXPERT = np.uint32(0x85EBCA77), 0x27D4EB2F


class _Current(threading.local):
    """Keys of the rows that this thread computes."""

    def __init__(self) -> None:
        self.keys = mx.zeros((1,), dtype=mx.uint32)
        self.tokens: int | None = None


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

    @property
    def tokens(self) -> int | None:
        """How many tokens this thread's rows have, padding included, where that is known."""
        return self._current.tokens

    @contextmanager
    def using(self, keys: mx.array, tokens: int | None = None) -> Iterator[None]:
        """Inside, ``keys`` (rows,) uint32 are those of the rows being computed, of ``tokens`` tokens together."""
        before = self._current.keys, self._current.tokens
        self._current.keys, self._current.tokens = keys, tokens
        try:
            yield
        finally:
            self._current.keys, self._current.tokens = before

    @staticmethod
    def for_rows(seed: int, step: int, row_ids: NDArray[np.int64]) -> NDArray[np.uint32]:
        """Keys (rows,) uint32 of the rows ``row_ids`` (rows,) of a step; the same on every node.

        A row that stands twice in a global batch gets the same mask twice.
        """
        keys = [np.random.SeedSequence([seed, step, int(row)]).generate_state(1)[0] for row in row_ids]
        return np.asarray(keys, dtype=np.uint32)

    def needed_for(self, seed: int, step: int, row_ids: NDArray[np.int64]) -> NDArray[np.uint32]:
        """The keys of :meth:`for_rows` where the model has dropout; else (1,) zero, for nobody reads it."""
        return self.for_rows(seed, step, row_ids) if self.in_use else np.zeros(1, np.uint32)


class RowDropout(nn.Module):
    """Drops elements of ``x`` with probability ``p`` and rescales the rest by 1 / (1 - p).

    ``x`` is (rows, length, ...), or (rows * length, features); where rows are packed, (1, tokens, ...) or (tokens,
    features).
    """

    def __init__(self, p: float, layer: int, keys: DropoutKeys):
        super().__init__()
        self._p = p
        self._layer = layer
        self._keys = keys

    def __call__(self, x: mx.array) -> mx.array:
        if not self.training:
            return x
        if x.ndim == 2:
            if self._keys.tokens not in (None, x.shape[0]):
                raise ConfigError(
                    "adapter.dropout: this model's code gives layers some tokens of a row only, whose masks would "
                    "depend on who computes them; use 0"
                )
            return self._dropped(x, *self._of_tokens(mx.arange(x.shape[0]), x.shape[0]))
        layout = layout_of_pack()
        if layout is None:
            rows, length = x.shape[:2]
            return self._dropped(x, _mix(self._keys.value)[:rows, None], _first.value + mx.arange(length)[None])
        return self._dropped(x, _mix(self._keys.value)[layout.owners][None], layout.depths[None])

    def _of_tokens(self, tokens: mx.array, count: int) -> tuple[mx.array, mx.array]:
        """Key of the row, and place in it, of ``tokens``, whose numbers go through ``count`` tokens row after row."""
        keys = _mix(self._keys.value)
        layout = layout_of_pack()
        if layout is not None:
            return keys[layout.owners[tokens]], layout.depths[tokens]
        length = count // keys.shape[0]
        return keys[tokens // length], _first.value + tokens % length

    def _dropped(self, x: mx.array, keys: mx.array, places: mx.array) -> mx.array:
        """``x`` (..., features) without some elements; ``keys`` and ``places`` have its first dimensions, or 1."""
        shape = x.shape
        x = x.reshape(*x.shape[: keys.ndim], -1)
        position = places.astype(mx.uint32)[..., None] * 0x9E3779B1
        # An array, for a number would become a part of the compiled code, and make it another one for each layer.
        layer = np.uint32(self._layer * 0xC2B2AE3D % 2**32)
        feature = mx.array(np.arange(x.shape[-1], dtype=np.uint32) * _FEATURE + layer)
        keep = _mix((position + feature) ^ keys[..., None]) >= int(self._p * 2**32)
        result = mx.where(keep, x * (1.0 / (1.0 - self._p)), 0.0).astype(x.dtype)
        return result.reshape(*result.shape[: keys.ndim], *shape[keys.ndim :])


class ExpertDropout(RowDropout):
    """The same for a layer of experts: each expert of a token has a mask of its own.

    ``x`` is (..., k or 1, 1, features), and the layer is called with ``indices`` (..., k), the numbers of the k experts
    of each token; or both are in the order of the experts, (tokens * k, 1, features) and (tokens * k,).
    """

    def __call__(self, x: mx.array) -> mx.array:
        if not self.training:
            return x
        experts = _routing.experts
        if _routing.is_sorted:
            if experts is not _routing.last_sorted:
                raise ConfigError("adapter.dropout: this model sorts what its experts get by code of its own; use 0")
            tokens, count = _routing.tokens, _routing.count
        else:
            experts = mx.broadcast_to(experts, np.broadcast_shapes(x.shape[:-2], experts.shape))
            count = math.prod(experts.shape[:-1])
            tokens = mx.arange(count).reshape(*experts.shape[:-1], 1)
        keys, places = self._of_tokens(tokens, count)
        keys = _mix(keys + experts.astype(mx.uint32) * _EXPERT)
        return self._dropped(x, keys[..., None], places[..., None])


class _Routing(threading.local):
    """Which experts this thread calls.

    ``experts`` are the indices that the layer being computed was called with. ``last_sorted`` are those that were
    sorted last, and ``tokens`` the numbers, up to ``count``, of the tokens that they belong to.
    """

    experts: mx.array
    is_sorted = False
    last_sorted: mx.array | None = None
    tokens: mx.array
    count: int


_routing = _Routing()


def _telling_experts(kind: type[nn.Module]) -> Members:
    """For layers of experts: their dropout is told for which experts they are called."""
    call = kind.__call__

    def layer_call(layer: nn.Module, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> Any:
        _routing.experts, _routing.is_sorted = indices, sorted_indices
        return call(layer, x, indices, sorted_indices=sorted_indices)

    return {"__call__": layer_call}


def _telling_tokens(gather_sort: ModuleCall) -> ModuleCall:
    """Takes the place of mlx-lm's ``_gather_sort``, which forgets what comes from which token."""

    def function(x: mx.array, indices: mx.array) -> Any:
        result = gather_sort(x, indices)
        count = math.prod(indices.shape[:-1])
        tokens, *_ = gather_sort(mx.arange(count).reshape(count, 1, 1), indices)
        _routing.last_sorted, _routing.tokens, _routing.count = result[1], tokens.reshape(-1), count
        return result

    return function


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
    experts = {f"{name}.dropout" for name, module in model.named_modules() if isinstance(module, LoRASwitchLinear)}
    replaced: list[tuple[str, RowDropout]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module._p_1 < 1.0:
            kind = ExpertDropout if name in experts else RowDropout
            replaced.append((name, kind(1.0 - module._p_1, len(replaced), keys)))
    if replaced:
        model.update_modules(tree_unflatten(replaced))
        keys.in_use = True
    if any(isinstance(dropout, ExpertDropout) for _, dropout in replaced):
        change_functions(model, {"_gather_sort": _telling_tokens})
        layers = [module for module in model.modules() if isinstance(module, LoRASwitchLinear)]
        change_members(layers, _telling_experts)
    return keys
