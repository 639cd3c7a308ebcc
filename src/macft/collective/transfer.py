"""What a rank sends, expects and does with each frame of one collective call: no sockets, no waiting.

A part that starts at rank ``c`` travels ``c+1, c+2, ...``: after ``h`` hops it is at rank ``c+h``. So a rank
receives by hop ``h`` only what started at ``rank-h``, and whatever it has taken it passes on at once.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from macft.collective.codecs.wire_codec import WireCodec
from macft.collective.dtypes import add, view
from macft.collective.stream import fresh
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

    def room(self, header: Header, *, in_place: bool) -> memoryview | None:  # noqa: ARG002
        """Where the body of a frame of this call is to be received; None where ``take`` is the last to use it.

        ``in_place``: it may be the caller's own memory, as nothing comes twice.
        """
        return fresh(header)

    def take(self, header: Header, body: Any) -> None:
        """Takes in a frame from the left; adds to ``outgoing`` what goes on.

        Over several paths frames may come in any order, and twice; a second copy is ignored. Raises ProtocolError.
        """
        ...


@dataclass(frozen=True)
class Buffer:
    """Memory to sum in place: flat, with the wire's name of its type (see :mod:`~macft.collective.dtypes`)."""

    flat: NDArray[Any]
    dtype: str


class GatherReduce(Transfer):
    """All-reduce of little: every rank's arrays go round whole, and each rank adds all up in the order of ranks.

    N - 1 hops, where :class:`Reduction` has 2N - 2, for N / 2 times the bytes: the faster one while latency counts.
    The arrays are copied before they are sent, so nothing is waited for at the end. With ``lend`` a single one is not:
    what is sent is no longer needed when the call is over.
    """

    def __init__(self, call: Header, buffers: Sequence[Buffer], world_size: int, *, lend: bool = False):
        self._buffers, self._ranks = buffers, world_size
        own: Any = b""
        if (
            lend and len(buffers) == 1 and call.sender < 2
        ):  # of others the sum would overwrite what is still to be added
            own = buffers[0].flat.data.cast("B")
        elif buffers:
            own = b"".join([buffer.flat.data for buffer in buffers])
        self.call = Header(*call[:4], len(own), _layout(buffers))
        self._parts: dict[int, Any] = {call.sender: own}
        self.outgoing: deque[tuple[Header, Any]] = deque([(self._header(1), own)])

    @property
    def missing(self) -> bool:
        return len(self._parts) < self._ranks

    @property
    def awaited(self) -> int:
        ranks = self._ranks
        return next((self.call.sender - hop) % ranks for hop in range(1, ranks + 1) if not self._has(hop))

    def take(self, header: Header, body: Any) -> None:
        if not 1 <= header.hop < self._ranks or header.length != self.call.total or header.piece:
            raise ProtocolError(f"hop {header.hop} of {header} with {header.length} bytes is not due")
        if self._has(header.hop):
            return
        self._parts[(self.call.sender - header.hop) % self._ranks] = body
        if header.hop + 1 < self._ranks:
            self.outgoing.append((self._header(header.hop + 1), body))

    def _header(self, hop: int) -> Header:
        return Header(*self.call[:6], hop, 0, "", self.call.total)

    def finish(self) -> None:
        """Puts the sums into the buffers."""
        start = 0
        for buffer in self._buffers:
            flat = buffer.flat
            parts = [np.frombuffer(self._parts[rank], flat.dtype, flat.size, start) for rank in range(self._ranks)]
            add(flat, parts[0], parts[1], buffer.dtype)
            for part in parts[2:]:
                add(flat, flat, part, buffer.dtype)
            start += buffer.flat.nbytes

    def _has(self, hop: int) -> bool:
        return (self.call.sender - hop) % self._ranks in self._parts


class Reduction(Transfer):
    """Ring all-reduce (Patarasuk and Yuan 2009): N - 1 hops add up a chunk, N - 1 more carry its total round.

    Chunk ``c`` starts at rank ``c``. Every element is summed along one path and then copied, hence the same
    bits on all ranks. Pieces are passed on as soon as they are added, so that adding and sending overlap.
    """

    def __init__(self, call: Header, buffers: Sequence[Buffer], world_size: int, piece_bytes: int):
        self.call = call._replace(total=sum(buffer.flat.nbytes for buffer in buffers), layout=_layout(buffers))
        self._ranks = world_size
        self._chunks = [list(_pieces(buffers, chunk, world_size, piece_bytes)) for chunk in range(world_size)]
        self._hops = 2 * world_size - 2
        self._due = {(hop, number) for hop in range(1, self._hops + 1) for number in range(len(self._chunk(hop)))}
        self._in_place = (0, 0)  # the part that is being received where it belongs
        self.outgoing = deque(
            (self._header(1, number, piece), piece.flat.data) for number, piece in enumerate(self._chunks[call.sender])
        )

    @property
    def missing(self) -> bool:
        return bool(self._due)

    @property
    def awaited(self) -> int:
        hop = min(self._due)[0] if self._due else 1
        # Once all have joined in, only the left neighbour can be told.
        return (self.call.sender - (hop if hop < self._ranks else 1)) % self._ranks

    def room(self, header: Header, *, in_place: bool) -> memoryview | None:
        place = header.hop, header.piece
        if not in_place or header.hop < self._ranks or place not in self._due:
            return None
        local = self._chunk(header.hop)[header.piece]
        if header.length != local.flat.nbytes:
            return None
        self._in_place = place
        return local.flat.data.cast("B")

    def take(self, header: Header, body: Any) -> None:
        hop, number = header.hop, header.piece
        if not 1 <= hop <= self._hops or number >= len(self._chunk(hop)):
            raise ProtocolError(f"part {number} of hop {hop} of {header} is not due")
        local = self._chunk(hop)[number]
        if header.dtype != local.dtype or header.length != local.flat.nbytes:
            found = f"{header.length} bytes of {header.dtype}, not {local.flat.nbytes} of {local.dtype}"
            raise ProtocolError(f"part {number} of hop {hop} of {header} has {found}")
        if (hop, number) not in self._due:
            return
        self._due.remove((hop, number))
        # `local` may still be on its way, sent without a copy, only where it is overwritten by a total; but that total
        # has in it what the neighbour received from here, so the bytes have long left, and a second copy of them over
        # another path will be ignored.
        if hop < self._ranks:
            add(local.flat, local.flat, np.frombuffer(body, local.flat.dtype), local.dtype)
        elif (hop, number) != self._in_place:
            np.copyto(local.flat, np.frombuffer(body, local.flat.dtype))
        if hop < self._hops:
            self.outgoing.append((self._header(hop + 1, number, local), local.flat.data))

    def _chunk(self, hop: int) -> list[Buffer]:
        return self._chunks[(self.call.sender - hop) % self._ranks]

    def _header(self, hop: int, number: int, piece: Buffer) -> Header:
        return Header(*self.call[:6], hop, number, piece.dtype, piece.flat.nbytes)


class CodedReduction(Transfer):
    """Ring all-reduce of one flat float32 array whose parts travel encoded, with error feedback.

    A rank encodes each part once: what it has added up so far, or the total where it is the last to add. The total's
    bytes then go round unchanged, and every rank, that one too, takes what they decode to: the same bits. ``residual``
    has what this rank rounded away in earlier calls; it is added before encoding, and gets the new rest.
    """

    def __init__(
        self,
        call: Header,
        flat: NDArray[np.float32],
        codec: WireCodec,
        residual: NDArray[np.float32],
        world_size: int,
        piece_bytes: int,
    ):
        # The codec belongs to what must be the same on all ranks.
        layout = zlib.crc32(f"{codec.name}{flat.size}".encode())
        self.call = call._replace(total=flat.nbytes, layout=layout)
        self._codec, self._ranks, self._hops = codec, world_size, 2 * world_size - 2
        pairs = [Buffer(flat, "<f4"), Buffer(residual, "<f4")]
        parts = [list(_pieces(pairs[:1], chunk, world_size, piece_bytes)) for chunk in range(world_size)]
        rests = [list(_pieces(pairs[1:], chunk, world_size, piece_bytes)) for chunk in range(world_size)]
        self._chunks = [
            [(part.flat, rest.flat) for part, rest in zip(*chunk, strict=True)]
            for chunk in zip(parts, rests, strict=True)
        ]
        self._due = {(hop, number) for hop in range(1, self._hops + 1) for number in range(len(self._chunk(hop)))}
        self.outgoing: deque[tuple[Header, Any]] = deque()
        for number, (local, rest) in enumerate(self._chunks[call.sender]):
            self._send(1, number, self._encode(local, rest))

    @property
    def missing(self) -> bool:
        return bool(self._due)

    @property
    def awaited(self) -> int:
        hop = min(self._due)[0] if self._due else 1
        return (self.call.sender - (hop if hop < self._ranks else 1)) % self._ranks

    def take(self, header: Header, body: Any) -> None:
        hop, number = header.hop, header.piece
        chunk = self._chunk(hop) if 1 <= hop <= self._hops else []
        if number >= len(chunk) or header.length != self._codec.encoded_bytes(chunk[number][0].size):
            raise ProtocolError(f"part {number} of hop {hop} of {header} with {header.length} bytes is not due")
        if (hop, number) not in self._due:
            return
        self._due.remove((hop, number))
        local, rest = chunk[number]
        incoming = self._codec.decode(body, local.size)
        onward = body
        if hop < self._ranks:
            local += incoming
            onward = self._encode(local, rest)
            if hop == self._ranks - 1:
                local[:] = self._codec.decode(onward, local.size)
        else:
            local[:] = incoming
        if hop < self._hops:
            self._send(hop + 1, number, onward)

    def _encode(self, local: NDArray[np.float32], rest: NDArray[np.float32]) -> NDArray[np.uint8]:
        rest += local
        data = self._codec.encode(rest)
        rest -= self._codec.decode(data, rest.size)
        return data

    def _send(self, hop: int, number: int, data: Any) -> None:
        header = self.call._replace(hop=hop, piece=number, dtype="<f4", length=len(data))
        self.outgoing.append((header, data))

    def _chunk(self, hop: int) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        return self._chunks[(self.call.sender - hop) % self._ranks]


class BlobTransfer(Transfer):
    """Carries the blobs of ``origins`` to every rank: a broadcast from one, a gathering from all."""

    def __init__(self, call: Header, payload: bytes, world_size: int, origins: Sequence[int], piece_bytes: int):
        self.call = call
        self.blobs: dict[int, bytes] = {}
        self._ranks, self._piece_bytes = world_size, piece_bytes
        self._parts: dict[int, dict[int, Any]] = {}  # by hop and number
        self._totals: dict[int, int] = {}  # by hop
        self._due = {hop for hop in range(1, world_size) if (call.sender - hop) % world_size in origins}
        self._awaited = set(self._due)
        self.outgoing: deque[tuple[Header, Any]] = deque()
        if call.sender in origins:
            self.blobs[call.sender] = payload
            view = memoryview(payload)
            for number in range(self._count(len(payload))):
                body = view[number * piece_bytes : (number + 1) * piece_bytes]
                header = call._replace(total=len(payload), hop=1, piece=number, length=len(body))
                self.outgoing.append((header, body))

    @property
    def missing(self) -> bool:
        return bool(self._due)

    @property
    def awaited(self) -> int:
        return (self.call.sender - min(self._due, default=1)) % self._ranks

    def take(self, header: Header, body: Any) -> None:
        hop, number, total = header.hop, header.piece, header.total
        length = min(self._piece_bytes, total - number * self._piece_bytes)
        known = self._totals.setdefault(hop, total) == total <= MAX_BLOB_BYTES
        if hop not in self._awaited or not known or number >= self._count(total) or header.length != length:
            raise ProtocolError(f"part {number} of hop {hop} of {header} is not due or of a wrong size")
        parts = self._parts.setdefault(hop, {})
        if hop not in self._due or number in parts:
            return
        parts[number] = body
        if hop + 1 < self._ranks:
            self.outgoing.append((header._replace(sender=self.call.sender, hop=hop + 1), body))
        if len(parts) == self._count(total):
            self._due.remove(hop)
            self.blobs[(self.call.sender - hop) % self._ranks] = b"".join(parts[i] for i in range(len(parts)))
            parts.clear()

    def _count(self, total: int) -> int:
        return max(1, -(-total // self._piece_bytes))  # an empty blob takes a frame too: its arrival is the news


def fuse(
    arrays: Sequence[Any],
) -> tuple[list[Buffer], list[tuple[Buffer, list[NDArray[Any]]]]]:
    """Buffers to sum in place of ``arrays`` (NumPy or MLX); those that hold copies, each with the memory copied.

    Raises:
        ValueError: an array that can't be summed; names its place.
    """
    buffers: list[Buffer] = []
    small: dict[str, list[NDArray[Any]]] = {}
    for number, array in enumerate(arrays):
        try:
            flat, dtype = view(array)
        except (ValueError, TypeError) as error:
            kinds = "float32, float64, float16 or bfloat16"
            raise ValueError(
                f"all_reduce sums C-contiguous, writable {kinds} arrays; array {number} is {error}"
            ) from None
        if flat.nbytes >= FUSE_BELOW:
            buffers.append(Buffer(flat, dtype))
        elif flat.size:
            small.setdefault(dtype, []).append(flat)
    copies = []
    for dtype in sorted(small):
        flats = small[dtype]
        fused = Buffer(flats[0] if len(flats) == 1 else np.concatenate(flats), dtype)
        buffers.append(fused)
        if len(flats) > 1:
            copies.append((fused, flats))
    return buffers, copies


def unfuse(copies: Sequence[tuple[Buffer, list[NDArray[Any]]]]) -> None:
    """Copies the sums back into the arrays they belong to."""
    for fused, arrays in copies:
        start = 0
        for flat in arrays:
            flat[:] = fused.flat[start : start + flat.size]
            start += flat.size


def _pieces(buffers: Sequence[Buffer], chunk: int, chunks: int, piece_bytes: int) -> Iterator[Buffer]:
    for buffer in buffers:
        flat = buffer.flat
        begin, end = flat.size * chunk // chunks, flat.size * (chunk + 1) // chunks
        step = piece_bytes // flat.itemsize
        for start in range(begin, end, step):
            yield Buffer(flat[start : min(start + step, end)], buffer.dtype)


def _layout(buffers: Sequence[Buffer]) -> int:
    """Tells apart calls of equal size whose arrays differ; they would be summed wrongly without a word."""
    return _checksum(tuple([(buffer.dtype, buffer.flat.size) for buffer in buffers]))


@lru_cache
def _checksum(layout: tuple[tuple[str, int], ...]) -> int:
    return zlib.crc32(",".join(f"{dtype}{size}" for dtype, size in layout).encode())
