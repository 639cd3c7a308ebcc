"""Where a model, or a layer of it, keeps its trainable parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten


class ParameterRefs:
    """Found once, since a walk through all modules of a model takes milliseconds. ``names`` are in MLX's order."""

    def __init__(self, model: nn.Module):
        modules = dict(model.named_modules())
        self.names = [name for name, _ in tree_flatten(model.trainable_parameters())]
        self._places = []
        for name in self.names:
            # The module that holds the array, and where in it: in a list, perhaps, which is no module.
            owner = name
            while owner not in modules:
                owner = owner.rpartition(".")[0]
            self._places.append((modules[owner], name[len(owner) :].lstrip(".").split(".")))

    def get(self) -> list[mx.array]:
        """The parameters, in the order of ``names``."""
        return [_within(module, path)[_key(path[-1])] for module, path in self._places]

    def put(self, values: Iterable[mx.array]) -> None:
        """Sets all of them, in that order."""
        for (module, path), value in zip(self._places, values, strict=True):
            _within(module, path)[_key(path[-1])] = value

    @contextmanager
    def holding(self, values: Iterable[mx.array]) -> Iterator[None]:
        """Inside, the parameters are ``values``."""
        before = self.get()
        self.put(values)
        try:
            yield
        finally:
            self.put(before)


def _within(module: Any, path: list[str]) -> Any:
    for part in path[:-1]:
        module = module[_key(part)]
    return module


def _key(part: str) -> str | int:
    return int(part) if part.isdigit() else part
