"""A rank's two links: a ROUTER bound for its left neighbour, a DEALER connected to its right one.

Data flows to the right under credits: at most ``WINDOW`` frames are on their way that the neighbour has not
taken, so sending never blocks and a rank that computes holds little for others. Liveness is ZeroMQ's own
business (ZMTP heartbeats, from its I/O thread); a socket monitor says when a connection ends. A goodbye goes
both ways round the ring.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import Any, NoReturn

import zmq
from zmq.utils.monitor import recv_monitor_message

from macft.collective.settings import CollectiveConfig
from macft.collective.wire import (
    LINGER_SECONDS,
    MAX_HEADER_BYTES,
    MAX_TEXT,
    Cause,
    Header,
    Kind,
    bind,
    knock,
    pack,
    set_endpoint,
    unpack,
)
from macft.errors import CollectiveError, PeerLost, PeerTimeout, ProtocolError

WINDOW = 32
"""Frames a rank may have sent that its neighbour has not taken."""
COPY_BELOW = 65_536
"""Smaller bodies are copied when sent; larger ones are read from the caller's memory until credited."""
_Failure = type[PeerLost] | type[PeerTimeout] | type[ProtocolError]
_CAUSES: dict[int, _Failure] = {
    Cause.DONE: PeerLost,
    Cause.LOST: PeerLost,
    Cause.TIMEOUT: PeerTimeout,
    Cause.PROTOCOL: ProtocolError,
}
_KNOCK_SECONDS = 0.5
_QUIET_MS = 100


class Listener:
    """This rank's port for its left neighbour. Made first, so that its ``address`` can be told to the others.

    Raises:
        CollectiveError: ``address`` ("host:port", port 0 for a free one) can't be listened on.
    """

    def __init__(self, address: str, settings: CollectiveConfig):
        self.settings = settings
        self.context: zmq.Context[Any] = zmq.Context()
        self.sockets: list[zmq.Socket[Any]] = []
        self.router = self.open(zmq.ROUTER)
        self.monitor = self.watch(self.router, zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
        try:
            self.address = bind(self.router, address)
        except BaseException:
            self.close()
            raise

    def open(self, kind: int) -> zmq.Socket[Any]:
        """A socket with the ring's options; ZeroMQ reads most of them once, so before any bind or connect."""
        sock: zmq.Socket[Any] = self.context.socket(kind)
        self.sockets.append(sock)
        # `Links.leave` sees the last frames off. A socket that lingers by itself takes in nothing meanwhile,
        # and when the peer then hangs up, the next heartbeat aborts the process (libzmq 4.3.5, `Assertion
        # failed: !_io_error`; akin to libzmq issues 3937 and 4767).
        sock.linger = 0
        # Credits keep a member within its window; a limit here would stop the heartbeats of a link that
        # reaches it.
        sock.rcvhwm, sock.sndhwm = 0, 0
        sock.maxmsgsize = max(self.settings.piece_bytes, MAX_HEADER_BYTES)
        sock.heartbeat_ivl = int(self.settings.heartbeat * 1000)
        sock.heartbeat_timeout = int(self.settings.timeout * 1000)
        # After eleven days, so never: a new connection must not be spliced into a call. Not -1 either, which
        # throws away frames that came before the break, a goodbye for instance.
        sock.reconnect_ivl = 10**9
        sock.copy_threshold = COPY_BELOW
        return sock

    def watch(self, sock: zmq.Socket[Any], events: int) -> zmq.Socket[Any]:
        """A socket that receives ``sock``'s connection events."""
        address = f"inproc://monitor-{len(self.sockets)}"
        sock.monitor(address, events)
        monitor: zmq.Socket[Any] = self.context.socket(zmq.PAIR)
        monitor.linger, monitor.rcvhwm = 0, 0  # never full: that would hold up ZeroMQ's I/O thread
        monitor.connect(address)
        self.sockets.append(monitor)
        return monitor

    def close(self) -> None:
        """Closes all sockets at once. Safe to call twice."""
        for sock in self.sockets:
            if not sock.closed and sock.type != zmq.PAIR:
                sock.disable_monitor()
        for sock in self.sockets:
            sock.close()
        self.context.term()


class Links:
    """Sends frames to the right, takes frames from the left, raises as soon as a rank is known to be gone.

    Raises:
        PeerTimeout, PeerLost, ProtocolError: the ring did not come together within ``settings.timeout``.
    """

    def __init__(
        self,
        listener: Listener,
        rank: int,
        addresses: Sequence[str],
        names: Sequence[str],
        *,
        ring_id: str,
        generation: int,
    ):
        self.rank, self.generation = rank, generation
        self.left, self.right = (rank - 1) % len(addresses), (rank + 1) % len(addresses)
        self.failure: CollectiveError | None = None
        self.unacknowledged = 0
        self._listener, self._addresses, self._names, self._ring_id = listener, addresses, names, ring_id
        self._settings = listener.settings
        self._from_left, self._left_monitor = listener.router, listener.monitor
        self._to_right = listener.open(zmq.DEALER)
        self._right_monitor = listener.watch(self._to_right, zmq.EVENT_DISCONNECTED)
        self._left_id, self._left_fd, self._accepted = b"", -1, set[int]()
        self._taken = 0
        self._last_left = self._last_right = zmq.MessageTracker()  # of the goodbyes
        self._left_broken = self._right_broken = self._left_done = self._right_done = False
        self._right_poller, self._poller = zmq.Poller(), zmq.Poller()
        for sock in (self._to_right, self._right_monitor, self._from_left, self._left_monitor):
            self._poller.register(sock, zmq.POLLIN)
        for sock in (self._to_right, self._right_monitor):
            self._right_poller.register(sock, zmq.POLLIN)
        self._join()

    def name(self, rank: int) -> str:
        """A rank for people: ``rank 2 (studio, 192.168.0.2:7071)``."""
        known = [*self._names[rank : rank + 1], self._addresses[rank]]
        return f"rank {rank} ({', '.join(dict.fromkeys(word for word in known if word))})"

    @property
    def has_room(self) -> bool:
        """Whether the right neighbour lets another frame come."""
        return self.unacknowledged < WINDOW

    def send(self, header: Header, body: Any) -> None:
        """Hands a frame to ZeroMQ, given ``has_room``. A large ``body`` must not change until credited."""
        self._to_right.send(pack(header), zmq.SNDMORE)
        self._to_right.send(body, copy=False)
        self.unacknowledged += 1

    def wait(self, doing: str, *, left: bool, right: bool, seconds: float) -> tuple[Header, zmq.Frame] | None:
        """A data frame of the left neighbour; None when there is other news, or nothing within ``seconds``.

        ``left``: this rank needs frames from the left, and the left socket is read only then, for what
        follows belongs to a later call. ``right``: it needs the right neighbour to go on taking. ``doing``
        names the call.
        """
        if right and self._right_done:
            self.fail(PeerLost, self.right, f"{self.name(self.right)} left the ring while {doing} went on")
        right_broken = self._right_broken and not self._right_done
        broken = right_broken or (left and self._left_broken)
        poller = self._poller if left else self._right_poller
        ready = dict(poller.poll(0 if broken else int(seconds * 1000)))
        if self._to_right in ready:
            self._read_right(doing)
        if self._from_left in ready:
            return self._read_left(doing)
        if self._right_monitor in ready:
            recv_monitor_message(self._right_monitor)
            self._right_broken = True
        elif self._left_monitor in ready:
            self._read_left_monitor()
        elif broken and self._to_right not in ready:
            # All that came before the break has been read: no goodbye explains it.
            self._diagnose(self.right if right_broken else self.left, doing)
        return None

    def credit(self) -> None:
        """Tells the left neighbour that all its frames so far have been taken."""
        if self._taken:
            header = Header(Kind.CREDIT, self.generation, self.rank, frames=self._taken)
            self._from_left.send_multipart([self._left_id, pack(header)], zmq.NOBLOCK)
            self._taken = 0

    def fail(self, kind: _Failure, culprit: int, text: str) -> NoReturn:
        """Ends the ring: tells both neighbours that ``culprit`` is to blame, and raises."""
        self.failure = kind(text)
        self.say_goodbye(next(cause for cause in Cause if cause and _CAUSES[cause] is kind), culprit, text)
        raise self.failure

    def say_goodbye(self, cause: Cause, culprit: int, text: str) -> None:
        """Tells both neighbours that this rank leaves; one that is gone gets nothing. Never blocks."""
        header = Header(Kind.GOODBYE, self.generation, self.rank, cause=cause, culprit=culprit, text=text[:MAX_TEXT])
        with contextlib.suppress(zmq.Again):  # not even connected yet
            self._last_right = _tracked(self._to_right, [], header)
        if self._left_id:
            self._last_left = _tracked(self._from_left, [self._left_id], header)

    def leave(self) -> None:
        """Sees the last frames off, for at most ``LINGER_SECONDS``; what still comes in is dropped.

        The neighbours may still be sending. TCP answers a close before unread data with a reset, which can overtake
        the goodbye, so this rank reads on until they have left too, or fall silent.
        """
        deadline = time.monotonic() + LINGER_SECONDS
        while time.monotonic() < deadline:
            right_over = self._right_broken or self._right_done
            is_sent = (self._last_right.done or self._right_broken) and (self._last_left.done or self._left_broken)
            if is_sent and right_over and (self._left_broken or self._left_done):
                return
            news = self._poller.poll(_QUIET_MS if is_sent else 2)
            if is_sent and not news:
                return
            for sock, _ in news:
                if sock is self._left_monitor:
                    self._read_left_monitor()
                elif sock is self._right_monitor:
                    recv_monitor_message(self._right_monitor)
                    self._right_broken = True
                else:
                    self._drop(sock)

    def _drop(self, sock: zmq.Socket[Any]) -> None:
        parts = sock.recv_multipart(zmq.NOBLOCK)
        is_left = sock is self._from_left
        if is_left and (parts[0] != self._left_id or len(parts) < 2):
            return
        with contextlib.suppress(ProtocolError):
            done = unpack(parts[1 if is_left else 0], "a neighbour").kind == Kind.GOODBYE
            if is_left:
                self._left_done = self._left_done or done
            else:
                self._right_done = self._right_done or done

    def _join(self) -> None:
        """Greets the right neighbour; waits for the left one's greeting and the right one's first credit."""
        deadline = time.monotonic() + self._settings.timeout
        self._await_port(deadline)
        self._to_right.connect(set_endpoint(self._to_right, self._addresses[self.right]))
        self._to_right.send(pack(Header(Kind.HELLO, self.generation, self.rank, text=self._ring_id)))
        self.unacknowledged = WINDOW  # until the neighbour's first credit, which so doubles as its welcome
        while not self._left_id or self.unacknowledged:
            if time.monotonic() > deadline:
                peer = self.left if not self._left_id else self.right
                waited = f"within {self._settings.timeout:g} s"
                text = f"{self.name(peer)} did not join the ring {waited}; does it still run?"
                self.fail(PeerTimeout, peer, text)
            self.wait("joining the ring", left=not self._left_id, right=True, seconds=0.1)

    def _await_port(self, deadline: float) -> None:
        """Waits until the right neighbour's port answers. Plain TCP tells why it does not."""
        peer = self._addresses[self.right]
        while (state := knock(peer, _KNOCK_SECONDS)) != "alive":
            if time.monotonic() > deadline:
                reason = "nothing listens there" if state == "ended" else f"it is {state}"
                waited = f"{self._settings.timeout:g} s: {reason}"
                text = (
                    f"rank {self.rank} can't reach {self.name(self.right)} within {waited}; "
                    "is its address right on this network, and does its firewall let macft in?"
                )
                self.fail(PeerTimeout, self.right, text)
            time.sleep(0.05)

    def _read_right(self, doing: str) -> None:
        parts = self._to_right.recv_multipart(zmq.NOBLOCK)
        header = self._unpack(parts[0], self.right)
        if header.kind == Kind.GOODBYE:
            self._right_done = True
            if header.cause != Cause.DONE:
                self._pass_on(header, doing)
            # Otherwise it has all it needs; whether we do shows in what we wait for
        elif header.kind != Kind.CREDIT or header.frames > self.unacknowledged:
            text = f"{self.name(self.right)} sent a {header.kind.name} frame of {header.frames} that is not due"
            self.fail(ProtocolError, self.right, text)
        else:
            self.unacknowledged -= header.frames

    def _read_left(self, doing: str) -> tuple[Header, zmq.Frame] | None:
        parts = self._from_left.recv_multipart(zmq.NOBLOCK, copy=False)
        if parts[0].bytes != self._left_id:
            self._greet(parts)
            return None
        header = self._unpack(parts[1].buffer, self.left)
        if header.kind == Kind.GOODBYE:
            self._left_done = True
            self._pass_on(header, doing)
        if len(parts) != 3 or header.sequence == 0 or len(parts[2]) != header.length:
            sizes = [len(part) for part in parts[2:]]
            text = f"{self.name(self.left)} sent a {header.kind.name} frame with bodies of {sizes} bytes"
            self.fail(ProtocolError, self.left, f"{text}, not one of {header.length}")
        self._taken += 1
        if self._taken >= WINDOW // 2:
            self.credit()
        return header, parts[2]

    def _greet(self, parts: list[zmq.Frame]) -> None:
        """Welcomes the left neighbour, tells another macft why it is not welcome, ignores other strangers."""
        try:
            header = unpack(parts[1].buffer, "a stranger")
        except ProtocolError:
            return
        if header.kind != Kind.HELLO:
            return
        found = (header.text, header.generation, header.sender)
        if self._left_id or found != (self._ring_id, self.generation, self.left):
            expected = f"{self.name(self.rank)} expects rank {self.left} of its own run"
            text = f"{expected}, not another rank {header.sender}"
            refusal = Header(Kind.GOODBYE, self.generation, self.rank, cause=Cause.PROTOCOL, culprit=header.sender)
            self._from_left.send_multipart([parts[0].bytes, pack(refusal._replace(text=text[:MAX_TEXT]))], zmq.NOBLOCK)
            return
        self._left_id, self._left_fd = parts[0].bytes, parts[1].get(zmq.SRCFD)
        while self._left_monitor.poll(0):  # its own acceptance is among these; older events of the same number are not
            self._read_left_monitor()
        self._left_broken = self._left_fd not in self._accepted
        self._taken = WINDOW
        self.credit()

    def _read_left_monitor(self) -> None:
        event = recv_monitor_message(self._left_monitor)
        if event["event"] == zmq.EVENT_ACCEPTED:
            self._accepted.add(int(event["value"]))
        else:
            self._accepted.discard(int(event["value"]))
            self._left_broken = self._left_broken or int(event["value"]) == self._left_fd

    def _unpack(self, data: bytes | memoryview, peer: int) -> Header:
        try:
            header = unpack(data, self.name(peer))
        except ProtocolError as error:
            self.fail(ProtocolError, peer, str(error))
        refused = header.kind == Kind.GOODBYE  # may come from a rank of another generation, and says so
        if not refused and (header.sender, header.generation) != (peer, self.generation):
            text = f"{self.name(peer)} sent a frame of rank {header.sender}, generation {header.generation}"
            self.fail(ProtocolError, peer, f"{text}; this ring has generation {self.generation}")
        return header

    def _pass_on(self, header: Header, doing: str) -> NoReturn:
        text = header.text or f"{self.name(header.sender)} left the ring while {doing} waited"
        self.fail(_CAUSES[header.cause], header.culprit, text)

    def _diagnose(self, peer: int, doing: str) -> NoReturn:
        """Tells a peer that ended from one that is stopped or out of reach: both end the connection."""
        state = knock(self._addresses[peer], _KNOCK_SECONDS)
        if state in ("silent", "unreachable"):
            text = (
                f"{self.name(peer)} sent nothing for {self._settings.timeout:g} s while {doing} waited; "
                "it may be asleep, stopped or unreachable"
            )
            self.fail(PeerTimeout, peer, text)
        how = "the connection to it broke" if state == "alive" else "its process ended"
        self.fail(PeerLost, peer, f"{self.name(peer)} is gone: {how} while {doing} waited")


def _tracked(sock: zmq.Socket[Any], prefix: list[bytes], header: Header) -> zmq.MessageTracker:
    """Sends ``header``; what is returned tells when ZeroMQ has written it and all before it."""
    frame = zmq.Frame(pack(header), track=True, copy=False)
    sock.send_multipart([*prefix, frame], zmq.NOBLOCK, copy=False)
    tracker: zmq.MessageTracker = frame.tracker
    return tracker
