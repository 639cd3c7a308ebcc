"""One cable between two neighbours: the sending end, the receiving end, and its measured speed.

Each end has a ZeroMQ connection. Data goes over a stream beside it if there is one
(:mod:`~macft.collective.ring.stream`), otherwise over that connection too.
"""

from __future__ import annotations

import socket
import time
from collections import deque
from typing import NamedTuple

import zmq
from zmq.utils.monitor import recv_monitor_message

from macft.collective.ring.listener import COPY_BELOW, Listener
from macft.collective.ring.stream import StreamIn, StreamOut, StreamPort
from macft.collective.wire import Frame, Header, Kind, pack, split_address

WINDOW = 32
"""Most frames that a rank may have sent over a path without a credit from its neighbour."""
_INITIAL_RATE = 1e9
_MOST_EVENTS = 1_000
_MEASURED_BYTES, _MEASURED_SECONDS = 256 * 1024, 0.02
_NEWEST_WEIGHT = 0.3
"""Weight of the newest measurement in the running average of a path's speed."""


class SentFrame(NamedTuple):
    """A frame without a credit yet. The frame itself is kept only if it may have to be sent again."""

    frame: Frame | None
    size: int
    sent_at: float


class SendPath:
    """The sending end: a DEALER connected to the right neighbour's port.

    Args:
        listener: The rank's listener, which owns the sockets.
        endpoint: ``host:port`` of the neighbour.
        is_only_path: Whether there is no other path to the neighbour.

    Attributes:
        stream: Where data is sent; None: over ZeroMQ.
        uncredited: Frames that the neighbour has not acknowledged yet, oldest first.
        connected: Whether this rank has said HELLO on this path.
        accepted: Whether the neighbour has accepted it.
        failed: Whether it can no longer be used.
        probed: Whether its oldest frame was also sent over another path, because this one is stalled.
        last_credit: When the last credit arrived (``time.monotonic``); 0 before.
        rate: Bytes a second, measured from credits.
        is_sending: Whether a message of two parts is being sent; stays so where Ctrl-C comes between them.
    """

    def __init__(self, listener: Listener, endpoint: str, *, is_only_path: bool):
        self.endpoint = endpoint
        self.stream: StreamOut | None = None
        self._listener, self._is_only_path = listener, is_only_path
        self.sock = listener.open(zmq.DEALER)
        self.monitor = listener.watch(self.sock, zmq.EVENT_DISCONNECTED)
        self.uncredited: deque[SentFrame] = deque()
        self.uncredited_bytes = 0
        self.rate = _INITIAL_RATE
        self.connected = self.accepted = self.failed = self.probed = self.is_sending = False
        self.last_credit = self._busy_since = 0.0
        self._delivered_bytes = 0

    @property
    def usable(self) -> bool:
        """Whether the neighbour has accepted this path and it has not failed."""
        return self.accepted and not self.failed

    @property
    def is_gone(self) -> bool:
        """Whether this path has failed."""
        return self.failed

    @property
    def pending(self) -> bool:
        """Whether the stream has not sent all it was given."""
        return self.stream is not None and self.stream.pending

    @property
    def can_send(self) -> bool:
        """Whether another frame may be sent now."""
        return len(self.uncredited) < WINDOW and not self.pending

    def open_stream(self, port: int, secret: bytes) -> None:
        """Sends data over a stream to ``port`` of the neighbour from now on, if that port can be reached."""
        max_bytes, encrypted = self._listener.settings.piece_bytes, self._listener.encrypted
        self.stream = StreamOut.connect(self.endpoint, port, secret, max_bytes, encrypted=encrypted)
        if self.stream is not None:
            self._listener.keep(self.stream)

    def finish_time(self, size: int) -> float:
        """Estimated seconds until ``size`` more bytes are delivered."""
        # An unused path is not measured. The longer it is unused, the lower the estimate, until it is tried again.
        idle = 0.0 if self.uncredited else time.monotonic() - self.last_credit
        return (self.uncredited_bytes + size) / (self.rate * (1.0 + idle))

    def send(self, frame: Frame) -> None:
        """Sends a frame, given ``can_send``. If there are other paths it is kept, to be sent again if this one fails.

        A large body must not change until the frame is credited; over the only path's stream, until it is no longer
        pending.
        """
        keep = not self._is_only_path
        header, body = frame
        if keep and header.length < COPY_BELOW:
            body = bytes(body)
        now = time.monotonic()
        if self.stream is not None:
            self.stream.send(pack(header), body)
            if self._is_only_path:
                return
        else:
            self.is_sending = True
            self.sock.send(pack(header), zmq.SNDMORE)
            self.sock.send(body, copy=False)
            self.is_sending = False
        if not self.uncredited:
            self._busy_since, self._delivered_bytes = now, 0
        self.uncredited.append(SentFrame(Frame(header, body) if keep else None, header.length, now))
        self.uncredited_bytes += header.length

    def add_credit(self, frames: int) -> None:
        """The neighbour has received the ``frames`` oldest frames."""
        self.last_credit, self.probed = time.monotonic(), False
        for _ in range(frames):
            size = self.uncredited.popleft().size
            self.uncredited_bytes -= size
            self._delivered_bytes += size
        # Credits arrive in bursts, so the speed can be measured only over many frames.
        busy = self.last_credit - self._busy_since
        if self._delivered_bytes >= _MEASURED_BYTES and (busy > _MEASURED_SECONDS or not self.uncredited):
            rate = self._delivered_bytes / max(busy, 1e-6)
            self.rate = rate if self.rate == _INITIAL_RATE else self.rate + _NEWEST_WEIGHT * (rate - self.rate)
            self._busy_since, self._delivered_bytes = self.last_credit, 0


class RecvPath:
    """The receiving end: a bound ROUTER that accepts the left neighbour only.

    Attributes:
        peer: ZeroMQ's routing id of the left neighbour; empty until its HELLO has been accepted.
        failed: Whether nothing more can arrive: the connection or the stream has ended, or a goodbye was processed.
        goodbye: The neighbour's goodbye and when it arrived (``time.monotonic``), while data sent before it may still
            arrive over the stream.
        uncredited: Frames received since the last credit.
        stream: Where data arrives; None: over ZeroMQ, or not connected yet.
        is_sending: Whether a message of two parts is being sent; stays so where Ctrl-C comes between them.
    """

    def __init__(self, listener: Listener, number: int):
        self.sock, self.monitor = listener.routers[number]
        self.address = listener.address.split("+")[number]
        self.peer = b""
        self.failed = self.is_sending = False
        self.goodbye: tuple[Header, float] | None = None
        self.uncredited = 0
        self.stream: StreamIn | None = None
        self._port: StreamPort | None = None
        self._listener = listener
        self._descriptor = -1
        self._accepted: set[int] = set()

    def accept_peer(self, peer: bytes, descriptor: int, generation: int, rank: int) -> None:
        """Accepts the left neighbour, whose HELLO arrived over the connection with number ``descriptor``."""
        self.peer, self._descriptor = peer, descriptor
        while self.monitor.poll(0):  # includes this connection's event; older events may have the same number
            self.read_monitor()
        self.failed = descriptor not in self._accepted
        if self._listener.settings.streams:
            self._port = StreamPort(split_address(self.address)[0], encrypted=self._listener.encrypted)
            self._listener.keep(self._port)
            offer = Header(Kind.STREAM, generation, rank, port=self._port.port, text=self._port.secret.hex())
            self.sock.send_multipart([peer, pack(offer)], zmq.NOBLOCK)
        self.uncredited = WINDOW
        self.send_credit(generation, rank)

    @property
    def is_gone(self) -> bool:
        """Whether this path has failed, or has not been accepted yet, without a goodbye that explains it."""
        return not self.peer or (self.failed and self.goodbye is None)

    @property
    def may_stream(self) -> bool:
        """Whether data may still arrive over a stream."""
        return self._port is not None if self.stream is None else self.stream.ended_at is None

    @property
    def data_sockets(self) -> list[socket.socket]:
        """The stream's sockets to poll."""
        if self.stream is not None:
            return [self.stream.sock] if self.stream.ended_at is None else []
        return self._port.sockets if self._port is not None else []

    def accept_stream(self) -> None:
        """Accepts the stream, if the neighbour has connected it."""
        if self._port is not None and self.stream is None:
            self.stream = self._port.accept(self._listener.settings.piece_bytes)
            if self.stream is not None:
                self._listener.keep(self.stream)

    def refuse_stream(self) -> None:
        """Closes the stream's port: the neighbour sends its data over ZeroMQ."""
        if self._port is not None:
            self._port.close()
            self._port = None

    def read_monitor(self) -> None:
        """Reads the connection events of the ROUTER's monitor that have come, up to ``_MOST_EVENTS``; never waits."""
        for _ in range(_MOST_EVENTS):
            if not self.monitor.poll(0):
                return
            event = recv_monitor_message(self.monitor)
            number = int(event["value"])
            if event["event"] == zmq.EVENT_ACCEPTED:
                self._accepted.add(number)
            else:
                self._accepted.discard(number)
                self.failed = self.failed or number == self._descriptor

    def send_credit(self, generation: int, rank: int) -> None:
        """Acknowledges all frames received since the last credit."""
        if self.uncredited:
            header = Header(Kind.CREDIT, generation, rank, frames=self.uncredited)
            self.is_sending = True
            self.sock.send_multipart([self.peer, pack(header)], zmq.NOBLOCK)
            self.uncredited, self.is_sending = 0, False
