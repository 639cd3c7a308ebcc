"""A world of one rank: the collective of a run on a single node."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from macft.collective.base import Channels, ReducibleArray, RingSpeed
from macft.collective.codecs.quantization import WireCodec


class NoChannels(Channels):
    """Those of a rank that has no peers."""

    waited, bytes_sent, sending_seconds = 0.0, 0, 0.0
    peers: Collection[int] = ()

    def guard(self, check: Callable[[], None], errors: Callable[[], AbstractContextManager[None]]) -> Channels:  # noqa: ARG002
        """Returns itself: nobody waits."""
        return self

    def send(self, to: int, tag: int, body: bytes | memoryview) -> None:  # noqa: ARG002
        """Raises ValueError."""
        raise ValueError(f"there is no channel to rank {to}")

    def receive(self, source: int, tag: int) -> memoryview:  # noqa: ARG002
        """Raises ValueError."""
        raise ValueError(f"there is no channel from rank {source}")


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

    @property
    def speed(self) -> RingSpeed | None:
        """Always None: there are no links."""
        return None

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
        return NoChannels()

    def close(self) -> None:
        """Nothing to close."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
