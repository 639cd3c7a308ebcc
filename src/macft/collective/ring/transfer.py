"""The algorithms of the collective calls, as seen by one rank: which frames it sends and expects. No sockets.

A part that starts at rank ``c`` travels ``c+1, c+2, ...``: after ``h`` hops it is at rank ``c+h``. So what a rank
receives at hop ``h`` started at ``rank-h``. A rank forwards what it receives at once.
"""

from __future__ import annotations

import time
import zlib
from collections import deque
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from macft.collective.codecs.error_feedback import encode_with_feedback
from macft.collective.codecs.quantization import WireCodec
from macft.collective.dtypes import add
from macft.collective.ring.buffers import Buffer, chunk_of, layout_of, pieces_of, slices_of
from macft.collective.ring.stream import new_buffer
from macft.collective.wire import MAX_BLOB_BYTES, Body, Frame, Header
from macft.errors import ProtocolError


class Transfer(Protocol):
    """One rank's side of a collective call.

    Attributes:
        call: The header that all frames of the call share.
        outgoing: Frames to send to the right, in order.
    """

    call: Header
    outgoing: deque[Frame]

    @property
    def incomplete(self) -> bool:
        """Whether frames from the left are still to come."""
        ...

    @property
    def next_source(self) -> int:
        """The rank whose part is expected next."""
        ...

    def buffer_for(self, header: Header, *, in_place: bool) -> memoryview | None:  # noqa: ARG002
        """Where to receive the body of a frame of this call; None if :meth:`receive` does not keep it.

        ``in_place``: the buffer may be the caller's own memory, because no frame arrives twice.
        """
        return new_buffer(header)

    def receive(self, frame: Frame) -> None:
        """Processes a frame from the left; appends to ``outgoing`` what is to be forwarded.

        Over several paths frames may arrive in any order, and twice; a second copy is ignored.

        Raises:
            ProtocolError: the frame is not one of this call.
        """
        ...


class GatherReduce(Transfer):
    """All-reduce of few bytes: all-gather the arrays, then every rank adds them up in the order of ranks.

    N - 1 hops instead of the 2N - 2 of :class:`Reduction`, for N / 2 times the bytes: faster while latency dominates.

    1. **Gather.** A rank sends its own arrays, concatenated, as one frame. It forwards each frame it receives, until
       every rank has those of all ranks.
    2. **Reduce.** :meth:`finish` adds them up, each chunk of an array in the order in which :class:`Reduction` would:
       chunk ``c`` from rank ``c`` on. So both give the same bits, and it does not show in the result which one the
       measured speed of the links has chosen.

    The arrays are copied before they are sent, so the call need not wait until they have left. With ``lend``, a single
    array is sent without a copy; the caller must then be done sending before :meth:`finish`.
    """

    def __init__(self, call: Header, buffers: Sequence[Buffer], world_size: int, *, lend: bool = False):
        self._buffers, self._world_size = buffers, world_size
        own: Body = b""
        if lend and len(buffers) == 1:
            own = buffers[0].flat.data.cast("B")
        elif buffers:
            own = b"".join([buffer.flat.data for buffer in buffers])
        self.call = call._replace(total=len(own), layout=layout_of(buffers))
        self._parts: dict[int, Body] = {call.sender: own}  # by rank
        self.outgoing: deque[Frame] = deque([Frame(self._header(1), own)])

    @property
    def incomplete(self) -> bool:
        return len(self._parts) < self._world_size

    @property
    def next_source(self) -> int:
        hops = range(1, self._world_size + 1)
        return next((self.call.sender - hop) % self._world_size for hop in hops if not self._has(hop))

    def receive(self, frame: Frame) -> None:
        header = frame.header
        if not 1 <= header.hop < self._world_size or header.length != self.call.total or header.piece:
            raise ProtocolError(f"hop {header.hop} of {header} with {header.length} bytes is not due")
        if self._has(header.hop):
            return
        self._parts[(self.call.sender - header.hop) % self._world_size] = frame.body
        if header.hop + 1 < self._world_size:
            self.outgoing.append(Frame(self._header(header.hop + 1), frame.body))

    def finish(self) -> None:
        """Writes the sums into the buffers."""
        ranks, start = self._world_size, 0
        for buffer in self._buffers:
            flat = buffer.flat
            parts = [np.frombuffer(self._parts[rank], flat.dtype, flat.size, start) for rank in range(ranks)]
            if ranks == 2:  # the order of two does not matter
                add(flat, parts[0], parts[1], buffer.dtype)
            else:
                # This rank's own part may be `flat` itself, so only the last addition writes there.
                scratch = np.empty_like(flat)
                for chunk in range(ranks):
                    begin, end = chunk_of(flat.size, chunk, ranks)
                    first, second, *between, last = [part[begin:end] for part in parts[chunk:] + parts[:chunk]]
                    total = scratch[begin:end]
                    add(total, first, second, buffer.dtype)
                    for part in between:
                        add(total, total, part, buffer.dtype)
                    add(flat[begin:end], total, last, buffer.dtype)
            start += flat.nbytes

    def _header(self, hop: int) -> Header:
        return self.call._replace(hop=hop, length=self.call.total)

    def _has(self, hop: int) -> bool:
        return (self.call.sender - hop) % self._world_size in self._parts


class _RingReduction(Transfer):
    """The parts of a ring all-reduce that are still due.

    Args:
        call: The header that all frames of the call share.
        world_size: The number of ranks N; there are N chunks and 2N - 2 hops.
        pieces: The number of pieces of each chunk.
    """

    def __init__(self, call: Header, world_size: int, pieces: Sequence[int]):
        self.call = call
        self._world_size, self._hops = world_size, 2 * world_size - 2
        self._due = {(hop, piece) for hop in range(1, self._hops + 1) for piece in range(pieces[self._chunk_at(hop)])}

    @property
    def incomplete(self) -> bool:
        return bool(self._due)

    @property
    def next_source(self) -> int:
        hop = min(self._due)[0] if self._due else 1
        # In the second phase all ranks have contributed, so only the left neighbour can be named.
        return self._chunk_at(hop if hop < self._world_size else 1)

    def _chunk_at(self, hop: int) -> int:
        """The chunk that arrives here at ``hop``. It started at the rank of this number."""
        return (self.call.sender - hop) % self._world_size


class Reduction(_RingReduction):
    """Ring all-reduce (Patarasuk and Yuan 2009, bandwidth-optimal): reduce-scatter, then all-gather, in 2N - 2 hops.

    The buffers are cut into N chunks, and each chunk into pieces of at most ``piece_bytes``.

    1. **Reduce-scatter**, hops 1 to N - 1. Rank ``r`` sends chunk ``r`` to the right. At hop ``h`` a rank receives the
       partial sum of chunk ``rank-h``, adds it to its own values and forwards the result. After N - 1 hops rank ``r``
       holds the total of chunk ``r+1``.
    2. **All-gather**, hops N to 2N - 2. Each total travels on round the ring; a rank copies it over its own values and
       forwards it.

    ::

        N = 3, chunk c, "+": adds      rank 0    rank 1    rank 2
        hop 1                          + c=2     + c=0     + c=1
        hop 2                          + c=1     + c=2     + c=0     rank 0 has the total of chunk 1
        hop 3                            c=0       c=1       c=2
        hop 4                            c=2       c=0       c=1

    Every rank sends 2 (N - 1) / N of the bytes. Each element is summed along one path and then copied, so all ranks get
    the same bits. A piece is forwarded as soon as it is added, so that adding and sending overlap.
    """

    def __init__(self, call: Header, buffers: Sequence[Buffer], world_size: int, piece_bytes: int):
        self._chunks = [list(pieces_of(buffers, chunk, world_size, piece_bytes)) for chunk in range(world_size)]
        call = call._replace(total=sum(buffer.flat.nbytes for buffer in buffers), layout=layout_of(buffers))
        super().__init__(call, world_size, [len(chunk) for chunk in self._chunks])
        self._in_place = (0, 0)  # hop and number of the piece that is received directly into its array
        self.outgoing = deque(
            Frame(self._header(1, number, piece), piece.flat.data)
            for number, piece in enumerate(self._chunks[call.sender])
        )

    def buffer_for(self, header: Header, *, in_place: bool) -> memoryview | None:
        part = header.hop, header.piece
        if not in_place or header.hop < self._world_size or part not in self._due:
            return None
        local = self._chunk(header.hop)[header.piece]
        if header.length != local.flat.nbytes:
            return None
        self._in_place = part
        return local.flat.data.cast("B")

    def receive(self, frame: Frame) -> None:
        header = frame.header
        hop, number = header.hop, header.piece
        if not 1 <= hop <= self._hops or number >= len(self._chunk(hop)):
            raise ProtocolError(f"part {number} of hop {hop} of {header} is not due")
        local = self._chunk(hop)[number]
        if header.dtype != local.dtype or header.length != local.flat.nbytes:
            sizes = f"{header.length} bytes of {header.dtype}, not {local.flat.nbytes} of {local.dtype}"
            raise ProtocolError(f"part {number} of hop {hop} of {header} has {sizes}")
        if (hop, number) not in self._due:
            return
        self._due.remove((hop, number))
        # A total may overwrite `local` although that was sent without a copy: the total includes what the neighbour
        # received from here, so those bytes have been sent. A second copy of them over another path is ignored.
        if hop < self._world_size:
            add(local.flat, local.flat, np.frombuffer(frame.body, local.flat.dtype), local.dtype)
        elif (hop, number) != self._in_place:
            np.copyto(local.flat, np.frombuffer(frame.body, local.flat.dtype))
        if hop < self._hops:
            self.outgoing.append(Frame(self._header(hop + 1, number, local), local.flat.data))

    def _chunk(self, hop: int) -> list[Buffer]:
        return self._chunks[self._chunk_at(hop)]

    def _header(self, hop: int, number: int, piece: Buffer) -> Header:
        return self.call._replace(hop=hop, piece=number, dtype=piece.dtype, length=piece.flat.nbytes)


class CodedReduction(_RingReduction):
    """Ring all-reduce of one flat float32 array whose parts are encoded on the wire, with error feedback.

    The phases are those of :class:`Reduction`. A rank encodes each part once: a partial sum, or the total if it is the
    last rank to add. The encoded total is forwarded unchanged, and every rank, that one too, takes its decoded values:
    the same bits.

    Args:
        flat: float32, shape (n,); summed in place.
        residual: float32, shape (n,); this rank's rounding error of earlier calls. It is added before encoding and
            receives the new rounding error.
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
        # The codec must be the same on all ranks, so it is part of the layout.
        layout = zlib.crc32(f"{codec.name}{flat.size}".encode())
        self._codec = codec
        self._chunks = [
            [
                (flat[piece], residual[piece])
                for piece in slices_of(flat, chunk, world_size, piece_bytes, multiple=codec.block)
            ]
            for chunk in range(world_size)
        ]
        pieces = [len(chunk) for chunk in self._chunks]
        super().__init__(call._replace(total=flat.nbytes, layout=layout), world_size, pieces)
        self.outgoing: deque[Frame] = deque()
        for number, (local, local_residual) in enumerate(self._chunks[call.sender]):
            self._send(1, number, encode_with_feedback(codec, local, local_residual))

    def receive(self, frame: Frame) -> None:
        header = frame.header
        hop, number = header.hop, header.piece
        chunk = self._chunk(hop) if 1 <= hop <= self._hops else []
        if number >= len(chunk) or header.length != self._codec.encoded_bytes(chunk[number][0].size):
            raise ProtocolError(f"part {number} of hop {hop} of {header} with {header.length} bytes is not due")
        if (hop, number) not in self._due:
            return
        self._due.remove((hop, number))
        local, residual = chunk[number]
        received = self._codec.decode(frame.body, local.size)
        encoded = frame.body
        if hop < self._world_size:
            local += received
            encoded = encode_with_feedback(self._codec, local, residual)
            if hop == self._world_size - 1:
                local[:] = self._codec.decode(encoded, local.size)
        else:
            local[:] = received
        if hop < self._hops:
            self._send(hop + 1, number, encoded)

    def _send(self, hop: int, number: int, encoded: Body) -> None:
        header = self.call._replace(hop=hop, piece=number, dtype="<f4", length=len(encoded))
        self.outgoing.append(Frame(header, encoded))

    def _chunk(self, hop: int) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        return self._chunks[self._chunk_at(hop)]


class BlobTransfer(Transfer):
    """Copies the blobs of the ranks ``origins`` to every rank: a broadcast from one, an all-gather from all."""

    def __init__(self, call: Header, payload: bytes, world_size: int, origins: Sequence[int], piece_bytes: int):
        self.call = call
        self.blobs: dict[int, bytes] = {}  # by rank
        self._world_size, self._piece_bytes = world_size, piece_bytes
        self._parts: dict[int, dict[int, Body]] = {}  # by hop and number
        self._totals: dict[int, int] = {}  # by hop
        self._expected = {hop for hop in range(1, world_size) if (call.sender - hop) % world_size in origins}
        self._due = set(self._expected)
        self.first_hop_done: float | None = None
        """When all of the left neighbour's own blob had come (``time.perf_counter``)."""
        self.outgoing: deque[Frame] = deque()
        if call.sender in origins:
            self.blobs[call.sender] = payload
            view = memoryview(payload)
            for number in range(self._part_count(len(payload))):
                body = view[number * piece_bytes : (number + 1) * piece_bytes]
                header = call._replace(total=len(payload), hop=1, piece=number, length=len(body))
                self.outgoing.append(Frame(header, body))

    @property
    def incomplete(self) -> bool:
        return bool(self._due)

    @property
    def next_source(self) -> int:
        return (self.call.sender - min(self._due, default=1)) % self._world_size

    def receive(self, frame: Frame) -> None:
        header = frame.header
        hop, number, total = header.hop, header.piece, header.total
        length = min(self._piece_bytes, total - number * self._piece_bytes)
        has_valid_total = self._totals.setdefault(hop, total) == total <= MAX_BLOB_BYTES
        is_valid = has_valid_total and number < self._part_count(total) and header.length == length
        if hop not in self._expected or not is_valid:
            raise ProtocolError(f"part {number} of hop {hop} of {header} is not due or of a wrong size")
        parts = self._parts.setdefault(hop, {})
        if hop not in self._due or number in parts:
            return
        parts[number] = frame.body
        if hop + 1 < self._world_size:
            self.outgoing.append(Frame(header._replace(sender=self.call.sender, hop=hop + 1), frame.body))
        if len(parts) == self._part_count(total):
            self._due.remove(hop)
            if hop == 1:
                self.first_hop_done = time.perf_counter()
            self.blobs[(self.call.sender - hop) % self._world_size] = b"".join(parts[i] for i in range(len(parts)))
            parts.clear()

    def _part_count(self, total: int) -> int:
        return max(1, -(-total // self._piece_bytes))  # an empty blob takes a frame too: a barrier is made of these
