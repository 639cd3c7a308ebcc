"""One cable between two neighbours: the sending end, the receiving end, and how fast it is.

Each has a ZeroMQ connection. Data goes over a stream beside it where there is one (:mod:`~macft.collective.stream`),
otherwise over that connection too.
"""

from __future__ import annotations

import socket
import time
from collections import deque
from typing import Any, NamedTuple

import zmq
from zmq.utils.monitor import recv_monitor_message

from macft.collective.listener import COPY_BELOW, Listener
from macft.collective.stream import StreamIn, StreamOut, StreamPort
from macft.collective.wire import Header, Kind, pack, split_address

WINDOW = 32
"""Frames a rank may have sent over a path that its neighbour has not taken."""
_GUESSED_RATE = 1e9
_MEASURED_BYTES, _MEASURED_SECONDS = 256 * 1024, 0.02
_NEWEST = 0.3
"""Weight of the newest measurement of a path's speed."""


class Sent(NamedTuple):
    """A frame that has not been credited; header and body are kept only where they may have to go again."""

    header: Header | None
    body: Any
    size: int
    at: float


class SendPath:
    """The sending end: a DEALER connected to the right neighbour's port. ``alone``: there is no other path to it."""

    def __init__(self, listener: Listener, endpoint: str, *, alone: bool):
        self.endpoint = endpoint
        self.stream: StreamOut | None = None
        self._listener, self._alone = listener, alone
        self.sock = listener.open(zmq.DEALER)
        self.monitor = listener.watch(self.sock, zmq.EVENT_DISCONNECTED)
        self.sent: deque[Sent] = deque()
        self.waiting_bytes = 0
        self.rate = _GUESSED_RATE
        """Bytes a second, measured from credits."""
        self.connected = self.welcome = self.lost = self.probed = False
        self.last_credit = self._busy_since = 0.0
        self._across = 0

    @property
    def usable(self) -> bool:
        """Whether frames may go this way."""
        return self.welcome and not self.lost

    @property
    def pending(self) -> bool:
        """Whether the stream still has to send what it was given."""
        return self.stream is not None and self.stream.pending

    @property
    def has_room(self) -> bool:
        """Whether another frame may go now."""
        return len(self.sent) < WINDOW and not self.pending

    def open_stream(self, port: int, secret: bytes) -> None:
        """Lets data go over a stream to ``port`` of the neighbour, if that can be reached."""
        most_bytes, encrypted = self._listener.settings.piece_bytes, self._listener.encrypted
        self.stream = StreamOut.connect(self.endpoint, port, secret, most_bytes, encrypted=encrypted)
        if self.stream is not None:
            self._listener.keep(self.stream)

    def finish_time(self, size: int) -> float:
        """Seconds until ``size`` more bytes would be across."""
        # What is not used is not measured: the longer ago, the better the guess, until it gets another try.
        idle = 0.0 if self.sent else time.monotonic() - self.last_credit
        return (self.waiting_bytes + size) / (self.rate * (1.0 + idle))

    def send(self, header: Header, body: Any) -> None:
        """Sends a frame, given ``has_room``; where there are other paths it is kept, to go again if this one is lost.

        A large ``body`` must not change until the frame is credited, or where it goes over the only path's stream until
        that is no longer pending.
        """
        keep = not self._alone
        if keep and header.length < COPY_BELOW:
            body = bytes(body)
        now = time.monotonic()
        if self.stream is not None:
            self.stream.send(pack(header), body)
            if self._alone:
                return
        else:
            self.sock.send(pack(header), zmq.SNDMORE)
            self.sock.send(body, copy=False)
        if not self.sent:
            self._busy_since, self._across = now, 0
        self.sent.append(Sent(header if keep else None, body if keep else None, header.length, now))
        self.waiting_bytes += header.length

    def credited(self, frames: int) -> None:
        """The neighbour has taken the ``frames`` oldest frames."""
        self.last_credit, self.probed = time.monotonic(), False
        for _ in range(frames):
            size = self.sent.popleft().size
            self.waiting_bytes -= size
            self._across += size
        # Credits come in bursts, so the speed shows only over many frames.
        busy = self.last_credit - self._busy_since
        if self._across >= _MEASURED_BYTES and (busy > _MEASURED_SECONDS or not self.sent):
            rate = self._across / max(busy, 1e-6)
            self.rate = rate if self.rate == _GUESSED_RATE else self.rate + _NEWEST * (rate - self.rate)
            self._busy_since, self._across = self.last_credit, 0


class RecvPath:
    """The receiving end: a bound ROUTER that lets the left neighbour in, and no other."""

    def __init__(self, listener: Listener, number: int):
        self.sock, self.monitor = listener.routers[number]
        self.peer = b""
        """ZeroMQ's name of the left neighbour, once it has greeted."""
        self.broken = False
        self.farewell: tuple[Header, float] | None = None
        """Its goodbye, and when that came, while what it sent before over the stream is still to come."""
        self.taken = 0
        self.stream: StreamIn | None = None
        self._port: StreamPort | None = None
        self._listener = listener
        self._host = split_address(listener.address.split("+")[number])[0]
        self._descriptor = -1
        self._accepted: set[int] = set()

    def welcome(self, peer: bytes, descriptor: int, generation: int, rank: int) -> None:
        """Lets the left neighbour in, whose greeting came over connection number ``descriptor``."""
        self.peer, self._descriptor = peer, descriptor
        while self.monitor.poll(0):  # its own acceptance is among these; older events of the same number are not
            self.read_monitor()
        self.broken = descriptor not in self._accepted
        if self._listener.settings.streams:
            self._port = StreamPort(self._host, encrypted=self._listener.encrypted)
            self._listener.keep(self._port)
            offer = Header(Kind.STREAM, generation, rank, port=self._port.port, text=self._port.secret.hex())
            self.sock.send_multipart([peer, pack(offer)], zmq.NOBLOCK)
        self.taken = WINDOW
        self.credit(generation, rank)

    @property
    def may_stream(self) -> bool:
        """Whether data may still come over a stream."""
        return self._port is not None if self.stream is None else self.stream.ended_at is None

    @property
    def data_sockets(self) -> list[socket.socket]:
        """The stream's sockets that may have news."""
        if self.stream is not None:
            return [self.stream.sock] if self.stream.ended_at is None else []
        return self._port.sockets if self._port is not None else []

    def accept_stream(self) -> None:
        """Takes in the stream, if it has come."""
        if self._port is not None and self.stream is None:
            self.stream = self._port.accept(self._listener.settings.piece_bytes)
            if self.stream is not None:
                self._listener.keep(self.stream)

    def refuse_stream(self) -> None:
        """The neighbour sends its data over ZeroMQ."""
        if self._port is not None:
            self._port.close()
            self._port = None

    def read_monitor(self) -> None:
        """Takes note of a connection that came or went."""
        event = recv_monitor_message(self.monitor)
        number = int(event["value"])
        if event["event"] == zmq.EVENT_ACCEPTED:
            self._accepted.add(number)
        else:
            self._accepted.discard(number)
            self.broken = self.broken or number == self._descriptor

    def credit(self, generation: int, rank: int) -> None:
        """Tells the left neighbour that all its frames so far have been taken."""
        if self.taken:
            header = Header(Kind.CREDIT, generation, rank, frames=self.taken)
            self.sock.send_multipart([self.peer, pack(header)], zmq.NOBLOCK)
            self.taken = 0
