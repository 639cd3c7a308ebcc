"""PowerSGD: low-rank gradients (Vogels, Karimireddy and Jaggi 2019, arXiv:1905.13727, algorithms 1 and 2)."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from macft.collective.base import Collective
from macft.collective.codecs.base import owed

_TINY = 1e-20


class PowerSGD:
    """Matrices travel as two thin factors, all the rest as it is.

    What must come out alike on all ranks is made from reduced values by element-wise operations and running sums, whose
    bits do not depend on the processor. ``rank`` is that of the factors; a matrix is factored where that saves half.
    """

    name = "powersgd"

    def __init__(self, rank: int):
        self._rank = rank
        self._errors: dict[str, NDArray[np.float32]] = {}
        self._q: dict[str, NDArray[np.float32]] = {}

    def all_reduce(self, collective: Collective, names: Sequence[str], arrays: Sequence[Any]) -> None:
        """As of :class:`~macft.collective.codecs.base.GradientCodec`."""
        if collective.world_size == 1:
            return
        views = [np.asarray(array) for array in arrays]
        groups: dict[tuple[int, int], list[int]] = {}
        for place, value in enumerate(views):
            if value.ndim == 2 and 2 * self._rank * sum(value.shape) <= value.size:
                groups.setdefault((value.shape[0], value.shape[1]), []).append(place)
        whole = [value for place, value in enumerate(views) if not any(place in group for group in groups.values())]
        stacks = {shape: np.stack([views[place] for place in places]) for shape, places in groups.items()}
        keys = {shape: f"{shape[0]}x{shape[1]}/{names[places[0]]}" for shape, places in groups.items()}
        left = {}
        for shape, stack in stacks.items():
            error = self._errors.get(f"error/{keys[shape]}")
            if error is not None:
                stack += error
            left[shape] = np.ascontiguousarray(stack @ self._warm(keys[shape], stack.shape))
        collective.all_reduce([*left.values(), *whole])
        right = {}
        for shape, stack in stacks.items():
            _orthonormalize(left[shape])
            right[shape] = np.ascontiguousarray(stack.transpose(0, 2, 1) @ left[shape])
        collective.all_reduce(list(right.values()))
        for shape, places in groups.items():
            total = _product(left[shape], right[shape])
            self._q[f"q/{keys[shape]}"] = right[shape]
            self._errors[f"error/{keys[shape]}"] = stacks[shape] - total / np.float32(collective.world_size)
            for place, value in zip(places, total, strict=True):
                views[place][...] = value

    def state(self) -> dict[str, NDArray[np.float32]]:
        """Errors, and the factors that the next step starts from."""
        return {**self._errors, **self._q}

    def load(self, states: Sequence[Mapping[str, NDArray[np.float32]]], rank: int, world_size: int) -> None:
        """Goes on with errors and factors."""
        self._errors = owed(states, rank, world_size, "error/")
        self._q = {name: value.copy() for name, value in states[0].items() if name.startswith("q/")}

    def _warm(self, key: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        known = self._q.get(f"q/{key}")
        if known is not None:
            return known
        random = np.random.default_rng(zlib.crc32(key.encode()))
        return random.standard_normal((shape[0], shape[2], self._rank)).astype(np.float32)


def _orthonormalize(stack: NDArray[np.float32]) -> None:
    """Gram-Schmidt on the columns of each (rows, rank) matrix, in place."""
    for column in range(stack.shape[2]):
        vector = stack[:, :, column].astype(np.float64)
        for earlier in range(column):
            other = stack[:, :, earlier].astype(np.float64)
            vector -= _dot(vector, other)[:, None] * other
        norm = np.sqrt(_dot(vector, vector))
        stack[:, :, column] = vector / np.maximum(norm, _TINY)[:, None]


def _dot(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    total: NDArray[np.float64] = np.cumsum(a * b, axis=1)[:, -1]  # one after the other, on every machine
    return total


def _product(left: NDArray[np.float32], right: NDArray[np.float32]) -> NDArray[np.float32]:
    total = left[:, :, None, 0] * right[:, None, :, 0]
    for column in range(1, left.shape[2]):
        total += left[:, :, None, column] * right[:, None, :, column]
    return total
