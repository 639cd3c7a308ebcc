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
from typing import TypeAlias

import zmq
from zmq.utils.monitor import recv_monitor_message

from macft.collective.ring.departure import Departure
from macft.collective.ring.ending import Ending
from macft.collective.ring.handshake import Handshake, RingIdentity, stream_secret
from macft.collective.ring.incoming import Incoming, Ready
from macft.collective.ring.listener import Listener
from macft.collective.ring.multipath import MultipathSender
from macft.collective.ring.path import WINDOW, RecvPath, SendPath
from macft.collective.ring.stream import WAIT_MS, BufferFor, new_buffer
from macft.collective.wire import LINGER_SECONDS, Cause, Frame, Header, Kind, split_paths
from macft.errors import PeerLost, PeerTimeout, ProtocolError

_Pollable: TypeAlias = zmq.Socket[bytes] | socket.socket
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
        ending: Ends the ring with an error.
        is_multipath: Whether a neighbour has several paths, so that frames may arrive out of order, or twice.
        early_frames: Data frames that arrived while the ring formed.
    """

    def __init__(self, listener: Listener, ring: RingIdentity):
        self.ring = ring
        self._settings = listener.settings
        self.recv_paths = [RecvPath(listener, number) for number in range(len(listener.routers))]
        self.sender = MultipathSender(listener, split_paths(ring.addresses[ring.right]))
        self.send_paths = self.sender.paths
        self.is_multipath = len(self.send_paths) > 1 or len(self.recv_paths) > 1
        self.early_frames: list[Frame] = []
        self._handshake = Handshake(ring, self.send_paths, self.recv_paths)
        self._departure = Departure(self.send_paths, self.recv_paths)
        self.ending = Ending(ring, self._departure, self._settings.timeout)
        self._incoming = Incoming(ring, self.recv_paths, self._handshake, self._departure, self.ending)
        self._sent = 0  # grows whenever data leaves or is acknowledged
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
    def progress(self) -> int:
        """Grows whenever data moves, also part of a frame. A call during which it stays the same is stalled."""
        return self._sent + self._incoming.progress

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
            name = self.ring.name(self.ring.right)
            self.ending.fail(PeerLost, self.ring.right, f"{name} left the ring during {call}")
        has_unsent = self.sender.pending
        may_skip_zmq = time.monotonic() < self._poll_zmq_at and not self.is_multipath
        if left and (frame := self._incoming.read_streams(call, buffer_for, blocking=may_skip_zmq and not has_unsent)):
            return frame
        broken = self._broken_neighbour(left, right)
        if has_unsent and may_skip_zmq and broken is None and self._poll_streams(left):
            self._sent += self.sender.flush()
            return self._incoming.read_streams(call, buffer_for) if left else None
        ready = self._poll(left, seconds if broken is None else 0.0)
        right_has_sent = self._read_right_sockets(ready, call)
        self._sent += self.sender.flush()
        if left and self._incoming.is_ready(ready):
            has_sent, frame = self._incoming.read(ready, call, buffer_for)
            if self._incoming.is_flooded:
                self._incoming.is_flooded, self._poll_zmq_at = False, 0.0
            if has_sent:
                return frame
        is_quiet = not self._read_monitors(ready)
        deadline = time.monotonic() - _REASON_SECONDS
        self.sender.lose_broken(deadline)
        self._incoming.expire(deadline, call)
        if broken is not None and is_quiet and not right_has_sent:
            self.ending.diagnose(broken, call)
        if not (is_quiet and self.sender.resend()) and not ready:
            self.sender.probe_stalled()
        return None

    def send_credit(self) -> None:
        """Acknowledges all frames of the left neighbour so far."""
        self._incoming.send_credit()

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
                self.ending.fail(PeerTimeout, *handshake.timed_out(state, timeout))
            if reason := stop_reason():
                self.ending.fail(PeerLost, self.ring.right, f"the ring can't form: {reason}")
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

    def _poll(self, left: bool, seconds: float) -> Ready:
        """Polls all sockets."""
        sockets: list[tuple[_Pollable, int]] = [*self._right_sockets]
        for send_path in self.send_paths:
            if send_path.pending and send_path.stream is not None:
                sockets.append((send_path.stream.sock, zmq.POLLOUT))
        if left:
            sockets += self._left_sockets
            sockets += [(sock, zmq.POLLIN) for path in self.recv_paths for sock in path.data_sockets]
        ready: Ready = dict(zmq.zmq_poll(sockets, int(seconds * 1000)))
        self._poll_zmq_at = time.monotonic() + _STREAMS_ONLY_SECONDS
        return ready

    def _read_right_sockets(self, ready: Ready, call: object) -> bool:
        """Reads one message of each path to the right; returns whether there was any."""
        paths = [path for path in self.send_paths if path.sock in ready]
        for path in paths:
            self._read_right(path, call)
        return bool(paths)

    def _read_monitors(self, ready: Ready) -> bool:
        """Marks paths whose connection has ended; returns whether there was any event."""
        ended = [path for path in self.send_paths if path.monitor in ready]
        for path in ended:
            recv_monitor_message(path.monitor)
            self.sender.lose(path, "its connection ended")
        return self._incoming.read_monitors(ready) or bool(ended)

    def _read_right(self, path: SendPath, call: object) -> None:
        parts = path.sock.recv_multipart(zmq.NOBLOCK)
        header = self.ending.unpack(parts[0], self.ring.right)
        if header.kind == Kind.GOODBYE:
            self._departure.right_done = True
            if header.cause != Cause.DONE:
                self.ending.pass_on(header, call)
            # Otherwise it has received all it needs; whether this rank has, the current call shows.
        elif header.kind == Kind.STREAM and not path.accepted and path.stream is None:
            self._open_stream(path, header)
        elif header.kind == Kind.CREDIT and not path.accepted and header.frames == WINDOW:
            path.accepted = True
        elif header.kind != Kind.CREDIT or (header.frames > len(path.uncredited) and not path.failed):
            text = f"{self.ring.name(self.ring.right)} sent an unexpected {header.kind.name} frame"
            self.ending.fail(ProtocolError, self.ring.right, f"{text} (frames: {header.frames})")
        elif header.frames and not path.failed:
            path.add_credit(header.frames)
            self._sent += 1

    def _open_stream(self, path: SendPath, offer: Header) -> None:
        secret = stream_secret(offer)
        if secret is None:
            text = f"{self.ring.name(self.ring.right)} offered a stream without a valid secret"
            self.ending.fail(ProtocolError, self.ring.right, text)
        if self._settings.streams:
            path.open_stream(offer.port, secret)
            if path.stream is None:
                _log.info("port %d for the stream to %s is not reachable; using ZeroMQ", offer.port, path.endpoint)
