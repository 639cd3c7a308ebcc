"""Leaving a ring: the goodbyes of this rank and of its neighbours."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence

import zmq
from zmq.utils.monitor import recv_monitor_message

from macft.collective.ring.path import RecvPath, SendPath
from macft.collective.wire import LINGER_SECONDS, Header, Kind, pack, unpack
from macft.errors import ProtocolError

_QUIET_MS = 300
"""How long nothing may arrive, once all has been sent, until this rank stops reading."""
_UNSENT_POLL_MS = 2
"""How often to check whether ZeroMQ has sent everything; no event reports it."""


class Departure:
    """The goodbyes on the paths to the right neighbour and from the left one.

    Attributes:
        left_done: Whether the left neighbour has said goodbye, on all its paths or with a failure.
        right_done: Whether the right neighbour has said goodbye.
    """

    def __init__(self, send_paths: Sequence[SendPath], recv_paths: Sequence[RecvPath]):
        self.left_done = self.right_done = False
        self._send_paths, self._recv_paths = send_paths, recv_paths
        self._sent: list[tuple[SendPath | RecvPath, zmq.MessageTracker]] = []

    def say_goodbye(self, header: Header) -> None:
        """Sends ``header`` to both neighbours, except one that is gone. Never blocks.

        Nor to one to which part of a message was being sent when this rank was interrupted.
        """
        for send_path in self._send_paths:
            if not (send_path.failed or send_path.is_sending):
                with contextlib.suppress(zmq.Again):  # not connected yet
                    self._sent.append((send_path, _send_tracked(send_path.sock, [], header)))
                if send_path.stream is not None:
                    send_path.stream.finish()
        for recv_path in self._recv_paths:
            if recv_path.peer and not recv_path.is_sending:
                self._sent.append((recv_path, _send_tracked(recv_path.sock, [recv_path.peer], header)))

    def wait_until_sent(self, sockets: Sequence[tuple[zmq.Socket[bytes], int]]) -> None:
        """Waits up to ``LINGER_SECONDS`` until all frames have been sent; incoming frames are dropped.

        The neighbours may still be sending. TCP answers a close with unread data by a reset, which can overtake the
        goodbye. So this rank reads on until they have left too, or are silent.
        """
        deadline = time.monotonic() + LINGER_SECONDS
        while time.monotonic() < deadline:
            is_sent = all(tracker.done or path.is_gone for path, tracker in self._sent)
            is_right_over = self.right_done or all(path.failed for path in self._send_paths)
            if is_sent and is_right_over and (self.left_done or all(path.failed for path in self._recv_paths)):
                return
            ready = dict(zmq.zmq_poll(sockets, _QUIET_MS if is_sent else _UNSENT_POLL_MS))
            if is_sent and not ready:
                return
            for send_path in self._send_paths:
                if send_path.sock in ready:
                    is_goodbye = _is_goodbye(send_path.sock.recv_multipart(zmq.NOBLOCK))
                    self.right_done = self.right_done or is_goodbye
                if send_path.monitor in ready:
                    recv_monitor_message(send_path.monitor)
                    send_path.failed = True
            for recv_path in self._recv_paths:
                if recv_path.sock in ready:
                    sender, *parts = recv_path.sock.recv_multipart(zmq.NOBLOCK)
                    self.left_done = self.left_done or (sender == recv_path.peer and _is_goodbye(parts))
                if recv_path.monitor in ready:
                    recv_path.read_monitor()


def _is_goodbye(parts: Sequence[bytes]) -> bool:
    try:
        return bool(parts) and unpack(parts[0], "a neighbour").kind == Kind.GOODBYE
    except ProtocolError:
        return False


def _send_tracked(sock: zmq.Socket[bytes], prefix: list[bytes], header: Header) -> zmq.MessageTracker:
    """Sends ``header``; the returned tracker is done when ZeroMQ has written it and all before it."""
    frame = zmq.Frame(pack(header), track=True, copy=False)
    sock.send_multipart([*prefix, frame], zmq.NOBLOCK, copy=False)
    tracker: zmq.MessageTracker = frame.tracker
    return tracker
