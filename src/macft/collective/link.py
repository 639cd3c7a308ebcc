"""A rank's two links: the paths to its right neighbour, and those from its left one.

Data goes to the right over streams, where TCP's flow control limits what a sender may have outstanding. Over ZeroMQ,
and where there are several paths, credits limit it: at most ``WINDOW`` frames of a path are uncredited. So sending
never blocks, and a rank that computes buffers little for others.

Liveness is checked by ZeroMQ (ZMTP heartbeats, from its I/O thread); a socket monitor reports when a connection ends.
A goodbye travels both ways round the ring. When a stream ends, ZeroMQ gets some time to deliver the reason.
"""

from __future__ import annotations

import logging
import select
import socket
import time
from collections.abc import Callable
from typing import NoReturn, TypeAlias

import zmq
from zmq.utils.monitor import recv_monitor_message

from macft.collective.departure import Departure
from macft.collective.handshake import PROBE_SECONDS, Handshake, RingIdentity, stream_secret
from macft.collective.listener import Listener
from macft.collective.multipath import MultipathSender
from macft.collective.path import WINDOW, RecvPath, SendPath
from macft.collective.stream import WAIT_MS, BufferFor, new_buffer
from macft.collective.wire import (
    CALL_NAMES,
    LINGER_SECONDS,
    MAX_TEXT,
    Cause,
    Frame,
    Header,
    Kind,
    probe,
    split_paths,
    unpack,
)
from macft.errors import CollectiveError, PeerLost, PeerTimeout, ProtocolError

_Failure: TypeAlias = type[PeerLost] | type[PeerTimeout] | type[ProtocolError]
_Pollable: TypeAlias = zmq.Socket[bytes] | socket.socket
_Ready: TypeAlias = dict[zmq.Socket[bytes] | int, int]
"""Sockets with events: ZeroMQ's sockets, and the descriptors of others."""

_CAUSE_OF: dict[_Failure, Cause] = {
    PeerLost: Cause.LOST,
    PeerTimeout: Cause.TIMEOUT,
    ProtocolError: Cause.PROTOCOL,
}
_FAILURE_OF: dict[int, _Failure] = {Cause.DONE: PeerLost, **{cause: kind for kind, cause in _CAUSE_OF.items()}}
_STREAMS_ONLY_SECONDS = 0.1
"""How long streams are polled alone before ZeroMQ's sockets are polled again."""
_REASON_SECONDS = 1.0
"""How long after a stream has ended its goodbye, or the end of its connection, may take to arrive over ZeroMQ."""
_SECOND_PATH_SECONDS = 2.0
"""How much later than the first path of a link the others may complete the handshake."""
_log = logging.getLogger("macft.ring")


class Links:
    """Sends frames to the right, receives frames from the left, raises as soon as a rank is known to be gone.

    :meth:`connect` makes links that are ready for frames.

    Args:
        listener: This rank's listener.
        ring: Which ring, and this rank's position in it.

    Attributes:
        failure: The error that ended the ring; None while it works.
        is_multipath: Whether a neighbour has several paths, so that frames may arrive out of order, or twice.
        progress: A number that grows whenever data moves, also part of a frame. A call during which it stays the same
            for long is stalled.
        early_frames: Data frames that arrived while the ring formed.
    """

    def __init__(self, listener: Listener, ring: RingIdentity):
        self.ring = ring
        self.failure: CollectiveError | None = None
        self._settings = listener.settings
        self.recv_paths = [RecvPath(listener, number) for number in range(len(listener.routers))]
        self.sender = MultipathSender(listener, split_paths(ring.addresses[ring.right]))
        self.send_paths = self.sender.paths
        self.is_multipath = len(self.send_paths) > 1 or len(self.recv_paths) > 1
        self.progress = 0
        self.early_frames: list[Frame] = []
        self._handshake = Handshake(ring, self.send_paths, self.recv_paths)
        self._departure = Departure(self.send_paths, self.recv_paths)
        self._poll_zmq_at = 0.0  # when ZeroMQ's sockets must be polled even if streams have events
        self._right_sockets = [(sock, zmq.POLLIN) for path in self.send_paths for sock in (path.sock, path.monitor)]
        self._left_sockets = [(sock, zmq.POLLIN) for path in self.recv_paths for sock in (path.sock, path.monitor)]

    @classmethod
    def connect(cls, listener: Listener, ring: RingIdentity, *, stop_reason: Callable[[], str]) -> Links:
        """The links of a rank that has completed the handshake with both neighbours. Blocks until then.

        Args:
            listener: This rank's listener, which stays open if this fails.
            ring: Which ring, and this rank's position in it.
            stop_reason: Called while the ring forms; a non-empty result is the reason to stop waiting.

        Raises:
            PeerTimeout: the ring did not form within ``settings.timeout`` seconds, or a neighbour is silent.
            PeerLost: a neighbour has ended, or ``stop_reason`` gave a reason.
            ProtocolError: a neighbour belongs to another ring or breaks the protocol.
        """
        links = cls(listener, ring)
        links._join(stop_reason)
        return links

    @property
    def sends_immediately(self) -> bool:
        """Whether a body is no longer needed once it is not pending."""
        return not self.is_multipath and self.send_paths[0].stream is not None

    @property
    def unacknowledged(self) -> int:
        """Frames that the right neighbour may not have received, counted only where frames are acknowledged."""
        if self._departure.right_done:  # it left normally, so it has received all it needs
            return 0
        return self.sender.unacknowledged

    def wait(
        self, call: object, *, left: bool, right: bool, seconds: float, buffer_for: BufferFor = new_buffer
    ) -> Frame | None:
        """Waits for the next event on the two links.

        Args:
            call: The collective call in words, for messages.
            left: Whether this rank needs frames from the left. Only then are they read: others belong to a later call.
            right: Whether this rank needs the right neighbour to receive more.
            seconds: Longest wait.
            buffer_for: Where to receive the body of a frame.

        Returns:
            A data frame of the left neighbour; None after another event, or after ``seconds``.

        Raises:
            PeerLost, PeerTimeout, ProtocolError: a rank is gone; names it.

        One wait is a sequence of stages. It ends at the first one with a result::

            GONE       right is needed and has left ---------------------> PeerLost
            STREAMS    a stream has a complete frame --------------------> the frame
            SEND ONLY  data is unsent, ZeroMQ was polled within 0.1 s,
                       one path, nothing broken: poll the streams alone -> a frame or None
            POLL       all sockets, for ``seconds``; 0 s if a neighbour is broken
            RIGHT      CREDIT, STREAM: update the path; GOODBYE ---------> its cause, unless DONE
            FLUSH      send what the network accepts
            LEFT       a message or stream data -------------------------> a frame or None
            MONITORS   a connection has ended: its path has failed
            EXPIRE     a stream ended 1 s ago, with no reason: its path has failed
            DIAGNOSE   broken, and no more messages explain it ----------> probe its port; PeerLost or PeerTimeout
            RESEND     frames of failed paths; probe stalled paths --------> None

        A neighbour is broken when all its paths have failed. The states of a path::

            from the left    NEW --HELLO--> OPEN --GOODBYE--> [stream still open: LEAVING --stream ends-->] LEFT
                                              \\--connection or stream ended------------------------------> FAILED
            to the right     NEW --CREDIT-> OPEN --GOODBYE(DONE)------------------------------------------> DONE
                                              \\--connection or stream ended, or stalled------------------> FAILED

        When all paths from the left have LEFT, or the goodbye's cause is not DONE, the wait raises that cause. The
        frames of a FAILED path are sent again over another one.
        """
        if right and self._departure.right_done:
            self.fail(PeerLost, self.ring.right, f"{self.ring.name(self.ring.right)} left the ring during {call}")
        has_unsent = self.sender.pending
        may_skip_zmq = time.monotonic() < self._poll_zmq_at and not self.is_multipath
        if left and (frame := self._read_streams(call, buffer_for, blocking=may_skip_zmq and not has_unsent)):
            return frame
        broken = self._broken_neighbour(left, right)
        if has_unsent and may_skip_zmq and broken is None and self._poll_streams(left):
            self.progress += self.sender.flush()
            return self._read_streams(call, buffer_for) if left else None
        ready = self._poll(left, seconds if broken is None else 0.0)
        right_has_sent = self._read_right_sockets(ready, call)
        self.progress += self.sender.flush()
        if left and self._is_left_ready(ready):
            return self._read_left_sockets(ready, call, buffer_for)
        is_quiet = not self._read_monitors(ready)
        self._expire_streams(call)
        if broken is not None and is_quiet and not right_has_sent:
            self._diagnose(broken, call)
        if not (is_quiet and self.sender.resend()) and not ready:
            self.sender.probe_stalled()
        return None

    def send_credit(self) -> None:
        """Acknowledges all frames of the left neighbour so far."""
        for path in self.recv_paths:
            if path.peer and not path.failed:
                path.send_credit(self.ring.generation, self.ring.rank)

    def fail(self, kind: _Failure, culprit: int, text: str) -> NoReturn:
        """Ends the ring: tells both neighbours that rank ``culprit`` is to blame, and raises."""
        self.failure = kind(text)
        _log.warning("ring ended (%s): %s", kind.__name__, text)
        self.say_goodbye(_CAUSE_OF[kind], culprit, text)
        raise self.failure

    def say_goodbye(self, cause: Cause, culprit: int, text: str) -> None:
        """Tells both neighbours that this rank leaves, except one that is gone. Never blocks."""
        self._departure.say_goodbye(
            self.ring.header(Kind.GOODBYE)._replace(cause=cause, culprit=culprit, text=text[:MAX_TEXT])
        )

    def drain(self) -> None:
        """Waits up to ``LINGER_SECONDS`` until the right neighbour has received all; a path may fail meanwhile."""
        deadline = time.monotonic() + LINGER_SECONDS
        while self.is_multipath and self.unacknowledged and time.monotonic() < deadline:
            self.wait("closing", left=False, right=False, seconds=0.05)

    def leave(self) -> None:
        """Waits up to ``LINGER_SECONDS`` until the last frames have been sent; incoming frames are dropped."""
        self._departure.wait_until_sent(self._right_sockets + self._left_sockets)

    def _join(self, stop_reason: Callable[[], str]) -> None:
        """Completes the handshake with both neighbours.

        After ``_SECOND_PATH_SECONDS`` one path each way is enough: a second cable may be unplugged.
        """
        handshake, timeout = self._handshake, self._settings.timeout
        deadline = second_path_deadline = time.monotonic() + timeout
        while not handshake.is_complete(all):
            if handshake.is_complete(any) and time.monotonic() > second_path_deadline:
                break
            state = handshake.connect()
            if time.monotonic() > deadline:
                self.fail(PeerTimeout, *handshake.timed_out(state, timeout))
            if reason := stop_reason():
                self.fail(PeerLost, self.ring.right, f"the ring can't form: {reason}")
            if handshake.is_complete(any):
                second_path_deadline = min(second_path_deadline, time.monotonic() + _SECOND_PATH_SECONDS)
            # A neighbour that has joined over one path may already send, while another path is awaited.
            needs_left = not all(path.peer for path in self.recv_paths)
            # A neighbour that has accepted this rank may leave again before all others have joined.
            needs_right = not any(path.accepted for path in self.send_paths)
            frame = self.wait("the handshake", left=needs_left, right=needs_right, seconds=0.05)
            if frame is not None:
                self.early_frames.append(frame)
        for path in self.send_paths:
            if not path.accepted:
                path.failed = True
                self.sender.lost.append(path.endpoint)
                _log.warning("path to %s did not come up; the ring uses the others", path.endpoint)
        streams = sum(path.stream is not None for path in self.send_paths)
        _log.info(
            "ring formed: rank %d of %d, generation %d, %d of %d paths to the right over streams, addresses %s",
            self.ring.rank,
            len(self.ring.addresses),
            self.ring.generation,
            streams,
            len(self.send_paths),
            ", ".join(self.ring.addresses),
        )

    def _broken_neighbour(self, left: bool, right: bool) -> int | None:
        """The rank of a neighbour that is needed and whose paths have all failed."""
        if right and not self._departure.right_done and all(path.is_gone for path in self.send_paths):
            return self.ring.right
        if left and all(path.is_gone for path in self.recv_paths) and any(path.peer for path in self.recv_paths):
            return self.ring.left
        return None

    def _poll_streams(self, left: bool) -> bool:
        """Polls the streams alone for ``WAIT_MS``: most events are theirs, and polling ZeroMQ's sockets is slower."""
        stream_out, stream_in = self.send_paths[0].stream, self.recv_paths[0].stream
        poller = select.poll()
        if stream_out is not None:
            poller.register(stream_out.sock, select.POLLOUT)
        if left:
            if stream_in is None or stream_in.ended_at is not None:
                return False
            poller.register(stream_in.sock, select.POLLIN)
        return bool(poller.poll(WAIT_MS))

    def _poll(self, left: bool, seconds: float) -> _Ready:
        """Polls all sockets."""
        sockets: list[tuple[_Pollable, int]] = [*self._right_sockets]
        for send_path in self.send_paths:
            if send_path.pending and send_path.stream is not None:
                sockets.append((send_path.stream.sock, zmq.POLLOUT))
        if left:
            sockets += self._left_sockets
            sockets += [(sock, zmq.POLLIN) for path in self.recv_paths for sock in path.data_sockets]
        ready: _Ready = dict(zmq.zmq_poll(sockets, int(seconds * 1000)))
        self._poll_zmq_at = time.monotonic() + _STREAMS_ONLY_SECONDS
        return ready

    def _read_right_sockets(self, ready: _Ready, call: object) -> bool:
        """Reads one message of each path to the right; returns whether there was any."""
        paths = [path for path in self.send_paths if path.sock in ready]
        for path in paths:
            self._read_right(path, call)
        return bool(paths)

    def _is_left_ready(self, ready: _Ready) -> bool:
        """Whether a path from the left has a message or stream data."""
        return any(
            path.sock in ready or any(sock.fileno() in ready for sock in path.data_sockets) for path in self.recv_paths
        )

    def _read_left_sockets(self, ready: _Ready, call: object, buffer_for: BufferFor) -> Frame | None:
        for path in self.recv_paths:
            if path.sock in ready:
                self._move_to_end(path)
                return self._read_left(path, call)
        return self._read_streams(call, buffer_for)

    def _move_to_end(self, path: RecvPath) -> None:
        """Reads ``path`` last from now on, so that the paths take turns however many are ready."""
        self.recv_paths.remove(path)
        self.recv_paths.append(path)

    def _read_monitors(self, ready: _Ready) -> bool:
        """Marks paths whose connection has ended; returns whether there was any event."""
        has_events = False
        for send_path in self.send_paths:
            if send_path.monitor in ready:
                recv_monitor_message(send_path.monitor)
                self.sender.lose(send_path, "its connection ended")
                has_events = True
        for recv_path in self.recv_paths:
            if recv_path.monitor in ready:
                recv_path.read_monitor()
                has_events = True
        return has_events

    def _read_streams(self, call: object, buffer_for: BufferFor, *, blocking: bool = False) -> Frame | None:
        """The next frame that a stream has."""
        for path in self.recv_paths:
            stream = path.stream
            if stream is None:
                path.accept_stream()
                continue
            received_before = stream.received
            try:
                frame = stream.read(self._unpack_stream_header, buffer_for, blocking=blocking)
            except ValueError as error:
                self.fail(ProtocolError, self.ring.left, f"{self.ring.name(self.ring.left)} sent {error}")
            self.progress += stream.received - received_before
            if frame is not None:
                if len(self.recv_paths) > 1:
                    self._move_to_end(path)
                    path.uncredited += 1
                    path.send_credit(self.ring.generation, self.ring.rank)
                return frame
            if stream.ended_at is not None and path.goodbye is not None:
                self._end_left_path(path, path.goodbye[0], call)
        return None

    def _expire_streams(self, call: object) -> None:
        """Ends paths whose stream ended, or never came, ``_REASON_SECONDS`` ago."""
        deadline = time.monotonic() - _REASON_SECONDS
        self.sender.lose_broken(deadline)
        for path in self.recv_paths:
            ended_at = path.stream.ended_at if path.stream is not None else None
            if path.goodbye is not None and path.stream is None and path.goodbye[1] < deadline:
                self._end_left_path(path, path.goodbye[0], call)
            path.failed = path.failed or (ended_at is not None and ended_at < deadline)

    def _read_right(self, path: SendPath, call: object) -> None:
        parts = path.sock.recv_multipart(zmq.NOBLOCK)
        header = self._unpack(parts[0], self.ring.right)
        if header.kind == Kind.GOODBYE:
            self._departure.right_done = True
            if header.cause != Cause.DONE:
                self._raise_goodbye(header, call)
            # Otherwise it has received all it needs; whether this rank has, the current call shows.
        elif header.kind == Kind.STREAM and not path.accepted and path.stream is None:
            self._open_stream(path, header)
        elif header.kind == Kind.CREDIT and not path.accepted and header.frames == WINDOW:
            path.accepted = True
        elif header.kind != Kind.CREDIT or (header.frames > len(path.uncredited) and not path.failed):
            text = f"{self.ring.name(self.ring.right)} sent an unexpected {header.kind.name} frame"
            self.fail(ProtocolError, self.ring.right, f"{text} (frames: {header.frames})")
        elif header.frames and not path.failed:
            path.add_credit(header.frames)
            self.progress += 1

    def _open_stream(self, path: SendPath, offer: Header) -> None:
        secret = stream_secret(offer)
        if secret is None:
            text = f"{self.ring.name(self.ring.right)} offered a stream without a valid secret"
            self.fail(ProtocolError, self.ring.right, text)
        if self._settings.streams:
            path.open_stream(offer.port, secret)
            if path.stream is None:
                _log.info("port %d for the stream to %s is not reachable; using ZeroMQ", offer.port, path.endpoint)

    def _read_left(self, path: RecvPath, call: object) -> Frame | None:
        parts = path.sock.recv_multipart(zmq.NOBLOCK, copy=False)
        if parts[0].bytes != path.peer:
            self._handshake.answer(path, parts[0].bytes, parts[1])
            return None
        left = self.ring.left
        header = self._unpack(parts[1].buffer, left)
        if header.kind == Kind.GOODBYE:
            if header.cause == Cause.DONE and path.may_stream:
                path.goodbye = header, time.monotonic()
            else:
                self._end_left_path(path, header, call)
            return None
        path.refuse_stream()
        if len(parts) != 3 or header.sequence == 0 or len(parts[2]) != header.length:
            sizes = ", ".join(str(len(part)) for part in parts[2:]) or "0"
            text = f"{self.ring.name(left)} sent a {header.kind.name} frame with a body of {sizes} bytes"
            self.fail(ProtocolError, left, f"{text}; its header says {header.length} bytes")
        path.uncredited += 1
        # Each frame gets a credit where there are several paths, because their speed is measured from credits.
        if path.uncredited >= (WINDOW // 2 if len(self.recv_paths) == 1 else 1):
            path.send_credit(self.ring.generation, self.ring.rank)
        return Frame(header, parts[2].buffer)

    def _end_left_path(self, path: RecvPath, header: Header, call: object) -> None:
        """The left neighbour has said goodbye on this path; frames sent earlier may still arrive over another one."""
        path.failed, path.goodbye = True, None
        all_ended = all(other.failed or not other.peer for other in self.recv_paths)
        self._departure.left_done = header.cause != Cause.DONE or all_ended
        if self._departure.left_done:
            self._raise_goodbye(header, call)

    def _unpack_stream_header(self, data: memoryview) -> Header:
        left = self.ring.left
        header = self._unpack(data, left)
        if header.kind not in CALL_NAMES or header.sequence == 0:
            self.fail(ProtocolError, left, f"{self.ring.name(left)} sent a {header.kind.name} frame over a stream")
        return header

    def _unpack(self, data: bytes | memoryview, peer: int) -> Header:
        try:
            header = unpack(data, self.ring.name(peer))
        except ProtocolError as error:
            self.fail(ProtocolError, peer, str(error))
        is_refusal = header.kind == Kind.GOODBYE  # may be sent by a rank of another generation
        if not is_refusal and (header.sender, header.generation) != (peer, self.ring.generation):
            text = f"{self.ring.name(peer)} sent a frame of rank {header.sender}, generation {header.generation}"
            self.fail(ProtocolError, peer, f"{text}; this ring has generation {self.ring.generation}")
        return header

    def _raise_goodbye(self, header: Header, call: object) -> NoReturn:
        text = header.text or f"{self.ring.name(header.sender)} left the ring during {call}"
        self.fail(_FAILURE_OF[header.cause], header.culprit, text)

    def _diagnose(self, peer: int, call: object) -> NoReturn:
        """Distinguishes a peer that ended from one that is stopped or unreachable: both end the connection."""
        states = [probe(path, PROBE_SECONDS) for path in split_paths(self.ring.addresses[peer])]
        state = next((known for known in ("alive", "ended") if known in states), states[0])
        name = self.ring.name(peer)
        if state in ("silent", "unreachable"):
            text = (
                f"{name} sent nothing for {self._settings.timeout:g} s during {call}; "
                "it may be asleep, stopped or unreachable"
            )
            self.fail(PeerTimeout, peer, text)
        how = "the connection to it broke" if state == "alive" else "its process ended"
        self.fail(PeerLost, peer, f"{name} is gone: {how} during {call}")
