"""A rank's two links in the ring: one from its left neighbour, one to its right neighbour.

Each rank binds a ROUTER, to which its left neighbour connects a DEALER. Data flows to the right; word of a peer's loss
flows both ways, so that every rank learns who is gone. libzmq's own heartbeats run in its I/O thread: a peer that
computes for minutes stays alive, one that was stopped, unplugged or killed is noticed, wherever this rank is waiting.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from macft.collective.wire import MAX_TEXT, Header, Kind, pack, unpack
from macft.errors import PeerLost, PeerTimeout, ProtocolError

_HEARTBEAT_MS = 1000
_LINGER_MS = 500
_TELL_BLAME_AFTER = 1.0
"""Seconds of waiting after which the right neighbour is told whom this rank waits for."""


def listening_socket(context: zmq.Context[Any], bind: str, *, piece_bytes: int) -> tuple[zmq.Socket[Any], int]:
    """A ROUTER bound to ``bind`` (host:port, port 0 for any free one) and its port; drops larger frames than pieces.

    Raises:
        zmq.ZMQError: the address can't be bound.
    """
    socket = context.socket(zmq.ROUTER)
    socket.setsockopt(zmq.LINGER, _LINGER_MS)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, piece_bytes + 65536)
    # Read by libzmq for each connection it accepts, so set here, before any.
    socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
    try:
        socket.bind(f"tcp://{bind}")
    except zmq.ZMQError:
        socket.close(0)
        raise
    endpoint: bytes = socket.getsockopt(zmq.LAST_ENDPOINT)
    return socket, int(endpoint.rsplit(b":", 1)[1])


class Links:
    """Sends to the right, receives from the left, and raises as soon as any rank is known to be gone.

    ``names`` are the ranks' names for messages; ``token`` is the run's secret; ``timeout`` the seconds of silence after
    which a peer counts as lost, ``patience`` the seconds to wait for one that is alive but does not send.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        listener: zmq.Socket[Any],
        *,
        rank: int,
        addresses: Sequence[str],
        names: Sequence[str],
        token: bytes,
        timeout: float,
        patience: float,
        generation: int = 0,
    ):
        self.rank, self.world_size = rank, len(addresses)
        self._names = [f"rank {number} ({name})" for number, name in enumerate(names)]
        self._token, self._patience, self._generation = token, patience, generation
        self._timeout = timeout
        self._left, self._right = (rank - 1) % self.world_size, (rank + 1) % self.world_size
        self._from_left = listener
        self._left_id = _identity(token, self._left)
        self._to_right = context.socket(zmq.DEALER)
        self._to_right.setsockopt(zmq.IDENTITY, _identity(token, rank))
        self._to_right.setsockopt(zmq.LINGER, _LINGER_MS)
        self._to_right.setsockopt(zmq.SNDHWM, 0)
        self._to_right.setsockopt(zmq.RCVHWM, 0)
        self._to_right.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
        self._to_right.setsockopt(zmq.HEARTBEAT_TIMEOUT, int(timeout * 1000))
        self._monitor = self._to_right.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._to_right.connect(f"tcp://{addresses[self._right]}")
        self._poller = zmq.Poller()
        for socket in (self._from_left, self._to_right, self._monitor):
            self._poller.register(socket, zmq.POLLIN)
        self._blame = self._left
        self._right_done = False
        self._failure: PeerLost | PeerTimeout | ProtocolError | None = None
        self._closed = False

    def name(self, rank: int) -> str:
        """A rank's name for messages."""
        return self._names[rank]

    def send(self, header: Header, payload: Any = b"", *, track: bool = False) -> zmq.MessageTracker | None:
        """Queues a frame for the right neighbour; never blocks. With ``track``, returns what tells when it has left."""
        self._to_right.send(pack(self._token, header), zmq.SNDMORE)
        tracker: zmq.MessageTracker | None = self._to_right.send(payload, copy=not track, track=track)
        return tracker

    def receive(self, doing: Header) -> tuple[Header, Any]:
        """The next frame from the left: header and payload buffer. ``doing`` says what this rank waits for.

        Raises:
            PeerLost: a rank is gone; every rank gets this with that rank's name.
            PeerTimeout: a rank is alive but has not sent for ``patience`` seconds.
            ProtocolError: a frame that breaks the protocol.
        """
        started = time.monotonic()
        told = -1
        while True:
            self._raise_failure()
            waited = time.monotonic() - started
            if waited > self._patience:
                self.fail(
                    PeerTimeout(
                        f"{self.name(self._blame)} is alive but sent nothing for {waited:.0f} s while "
                        f"{doing.describe()} waited; collective.patience sets the limit"
                    )
                )
            if waited > _TELL_BLAME_AFTER and told != self._blame:
                told = self._blame
                self.send(Header(Kind.WAITING, self.rank, doing.call, text=str(told), generation=self._generation))
            ready = dict(self._poller.poll(200))
            if self._from_left in ready and (frame := self._read_left()) is not None:
                self._blame = self._left
                return frame
            self._check_others(ready)

    def wait_sent(self, trackers: Sequence[zmq.MessageTracker]) -> None:
        """Returns once the frames have left this process, so that their buffers may change."""
        deadline = time.monotonic() + self._patience
        for tracker in trackers:
            while not tracker.done:
                with contextlib.suppress(zmq.NotDone):
                    tracker.wait(0.2)
                self._check_others(dict(self._poller.poll(0)))
                self._raise_failure()
                if time.monotonic() > deadline:
                    self.fail(PeerTimeout(f"{self.name(self._right)} takes no data for {self._patience:.0f} s"))

    def fail(self, error: PeerLost | PeerTimeout | ProtocolError) -> None:
        """Tells both neighbours why the ring ends and raises ``error``; later calls raise it again."""
        self._failure = error
        self._say_goodbye(str(error))
        raise error

    def close(self) -> None:
        """Says goodbye and closes the sockets; returns within a second. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        if self._failure is None:
            self._say_goodbye("")
        self._to_right.disable_monitor()
        self._monitor.close(0)
        self._to_right.close(_LINGER_MS)
        self._from_left.close(_LINGER_MS)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _say_goodbye(self, reason: str) -> None:
        header = Header(Kind.GOODBYE, self.rank, 0, text=reason[:MAX_TEXT], generation=self._generation)
        packed = pack(self._token, header)
        with contextlib.suppress(zmq.ZMQError):
            self._to_right.send_multipart([packed, b""], zmq.NOBLOCK)
        with contextlib.suppress(zmq.ZMQError):
            self._from_left.send_multipart([self._left_id, packed, b""], zmq.NOBLOCK)

    def _read_left(self) -> tuple[Header, Any] | None:
        """A data frame of the left neighbour, or None for anything else: strangers' frames, news, word of blame."""
        frames = self._from_left.recv_multipart(copy=False)
        if frames[0].bytes != self._left_id:
            return None  # a stranger; without the run's secret it can't pass for a member
        if len(frames) != 3:
            self.fail(ProtocolError(f"{self.name(self._left)} sent a message of {len(frames)} parts instead of 3"))
        header = self._checked(frames[1].buffer, self._left)
        if header.kind is Kind.WAITING:
            # Only a rank that itself waits for somebody else is excused.
            self._blame = (
                int(header.text) if header.text.isdigit() and int(header.text) < self.world_size else self._left
            )
            return None
        if header.kind is Kind.GOODBYE:
            # All that the left neighbour sent before has been read: nothing more will come.
            self.fail(
                PeerLost(header.text or f"{self.name(self._left)} left the ring while this rank was still working")
            )
        return header, frames[2].buffer

    def _check_others(self, ready: dict[Any, int]) -> None:
        """News from the right neighbour, and whether the connection to it still stands."""
        if self._to_right in ready:
            frames = self._to_right.recv_multipart(copy=False)
            self._take_news(frames)
        if self._monitor in ready:
            parse_monitor_message(self._monitor.recv_multipart())
            while self._to_right.poll(0):  # a goodbye that arrived before the connection broke says more than the break
                self._take_news(self._to_right.recv_multipart(copy=False))
            if self._right_done:
                return
            self.fail(
                PeerLost(
                    f"{self.name(self._right)} is gone: the connection to it broke "
                    f"(its process ended, or it gave no sign of life for {self._timeout:.0f} s)"
                )
            )

    def _take_news(self, frames: list[zmq.Frame]) -> None:
        """What the right neighbour says: only ever goodbye."""
        header = self._checked(frames[0].buffer, self._right)
        if header.kind is Kind.GOODBYE and header.text:
            self.fail(PeerLost(header.text))  # somebody else's loss, passed on in the words of the rank that saw it
        # Without a reason it has finished in order: all it owed is already on its way round the ring.
        self._right_done = True

    def _checked(self, data: Any, expected_sender: int) -> Header:
        try:
            header = unpack(data, self._token)
        except ProtocolError as error:
            self.fail(ProtocolError(f"{self.name(expected_sender)}: {error}"))
            raise
        if header.sender != expected_sender or header.generation != self._generation:
            self.fail(ProtocolError(f"{self.name(expected_sender)} sent a frame of sender {header.sender}"))
        return header


def _identity(token: bytes, rank: int) -> bytes:
    return token + rank.to_bytes(2, "big")
