"""A rank's two links: paths to its right neighbour, and paths from its left one.

Data goes to the right over streams, which hold up who sends more than the neighbour takes. Over ZeroMQ, and where there
are several paths, it goes under credits: at most ``WINDOW`` frames are on their way over a path that the neighbour has
not taken. So sending never blocks, and a rank that computes holds little for others.

Liveness is ZeroMQ's own business (ZMTP heartbeats, from its I/O thread); a socket monitor says when a connection ends.
A goodbye goes both ways round the ring. What happens to a stream counts only when ZeroMQ has had time to say why.
"""

from __future__ import annotations

import contextlib
import select
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import zmq
from zmq.utils.monitor import recv_monitor_message

from macft.collective.listener import Listener
from macft.collective.multipath import MultipathSender
from macft.collective.path import WINDOW, RecvPath, SendPath
from macft.collective.stream import MOMENT_MS, SECRET_BYTES, Room, fresh
from macft.collective.wire import (
    CALL_NAMES,
    LINGER_SECONDS,
    MAX_TEXT,
    Cause,
    Header,
    Kind,
    knock,
    pack,
    set_endpoint,
    split_paths,
    unpack,
)
from macft.errors import CollectiveError, PeerLost, PeerTimeout, ProtocolError

_Failure = type[PeerLost] | type[PeerTimeout] | type[ProtocolError]
_CAUSES: dict[int, _Failure] = {
    Cause.DONE: PeerLost,
    Cause.LOST: PeerLost,
    Cause.TIMEOUT: PeerTimeout,
    Cause.PROTOCOL: ProtocolError,
}
_KNOCK_SECONDS = 0.5
_QUIET_MS = 300
_STREAMS_ONLY_SECONDS = 0.1
_WORD_SECONDS = 1.0
"""How long after a stream has ended ZeroMQ may take to say why: goodbyes, and ends of connections, come that way."""
_GRACE_SECONDS = 2.0
"""How much later than the first path of a link the others may come up."""


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
        abandon: Callable[[], str],
    ):
        self.rank, self.generation = rank, generation
        self._abandon = abandon
        self.left, self.right = (rank - 1) % len(addresses), (rank + 1) % len(addresses)
        self.failure: CollectiveError | None = None
        self._addresses, self._ring_id = addresses, ring_id
        self._full_names = [
            f"rank {rank} ({', '.join(dict.fromkeys(word for word in (*names[rank : rank + 1], address) if word))})"
            for rank, address in enumerate(addresses)
        ]
        self._settings = listener.settings
        endpoints = split_paths(addresses[self.right])
        self._inward = [RecvPath(listener, number) for number in range(len(listener.routers))]
        self.out = MultipathSender(listener, endpoints)
        self._outward = self.out.paths
        self.has_paths = len(self._outward) > 1 or len(self._inward) > 1
        """Whether frames may come out of order, or twice."""
        self.moved = 0
        """Grows whenever data moves, a part of a frame too."""
        self.held: list[tuple[Header, Any]] = []
        """Data frames that came while the ring was coming together."""
        self._last: list[tuple[SendPath | RecvPath, zmq.MessageTracker]] = []  # the goodbyes
        self._left_done = self._right_done = False
        self._ask_zeromq = 0.0  # when its sockets are to be looked at even if streams have news
        self._right_sockets = [(sock, zmq.POLLIN) for out in self._outward for sock in (out.sock, out.monitor)]
        self._left_sockets = [(sock, zmq.POLLIN) for come in self._inward for sock in (come.sock, come.monitor)]
        self._join()

    def name(self, rank: int) -> str:
        """A rank for people: ``rank 2 (studio, 192.168.0.2:7071)``."""
        return self._full_names[rank]

    @property
    def sends_at_once(self) -> bool:
        """Whether nobody needs a body any more once it is not pending."""
        return not self.has_paths and self._outward[0].stream is not None

    @property
    def unacknowledged(self) -> int:
        """Frames that the right neighbour is not known to have taken, where that has to be known."""
        if self._right_done:  # it leaves in order, so it has all it needs
            return 0
        return self.out.unacknowledged

    def wait(
        self, doing: object, *, left: bool, right: bool, seconds: float, room: Room = fresh
    ) -> tuple[Header, Any] | None:
        """A data frame of the left neighbour; None when there is other news, or nothing within ``seconds``.

        ``left``: this rank needs frames from the left, and the left sockets are read only then, for what
        follows belongs to a later call. ``right``: it needs the right neighbour to go on taking. ``doing``
        is the call in words. ``room`` says where the body of a frame is wanted.
        """
        if right and self._right_done:
            self.fail(PeerLost, self.right, f"{self.name(self.right)} left the ring while {doing} went on")
        pending = self.out.pending
        is_early = time.monotonic() < self._ask_zeromq and not self.has_paths
        if left and (found := self._read_streams(doing, room, patient=is_early and not pending)) is not None:
            return found
        right_broken = right and not self._right_done and all(map(_is_gone, self._outward))
        left_broken = left and all(map(_is_gone, self._inward)) and any(path.peer for path in self._inward)
        broken = right_broken or left_broken
        if pending and is_early and not broken and self._have_streams_news(left):
            self.moved += self.out.flush()
            return self._read_streams(doing, room) if left else None
        ready = self._poll(left, 0.0 if broken else seconds)
        for out in self._outward:
            if out.sock in ready:
                self._read_right(out, doing)
        self.moved += self.out.flush()
        if left:
            for come in self._inward:
                if come.sock in ready:
                    self._inward.reverse()  # takes turns
                    return self._read_left(come, doing)
            if ready.keys() & {sock.fileno() for come in self._inward for sock in come.data_sockets}:
                return self._read_streams(doing, room)
        quiet = True
        for out in self._outward:
            if out.monitor in ready:
                recv_monitor_message(out.monitor)
                self.out.lose(out)
                quiet = False
        for come in self._inward:
            if come.monitor in ready:
                come.read_monitor()
                quiet = False
        self._judge_streams(doing)
        if quiet and broken and not any(out.sock in ready for out in self._outward):
            # All that came before the break has been read: no goodbye explains it.
            self._diagnose(self.right if right_broken else self.left, doing)
        if not (quiet and self.out.send_again()) and not ready:
            self.out.try_out_stalled()
        return None

    def credit(self) -> None:
        """Tells the left neighbour that all its frames so far have been taken."""
        for path in self._inward:
            if path.peer and not path.broken:
                path.credit(self.generation, self.rank)

    def fail(self, kind: _Failure, culprit: int, text: str) -> NoReturn:
        """Ends the ring: tells both neighbours that ``culprit`` is to blame, and raises."""
        self.failure = kind(text)
        self.say_goodbye(next(cause for cause in Cause if cause and _CAUSES[cause] is kind), culprit, text)
        raise self.failure

    def say_goodbye(self, cause: Cause, culprit: int, text: str) -> None:
        """Tells both neighbours that this rank leaves; one that is gone gets nothing. Never blocks."""
        header = Header(Kind.GOODBYE, self.generation, self.rank, cause=cause, culprit=culprit, text=text[:MAX_TEXT])
        for out in self._outward:
            if not out.lost:
                with contextlib.suppress(zmq.Again):  # not even connected yet
                    self._last.append((out, _tracked(out.sock, [], header)))
                if out.stream is not None:
                    out.stream.finish()
        for come in self._inward:
            if come.peer:
                self._last.append((come, _tracked(come.sock, [come.peer], header)))

    def drain(self) -> None:
        """Waits, for at most ``LINGER_SECONDS``, until the right neighbour has all: a path may break meanwhile."""
        deadline = time.monotonic() + LINGER_SECONDS
        while self.has_paths and self.unacknowledged and time.monotonic() < deadline:
            self.wait("closing", left=False, right=False, seconds=0.05)

    def leave(self) -> None:
        """Sees the last frames off, for at most ``LINGER_SECONDS``; what still comes in is dropped.

        The neighbours may still be sending. TCP answers a close before unread data with a reset, which can overtake
        the goodbye, so this rank reads on until they have left too, or fall silent.
        """
        deadline = time.monotonic() + LINGER_SECONDS
        while time.monotonic() < deadline:
            is_sent = all(tracker.done or _is_gone(path) for path, tracker in self._last)
            right_over = self._right_done or all(path.lost for path in self._outward)
            if is_sent and right_over and (self._left_done or all(path.broken for path in self._inward)):
                return
            ready = dict(zmq.zmq_poll(self._right_sockets + self._left_sockets, _QUIET_MS if is_sent else 2))
            if is_sent and not ready:
                return
            for out in self._outward:
                if out.sock in ready:
                    self._right_done = _says_goodbye(out.sock.recv_multipart(zmq.NOBLOCK)) or self._right_done
                if out.monitor in ready:
                    recv_monitor_message(out.monitor)
                    out.lost = True
            for come in self._inward:
                if come.sock in ready:
                    sender, *parts = come.sock.recv_multipart(zmq.NOBLOCK)
                    self._left_done = self._left_done or (sender == come.peer and _says_goodbye(parts))
                if come.monitor in ready:
                    come.read_monitor()

    def _have_streams_news(self, left: bool) -> bool:
        """Waits a moment for the streams alone: nearly all news is theirs, and asking ZeroMQ's sockets takes longer."""
        out, come = self._outward[0].stream, self._inward[0].stream
        poller = select.poll()
        if out is not None:
            poller.register(out.sock, select.POLLOUT)
        if left:
            if come is None or come.ended_at is not None:
                return False
            poller.register(come.sock, select.POLLIN)
        return bool(poller.poll(MOMENT_MS))

    def _poll(self, left: bool, seconds: float) -> dict[Any, int]:
        """Sockets with news: ZeroMQ's own, and of others their descriptors."""
        sockets: list[tuple[Any, int]] = [*self._right_sockets]
        for out in self._outward:
            if out.pending and out.stream is not None:
                sockets.append((out.stream.sock, zmq.POLLOUT))
        if left:
            sockets += self._left_sockets
            sockets += [(sock, zmq.POLLIN) for come in self._inward for sock in come.data_sockets]
        ready = dict(zmq.zmq_poll(sockets, int(seconds * 1000)))
        self._ask_zeromq = time.monotonic() + _STREAMS_ONLY_SECONDS
        return ready

    def _read_streams(self, doing: object, room: Room, *, patient: bool = False) -> tuple[Header, Any] | None:
        """The next frame that a stream has."""
        for come in self._inward:
            stream = come.stream
            if stream is None:
                come.accept_stream()
                continue
            before = stream.received
            try:
                found = stream.read(self._unpack_data, room, patient=patient)
            except ValueError as error:
                self.fail(ProtocolError, self.left, f"{self.name(self.left)} sent {error}")
            self.moved += stream.received - before
            if found is not None:
                if len(self._inward) > 1:
                    self._inward.reverse()
                    come.taken += 1
                    come.credit(self.generation, self.rank)
                return found
            if stream.ended_at is not None and come.farewell is not None:
                self._left_leaves(come, come.farewell[0], doing)
        return None

    def _judge_streams(self, doing: object) -> None:
        """Gives up paths whose stream has ended, if it stays unsaid why, and streams that did not come in time."""
        latest = time.monotonic() - _WORD_SECONDS
        self.out.lose_broken(latest)
        for come in self._inward:
            ended = come.stream.ended_at if come.stream is not None else None
            if come.farewell is not None and come.stream is None and come.farewell[1] < latest:
                self._left_leaves(come, come.farewell[0], doing)
            come.broken = come.broken or (ended is not None and ended < latest)

    def _join(self) -> None:
        """Greets the right neighbour; waits for the left one's greeting and the right one's first credit.

        One path each way is enough after a moment's grace: a second cable may be unplugged.
        """
        deadline = time.monotonic() + self._settings.timeout
        grace = deadline
        while not (self._is_joined(all) or (self._is_joined(any) and time.monotonic() > grace)):
            state = self._connect()
            if time.monotonic() > deadline:
                self._fail_to_join(state)
            if reason := self._abandon():
                self.fail(PeerLost, self.right, f"the ring can't come together: {reason}")
            if self._is_joined(any):
                grace = min(grace, time.monotonic() + _GRACE_SECONDS)
            greeted = all(path.peer for path in self._inward)
            # A neighbour that has joined over one path may already send, while another path is awaited.
            # A neighbour that has welcomed this rank may leave again before the others have all joined.
            welcome = any(path.welcome for path in self._outward)
            frame = self.wait("joining the ring", left=not greeted, right=not welcome, seconds=0.05)
            self.held += [frame] if frame is not None else []
        for path in self._outward:
            if not path.welcome:
                path.lost = True
                self.out.lost.append(path.endpoint)

    def _is_joined(self, enough: Any) -> bool:
        greeted = enough(bool(path.peer) for path in self._inward)
        return bool(greeted and enough(path.welcome for path in self._outward))

    def _connect(self) -> str:
        """Connects the paths whose port answers; plain TCP tells why one does not: returns the last one's state."""
        state = "alive"
        for path in self._outward:
            if not path.connected and (state := knock(path.endpoint, _KNOCK_SECONDS)) == "alive":
                path.sock.connect(set_endpoint(path.sock, path.endpoint))
                path.sock.send(pack(Header(Kind.HELLO, self.generation, self.rank, text=self._ring_id)))
                path.connected = True
        return state

    def _fail_to_join(self, state: str) -> NoReturn:
        waited = f"within {self._settings.timeout:g} s"
        if not any(path.connected for path in self._outward):
            reason = "nothing listens there" if state == "ended" else f"it is {state}"
            text = (
                f"rank {self.rank} can't reach {self.name(self.right)} {waited}: {reason}; "
                "is its address right on this network, and does its firewall let macft in?"
            )
            self.fail(PeerTimeout, self.right, text)
        peer = self.left if not any(path.peer for path in self._inward) else self.right
        self.fail(PeerTimeout, peer, f"{self.name(peer)} did not join the ring {waited}; does it still run?")

    def _read_right(self, path: SendPath, doing: object) -> None:
        parts = path.sock.recv_multipart(zmq.NOBLOCK)
        header = self._unpack(parts[0], self.right)
        if header.kind == Kind.GOODBYE:
            self._right_done = True
            if header.cause != Cause.DONE:
                self._pass_on(header, doing)
            # Otherwise it has all it needs; whether we do shows in what we wait for.
        elif header.kind == Kind.STREAM and not path.welcome and path.stream is None:
            self._open_stream(path, header)
        elif header.kind == Kind.CREDIT and not path.welcome and header.frames == WINDOW:
            path.welcome = True
        elif header.kind != Kind.CREDIT or (header.frames > len(path.sent) and not path.lost):
            text = f"{self.name(self.right)} sent a {header.kind.name} frame of {header.frames} that is not due"
            self.fail(ProtocolError, self.right, text)
        elif header.frames and not path.lost:
            path.credited(header.frames)
            self.moved += 1

    def _open_stream(self, path: SendPath, offer: Header) -> None:
        try:
            secret = bytes.fromhex(offer.text)
        except ValueError:
            secret = b""
        if len(secret) != SECRET_BYTES:
            self.fail(ProtocolError, self.right, f"{self.name(self.right)} offered a stream without a proper secret")
        if self._settings.streams:
            path.open_stream(offer.port, secret)

    def _read_left(self, path: RecvPath, doing: object) -> tuple[Header, Any] | None:
        parts = path.sock.recv_multipart(zmq.NOBLOCK, copy=False)
        if parts[0].bytes != path.peer:
            self._greet(path, parts)
            return None
        header = self._unpack(parts[1].buffer, self.left)
        if header.kind == Kind.GOODBYE:
            if header.cause == Cause.DONE and path.may_stream:
                path.farewell = header, time.monotonic()
            else:
                self._left_leaves(path, header, doing)
            return None
        path.refuse_stream()
        if len(parts) != 3 or header.sequence == 0 or len(parts[2]) != header.length:
            sizes = [len(part) for part in parts[2:]]
            text = f"{self.name(self.left)} sent a {header.kind.name} frame with bodies of {sizes} bytes"
            self.fail(ProtocolError, self.left, f"{text}, not one of {header.length}")
        path.taken += 1
        if path.taken >= (WINDOW // 2 if len(self._inward) == 1 else 1):  # several paths are to be measured
            path.credit(self.generation, self.rank)
        return header, parts[2]

    def _left_leaves(self, path: RecvPath, header: Header, doing: object) -> None:
        """Over this path nothing follows; over another one what was sent before may still come."""
        path.broken, path.farewell = True, None
        self._left_done = header.cause != Cause.DONE or all(come.broken or not come.peer for come in self._inward)
        if self._left_done:
            self._pass_on(header, doing)

    def _greet(self, path: RecvPath, parts: list[zmq.Frame]) -> None:
        """Welcomes the left neighbour, tells another macft why it is not welcome, ignores other strangers."""
        try:
            header = unpack(parts[1].buffer, "a stranger")
        except ProtocolError:
            return
        if header.kind != Kind.HELLO:
            return
        found = (header.text, header.generation, header.sender)
        if path.peer or found != (self._ring_id, self.generation, self.left):
            expected = f"{self.name(self.rank)} expects rank {self.left} of its own run"
            text = f"{expected}, not another rank {header.sender}"
            refusal = Header(Kind.GOODBYE, self.generation, self.rank, cause=Cause.PROTOCOL, culprit=header.sender)
            path.sock.send_multipart([parts[0].bytes, pack(refusal._replace(text=text[:MAX_TEXT]))], zmq.NOBLOCK)
            return
        path.welcome(parts[0].bytes, parts[1].get(zmq.SRCFD), self.generation, self.rank)

    def _unpack_data(self, data: memoryview) -> Header:
        """The header of a frame on the left neighbour's stream."""
        header = self._unpack(data, self.left)
        if header.kind not in CALL_NAMES or header.sequence == 0:
            self.fail(ProtocolError, self.left, f"{self.name(self.left)} sent a {header.kind.name} frame over a stream")
        return header

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

    def _pass_on(self, header: Header, doing: object) -> NoReturn:
        text = header.text or f"{self.name(header.sender)} left the ring while {doing} waited"
        self.fail(_CAUSES[header.cause], header.culprit, text)

    def _diagnose(self, peer: int, doing: object) -> NoReturn:
        """Tells a peer that ended from one that is stopped or out of reach: both end the connection."""
        states = [knock(path, _KNOCK_SECONDS) for path in split_paths(self._addresses[peer])]
        state = next((found for found in ("alive", "ended") if found in states), states[0])
        if state in ("silent", "unreachable"):
            text = (
                f"{self.name(peer)} sent nothing for {self._settings.timeout:g} s while {doing} waited; "
                "it may be asleep, stopped or unreachable"
            )
            self.fail(PeerTimeout, peer, text)
        how = "the connection to it broke" if state == "alive" else "its process ended"
        self.fail(PeerLost, peer, f"{self.name(peer)} is gone: {how} while {doing} waited")


def _is_gone(path: SendPath | RecvPath) -> bool:
    return path.lost if isinstance(path, SendPath) else not path.peer or (path.broken and path.farewell is None)


def _says_goodbye(parts: list[bytes]) -> bool:
    try:
        return bool(parts) and unpack(parts[0], "a neighbour").kind == Kind.GOODBYE
    except ProtocolError:
        return False


def _tracked(sock: zmq.Socket[Any], prefix: list[bytes], header: Header) -> zmq.MessageTracker:
    """Sends ``header``; what is returned tells when ZeroMQ has written it and all before it."""
    frame = zmq.Frame(pack(header), track=True, copy=False)
    sock.send_multipart([*prefix, frame], zmq.NOBLOCK, copy=False)
    tracker: zmq.MessageTracker = frame.tracker
    return tracker
