"""The interface between the trainer and whatever moves bytes between ranks."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from macft.collective.codecs.wire_codec import WireCodec


@runtime_checkable
class Collective(Protocol):
    """Collective operations over all ranks of a run.

    All ranks make the same calls in the same order. No call waits for ever: each ends with
    :class:`~macft.errors.PeerTimeout` or :class:`~macft.errors.PeerLost`, which name the peer.
    """

    @property
    def rank(self) -> int:
        """This process's place in the ring, ``0 <= rank < world_size``."""
        ...

    @property
    def world_size(self) -> int:
        """How many ranks take part."""
        ...

    def all_reduce(self, arrays: Sequence[Any]) -> None:
        """Sums each array over all ranks, in place: NumPy or evaluated MLX arrays, C-contiguous, any shape.

        float32, float64, float16, and of MLX also bfloat16.

        Every rank ends with the same bits: each element is summed along one path and then copied.
        """
        ...

    def all_reduce_coded(self, array: NDArray[np.float32], codec: WireCodec, residual: NDArray[np.float32]) -> None:
        """Sums a flat float32 array in place in fewer bytes; ``residual`` carries what is rounded away (both (n,))."""
        ...

    @property
    def bytes_sent(self) -> int:
        """Bytes of data this rank has sent so far, as far as it knows."""
        ...

    @property
    def lost_paths(self) -> list[str]:
        """Cables to the next rank, as ``host:port``, that are out of use while another one carries on."""
        ...

    def broadcast(self, payload: bytes, root: int = 0) -> bytes:
        """Returns ``root``'s ``payload`` on every rank; the other ranks' argument is ignored."""
        ...

    def all_gather(self, payload: bytes) -> list[bytes]:
        """Every rank's ``payload``, by rank."""
        ...

    def barrier(self) -> None:
        """Returns once every rank has called it."""
        ...

    def close(self) -> None:
        """Releases sockets and threads. Safe to call twice."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
