"""Messages from one rank to another: hidden states between the stages of a pipeline, for instance.

A channel is a stream of its own (:mod:`~macft.collective.ring.stream`) for each direction of two ranks, which need not
be neighbours in the ring. Ports and secrets are exchanged over the ring. Each channel has a thread, so that messages
move while their ranks compute. The ring goes on to watch its ranks: who waits for a message learns from it who is gone.
"""

from __future__ import annotations

import contextlib
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from typing import NoReturn, Protocol

import numpy as np

from macft.collective.base import Channels
from macft.collective.ring.stream import StreamIn, StreamOut
from macft.collective.wire import LINGER_SECONDS, MAX_MESSAGE_BYTES, Header, Kind, pack, unpack
from macft.errors import PeerTimeout, ProtocolError

_MAX_UNREAD = 8
"""Messages that a channel reads ahead of its rank; TCP then holds the sender back."""
_WATCH_SECONDS = 0.1
"""How often a waiting rank looks whether the others are alive."""
_POLL_MS = 200


class RingWatch(Protocol):
    """What channels ask the ring that they belong to."""

    patience: float
    """Seconds that a rank waits for one that is alive."""

    def name(self, rank: int) -> str:
        """A rank in messages."""
        ...

    def watch(self, call: str) -> None:
        """Raises if a rank is known to be gone."""
        ...

    def explain(self, peer: int, call: str) -> NoReturn:
        """Raises why ``peer``'s channel has ended."""
        ...

    def fail(self, kind: type[PeerTimeout] | type[ProtocolError], culprit: int, text: str) -> NoReturn:
        """Ends the ring with an error."""
        ...


class _Outgoing:
    """Sends messages over ``stream``, in their order, in a thread of its own."""

    def __init__(self, stream: StreamOut, header: Header, piece_bytes: int):
        self.bytes_sent, self.seconds = 0, 0.0
        self._stream, self._header, self._piece_bytes = stream, header, piece_bytes
        self._unsent: deque[tuple[int, memoryview]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._poller = select.poll()
        self._poller.register(stream.sock, select.POLLOUT)
        self._thread = threading.Thread(target=self._run, name="channel-out", daemon=True)
        self._thread.start()

    @property
    def is_broken(self) -> bool:
        return self._stream.broken_at is not None

    def send(self, tag: int, body: memoryview) -> None:
        with self._changed:
            self._unsent.append((tag, body))
            self._changed.notify_all()

    def drain(self, seconds: float) -> bool:
        """Waits until all has been given to the network; False if it has not."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._unsent or self.is_broken, seconds)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._stream.finish()
        self._thread.join()
        self._stream.close()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._unsent or self._closed)
                if self._closed:
                    return
                tag, body = self._unsent[0]
            started = time.perf_counter()
            is_sent = self._send(tag, body)
            with self._changed:
                self.seconds += time.perf_counter() - started
                if is_sent:
                    self.bytes_sent += len(body)
                    self._unsent.popleft()
                del body
                self._changed.notify_all()
            if not is_sent:
                return

    def _send(self, tag: int, body: memoryview) -> bool:
        for number in range(max(1, -(-len(body) // self._piece_bytes))):
            piece = body[number * self._piece_bytes : (number + 1) * self._piece_bytes]
            header = self._header._replace(sequence=tag, total=len(body), piece=number, length=len(piece))
            self._stream.send(pack(header), piece)
            while self._stream.pending and not self._closed:
                self._poller.poll(_POLL_MS)
                self._stream.flush()
            if self.is_broken or self._closed:
                return False
        return True


class _Incoming:
    """Receives messages of rank ``sender``, named ``name``, from ``stream``, in a thread of its own."""

    def __init__(self, stream: StreamIn, sender: int, generation: int, name: str):
        self.refusal = ""
        """What was wrong with what arrived."""
        self._stream, self._sender, self._generation, self._name = stream, sender, generation, name
        self._messages: deque[tuple[int, memoryview]] = deque()
        self._changed = threading.Condition()
        self._closed = self._ended = False
        # The message that is arriving.
        self._first: Header | None = None
        self._message = memoryview(b"")
        self._filled = self._pieces = 0
        self._poller = select.poll()
        self._poller.register(stream.sock, select.POLLIN)
        self._thread = threading.Thread(target=self._run, name="channel-in", daemon=True)
        self._thread.start()

    @property
    def has_ended(self) -> bool:
        """Whether no more messages will come."""
        return self._ended and not self._messages

    @property
    def received(self) -> int:
        """Bytes so far, of whole messages or not."""
        return self._stream.received

    def take(self, seconds: float) -> tuple[int, memoryview] | None:
        """The oldest message and its tag; waits up to ``seconds`` for one."""
        with self._changed:
            self._changed.wait_for(lambda: self._messages or self._ended, seconds)
            if not self._messages:
                return None
            self._changed.notify_all()
            return self._messages.popleft()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        with contextlib.suppress(OSError):
            self._stream.sock.shutdown(2)  # wakes the thread
        self._thread.join()
        self._stream.close()

    def _run(self) -> None:
        try:
            while not self._closed:
                with self._changed:
                    self._changed.wait_for(lambda: len(self._messages) < _MAX_UNREAD or self._closed)
                frame = self._stream.read(self._unpack, self._buffer_for)
                if frame is not None:
                    self._take(frame.header)
                elif self._stream.ended_at is not None:
                    return
                else:
                    self._poller.poll(_POLL_MS)
        except (ValueError, ProtocolError) as error:
            self.refusal = f"{self._name} sent {error}" if isinstance(error, ValueError) else str(error)
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _unpack(self, data: memoryview) -> Header:
        header = unpack(data, self._name)
        if (header.kind, header.sender, header.generation) != (Kind.MESSAGE, self._sender, self._generation):
            raise ProtocolError(f"{self._name} sent a {header.kind.name} frame of rank {header.sender} on a channel")
        first = self._first or header
        is_next = header.piece == self._pieces and self._filled + header.length <= header.total
        is_empty = header.length == 0 and header.total > 0
        if (header.sequence, header.total) != (first.sequence, first.total) or not is_next or is_empty:
            raise ProtocolError(f"{self._name} sent part {header.piece} of {header}, which is not due")
        return header

    def _buffer_for(self, header: Header) -> memoryview:
        if self._first is None:
            self._first, self._message = header, np.empty(header.total, np.uint8).data
        return self._message[self._filled : self._filled + header.length]

    def _take(self, header: Header) -> None:
        self._filled, self._pieces = self._filled + header.length, self._pieces + 1
        if self._filled == header.total:
            with self._changed:
                self._messages.append((header.sequence, self._message))
                self._changed.notify_all()
            self._first, self._message, self._filled, self._pieces = None, memoryview(b""), 0, 0


class StreamChannels(Channels):
    """The :class:`~macft.collective.base.Channels` of a ring's rank.

    Args:
        ring: Watches the ranks.
        streams_out: By rank, the stream to it and the header of what is sent there.
        streams_in: By rank, the stream from it.
        purpose: One word for messages.
        generation: Of the ring.
        piece_bytes: Most bytes of a frame.
    """

    def __init__(
        self,
        ring: RingWatch,
        streams_out: Mapping[int, tuple[StreamOut, Header]],
        streams_in: Mapping[int, StreamIn],
        *,
        purpose: str,
        generation: int,
        piece_bytes: int,
    ):
        self._ring, self._purpose = ring, purpose
        self._check: Callable[[], None] = lambda: None
        self._errors: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
        self._outgoing = {to: _Outgoing(stream, header, piece_bytes) for to, (stream, header) in streams_out.items()}
        self._incoming = {
            source: _Incoming(stream, source, generation, ring.name(source)) for source, stream in streams_in.items()
        }
        self.waiting: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
        self.waited, self._closed = 0.0, False

    @property
    def peers(self) -> Collection[int]:
        """The ranks that there is a channel to."""
        return self._outgoing.keys()

    @property
    def bytes_sent(self) -> int:
        """Bytes of the messages that have been sent."""
        return sum(each.bytes_sent for each in self._outgoing.values())

    @property
    def sending_seconds(self) -> float:
        """Seconds in which messages were being sent, over all channels."""
        return sum(each.seconds for each in self._outgoing.values())

    def guard(self, check: Callable[[], None], errors: Callable[[], AbstractContextManager[None]]) -> Channels:
        """See :class:`~macft.collective.base.Channels`."""
        self._check, self._errors = check, errors
        return self

    def send(self, to: int, tag: int, body: bytes | memoryview) -> None:
        """See :class:`~macft.collective.base.Channels`."""
        if len(body) > MAX_MESSAGE_BYTES:
            raise ValueError(f"a message of {len(body)} bytes: {MAX_MESSAGE_BYTES} are the most")
        with self._errors():
            self._look(f"{self._purpose} message {tag}")
        self._outgoing[to].send(tag, memoryview(body).cast("B") if len(body) else memoryview(b""))

    def receive(self, source: int, tag: int) -> memoryview:
        """See :class:`~macft.collective.base.Channels`."""
        with self._errors(), self.waiting():
            return self._receive(source, tag)

    def close(self, *, drain: bool = False) -> None:
        """Ends the threads; with ``drain`` after what was sent has left, for a second at most. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        deadline = time.monotonic() + LINGER_SECONDS
        for outgoing in self._outgoing.values():
            if drain:
                outgoing.drain(max(0.0, deadline - time.monotonic()))
            outgoing.close()
        for incoming in self._incoming.values():
            incoming.close()

    def _receive(self, source: int, tag: int) -> memoryview:
        call, channel = f"{self._purpose} message {tag}", self._incoming[source]
        started = progressed = time.monotonic()
        received = channel.received
        while (message := channel.take(_WATCH_SECONDS)) is None:
            if channel.refusal:
                self._ring.fail(ProtocolError, source, channel.refusal)
            if channel.has_ended:
                self._ring.explain(source, call)
            self._look(call)
            self._ring.watch(call)
            now = time.monotonic()
            if channel.received != received:
                received, progressed = channel.received, now
            elif now - progressed > self._ring.patience:
                text = f"{self._ring.name(source)} is alive but did not send {call} for {now - progressed:.0f} s"
                self._ring.fail(
                    PeerTimeout, source, f"{text}; it may still compute: collective.patience sets the limit"
                )
        self.waited += time.monotonic() - started
        if message[0] != tag:
            text = f"{self._ring.name(source)} sent {self._purpose} message {message[0]}, and {tag} was due"
            self._ring.fail(ProtocolError, source, f"{text}; do all ranks run the same macft, data and configuration?")
        return message[1]

    def _look(self, call: str) -> None:
        """Raises where this rank knows already that it can't go on."""
        self._check()
        for to, channel in self._outgoing.items():
            if channel.is_broken:
                self._ring.explain(to, call)
