"""The interface of all gradient codecs, and the exact one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from macft.collective.base import Collective, ReducibleArray


class GradientCodec(Protocol):
    """Sums buckets of gradients over all ranks. What it loses in one step it adds in a later one (error feedback)."""

    name: str
    needs_matrices: bool
    """Whether it wants each parameter's gradient in its own shape; else several may be joined as one long array."""

    def all_reduce(self, collective: Collective, names: Sequence[str], arrays: Sequence[ReducibleArray]) -> None:
        """Sums float32 arrays in place, to the same bits on all ranks.

        Args:
            names: Parameter names. A name always belongs to the same array.
            arrays: float32, row-contiguous, any shapes; NumPy or evaluated MLX arrays.

        Raises:
            CollectiveError: as the collective does.
        """
        ...

    def state(self) -> dict[str, NDArray[np.float32]]:
        """This rank's state for checkpoints; empty for a codec without state."""
        ...

    def load(self, states: Sequence[Mapping[str, NDArray[np.float32]]], rank: int, world_size: int) -> None:
        """Restores the ``states`` of all ranks. With another number of ranks, rank 0 takes all residuals."""
        ...


class Exact:
    """No codec: the exact sum."""

    name = "none"
    needs_matrices = False

    def all_reduce(
        self,
        collective: Collective,
        names: Sequence[str],  # noqa: ARG002
        arrays: Sequence[ReducibleArray],
    ) -> None:
        """Calls the collective's own all-reduce."""
        collective.all_reduce(arrays)

    def state(self) -> dict[str, NDArray[np.float32]]:
        """Empty: there is no state."""
        return {}

    def load(self, states: Sequence[Mapping[str, NDArray[np.float32]]], rank: int, world_size: int) -> None:
        """Does nothing: there is no state."""


def restore_residuals(
    states: Sequence[Mapping[str, NDArray[np.float32]]], rank: int, world_size: int, prefix: str
) -> dict[str, NDArray[np.float32]]:
    """The residuals under ``prefix`` that ``rank`` continues with. When ranks join or leave, rank 0 takes the sum."""
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
