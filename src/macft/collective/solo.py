"""A world of one: the same interface, and nothing to do."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray


class Solo:
    """The collective of a run on a single node."""

    rank = 0
    world_size = 1

    def all_reduce(self, arrays: Sequence[NDArray[np.float32] | NDArray[np.float64]]) -> None:
        """Leaves ``arrays`` as they are: the sum over one rank."""

    def broadcast(self, payload: bytes, root: int = 0) -> bytes:
        """Returns ``payload``."""
        if root != 0:
            raise ValueError(f"root {root} is not in a world of one")
        return payload

    def all_gather(self, payload: bytes) -> list[bytes]:
        """Returns ``[payload]``."""
        return [payload]

    def barrier(self) -> None:
        """Returns at once."""

    def close(self) -> None:
        """Nothing to release."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
