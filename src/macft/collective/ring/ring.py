"""The collective of two or more ranks: a ring over ZeroMQ, with TCP streams beside it.

This module runs the calls. The algorithms are in :mod:`~macft.collective.ring.transfer`, the sockets in
:mod:`~macft.collective.ring.link`. A ring may be used only by the thread that made it.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from macft.collective.base import ReducibleArray, RingSpeed
from macft.collective.codecs.quantization import WireCodec
from macft.collective.ring.buffers import fuse, unfuse
from macft.collective.ring.channel_setup import open_channels
from macft.collective.ring.channels import StreamChannels
from macft.collective.ring.handshake import RingIdentity
from macft.collective.ring.link import Links
from macft.collective.ring.listener import COPY_BELOW, Listener
from macft.collective.ring.path import WINDOW
from macft.collective.ring.stream import new_buffer
from macft.collective.ring.transfer import BlobTransfer, CodedReduction, GatherReduce, Reduction, Transfer
from macft.collective.ring.tuning import PROBE_BYTES, Tuning, measured_ring, report
from macft.collective.settings import CollectiveConfig
from macft.collective.wire import (
    CALL_NAMES,
    MAX_BLOB_BYTES,
    MAX_CALL_BYTES,
    MAX_PATHS,
    Cause,
    Frame,
    Header,
    Kind,
    split_paths,
)
from macft.errors import CollectiveError, PeerLost, PeerStopped, PeerTimeout, ProtocolError

_GATHER_REDUCE_BYTES = 768 * 1024
"""All-reduces of up to this over the number of ranks use :class:`GatherReduce`, until :meth:`Ring.tune` lowers it."""
_POLL_SECONDS = 0.5
"""Longest single wait; connection events and frames end it at once."""
_log = logging.getLogger("macft.ring")


class Ring:
    """The :class:`~macft.collective.base.Collective` of ranks joined in a ring.

    Args:
        rank: This process's rank, ``0 <= rank < world_size``.
        world_size: 2 or more.
        addresses: ``host:port`` of each rank's listener, by rank (``host:port+host:port`` for several cables). The same
            list on all ranks.
        listener: This rank's listener, which the ring then owns. Without one it listens at ``addresses[rank]``.
        settings: Timeouts and piece size, the same on all ranks. Ignored if ``listener`` is given, which has its own.
        names: Host names by rank, for messages.
        ring_id: Known to the ranks of this run only. A connection that does not send it is refused.
        generation: Distinguishes this ring from earlier ones of the same run.
        stop_reason: Called while the ring forms. A non-empty result is the reason to stop waiting.

    Raises:
        CollectiveError: the ring did not form; names the peer.
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
        stop_reason: Callable[[], str] = str,
    ):
        if world_size < 2 or len(addresses) != world_size or not 0 <= rank < world_size:
            raise ValueError(f"a ring of {world_size} ranks with {len(addresses)} addresses has no rank {rank}")
        for address in addresses:
            split_paths(address)
        self._world_size, self._sequence, self._closed, self._bytes_sent = world_size, 0, False, 0
        self._listener = listener or Listener(addresses[rank], settings or CollectiveConfig())
        self._settings = self._listener.settings
        self._identity = RingIdentity(rank, addresses, names, ring_id, generation)
        try:
            self._links = Links.connect(self._listener, self._identity, stop_reason=stop_reason)
        except BaseException:
            self._listener.close()
            raise
        piece_bytes = self._settings.piece_bytes
        self.tuning = Tuning(min(_GATHER_REDUCE_BYTES // world_size, piece_bytes), piece_bytes)
        """The same on all ranks."""
        self._early_frames = [*self._links.early_frames]  # frames of later calls
        self._channels: list[StreamChannels] = []
        self._speed: RingSpeed | None = None

    @property
    def rank(self) -> int:
        """This process's rank."""
        return self._identity.rank

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return self._world_size

    @property
    def address(self) -> str:
        """``host:port`` of this rank's listener."""
        return self._listener.address

    @property
    def lost_paths(self) -> list[str]:
        """Cables to the right neighbour, as ``host:port``, that failed while another one still works."""
        return list(self._links.sender.lost)

    @property
    def speed(self) -> RingSpeed | None:
        """How fast the links were when :meth:`tune` measured them."""
        return self._speed

    def all_reduce(self, arrays: Sequence[ReducibleArray]) -> None:
        """Sums each array over all ranks, in place. Every rank gets the same bits.

        Few bytes are summed by :class:`~macft.collective.ring.transfer.GatherReduce`, many by
        :class:`~macft.collective.ring.transfer.Reduction`; their docstrings show the communication pattern.

        Args:
            arrays: C-contiguous, writable NumPy or evaluated MLX arrays of any shape; float16, bfloat16 (MLX only),
                float32 or float64. Every rank passes the same shapes and dtypes. The arrays must not overlap. Large
                ones are sent from and summed in their own memory.

        Raises:
            ValueError: an array that cannot be summed. Nothing has been sent then.
            PeerLost, PeerTimeout, ProtocolError: name the rank to blame. The values of the arrays are then undefined.
        """
        buffers, copies = fuse(arrays)
        total = sum(buffer.flat.nbytes for buffer in buffers)
        if total > MAX_CALL_BYTES:
            raise ValueError(f"all_reduce of {total} bytes: {MAX_CALL_BYTES} are the most")
        # The trainer checks the sums for infinity and NaN.
        with np.errstate(over="ignore", invalid="ignore"):
            if total <= self.tuning.gather_reduce_bytes:
                call = self._next_call(Kind.EXCHANGE)
                gather_reduce = GatherReduce(call, buffers, self._world_size, lend=self._links.sends_immediately)
                self._run(gather_reduce)
                gather_reduce.finish()
            else:
                call = self._next_call(Kind.PIECE)
                self._run(Reduction(call, buffers, self._world_size, self.tuning.piece_bytes))
        unfuse(copies)

    def all_reduce_coded(self, array: NDArray[np.float32], codec: WireCodec, residual: NDArray[np.float32]) -> None:
        """Sums a flat array in place, encoded on every hop. Every rank gets the same bits.

        Args:
            array: float32, shape (n,).
            codec: The same on all ranks.
            residual: float32, shape (n,): this rank's rounding error of earlier calls, replaced by the new one.

        Raises:
            CollectiveError: as :meth:`all_reduce`.
        """
        call, piece_bytes = self._next_call(Kind.PIECE), self.tuning.piece_bytes
        with np.errstate(over="ignore", invalid="ignore"):
            self._run(CodedReduction(call, array, codec, residual, self._world_size, piece_bytes))

    @property
    def bytes_sent(self) -> int:
        """Bytes of data this rank has sent, without headers and frames sent again."""
        return self._bytes_sent + sum(channels.bytes_sent for channels in self._channels)

    def tune(self) -> None:
        """Measures the links and chooses algorithm and piece size by them. A collective call: all ranks make it.

        See :mod:`~macft.collective.ring.tuning`.
        """
        ranks = self._world_size
        latency = min(_seconds(self.barrier) for _ in range(4)) / (ranks - 1)
        gathers = [self._timed_gather() for _ in range(2)]
        hop = min(whole for whole, _ in gathers) / (ranks - 1)
        from_left = min(first for _, first in gathers)
        limits = Tuning(self.tuning.gather_reduce_bytes, self._settings.piece_bytes)
        self._speed, latency, bandwidth, self.tuning = measured_ring(
            self.all_gather(report(latency, hop, from_left)), limits
        )
        _log.info(
            "ring measured: %.0f us a hop, %.0f MB/s; gather-reduce up to %d bytes, pieces of %d bytes",
            1e6 * latency,
            bandwidth / 1e6,
            *self.tuning,
        )

    def _timed_gather(self) -> tuple[float, float]:
        """Seconds of an all-gather of ``PROBE_BYTES``, and until the left neighbour's own bytes were here.

        All ranks begin at about the same time, and send their own bytes first.
        """
        self.barrier()
        transfer = BlobTransfer(
            self._next_call(Kind.GATHER),
            bytes(PROBE_BYTES),
            self._world_size,
            range(self._world_size),
            self._settings.piece_bytes,
        )
        started = time.perf_counter()
        self._run(transfer)
        whole = time.perf_counter() - started
        return whole, (transfer.first_hop_done or started + whole) - started

    def broadcast(self, payload: bytes, root: int = 0) -> bytes:
        """Returns ``root``'s ``payload`` on every rank; raises as :meth:`all_reduce` does."""
        if not 0 <= root < self._world_size:
            raise ValueError(f"broadcast: root {root} is not a rank of this ring of {self._world_size}")
        return self._transfer_blobs(Kind.BROADCAST, payload, [root])[root]

    def all_gather(self, payload: bytes) -> list[bytes]:
        """The ``payload`` of every rank, ordered by rank; raises as :meth:`all_reduce` does."""
        blobs = self._transfer_blobs(Kind.GATHER, payload, range(self._world_size))
        return [blobs[rank] for rank in range(self._world_size)]

    def barrier(self) -> None:
        """Returns once every rank has called it; raises as :meth:`all_reduce` does."""
        self._transfer_blobs(Kind.BARRIER, b"", range(self._world_size))

    def open_channels(self, pairs: Collection[tuple[int, int]], purpose: str) -> StreamChannels:
        """See :meth:`~macft.collective.base.Collective.open_channels`; raises as :meth:`all_reduce` does."""
        self._channels.append(
            open_channels(self._links, self._identity, self._listener, self.all_gather, pairs, purpose)
        )
        return self._channels[-1]

    def tell_stopped(self) -> None:
        """See :meth:`~macft.collective.base.Collective.tell_stopped`."""
        if not self._closed and self._links.ending.failure is None:
            text = f"{self._identity.name(self.rank)} was stopped by its user"
            self._links.ending.failure = PeerStopped(text)
            self._links.ending.say_goodbye(Cause.STOPPED, self.rank, text)

    def close(self) -> None:
        """Says goodbye to the neighbours and closes the sockets, within about a second. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        for channels in self._channels:
            channels.close(drain=self._links.ending.failure is None)
        if self._links.ending.failure is None:
            with contextlib.suppress(CollectiveError):
                self._links.drain()
                self._links.ending.say_goodbye(Cause.DONE, self.rank, "")
                _log.info("ring of generation %d closed after %d calls", self._identity.generation, self._sequence)
        self._links.leave()
        self._listener.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, KeyboardInterrupt):
            self.tell_stopped()
        elif error is not None and not self._closed and self._links.ending.failure is None:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            text = f"{self._identity.name(self.rank)} stopped with {reason}"
            self._links.ending.say_goodbye(Cause.LOST, self.rank, text)
            self._links.ending.failure = PeerLost(text)
        self.close()

    def _next_call(self, kind: Kind) -> Header:
        if self._closed:
            raise PeerLost(f"this ring of rank {self.rank} is closed; no {CALL_NAMES[kind]} can be made")
        if self._links.ending.failure is not None:
            raise self._links.ending.failure
        self._sequence += 1
        return self._identity.header(kind)._replace(sequence=self._sequence)

    def _transfer_blobs(self, kind: Kind, payload: bytes, origins: Sequence[int]) -> dict[int, bytes]:
        if len(payload) > MAX_BLOB_BYTES:
            raise ValueError(f"{CALL_NAMES[kind]} of {len(payload)} bytes: {MAX_BLOB_BYTES} are the most")
        call = self._next_call(kind)
        transfer = BlobTransfer(call, payload, self._world_size, origins, self._settings.piece_bytes)
        self._run(transfer)
        return transfer.blobs

    def _run(self, transfer: Transfer) -> None:
        """Runs a call. An exception halfway ends the ring: the ranks are no longer at the same point."""
        try:
            self._send_and_receive(transfer)
        except CollectiveError:
            raise
        except KeyboardInterrupt:
            self.tell_stopped()
            raise
        except BaseException:
            # This may be between the two parts of a message, so no goodbye: the neighbours see the connection end.
            reason = f"rank {self.rank} was interrupted in {transfer.call}; its ring has ended"
            self._links.ending.failure = PeerLost(reason)
            raise

    def _send_and_receive(self, transfer: Transfer) -> None:
        links, call = self._links, transfer.call
        buffer_for = partial(self._buffer_for, transfer)
        early_frames, self._early_frames = self._early_frames, []
        for frame in early_frames:
            self._receive(transfer, frame)
        has_sent_uncopied = has_received_large = False
        last_progress = time.monotonic()
        while True:
            while transfer.outgoing and links.sender.send(transfer.outgoing[0]):
                header = transfer.outgoing.popleft().header
                self._bytes_sent += header.length
                has_sent_uncopied = has_sent_uncopied or _is_uncopied(header)
            incomplete = transfer.incomplete
            if has_received_large and not incomplete:
                links.send_credit()  # the left neighbour waits for it, see below
                has_received_large = False
            # The caller may change its arrays once this returns, so uncopied bodies must have been sent by then. A
            # stream knows when they are; ZeroMQ and several paths need them until they are credited. Both sides know
            # the sizes, so both know whether a credit is awaited.
            awaits_credit = has_sent_uncopied and links.unacknowledged > 0
            needs_right = bool(transfer.outgoing) or links.sender.pending or awaits_credit
            if not incomplete and not needs_right:
                return
            progress = links.progress
            received = links.wait(
                call, left=incomplete, right=needs_right, seconds=_POLL_SECONDS, buffer_for=buffer_for
            )
            if received is not None:
                has_received_large = has_received_large or _is_uncopied(received.header)
                self._receive(transfer, received)
            now = time.monotonic()
            if received is not None or links.progress != progress:
                last_progress = now
            elif now - last_progress > self._settings.patience:
                self._fail_stalled(transfer, now - last_progress)

    def _buffer_for(self, transfer: Transfer, header: Header) -> memoryview | None:
        """Where to receive the body of a frame."""
        if not _belongs(header, transfer.call):
            return new_buffer(header)
        # Over several paths a second copy may arrive after the call, when the caller uses its arrays again.
        return transfer.buffer_for(header, in_place=not self._links.is_multipath)

    def _receive(self, transfer: Transfer, frame: Frame) -> None:
        header, call = frame.header, transfer.call
        if calls_ahead := header.sequence - call.sequence if self._links.is_multipath else 0:
            # Over several paths a frame may overtake others, or arrive a second time after its call.
            if calls_ahead > 0 and len(self._early_frames) < WINDOW * MAX_PATHS:
                self._early_frames.append(frame)
            if calls_ahead < 0 or self._early_frames:
                return
        name = self._identity.name
        if not _belongs(header, call):
            same = (header.kind, header.sequence) == (call.kind, call.sequence)
            theirs = f"{name(header.sender)} is at {header}, this rank at {call}"
            others = " of other shapes or types" if same and header.total == call.total else ""
            text = f"{theirs}{others}; do all ranks run the same macft, data and configuration?"
            self._links.ending.fail(ProtocolError, header.sender, text)
        try:
            transfer.receive(frame)
        except ProtocolError as error:
            self._links.ending.fail(ProtocolError, header.sender, f"{name(header.sender)}: {error}")

    def _fail_stalled(self, transfer: Transfer, seconds: float) -> None:
        peer = transfer.next_source if transfer.incomplete else self._identity.right
        text = (
            f"{self._identity.name(peer)} is alive but did not do its part of {transfer.call} "
            f"for {seconds:.0f} s; it may still compute: collective.patience sets the limit"
        )
        self._links.ending.fail(PeerTimeout, peer, text)


def _belongs(header: Header, call: Header) -> bool:
    """Whether a frame is part of ``call``."""
    if (header.kind, header.sequence) != (call.kind, call.sequence):
        return False
    return header.kind not in (Kind.PIECE, Kind.EXCHANGE) or (header.total, header.layout) == (call.total, call.layout)


def _is_uncopied(header: Header) -> bool:
    """Whether the body is sent from the caller's arrays; only those of PIECE frames can be changed by the caller."""
    return header.kind == Kind.PIECE and header.length >= COPY_BELOW


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
