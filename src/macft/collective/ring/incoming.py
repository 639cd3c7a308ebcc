"""The paths from the left neighbour: reading its messages, its streams, and its goodbye."""

from __future__ import annotations

import time
from typing import TypeAlias

import zmq

from macft.collective.ring.departure import Departure
from macft.collective.ring.ending import Ending
from macft.collective.ring.handshake import Handshake, RingIdentity
from macft.collective.ring.path import WINDOW, RecvPath
from macft.collective.ring.stream import BufferFor
from macft.collective.wire import CALL_NAMES, Cause, Frame, Header, Kind
from macft.errors import ProtocolError

_MOST_OF_STRANGERS = 1_000

Ready: TypeAlias = dict[zmq.Socket[bytes] | int, int]
"""Sockets with events: ZeroMQ's sockets, and the descriptors of others."""


class Incoming:
    """Reads the frames of the left neighbour. The paths take turns, however many are ready.

    Attributes:
        progress: A number that grows whenever data of a stream arrives, also part of a frame.
        is_flooded: Whether strangers have sent more messages than are dropped at a time.
    """

    def __init__(
        self, ring: RingIdentity, paths: list[RecvPath], handshake: Handshake, departure: Departure, ending: Ending
    ):
        self.progress = 0
        self.is_flooded = False
        self._ring, self._paths, self._handshake = ring, paths, handshake
        self._departure, self._ending = departure, ending

    def send_credit(self) -> None:
        """Acknowledges all frames of the left neighbour so far."""
        for path in self._paths:
            if path.peer and not path.failed:
                path.send_credit(self._ring.generation, self._ring.rank)

    def is_ready(self, ready: Ready) -> bool:
        """Whether a path has a message or stream data."""
        return any(
            path.sock in ready or any(sock.fileno() in ready for sock in path.data_sockets) for path in self._paths
        )

    def read(self, ready: Ready, call: object, buffer_for: BufferFor) -> tuple[bool, Frame | None]:
        """Reads one message, or what the streams have.

        Returns:
            Whether the left neighbour has sent anything, and the data frame, if it is one. Messages of strangers are
            dropped, up to ``_MOST_OF_STRANGERS``: they must not keep the neighbour's, or its end, from being seen.
        """
        for path in self._paths:
            if path.sock in ready and (parts := self._next_of_neighbour(path)):
                self._move_to_end(path)
                return True, self._read_message(path, parts, call)
        has_data = any(sock.fileno() in ready for path in self._paths for sock in path.data_sockets)
        return has_data, self.read_streams(call, buffer_for) if has_data else None

    def read_streams(self, call: object, buffer_for: BufferFor, *, blocking: bool = False) -> Frame | None:
        """The next frame that a stream has."""
        for path in self._paths:
            stream = path.stream
            if stream is None:
                path.accept_stream()
                continue
            received_before = stream.received
            try:
                frame = stream.read(self._unpack_stream_header, buffer_for, blocking=blocking)
            except ValueError as error:
                left = self._ring.left
                self._ending.fail(ProtocolError, left, f"{self._ring.name(left)} sent {error}")
            self.progress += stream.received - received_before
            if frame is not None:
                if len(self._paths) > 1:
                    self._move_to_end(path)
                    path.uncredited += 1
                    path.send_credit(self._ring.generation, self._ring.rank)
                return frame
            if stream.ended_at is not None and path.goodbye is not None:
                self._end_path(path, path.goodbye[0], call)
        return None

    def read_monitors(self, ready: Ready) -> bool:
        """Marks paths whose connection has ended; returns whether there was any event."""
        paths = [path for path in self._paths if path.monitor in ready]
        for path in paths:
            path.read_monitor()
        return bool(paths)

    def expire(self, deadline: float, call: object) -> None:
        """Ends paths whose stream ended, or never came, before ``deadline`` (``time.monotonic()``)."""
        for path in self._paths:
            ended_at = path.stream.ended_at if path.stream is not None else None
            if path.goodbye is not None and path.stream is None and path.goodbye[1] < deadline:
                self._end_path(path, path.goodbye[0], call)
            path.failed = path.failed or (ended_at is not None and ended_at < deadline)

    def _next_of_neighbour(self, path: RecvPath) -> list[zmq.Frame]:
        """The neighbour's next message; empty if there is none. Those of others are answered, or dropped."""
        for _ in range(_MOST_OF_STRANGERS):
            try:
                parts = path.sock.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return []
            if parts[0].bytes == path.peer:
                return parts
            self._handshake.answer(path, parts[0].bytes, parts[1])
        self.is_flooded = True
        return []

    def _read_message(self, path: RecvPath, parts: list[zmq.Frame], call: object) -> Frame | None:
        left = self._ring.left
        header = self._ending.unpack(parts[1].buffer, left)
        if header.kind == Kind.GOODBYE:
            if header.cause == Cause.DONE and path.may_stream:
                path.goodbye = header, time.monotonic()
            else:
                self._end_path(path, header, call)
            return None
        path.refuse_stream()
        if len(parts) != 3 or header.sequence == 0 or len(parts[2]) != header.length:
            sizes = ", ".join(str(len(part)) for part in parts[2:]) or "0"
            text = f"{self._ring.name(left)} sent a {header.kind.name} frame with a body of {sizes} bytes"
            self._ending.fail(ProtocolError, left, f"{text}; its header says {header.length} bytes")
        path.uncredited += 1
        # Each frame gets a credit where there are several paths, because their speed is measured from credits.
        if path.uncredited >= (WINDOW // 2 if len(self._paths) == 1 else 1):
            path.send_credit(self._ring.generation, self._ring.rank)
        return Frame(header, parts[2].buffer)

    def _move_to_end(self, path: RecvPath) -> None:
        """Reads ``path`` last from now on."""
        self._paths.remove(path)
        self._paths.append(path)

    def _end_path(self, path: RecvPath, header: Header, call: object) -> None:
        """The left neighbour has said goodbye on this path; frames sent earlier may still arrive over another one."""
        path.failed, path.goodbye = True, None
        all_ended = all(other.failed or not other.peer for other in self._paths)
        self._departure.left_done = header.cause != Cause.DONE or all_ended
        if self._departure.left_done:
            self._ending.pass_on(header, call)

    def _unpack_stream_header(self, data: memoryview) -> Header:
        left = self._ring.left
        header = self._ending.unpack(data, left)
        if header.kind not in CALL_NAMES or header.sequence == 0:
            text = f"{self._ring.name(left)} sent a {header.kind.name} frame over a stream"
            self._ending.fail(ProtocolError, left, text)
        return header
