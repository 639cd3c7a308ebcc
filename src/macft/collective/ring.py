"""Ring all-reduce over ZeroMQ.

Each array is cut into one chunk a rank. In the first N - 1 stages every rank adds what it receives to its own values
and passes the sum on; after them each rank holds one chunk's total, and N - 1 more stages pass the totals round
(Patarasuk and Yuan 2009). Chunks travel in pieces, and a piece is passed on as soon as it has been added, so that
adding and sending overlap. Every element is summed along one path and then copied: all ranks end with the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np
import zmq
from numpy.typing import NDArray

from macft.collective.link import Links
from macft.collective.wire import MAX_TOTAL_BYTES, Header, Kind
from macft.errors import ProtocolError

_ZERO_COPY_FROM = 65536
"""Bytes below which copying a payload is cheaper than telling when ZeroMQ is done with it."""


class Ring:
    """The collective of two ranks or more. Owns ``context`` and ``links`` and is used by one thread."""

    def __init__(self, context: zmq.Context[Any], links: Links, *, piece_bytes: int):
        self._context = context
        self._links = links
        self._piece_bytes = piece_bytes
        self._calls = 0

    @property
    def rank(self) -> int:
        """This process's place in the ring."""
        return self._links.rank

    @property
    def world_size(self) -> int:
        """How many ranks take part."""
        return self._links.world_size

    def all_reduce(self, arrays: Sequence[NDArray[np.float32] | NDArray[np.float64]]) -> None:
        """Sums each array over all ranks in place; see :class:`~macft.collective.base.Collective`."""
        for array in arrays:
            if array.dtype.char not in "fd" or not array.flags.c_contiguous or not array.flags.writeable:
                raise ValueError("all_reduce needs C-contiguous, writable float32 or float64 arrays")
            self._all_reduce(array.reshape(-1))

    def _all_reduce(self, flat: NDArray[Any]) -> None:
        doing = self._begin(Kind.ALL_REDUCE, flat.nbytes, flat.dtype.char)
        ranks, stages = self.world_size, 2 * self.world_size - 2
        bounds = [len(flat) * i // ranks for i in range(ranks + 1)]
        step = max(1, self._piece_bytes // flat.itemsize)
        pieces = [
            [flat[at : min(at + step, bounds[chunk + 1])] for at in range(bounds[chunk], bounds[chunk + 1], step)]
            for chunk in range(ranks)
        ]
        for number, piece in enumerate(pieces[self.rank]):
            self._send(doing, 0, number, piece)
        unsent = []
        for stage in range(stages):
            for number, piece in enumerate(pieces[(self.rank - stage - 1) % ranks]):
                received = np.frombuffer(self._receive(doing, stage, number, piece.nbytes), dtype=flat.dtype)
                if stage < ranks - 1:
                    np.add(piece, received, out=piece)
                else:
                    piece[...] = received
                if stage + 1 < stages:
                    tracker = self._send(doing, stage + 1, number, piece)
                    # A partial sum may be overwritten once its total arrives: by then the next rank has had it, or
                    # there would be no total. A total may be overwritten by the caller: it must be gone by then.
                    if tracker is not None and stage + 1 >= ranks - 1:
                        unsent.append(tracker)
        self._links.wait_sent(unsent)

    def broadcast(self, payload: bytes, root: int = 0) -> bytes:
        """Returns ``root``'s payload on every rank."""
        if not 0 <= root < self.world_size:
            raise ValueError(f"root {root} is not a rank of this world of {self.world_size}")
        is_root, is_last = self.rank == root, (self.rank + 1) % self.world_size == root
        doing = self._begin(Kind.BROADCAST, len(payload) if is_root else 0, "")
        if is_root:
            self._send_blob(doing, 0, payload)
            return payload
        received = self._receive_blob(doing, 0)
        if not is_last:
            self._send_blob(doing, 0, received)
        return received

    def all_gather(self, payload: bytes) -> list[bytes]:
        """Every rank's payload, by rank."""
        doing = self._begin(Kind.ALL_GATHER, len(payload), "")
        gathered = [b""] * self.world_size
        gathered[self.rank] = payload
        for stage in range(self.world_size - 1):
            self._send_blob(doing, stage, gathered[(self.rank - stage) % self.world_size])
            gathered[(self.rank - stage - 1) % self.world_size] = self._receive_blob(doing, stage)
        return gathered

    def barrier(self) -> None:
        """Returns once every rank has called it."""
        self.all_gather(b"")

    def close(self) -> None:
        """Says goodbye and releases the sockets."""
        self._links.close()
        self._context.term()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _begin(self, kind: Kind, total: int, dtype: str) -> Header:
        if total >= MAX_TOTAL_BYTES:
            raise ValueError(f"{total} bytes are too many for one collective call")
        self._calls += 1
        return Header(kind, self.rank, self._calls, total=total, dtype=dtype)

    def _send(self, doing: Header, stage: int, piece: int, payload: NDArray[Any]) -> zmq.MessageTracker | None:
        header = Header(doing.kind, self.rank, doing.call, stage, piece, doing.total, doing.dtype)
        return self._links.send(header, payload.data, track=payload.nbytes >= _ZERO_COPY_FROM)

    def _receive(self, doing: Header, stage: int, piece: int, size: int) -> Any:
        header, payload = self._links.receive(doing)
        found = (header.kind, header.call, header.total, header.dtype, header.stage, header.piece)
        if found != (doing.kind, doing.call, doing.total, doing.dtype, stage, piece) or len(payload) != size:
            self._mismatch(header, doing)
        return payload

    def _send_blob(self, doing: Header, stage: int, payload: bytes) -> None:
        """At least one frame, so that the receiver learns the size of an empty payload too."""
        for number, start in enumerate(range(0, max(1, len(payload)), self._piece_bytes)):
            header = Header(doing.kind, self.rank, doing.call, stage, number, len(payload))
            self._links.send(header, payload[start : start + self._piece_bytes])

    def _receive_blob(self, doing: Header, stage: int) -> bytes:
        parts: list[bytes] = []
        size, total = 0, None
        while total is None or size < total:
            header, payload = self._links.receive(doing)
            found = (header.kind, header.call, header.stage, header.piece)
            total = header.total if total is None else total
            fits = header.total == total and size + len(payload) <= total and (len(payload) > 0 or total == 0)
            if found != (doing.kind, doing.call, stage, len(parts)) or not fits:
                self._mismatch(header, doing)
            parts.append(bytes(payload))
            size += len(payload)
        return b"".join(parts)

    def _mismatch(self, header: Header, doing: Header) -> None:
        self._links.fail(
            ProtocolError(
                f"{self._links.name(header.sender)} is at {header.describe()}, rank {self.rank} at {doing.describe()}: "
                "the ranks don't make the same calls; do all run the same macft, data and configuration?"
            )
        )
