"""A world of one: the collective of a run on a single node."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from macft.collective.codecs.wire_codec import WireCodec


class Solo:
    """The :class:`~macft.collective.base.Collective` of one rank: no socket, and no waiting."""

    @property
    def rank(self) -> int:
        """Always 0."""
        return 0

    @property
    def world_size(self) -> int:
        """Always 1."""
        return 1

    def all_reduce(self, arrays: Sequence[Any]) -> None:
        """Leaves the arrays as they are: the sum over one rank."""

    def all_reduce_coded(self, array: NDArray[np.float32], codec: WireCodec, residual: NDArray[np.float32]) -> None:
        """Leaves the array as it is: nothing has to travel."""

    @property
    def bytes_sent(self) -> int:
        """Always 0."""
        return 0

    @property
    def lost_paths(self) -> list[str]:
        """None."""
        return []

    def broadcast(self, payload: bytes, root: int = 0) -> bytes:
        """Returns ``payload``. Raises ValueError for a ``root`` other than 0."""
        if root != 0:
            raise ValueError(f"broadcast: root {root} is not a rank; this world has rank 0 alone")
        return payload

    def all_gather(self, payload: bytes) -> list[bytes]:
        """Returns ``[payload]``."""
        return [payload]

    def barrier(self) -> None:
        """Returns: everyone is here."""

    def close(self) -> None:
        """Nothing is open."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
