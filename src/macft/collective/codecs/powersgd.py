"""PowerSGD: low-rank gradients (Vogels, Karimireddy and Jaggi 2019, arXiv:1905.13727, algorithms 1 and 2)."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from macft.collective.base import Collective, ReducibleArray
from macft.collective.codecs.base import restore_residuals

_TINY = 1e-20


class PowerSGD:
    """Sends each matrix as two low-rank factors, and everything else uncompressed.

    For a gradient matrix M of shape (m, n) and the factor Q of shape (n, rank) of the step before::

        P = all_reduce(M @ Q);  P = orthonormalize(P);  Q = all_reduce(M.T @ P);  M = P @ Q.T

    P has shape (m, rank). A matrix is factored only where the factors are at most half its size. Matrices of one shape
    are stacked. Values that must be equal on all ranks are computed from reduced values by element-wise operations and
    running sums, whose bits do not depend on the processor.

    Args:
        rank: The rank of the factors.
    """

    name = "powersgd"
    needs_matrices = True

    def __init__(self, rank: int):
        self._rank = rank
        self._errors: dict[str, NDArray[np.float32]] = {}
        self._q: dict[str, NDArray[np.float32]] = {}

    def all_reduce(self, collective: Collective, names: Sequence[str], arrays: Sequence[ReducibleArray]) -> None:
        """See :class:`~macft.collective.codecs.base.GradientCodec`."""
        if collective.world_size == 1:
            return
        views = [np.asarray(array) for array in arrays]
        groups: dict[tuple[int, int], list[int]] = {}
        for index, value in enumerate(views):
            if value.ndim == 2 and 2 * self._rank * sum(value.shape) <= value.size:
                groups.setdefault((value.shape[0], value.shape[1]), []).append(index)
        uncompressed = [v for index, v in enumerate(views) if not any(index in group for group in groups.values())]
        stacks = {shape: np.stack([views[index] for index in indices]) for shape, indices in groups.items()}
        keys = {shape: f"{shape[0]}x{shape[1]}/{names[indices[0]]}" for shape, indices in groups.items()}
        p = {}
        for shape, stack in stacks.items():
            error = self._errors.get(f"error/{keys[shape]}")
            if error is not None:
                stack += error
            p[shape] = np.ascontiguousarray(stack @ self._start_factor(keys[shape], stack.shape))
        collective.all_reduce([*p.values(), *uncompressed])
        q = {}
        for shape, stack in stacks.items():
            _orthonormalize(p[shape])
            q[shape] = np.ascontiguousarray(stack.transpose(0, 2, 1) @ p[shape])
        collective.all_reduce(list(q.values()))
        for shape, indices in groups.items():
            total = _product(p[shape], q[shape])
            self._q[f"q/{keys[shape]}"] = q[shape]
            self._errors[f"error/{keys[shape]}"] = stacks[shape] - total / np.float32(collective.world_size)
            for index, value in zip(indices, total, strict=True):
                views[index][...] = value

    def state(self) -> dict[str, NDArray[np.float32]]:
        """The residuals, and the factors Q that the next step starts from."""
        return {**self._errors, **self._q}

    def load(self, states: Sequence[Mapping[str, NDArray[np.float32]]], rank: int, world_size: int) -> None:
        """Continues with the residuals and factors of ``states``."""
        self._errors = restore_residuals(states, rank, world_size, "error/")
        self._q = {name: value.copy() for name, value in states[0].items() if name.startswith("q/")}

    def _start_factor(self, key: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
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
    total: NDArray[np.float64] = np.cumsum(a * b, axis=1)[:, -1]  # a running sum: the same order on every machine
    return total


def _product(left: NDArray[np.float32], right: NDArray[np.float32]) -> NDArray[np.float32]:
    total = left[:, :, None, 0] * right[:, None, :, 0]
    for column in range(1, left.shape[2]):
        total += left[:, :, None, column] * right[:, None, :, column]
    return total
