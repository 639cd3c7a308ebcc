"""A world of one rank: the collective of a run on a single node."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from macft.collective.base import ReducibleArray
from macft.collective.channels import Channels
from macft.collective.codecs.quantization import WireCodec


class Solo:
    """The :class:`~macft.collective.base.Collective` of one rank. No sockets; no call waits."""

    @property
    def rank(self) -> int:
        """Always 0."""
        return 0

    @property
    def world_size(self) -> int:
        """Always 1."""
        return 1

    def all_reduce(self, arrays: Sequence[ReducibleArray]) -> None:
        """Leaves the arrays unchanged: the sum over one rank."""

    def all_reduce_coded(self, array: NDArray[np.float32], codec: WireCodec, residual: NDArray[np.float32]) -> None:
        """Leaves the array unchanged: nothing is sent, so nothing is encoded."""

    @property
    def bytes_sent(self) -> int:
        """Always 0."""
        return 0

    @property
    def lost_paths(self) -> list[str]:
        """Always empty."""
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
        """Returns at once."""

    def open_channels(self, pairs: Collection[tuple[int, int]], purpose: str) -> Channels:
        """None. Raises ValueError for any pair."""
        if pairs:
            raise ValueError(f"{purpose}: this world has rank 0 alone, so no channel can be opened")
        return Channels()

    def close(self) -> None:
        """Nothing to close."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
