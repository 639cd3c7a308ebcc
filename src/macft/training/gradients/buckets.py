"""How a gradient travels between the ranks: small parameters joined, in buckets, in the order of the backward pass.

A bucket is summed over the ranks while MLX computes the next one. What is joined in it is one array for MLX, which
casts and adds it at once, and one buffer for the ring, which sums it where it lies. All ranks have the same buckets,
whatever computes their gradients: they follow from the names and shapes of the trained parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from numpy.typing import NDArray

from macft.model.joined_parameters import LARGE, join, split

Gradient = dict[str, mx.array]
"""By parameter name, float32, of the parameters' shapes."""


@dataclass(frozen=True)
class Piece:
    """Parameters whose gradients are joined: ``names`` in MLX's order, and their shapes. A large one is by itself.

    ``is_uniform``: all are of one type, on this rank, so that they are joined for the update too.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    is_uniform: bool

    @property
    def name(self) -> str:
        """That of its first parameter, by which a joined gradient has it."""
        return self.names[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the joined array; of a single parameter, its own."""
        return self.shapes[0] if len(self.names) == 1 else (sum(map(math.prod, self.shapes)),)

    def of(self, gradient: Mapping[str, mx.array]) -> mx.array:
        """Its array in a ``gradient`` by parameter or by piece."""
        is_joined = self.names[-1] not in gradient
        return gradient[self.name] if is_joined else join({self.name: self.names}, gradient)[self.name]

    def for_update(self, array: mx.array) -> dict[str, mx.array]:
        """The gradient that this piece, ``array``, is, as the update takes it."""
        if self.is_uniform:
            return {self.name: array}
        return split(array, dict(zip(self.names, self.shapes, strict=True)))

    def views(self, array: mx.array) -> dict[str, NDArray[np.float32]]:
        """By parameter, the memory of ``array``, which has been computed."""
        ends = list(accumulate(map(math.prod, self.shapes)))[:-1]
        parts = np.split(np.asarray(array).reshape(-1), ends)
        return {name: part.reshape(shape) for name, part, shape in zip(self.names, parts, self.shapes, strict=True)}


Buckets = Sequence[Sequence[Piece]]


def buckets_of(model: nn.Module, bucket_bytes: int) -> Buckets:
    """Those of ``model``'s trainable parameters, last layer first, of about ``bucket_bytes`` bytes each."""
    parameters: dict[str, mx.array] = dict(tree_flatten(model.trainable_parameters()))
    return [_pieces(reversed(names), parameters) for names in names_in_buckets(parameters, bucket_bytes)]


def names_in_buckets(parameters: dict[str, mx.array], bucket_bytes: int) -> list[list[str]]:
    """Names in the reverse order of the model, in groups of about ``bucket_bytes`` in float32."""
    buckets: list[list[str]] = [[]]
    size = 0
    for name in reversed(parameters):
        if size >= bucket_bytes:
            buckets.append([])
            size = 0
        buckets[-1].append(name)
        size += 4 * parameters[name].size
    return buckets


def _pieces(names: Iterable[str], parameters: Mapping[str, mx.array]) -> list[Piece]:
    """Of one bucket; ``names`` in MLX's order."""
    small: list[str] = []
    groups: list[list[str]] = []
    for name in names:
        if parameters[name].size >= LARGE:
            groups.append([name])
        else:
            small.append(name)
    return [
        Piece(
            names=tuple(group),
            shapes=tuple(parameters[name].shape for name in group),
            is_uniform=len({parameters[name].dtype for name in group}) == 1,
        )
        for group in [*groups, small]
        if group
    ]
