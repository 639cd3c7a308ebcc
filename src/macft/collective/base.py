"""The interface between the trainer and the code that moves bytes between ranks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Protocol, Self, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from macft.collective.codecs.quantization import WireCodec

if TYPE_CHECKING:
    import mlx.core as mx

ReducibleArray: TypeAlias = "NDArray[np.generic] | mx.array"
"""What an all-reduce sums: a C-contiguous NumPy array, or an evaluated, row-contiguous MLX array."""


class RingSpeed(NamedTuple):
    """How fast the links of a ring were when it formed.

    Attributes:
        latency: Seconds of a small message from one rank to the next, on average over the ring.
        bandwidths: Bytes a second from each rank to the next one, by rank.
    """

    latency: float
    bandwidths: tuple[float, ...]


class Channels(Protocol):
    """Channels of one rank, to and from some others; :meth:`Collective.open_channels` makes them.

    Messages of a channel arrive in the order in which they were sent. Used by the collective's thread only.
    """

    waited: float
    """Seconds that :meth:`receive` has waited."""
    waiting: Callable[[], AbstractContextManager[None]]
    """Surrounds each such wait."""

    @property
    def peers(self) -> Collection[int]:
        """The ranks that there is a channel to."""
        ...

    @property
    def bytes_sent(self) -> int:
        """Bytes of the messages that have been sent."""
        ...

    @property
    def sending_seconds(self) -> float:
        """Seconds in which messages were being sent, over all channels."""
        ...

    def send(self, to: int, tag: int, body: bytes | memoryview) -> None:
        """Sends ``body``, in the background: its memory must not change any more.

        Args:
            to: A rank that there is a channel to.
            tag: 0 or more, below 2**63; the receiver names it too.
            body: C-contiguous, at most 4 GiB.

        Raises:
            PeerLost, PeerTimeout, ProtocolError, MembershipChanged: as the collective's calls.
        """
        ...

    def receive(self, source: int, tag: int) -> memoryview:
        """The next message of rank ``source``, as writable memory of its own; waits for it.

        Raises:
            ProtocolError: it has another tag.
            PeerLost, PeerTimeout, MembershipChanged: as the collective's calls; names who is gone.
        """
        ...

    def guard(self, check: Callable[[], None], errors: Callable[[], AbstractContextManager[None]]) -> Channels:
        """Calls ``check``, which may raise, while a rank waits; whatever is raised passes through ``errors``."""
        ...

    def close(self) -> None:
        """Ends the channels, on all ranks between two messages. Safe to call twice."""
        ...


@runtime_checkable
class Collective(Protocol):
    """Collective operations over all ranks of a run.

    All ranks make the same calls in the same order. No call waits forever: a call that cannot complete raises
    :class:`~macft.errors.PeerTimeout` or :class:`~macft.errors.PeerLost`, which name the peer.
    """

    @property
    def rank(self) -> int:
        """This process's rank, ``0 <= rank < world_size``."""
        ...

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        ...

    def all_reduce(self, arrays: Sequence[ReducibleArray]) -> None:
        """Sums each array over all ranks, in place.

        Args:
            arrays: C-contiguous arrays of any shape; float32, float64, float16, and for MLX also bfloat16. Every rank
                passes the same shapes and dtypes.

        Every rank gets the same bits: each element is summed along one path and then copied.
        """
        ...

    def all_reduce_coded(self, array: NDArray[np.float32], codec: WireCodec, residual: NDArray[np.float32]) -> None:
        """Sums ``array`` (float32, shape (n,)) in place, encoded by ``codec`` on the wire.

        ``residual`` (float32, shape (n,)) holds the rounding error of earlier calls and receives the new one.
        """
        ...

    @property
    def bytes_sent(self) -> int:
        """Bytes of data that this rank has sent so far; an estimate where the backend does not count them."""
        ...

    @property
    def lost_paths(self) -> list[str]:
        """Cables to the next rank, as ``host:port``, that failed while another one still works."""
        ...

    @property
    def speed(self) -> RingSpeed | None:
        """How fast the links are; the same on all ranks. None where nobody has measured them."""
        ...

    def broadcast(self, payload: bytes, root: int = 0) -> bytes:
        """Returns ``root``'s ``payload`` on every rank; the argument of the other ranks is ignored."""
        ...

    def all_gather(self, payload: bytes) -> list[bytes]:
        """The ``payload`` of every rank, ordered by rank."""
        ...

    def barrier(self) -> None:
        """Returns once every rank has called it."""
        ...

    def open_channels(self, pairs: Collection[tuple[int, int]], purpose: str) -> Channels:
        """Channels for messages between the ranks of each of ``pairs``, in both directions. A collective call.

        They end with the collective.

        Args:
            pairs: Of different ranks; every rank passes the same ones.
            purpose: One word for messages, such as ``pipeline``.

        Raises:
            CollectiveError: this backend has none, or a rank can't be reached.
        """
        ...

    def tell_stopped(self) -> None:
        """Tells the others, as far as possible, that this rank's user has stopped it; no call can follow.

        For a process that is about to end, also from another thread while this collective's is in a long call of MLX.
        """
        ...

    def close(self) -> None:
        """Releases sockets and threads. Safe to call twice."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
