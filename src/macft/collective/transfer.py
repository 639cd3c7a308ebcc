"""What a rank sends, expects and does with each frame of one collective call: no sockets, no waiting.

A part that starts at rank ``c`` travels ``c+1, c+2, ...``: after ``h`` hops it is at rank ``c+h``. So a rank
receives by hop ``h`` only what started at ``rank-h``, and whatever it has taken it passes on at once.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from macft.collective.wire import MAX_BLOB_BYTES, Header
from macft.errors import ProtocolError

FUSE_BELOW = 65_536
"""Arrays of fewer bytes are summed together, as one."""


class Transfer(Protocol):
    """One rank's side of a collective call. ``call`` is the header all its frames share."""

    call: Header
    outgoing: deque[tuple[Header, Any]]

    @property
    def missing(self) -> bool:
        """Whether frames from the left are still due."""
        ...

    @property
    def awaited(self) -> int:
        """The rank whose part is due next."""
        ...

    def take(self, header: Header, body: Any) -> None:
        """Takes in a frame from the left; adds to ``outgoing`` what goes on. Raises ProtocolError."""
        ...


class Reduction:
    """Ring all-reduce (Patarasuk and Yuan 2009): N - 1 hops add up a chunk, N - 1 more carry its total round.

    Chunk ``c`` starts at rank ``c``. Every element is summed along one path and then copied, hence the same
    bits on all ranks. Pieces are passed on as soon as they are added, so that adding and sending overlap.
    """

    def __init__(self, call: Header, buffers: Sequence[NDArray[Any]], world_size: int, piece_bytes: int):
        self.call = call._replace(total=sum(flat.nbytes for flat in buffers), layout=_layout(buffers))
        self._ranks = world_size
        self._chunks = [list(_pieces(buffers, chunk, world_size, piece_bytes)) for chunk in range(world_size)]
        self._hops = 2 * world_size - 2
        self._taken = [0] * (self._hops + 1)
        self._missing = sum(len(self._chunk(hop)) for hop in range(1, self._hops + 1))
        self.outgoing = deque(
            (self._header(1, number, piece), piece.data) for number, piece in enumerate(self._chunks[call.sender])
        )

    @property
    def missing(self) -> bool:
        return self._missing > 0

    @property
    def awaited(self) -> int:
        for hop in range(1, self._ranks):
            if self._taken[hop] < len(self._chunk(hop)):
                return (self.call.sender - hop) % self._ranks
        return (self.call.sender - 1) % self._ranks  # all have joined in; only the left neighbour can be told

    def take(self, header: Header, body: Any) -> None:
        hop, number = header.hop, header.piece
        if not 1 <= hop <= self._hops or number != self._taken[hop] or number >= len(self._chunk(hop)):
            raise ProtocolError(f"part {number} of hop {hop} of {header.call} is not due")
        local = self._chunk(hop)[number]
        if header.dtype != local.dtype.str or header.length != local.nbytes:
            found = f"{header.length} bytes of {header.dtype}, not {local.nbytes} of {local.dtype.str}"
            raise ProtocolError(f"part {number} of hop {hop} of {header.call} has {found}")
        incoming = np.frombuffer(body, local.dtype)
        self._taken[hop] += 1
        self._missing -= 1
        onward: Any = body  # a total is passed on as it came, from ZeroMQ's own memory
        if hop < self._ranks:
            # `local` may still be in ZeroMQ's hands, sent without a copy, only where it is overwritten by a
            # total; but that total has in it what the neighbour received from here, so the bytes have long
            # left.
            np.add(local, incoming, out=local)
            onward = local.data
        else:
            np.copyto(local, incoming)
        if hop < self._hops:
            self.outgoing.append((self._header(hop + 1, number, local), onward))

    def _chunk(self, hop: int) -> list[NDArray[Any]]:
        return self._chunks[(self.call.sender - hop) % self._ranks]

    def _header(self, hop: int, number: int, piece: NDArray[Any]) -> Header:
        return self.call._replace(hop=hop, piece=number, dtype=piece.dtype.str, length=piece.nbytes)


class Spread:
    """Carries the blobs of ``origins`` to every rank: a broadcast from one, a gathering from all."""

    def __init__(self, call: Header, payload: bytes, world_size: int, origins: Sequence[int], piece_bytes: int):
        self.call = call
        self.blobs: dict[int, bytes] = {}
        self._ranks = world_size
        self._parts: dict[int, list[Any]] = {}  # by hop
        self._sizes: dict[int, tuple[int, int]] = {}  # by hop: bytes so far, bytes in all
        self._due = {hop for hop in range(1, world_size) if (call.sender - hop) % world_size in origins}
        self.outgoing: deque[tuple[Header, Any]] = deque()
        if call.sender in origins:
            self.blobs[call.sender] = payload
            view = memoryview(payload)
            # An empty blob takes a frame too: its arrival is the news.
            for number, start in enumerate(range(0, max(1, len(payload)), piece_bytes)):
                body = view[start : start + piece_bytes]
                header = call._replace(total=len(payload), hop=1, piece=number, length=len(body))
                self.outgoing.append((header, body))

    @property
    def missing(self) -> bool:
        return bool(self._due)

    @property
    def awaited(self) -> int:
        return (self.call.sender - min(self._due, default=1)) % self._ranks

    def take(self, header: Header, body: Any) -> None:
        hop = header.hop
        parts = self._parts.setdefault(hop, [])
        size, total = self._sizes.get(hop, (0, header.total))
        size += header.length
        fits = header.total == total <= MAX_BLOB_BYTES and size <= total and (header.length > 0 or total == 0)
        if hop not in self._due or header.piece != len(parts) or not fits:
            raise ProtocolError(f"part {header.piece} of hop {hop} of {header.call} is not due or of a wrong size")
        parts.append(body)
        self._sizes[hop] = (size, total)
        if hop + 1 < self._ranks:
            self.outgoing.append((header._replace(sender=self.call.sender, hop=hop + 1), body))
        if size == total:
            self._due.remove(hop)
            self.blobs[(self.call.sender - hop) % self._ranks] = b"".join(self._parts.pop(hop))


def fuse(
    arrays: Sequence[NDArray[Any]],
) -> tuple[list[NDArray[Any]], list[tuple[NDArray[Any], list[NDArray[Any]]]]]:
    """Flat buffers to sum in place of ``arrays``; those that hold copies, each with the arrays copied."""
    flats = [array.reshape(-1) for array in arrays if array.size]
    buffers = [flat for flat in flats if flat.nbytes >= FUSE_BELOW]
    copies = []
    for dtype in (np.dtype(np.float32), np.dtype(np.float64)):
        small = [flat for flat in flats if flat.nbytes < FUSE_BELOW and flat.dtype == dtype]
        if len(small) == 1:
            buffers.append(small[0])
        elif small:
            buffers.append(np.concatenate(small))
            copies.append((buffers[-1], small))
    return buffers, copies


def unfuse(copies: Sequence[tuple[NDArray[Any], list[NDArray[Any]]]]) -> None:
    """Copies the sums back into the arrays they belong to."""
    for fused, arrays in copies:
        start = 0
        for flat in arrays:
            flat[:] = fused[start : start + flat.size]
            start += flat.size


def _pieces(buffers: Sequence[NDArray[Any]], chunk: int, chunks: int, piece_bytes: int) -> Iterator[NDArray[Any]]:
    for flat in buffers:
        begin, end = flat.size * chunk // chunks, flat.size * (chunk + 1) // chunks
        step = piece_bytes // flat.itemsize
        for start in range(begin, end, step):
            yield flat[start : min(start + step, end)]


def _layout(buffers: Sequence[NDArray[Any]]) -> int:
    """Tells apart calls of equal size whose arrays differ; they would be summed wrongly without a word."""
    return zlib.crc32(",".join(f"{flat.dtype.str}{flat.size}" for flat in buffers).encode())
