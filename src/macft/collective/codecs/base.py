"""The interface of all gradient codecs, and the exact one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from macft.collective.base import Collective


class GradientCodec(Protocol):
    """Sums buckets of gradients over all ranks. What it loses in one step it adds in a later one (error feedback)."""

    name: str

    def all_reduce(self, collective: Collective, names: Sequence[str], arrays: Sequence[Any]) -> None:
        """Sums float32 arrays in place, to the same bits on all ranks. ``names`` stay with their arrays for good.

        NumPy or evaluated MLX arrays, row-contiguous, any shapes; raises as the collective does.
        """
        ...

    def state(self) -> dict[str, NDArray[np.float32]]:
        """This rank's memory, for checkpoints; empty if it has none."""
        ...

    def load(self, states: Sequence[Mapping[str, NDArray[np.float32]]], rank: int, world_size: int) -> None:
        """Takes back the states of all ranks. On another number of ranks what was owed is paid by rank 0."""
        ...


class Exact:
    """No codec: the sum of all bits."""

    name = "none"

    def all_reduce(self, collective: Collective, names: Sequence[str], arrays: Sequence[Any]) -> None:  # noqa: ARG002
        """The collective's own."""
        collective.all_reduce(arrays)

    def state(self) -> dict[str, NDArray[np.float32]]:
        """Nothing is kept."""
        return {}

    def load(self, states: Sequence[Mapping[str, NDArray[np.float32]]], rank: int, world_size: int) -> None:
        """Nothing to take back."""


def owed(
    states: Sequence[Mapping[str, NDArray[np.float32]]], rank: int, world_size: int, prefix: str
) -> dict[str, NDArray[np.float32]]:
    """The error memory under ``prefix`` that ``rank`` goes on with; nothing of it is lost when ranks come or go."""
    if len(states) == world_size:
        return {name: value.copy() for name, value in states[rank].items() if name.startswith(prefix)}
    if rank:
        return {}
    total: dict[str, NDArray[np.float32]] = {}
    for state in states:
        for name, value in state.items():
            if name.startswith(prefix):
                total[name] = total[name] + value if name in total else value.copy()
    return total
