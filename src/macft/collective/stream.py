"""Streams: the plain TCP connections that carry a path's data, beside the ZeroMQ connection that rules it.

ZeroMQ brings the neighbours together, knows their keys, watches that they live, and says goodbye. It also hands each
message from thread to thread and into memory of its own, which costs as much time as the wire does where that is fast.
A stream has one direction and one thread: frames are written from where they lie and received where they are wanted.

The receiving rank opens a port and tells it, with a secret, over the ZeroMQ connection; whoever knows the secret may
connect, once. Where that connection is encrypted (CURVE), so is the stream: AES-256-GCM (NIST SP 800-38D) with a key
made of the secret and a counter as nonce, so that nothing can be read, changed, repeated, left out or put elsewhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import secrets
import socket
import struct
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from macft.collective.wire import DATA_HEADER_BYTES, Header, split_address
from macft.errors import CollectiveError

SECRET_BYTES = 32
_TAG_BYTES = 16
_AT_ONCE = 16 * 1024
"""Bytes received with a header: small frames whole, in one call."""
_CONNECT_SECONDS = 1.0
_MAX_STRANGERS = 8
MOMENT_MS = 2
"""How long a patient reader waits."""

_NOTHING = memoryview(b"")

Room = Callable[[Header], memoryview | None]
"""Where the body of a frame is to be received; None: anywhere, it is used up before the next frame."""


def fresh(header: Header) -> memoryview:
    """Room for the body of a frame in memory of its own."""
    return np.empty(header.length, np.uint8).data


class _Sealer:
    """AES-256-GCM for one direction of one stream."""

    def __init__(self, secret: bytes):
        self._cipher = AESGCM(_derive(secret, b"stream key"))
        self._count = 0

    def _nonce(self) -> bytes:
        self._count += 1
        return self._count.to_bytes(12, "big")

    def seal(self, data: Any, into: memoryview) -> None:
        self._cipher.encrypt_into(self._nonce(), data, None, into)

    def unseal(self, data: Any, into: memoryview) -> None:
        try:
            self._cipher.decrypt_into(self._nonce(), data, None, into)
        except InvalidTag:
            raise ValueError("a frame that was changed on its way") from None


class StreamPort:
    """Where one stream may come in: ``port`` of ``host``, for who knows ``secret``.

    Raises:
        CollectiveError: the host's address can't be listened on.
    """

    def __init__(self, host: str, *, encrypted: bool):
        try:
            family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
            self.server = socket.create_server((host, 0), family=family, backlog=_MAX_STRANGERS)
        except OSError as error:
            raise CollectiveError(f"can't listen on {host}: {error}") from None
        self.server.setblocking(False)
        self.port: int = self.server.getsockname()[1]
        self.secret = secrets.token_bytes(SECRET_BYTES)
        self._encrypted = encrypted
        self._strangers: dict[socket.socket, bytes] = {}

    @property
    def sockets(self) -> list[socket.socket]:
        """Those that may have news."""
        return [self.server, *self._strangers]

    def accept(self, most_bytes: int) -> StreamIn | None:
        """The stream, once it has come; the port is then closed. Others are shown out."""
        with contextlib.suppress(BlockingIOError, ConnectionError):
            while True:
                connection, _ = self.server.accept()
                connection.setblocking(False)
                self._strangers[connection] = b""
                if len(self._strangers) > _MAX_STRANGERS:
                    oldest = next(iter(self._strangers))
                    del self._strangers[oldest]
                    oldest.close()
        for connection, known in list(self._strangers.items()):
            try:
                found = connection.recv(SECRET_BYTES - len(known))
            except BlockingIOError:
                continue
            except OSError:
                found = b""
            told = known + found
            is_right = hmac.compare_digest(told, _derive(self.secret, b"stream token"))
            if is_right or not found or len(told) == SECRET_BYTES:
                del self._strangers[connection]
                if is_right:
                    self.close()
                    return StreamIn(connection, most_bytes, self.secret if self._encrypted else None)
                connection.close()
            else:
                self._strangers[connection] = told
        return None

    def close(self) -> None:
        """Nobody comes in any more. Safe to call twice."""
        for sock in self.sockets:
            sock.close()
        self._strangers.clear()


class StreamOut:
    """The sending end. Frames leave as the network takes them: call :meth:`flush` when ``sock`` can be written to."""

    def __init__(self, sock: socket.socket, most_bytes: int, secret: bytes | None):
        sock.setblocking(False)
        self.sock = sock
        self.broken_at: float | None = None
        """When the connection was found to have ended."""
        self._sealer = _Sealer(secret) if secret is not None else None
        self._sealed = memoryview(bytearray(most_bytes + _TAG_BYTES if secret is not None else 0))
        self._parts: deque[memoryview] = deque()

    @classmethod
    def connect(cls, endpoint: str, port: int, secret: bytes, most_bytes: int, *, encrypted: bool) -> StreamOut | None:
        """The stream to ``port`` of ``endpoint``'s host (``host:port``); None if it can't be reached."""
        try:
            sock = socket.create_connection((split_address(endpoint)[0], port), _CONNECT_SECONDS)
        except OSError:
            return None
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.sendall(_derive(secret, b"stream token"))
        except OSError:
            sock.close()
            return None
        return cls(sock, most_bytes, secret if encrypted else None)

    @property
    def pending(self) -> bool:
        """Whether a frame has not left yet; its body must not change until then, and no other may be sent."""
        return bool(self._parts)

    def send(self, header: bytes, body: Any) -> None:
        """Sends a frame, given that none is ``pending``; ``header`` is that of data."""
        assert not self._parts
        body = memoryview(body).cast("B") if len(body) else _NOTHING
        if self._sealer is not None:
            sealed = memoryview(bytearray(len(header) + _TAG_BYTES))
            self._sealer.seal(header, sealed)
            header = bytes(sealed)
            if len(body):
                plain, body = body, self._sealed[: len(body) + _TAG_BYTES]
                self._sealer.seal(plain, body)
        try:
            sent = self.sock.sendmsg((header, body))  # most often all of it
        except BlockingIOError:
            sent = 0
        except OSError:
            self._break()
            return
        if sent < len(header) + len(body):
            self._parts += [part for part in (memoryview(header)[sent:], body[max(0, sent - len(header)) :]) if part]

    def flush(self) -> int:
        """Sends what the network takes now, and returns how many bytes those were."""
        total = 0
        while self._parts:
            try:
                sent = self.sock.sendmsg(self._parts)
            except BlockingIOError:
                break
            except OSError:
                self._break()
                break
            total += sent
            while sent:
                first = self._parts[0]
                if sent < len(first):
                    self._parts[0] = first[sent:]
                    break
                sent -= len(self._parts.popleft())
        return total

    def _break(self) -> None:
        self._parts.clear()
        self.broken_at = self.broken_at or time.monotonic()

    def finish(self) -> None:
        """Nothing more will come; what has been sent still arrives."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Ends the connection. Safe to call twice."""
        self._parts.clear()
        self.sock.close()


class StreamIn:
    """The receiving end: frames of at most ``most_bytes``, one by one."""

    def __init__(self, sock: socket.socket, most_bytes: int, secret: bytes | None):
        # With MSG_DONTWAIT a call does not wait, without it for a moment: one call then, instead of three.
        sock.setblocking(True)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, 1000 * MOMENT_MS))
        self.sock = sock
        self.ended_at: float | None = None
        """When the connection was found to have ended."""
        self.received = 0
        """Bytes so far."""
        self._sealer = _Sealer(secret) if secret is not None else None
        self._tag = _TAG_BYTES if secret is not None else 0
        self._most_bytes = most_bytes
        self._scratch = memoryview(bytearray(most_bytes))
        self._sealed = memoryview(bytearray(most_bytes + self._tag if self._tag else 0))
        self._early = memoryview(bytearray(_AT_ONCE))
        self._start = self._end = 0  # of what has come early
        self._header: Header | None = None
        self._body = self._wire = self._scratch[:0]
        self._filled = 0
        self._flags: int = socket.MSG_DONTWAIT

    def read(
        self, unpack: Callable[[memoryview], Header], room: Room, *, patient: bool = False
    ) -> tuple[Header, memoryview] | None:
        """The next frame; None if it is not there, for a ``patient`` reader after ``MOMENT_MS``.

        ``unpack`` reads headers and may raise.

        Raises:
            ValueError: what came is no frame; says what it is.
        """
        self._flags = 0 if patient else socket.MSG_DONTWAIT
        if self._header is None and not self._read_header(unpack, room):
            return None
        while self._filled < len(self._wire):
            if not (count := self._receive(self._wire[self._filled :])):
                return None
            self._filled += count
        assert self._header is not None
        header, self._header = self._header, None
        if self._sealer is not None and header.length:
            self._sealer.unseal(self._wire, self._body)
        return header, self._body

    def _read_header(self, unpack: Callable[[memoryview], Header], room: Room) -> bool:
        size = DATA_HEADER_BYTES + self._tag
        while (there := self._end - self._start) < size:
            if self._start:
                self._early[:there] = bytes(self._early[self._start : self._end])
                self._start, self._end = 0, there
            if not (count := self._receive(self._early[there:])):
                return False
            self._end += count
        packed = self._early[self._start : self._start + size]
        if self._sealer is not None:
            opened = memoryview(bytearray(DATA_HEADER_BYTES))
            self._sealer.unseal(packed, opened)
            packed = opened
        header = unpack(packed)
        length = header.length
        if length > self._most_bytes:
            raise ValueError(f"a body of {length} bytes; {self._most_bytes} are the most")
        body = room(header)
        self._body = body if body is not None else self._scratch[:length]
        self._wire = self._sealed[: length + self._tag] if self._tag and length else self._body
        self._start += size
        self._filled = filled = min(len(self._wire), there - size)
        self._wire[:filled] = self._early[self._start : self._start + filled]
        self._start += filled
        if self._start == self._end:
            self._start = self._end = 0
        self._header = header
        return True

    def _receive(self, into: memoryview) -> int:
        if self.ended_at is not None:
            return 0
        try:
            count = self.sock.recv_into(into, 0, self._flags)
        except BlockingIOError:
            return 0
        except OSError:
            count = 0
        if not count:
            self.ended_at = time.monotonic()
        self.received += count
        return count

    def close(self) -> None:
        """Ends the connection. Safe to call twice."""
        self.sock.close()


def _derive(secret: bytes, purpose: bytes) -> bytes:
    return hashlib.blake2b(key=secret, person=purpose, digest_size=SECRET_BYTES).digest()
