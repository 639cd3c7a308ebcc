"""A model's small trainable parameters as one long array for each type, of which the model's own are views.

A thousand small arrays are a thousand kernels for each thing that is done with them; of one array it is one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import accumulate
from weakref import WeakValueDictionary

import mlx.core as mx
import mlx.nn as nn

from macft.model.parameter_refs import ParameterRefs

LARGE = 1 << 18
"""Parameters of so many values are by themselves."""

Joined = Mapping[str, mx.array]
"""Long arrays (n,) by the name of a kind of parameters, and large parameters by their own names."""


class JoinedParameters:
    """Those of ``model``. Parameters of 2^18 values or more stay by themselves.

    ``groups``: names of the parameters that are joined, in MLX's order, by a name for the whole.
    """

    def __init__(self, model: nn.Module):
        self._model, self._refs = model, ParameterRefs(model)
        arrays = dict(zip(self._refs.names, self._refs.get(), strict=True))
        self._shapes = {name: value.shape for name, value in arrays.items()}
        self.groups = _groups(arrays)
        self._views: list[mx.array] = []
        self._joined: dict[str, mx.array] = {}

    @classmethod
    def of(cls, model: nn.Module) -> JoinedParameters:
        """The same object for all who ask for those of ``model``, as long as it trains the same parameters."""
        found = _known.get(id(model))
        if found is None or found._refs.names != ParameterRefs(model).names:
            found = _known[id(model)] = cls(model)
        return found

    def get(self) -> dict[str, mx.array]:
        """The parameters as they are, joined anew if anybody else has set one since :meth:`put`."""
        arrays = self._refs.get()
        if len(self._views) != len(arrays) or any(a is not b for a, b in zip(arrays, self._views, strict=True)):
            self._views, self._joined = arrays, self.join(dict(zip(self._refs.names, arrays, strict=True)))
        return dict(self._joined)

    def put(self, joined: Joined) -> list[mx.array]:
        """Sets all of them; returns them one by one."""
        views = self.split(joined)
        self._joined, self._views = dict(joined), [views[name] for name in self._refs.names]
        self._refs.put(self._views)
        return self._views

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """The model has the same arrays afterwards: differentiating leaves it with copies, which :meth:`get` joins."""
        arrays = self._refs.get()
        try:
            yield
        finally:
            self._refs.put(arrays)

    def join(self, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """Arrays by name, of the parameters' shapes, as long ones: a kernel for each that is not by itself.

        An array may also be a joined part of a long one, under the name of its first parameter.
        """
        return join(self.groups, arrays)

    def split(self, joined: Joined) -> dict[str, mx.array]:
        """The inverse: views by name."""
        parts: dict[str, mx.array] = {}
        for key, names in self.groups.items():
            if names == [key]:
                parts[key] = joined[key]
                continue
            parts |= split(joined[key], {name: self._shapes[name] for name in names})
        return parts

    def holding(self, arrays: Mapping[str, mx.array]) -> AbstractContextManager[None]:
        """Inside, the model's parameters are ``arrays``, by name."""
        return self._refs.holding([arrays[name] for name in self._refs.names])


def join(groups: Mapping[str, Sequence[str]], arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """``arrays`` by the key of their group, one after the other, (n,); that of a group of its own name as it is."""
    joined: dict[str, mx.array] = {}
    for key, names in groups.items():
        if list(names) == [key]:
            joined[key] = arrays[key]
            continue
        parts = [arrays[name].reshape(-1) for name in names if name in arrays]
        joined[key] = parts[0] if len(parts) == 1 else mx.concatenate(parts)
    return joined


def split(array: mx.array, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, mx.array]:
    """The inverse for one group: views of the long ``array`` by name, of these ``shapes`` one after the other."""
    parts = mx.split(array, list(accumulate(map(math.prod, shapes.values())))[:-1])
    return {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


# Those in use, by the id of their model, which they hold.
_known: WeakValueDictionary[int, JoinedParameters] = WeakValueDictionary()


def _groups(parameters: Mapping[str, mx.array]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name, parameter in parameters.items():
        kind = str(parameter.dtype).removeprefix("mlx.core.")
        groups.setdefault(name if parameter.size >= LARGE else f"small-{kind}", []).append(name)
    return groups
