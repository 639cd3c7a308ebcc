"""The collective of two or more ranks: a ring over ZeroMQ, and TCP streams beside it.

This file runs the calls; what goes where is in :mod:`~macft.collective.transfer`, the sockets are in
:mod:`~macft.collective.link`. A ring belongs to the thread that made it.
"""

from __future__ import annotations

import contextlib
import struct
import time
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from macft.collective.codecs.wire_codec import WireCodec
from macft.collective.link import Links
from macft.collective.listener import COPY_BELOW, Listener
from macft.collective.path import WINDOW
from macft.collective.settings import CollectiveConfig
from macft.collective.stream import fresh
from macft.collective.transfer import BlobTransfer, CodedReduction, GatherReduce, Reduction, Transfer, fuse, unfuse
from macft.collective.wire import (
    CALL_NAMES,
    MAX_BLOB_BYTES,
    MAX_CALL_BYTES,
    MAX_PATHS,
    Cause,
    Header,
    Kind,
    split_paths,
)
from macft.errors import CollectiveError, PeerLost, PeerTimeout, ProtocolError

_EXCHANGE_BYTES = 768 * 1024
"""All-reduces of up to this, over the number of ranks, are exchanged whole, unless :meth:`Ring.tune` knows better."""
_TUNE_BYTES = 512 * 1024
_LEAST_PIECE_BYTES = 128 * 1024
_PIECE_SECONDS = 2e-3
"""How long a piece should be on its way, or less: then what a frame costs by itself hardly counts."""
_LOOK_SECONDS = 0.5
"""Longest single wait; connection events and frames end it at once."""


class Ring:
    """The :class:`~macft.collective.base.Collective` of ranks joined in a ring.

    Args:
        rank: This process's place, ``0 <= rank < world_size``. world_size: 2 or more. addresses:
        ``host:port`` of each rank's listener, by rank (``host:port+host:port`` where it has several cables); the same
        list on all ranks. listener: This rank's
        listener, which the ring then owns. Without one it listens at ``addresses[rank]``. settings: Waits and
        piece size, the same on all ranks; those of ``listener`` if one is given. names: Of the ranks, for
        messages. ring_id: Known to the ranks of this run only; a connection that does not know it is not let
        in. generation: Tells this ring from earlier ones of the same run. abandon: Asked while the ring comes
        together; what it answers is the reason not to wait any longer.

    Raises:
        CollectiveError: the ring did not come together; names the peer.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        addresses: Sequence[str],
        listener: Listener | None = None,
        *,
        settings: CollectiveConfig | None = None,
        names: Sequence[str] = (),
        ring_id: str = "",
        generation: int = 0,
        abandon: Callable[[], str] = str,
    ):
        if world_size < 2 or len(addresses) != world_size or not 0 <= rank < world_size:
            raise ValueError(f"a ring of {world_size} ranks with {len(addresses)} addresses has no rank {rank}")
        for address in addresses:
            split_paths(address)
        self._world_size, self._sequence, self._closed, self._bytes_sent = world_size, 0, False, 0
        self._listener = listener or Listener(addresses[rank], settings or CollectiveConfig())
        self._settings = self._listener.settings
        try:
            self._links = Links(
                self._listener, rank, addresses, names, ring_id=ring_id, generation=generation, abandon=abandon
            )
        except BaseException:
            self._listener.close()
            raise
        self._exchange_bytes = min(_EXCHANGE_BYTES // world_size, self._settings.piece_bytes)
        self._piece_bytes = self._settings.piece_bytes
        self._early: list[tuple[Header, Any]] = [*self._links.held]  # frames of calls to come

    @property
    def rank(self) -> int:
        """This process's place in the ring."""
        return self._links.rank

    @property
    def world_size(self) -> int:
        """How many ranks take part."""
        return self._world_size

    @property
    def address(self) -> str:
        """``host:port`` of this rank's listener."""
        return self._listener.address

    @property
    def lost_paths(self) -> list[str]:
        """Cables to the right neighbour, as ``host:port``, that are out of use while another one carries on."""
        return list(self._links.out.lost)

    def all_reduce(self, arrays: Sequence[Any]) -> None:
        """Sums each array over all ranks, in place; every rank ends with the same bits.

        Args:
            arrays: NumPy or evaluated MLX arrays, C-contiguous and writable, of float16, bfloat16 (MLX only), float32
            or float64, any shapes; the same ones on all ranks. They must not overlap. Large ones are sent from where
            they lie and summed there.

        Raises:
            ValueError: an array of another kind; nothing has been sent then. PeerLost, PeerTimeout,
            ProtocolError: name the rank to blame. The arrays then hold no particular values.
        """
        buffers, copies = fuse(arrays)
        total = sum(buffer.flat.nbytes for buffer in buffers)
        if total > MAX_CALL_BYTES:
            raise ValueError(f"all_reduce of {total} bytes: {MAX_CALL_BYTES} are the most")
        # Infinity and NaN are the trainer's to judge, once it has the sums.
        with np.errstate(over="ignore", invalid="ignore"):
            if total <= self._exchange_bytes:
                call = self._next_call(Kind.EXCHANGE)
                exchange = GatherReduce(call, buffers, self._world_size, lend=self._links.sends_at_once)
                self._run(exchange)
                exchange.finish()
            else:
                call = self._next_call(Kind.PIECE)
                self._run(Reduction(call, buffers, self._world_size, self._piece_bytes))
        unfuse(copies)

    def all_reduce_coded(self, array: NDArray[np.float32], codec: WireCodec, residual: NDArray[np.float32]) -> None:
        """Sums a flat float32 array in place, encoded on every hop; every rank ends with the same bits.

        ``residual``, of the same size, is what this rank rounded away before, and then what it rounds away now. Raises
        as :meth:`all_reduce` does.
        """
        call, piece = self._next_call(Kind.PIECE), self._piece_bytes
        with np.errstate(over="ignore", invalid="ignore"):
            self._run(CodedReduction(call, array, codec, residual, self._world_size, piece))

    @property
    def bytes_sent(self) -> int:
        """Bytes of data this rank has sent, without headers and what goes a second time."""
        return self._bytes_sent

    def tune(self) -> None:
        """Measures the links and sets what depends on them. A call: all ranks make it.

        Up to which size all-reduces are exchanged whole: an exchange takes n - 1 hops of all bytes, a ring 2n - 2 of an
        n-th, equal where bytes = latency * speed * n / (n - 2); of two ranks both send the same bytes, so there an
        exchange is right at any speed. And the size of pieces: while one is added the wire may have nothing to do, so
        on a slow link they are smaller.
        """
        ranks = self._world_size
        latency = min(_seconds(self.barrier) for _ in range(4)) / (ranks - 1)
        hop = min(_seconds(lambda: self.all_gather(bytes(_TUNE_BYTES))) for _ in range(2)) / (ranks - 1)
        found = self.all_gather(struct.pack("<dd", latency, _TUNE_BYTES / max(hop - latency, 1e-6)))
        latencies, speeds = zip(*(struct.unpack("<dd", blob) for blob in found), strict=True)
        if ranks > 2:
            crossover = min(latencies) * min(speeds) * ranks / (ranks - 2)
            self._exchange_bytes = int(min(crossover, self._exchange_bytes))
        piece = max(_LEAST_PIECE_BYTES, int(min(speeds) * _PIECE_SECONDS)) & ~7
        self._piece_bytes = min(piece, self._settings.piece_bytes)

    def broadcast(self, payload: bytes, root: int = 0) -> bytes:
        """Returns ``root``'s ``payload`` on every rank; raises as :meth:`all_reduce` does."""
        if not 0 <= root < self._world_size:
            raise ValueError(f"broadcast: root {root} is not a rank of this ring of {self._world_size}")
        return self._spread(Kind.BROADCAST, payload, [root])[root]

    def all_gather(self, payload: bytes) -> list[bytes]:
        """Every rank's ``payload``, by rank; raises as :meth:`all_reduce` does."""
        blobs = self._spread(Kind.GATHER, payload, range(self._world_size))
        return [blobs[rank] for rank in range(self._world_size)]

    def barrier(self) -> None:
        """Returns once every rank has called it; raises as :meth:`all_reduce` does."""
        self._spread(Kind.BARRIER, b"", range(self._world_size))

    def close(self) -> None:
        """Tells the neighbours and closes the sockets, within about a second. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        if self._links.failure is None:
            with contextlib.suppress(CollectiveError):
                self._links.drain()
                self._links.say_goodbye(Cause.DONE, self.rank, "")
        self._links.leave()
        self._listener.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not self._closed and self._links.failure is None:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            text = f"{self._links.name(self.rank)} stopped with {reason}"
            self._links.say_goodbye(Cause.LOST, self.rank, text)
            self._links.failure = PeerLost(text)
        self.close()

    def _next_call(self, kind: Kind) -> Header:
        if self._closed:
            raise PeerLost(f"this ring of rank {self.rank} is closed; no {CALL_NAMES[kind]} can be made")
        if self._links.failure is not None:
            raise self._links.failure
        self._sequence += 1
        return Header(kind, self._links.generation, self.rank, sequence=self._sequence)

    def _spread(self, kind: Kind, payload: bytes, origins: Sequence[int]) -> dict[int, bytes]:
        if len(payload) > MAX_BLOB_BYTES:
            raise ValueError(f"{CALL_NAMES[kind]} of {len(payload)} bytes: {MAX_BLOB_BYTES} are the most")
        call = self._next_call(kind)
        transfer = BlobTransfer(call, payload, self._world_size, origins, self._settings.piece_bytes)
        self._run(transfer)
        return transfer.blobs

    def _run(self, transfer: Transfer) -> None:
        """Carries out a call. What ends it half-way, Ctrl-C too, ends the ring: the ranks are out of step."""
        try:
            self._exchange(transfer)
        except CollectiveError:
            raise
        except BaseException:
            # Perhaps between the two parts of a message, so no goodbye: the neighbours see the connection
            # end.
            reason = f"rank {self.rank} was interrupted in {transfer.call}; its ring has ended"
            self._links.failure = PeerLost(reason)
            raise

    def _exchange(self, transfer: Transfer) -> None:
        links, call = self._links, transfer.call
        room = partial(self._room, transfer)
        early, self._early = self._early, []
        for header, body in early:
            self._take(transfer, header, body)
        sent_uncopied = took_large = False
        progress = time.monotonic()
        while True:
            while transfer.outgoing and links.out.send(*transfer.outgoing[0]):
                header, _ = transfer.outgoing.popleft()
                self._bytes_sent += header.length
                sent_uncopied = sent_uncopied or _is_lent(header)
            missing = transfer.missing
            if took_large and not missing:
                links.credit()  # the left neighbour waits for it, see below
                took_large = False
            # The caller may change its arrays once this returns, so uncopied bodies must have left by then. A
            # stream knows; ZeroMQ and several paths have them until the neighbour has taken them. Both sides know
            # the sizes, so both know whether a credit is awaited.
            needs_right = bool(transfer.outgoing) or links.out.pending or (sent_uncopied and links.unacknowledged > 0)
            if not missing and not needs_right:
                return
            moved = links.moved
            frame = links.wait(call, left=missing, right=needs_right, seconds=_LOOK_SECONDS, room=room)
            if frame is not None:
                took_large = took_large or _is_lent(frame[0])
                self._take(transfer, *frame)
            now = time.monotonic()
            if frame is not None or links.moved != moved:
                progress = now
            elif now - progress > self._settings.patience:
                self._give_up(transfer, now - progress)

    def _room(self, transfer: Transfer, header: Header) -> memoryview | None:
        """Where the body of a frame is to be received."""
        if not _belongs(header, transfer.call):
            return fresh(header)
        # A second copy, over another path, may still come when the call is over and the arrays are the caller's.
        return transfer.room(header, in_place=not self._links.has_paths)

    def _take(self, transfer: Transfer, header: Header, body: Any) -> None:
        call = transfer.call
        if links_differ := header.sequence - call.sequence if self._links.has_paths else 0:
            # Over several paths a frame may overtake others, or come a second time when its call is over.
            if links_differ > 0 and len(self._early) < WINDOW * MAX_PATHS:
                self._early.append((header, body))
            if links_differ < 0 or self._early:
                return
        if not _belongs(header, call):
            same = (header.kind, header.sequence) == (call.kind, call.sequence)
            theirs = f"{self._links.name(header.sender)} is at {header}, this rank at {call}"
            others = " of other shapes or types" if same and header.total == call.total else ""
            text = f"{theirs}{others}; do all ranks run the same macft, data and configuration?"
            self._links.fail(ProtocolError, header.sender, text)
        try:
            transfer.take(header, body)
        except ProtocolError as error:
            self._links.fail(ProtocolError, header.sender, f"{self._links.name(header.sender)}: {error}")

    def _give_up(self, transfer: Transfer, seconds: float) -> None:
        peer = transfer.awaited if transfer.missing else self._links.right
        text = (
            f"{self._links.name(peer)} is alive but did not do its part of {transfer.call} "
            f"for {seconds:.0f} s; it may still compute: collective.patience sets the limit"
        )
        self._links.fail(PeerTimeout, peer, text)


def _belongs(header: Header, call: Header) -> bool:
    """Whether a frame is part of ``call``, as this rank knows it."""
    if (header.kind, header.sequence) != (call.kind, call.sequence):
        return False
    return header.kind not in (Kind.PIECE, Kind.EXCHANGE) or (header.total, header.layout) == (call.total, call.layout)


def _is_lent(header: Header) -> bool:
    """Whether the body is sent from the caller's arrays; blobs and exchanges are nobody's to change."""
    return header.kind == Kind.PIECE and header.length >= COPY_BELOW


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
