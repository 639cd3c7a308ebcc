"""Streams: the plain TCP connections that carry a path's data, beside the ZeroMQ connection that controls it.

ZeroMQ connects the neighbours, checks their keys, monitors that they live, and carries goodbyes. It also passes each
message from thread to thread and into memory of its own, which takes as long as a fast network does. A stream has one
direction and one thread: frames are sent from and received into the memory where they are needed.

The receiving rank opens a port and sends its number and a secret over the ZeroMQ connection. Whoever knows the secret
may connect, once. If that connection is encrypted (CURVE), the stream is too: AES-256-GCM (NIST SP 800-38D) with a key
derived from the secret and a counter as nonce, so that frames cannot be read, changed, repeated, dropped or reordered.
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
from typing import TypeAlias

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from macft.collective.wire import DATA_HEADER_BYTES, Frame, Header, split_address
from macft.errors import CollectiveError

SECRET_BYTES = 32
_TAG_BYTES = 16
_PREFETCH_BYTES = 16 * 1024
"""Bytes received together with a header, so that a small frame takes one call."""
_CONNECT_SECONDS = 1.0
_MAX_UNAUTHENTICATED = 8
WAIT_MS = 2
"""How long a blocking read waits."""

_EMPTY = memoryview(b"")

BufferFor: TypeAlias = Callable[[Header], memoryview | None]
"""Where to receive the body of a frame. None: in the stream's own buffer, which the next frame overwrites."""


def new_buffer(header: Header) -> memoryview:
    """New memory for the body of a frame."""
    return np.empty(header.length, np.uint8).data


class _Cipher:
    """AES-256-GCM for one direction of one stream."""

    def __init__(self, secret: bytes):
        self._cipher = AESGCM(_derive(secret, b"stream key"))
        self._count = 0

    def _nonce(self) -> bytes:
        self._count += 1
        return self._count.to_bytes(12, "big")

    def encrypt(self, data: bytes | memoryview, out: memoryview) -> None:
        self._cipher.encrypt_into(self._nonce(), data, None, out)

    def decrypt(self, data: memoryview, out: memoryview) -> None:
        try:
            self._cipher.decrypt_into(self._nonce(), data, None, out)
        except InvalidTag:
            raise ValueError("a frame that was changed on its way") from None


class StreamPort:
    """A port of ``host`` that accepts one stream, from the peer that knows ``secret``.

    Raises:
        CollectiveError: the host's address cannot be listened on.
    """

    def __init__(self, host: str, *, encrypted: bool):
        try:
            family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
            self.server = socket.create_server((host, 0), family=family, backlog=_MAX_UNAUTHENTICATED)
        except OSError as error:
            raise CollectiveError(f"can't listen on {host}: {error}") from None
        self.server.setblocking(False)
        self.port: int = self.server.getsockname()[1]
        self.secret = secrets.token_bytes(SECRET_BYTES)
        self._encrypted = encrypted
        # Connections, with the part of the token that each has sent.
        self._unauthenticated: dict[socket.socket, bytes] = {}

    @property
    def sockets(self) -> list[socket.socket]:
        """The sockets to poll."""
        return [self.server, *self._unauthenticated]

    def accept(self, max_bytes: int) -> StreamIn | None:
        """The stream, once its token has arrived; the port is then closed. Other connections are closed."""
        with contextlib.suppress(BlockingIOError, ConnectionError):
            while True:
                connection, _ = self.server.accept()
                connection.setblocking(False)
                self._unauthenticated[connection] = b""
                if len(self._unauthenticated) > _MAX_UNAUTHENTICATED:
                    oldest = next(iter(self._unauthenticated))
                    del self._unauthenticated[oldest]
                    oldest.close()
        for connection, earlier in list(self._unauthenticated.items()):
            try:
                received = connection.recv(SECRET_BYTES - len(earlier))
            except BlockingIOError:
                continue
            except OSError:
                received = b""
            token = earlier + received
            is_valid = hmac.compare_digest(token, _derive(self.secret, b"stream token"))
            if is_valid or not received or len(token) == SECRET_BYTES:
                del self._unauthenticated[connection]
                if is_valid:
                    self.close()
                    return StreamIn(connection, max_bytes, self.secret if self._encrypted else None)
                connection.close()
            else:
                self._unauthenticated[connection] = token
        return None

    def close(self) -> None:
        """Accepts no more connections. Safe to call twice."""
        for sock in self.sockets:
            sock.close()
        self._unauthenticated.clear()


class StreamOut:
    """The sending end. Sending never blocks: call :meth:`flush` when ``sock`` is writable."""

    def __init__(self, sock: socket.socket, max_bytes: int, secret: bytes | None):
        sock.setblocking(False)
        self.sock = sock
        self.broken_at: float | None = None
        """When the connection was found to have ended."""
        self._cipher = _Cipher(secret) if secret is not None else None
        self._encrypted = memoryview(bytearray(max_bytes + _TAG_BYTES if secret is not None else 0))
        self._unsent: deque[memoryview] = deque()

    @classmethod
    def connect(cls, endpoint: str, port: int, secret: bytes, max_bytes: int, *, encrypted: bool) -> StreamOut | None:
        """The stream to ``port`` of ``endpoint``'s host (``host:port``); None if it cannot be reached."""
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
        return cls(sock, max_bytes, secret if encrypted else None)

    @property
    def pending(self) -> bool:
        """Whether part of a frame is unsent. Until it is sent, its body must not change and no other may be sent."""
        return bool(self._unsent)

    def send(self, header: bytes, body: bytes | memoryview) -> None:
        """Sends a frame with a data header. No other frame may be ``pending``."""
        assert not self._unsent
        body = memoryview(body).cast("B") if len(body) else _EMPTY
        if self._cipher is not None:
            encrypted_header = memoryview(bytearray(len(header) + _TAG_BYTES))
            self._cipher.encrypt(header, encrypted_header)
            header = bytes(encrypted_header)
            if len(body):
                plain, body = body, self._encrypted[: len(body) + _TAG_BYTES]
                self._cipher.encrypt(plain, body)
        try:
            sent = self.sock.sendmsg((header, body))  # usually all of it
        except BlockingIOError:
            sent = 0
        except OSError:
            self._break()
            return
        if sent < len(header) + len(body):
            self._unsent += [part for part in (memoryview(header)[sent:], body[max(0, sent - len(header)) :]) if part]

    def flush(self) -> int:
        """Sends as much as the network accepts now, and returns the number of bytes sent."""
        total = 0
        while self._unsent:
            try:
                sent = self.sock.sendmsg(self._unsent)
            except BlockingIOError:
                break
            except OSError:
                self._break()
                break
            total += sent
            while sent:
                first = self._unsent[0]
                if sent < len(first):
                    self._unsent[0] = first[sent:]
                    break
                sent -= len(self._unsent.popleft())
        return total

    def _break(self) -> None:
        self._unsent.clear()
        self.broken_at = self.broken_at or time.monotonic()

    def finish(self) -> None:
        """Shuts down sending; data already sent still arrives."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Closes the connection. Safe to call twice."""
        self._unsent.clear()
        self.sock.close()


class StreamIn:
    """The receiving end: reads frames of at most ``max_bytes``, one at a time."""

    def __init__(self, sock: socket.socket, max_bytes: int, secret: bytes | None):
        # With MSG_DONTWAIT a call returns at once, without it after WAIT_MS: one system call instead of three.
        sock.setblocking(True)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, 1000 * WAIT_MS))
        self.sock = sock
        self.ended_at: float | None = None
        """When the connection was found to have ended."""
        self.received = 0
        """Bytes received so far."""
        self._cipher = _Cipher(secret) if secret is not None else None
        self._tag_bytes = _TAG_BYTES if secret is not None else 0
        self._max_bytes = max_bytes
        self._scratch = memoryview(bytearray(max_bytes))
        self._encrypted = memoryview(bytearray(max_bytes + self._tag_bytes if self._tag_bytes else 0))
        # Bytes received beyond the last frame are _prefetch[_start:_end].
        self._prefetch = memoryview(bytearray(_PREFETCH_BYTES))
        self._start = self._end = 0
        # The frame being received: where its plain and its encrypted body go, and how much has arrived.
        self._header: Header | None = None
        self._body = self._wire_body = self._scratch[:0]
        self._filled = 0
        self._flags: int = socket.MSG_DONTWAIT

    def read(
        self, unpack: Callable[[memoryview], Header], buffer_for: BufferFor, *, blocking: bool = False
    ) -> Frame | None:
        """The next frame, or None if it is not complete; with ``blocking`` it waits up to ``WAIT_MS``.

        ``unpack`` reads headers and may raise.

        Raises:
            ValueError: the bytes are not a frame; the message says why.
        """
        self._flags = 0 if blocking else socket.MSG_DONTWAIT
        if self._header is None and not self._read_header(unpack, buffer_for):
            return None
        while self._filled < len(self._wire_body):
            if not (count := self._receive(self._wire_body[self._filled :])):
                return None
            self._filled += count
        assert self._header is not None
        header, self._header = self._header, None
        if self._cipher is not None and header.length:
            self._cipher.decrypt(self._wire_body, self._body)
        return Frame(header, self._body)

    def _read_header(self, unpack: Callable[[memoryview], Header], buffer_for: BufferFor) -> bool:
        size = DATA_HEADER_BYTES + self._tag_bytes
        while (available := self._end - self._start) < size:
            if self._start:
                self._prefetch[:available] = bytes(self._prefetch[self._start : self._end])
                self._start, self._end = 0, available
            if not (count := self._receive(self._prefetch[available:])):
                return False
            self._end += count
        packed = self._prefetch[self._start : self._start + size]
        if self._cipher is not None:
            plain = memoryview(bytearray(DATA_HEADER_BYTES))
            self._cipher.decrypt(packed, plain)
            packed = plain
        header = unpack(packed)
        length = header.length
        if length > self._max_bytes:
            raise ValueError(f"a body of {length} bytes; {self._max_bytes} are the most")
        body = buffer_for(header)
        self._body = body if body is not None else self._scratch[:length]
        self._wire_body = self._encrypted[: length + self._tag_bytes] if self._tag_bytes and length else self._body
        self._start += size
        self._filled = filled = min(len(self._wire_body), available - size)
        self._wire_body[:filled] = self._prefetch[self._start : self._start + filled]
        self._start += filled
        if self._start == self._end:
            self._start = self._end = 0
        self._header = header
        return True

    def _receive(self, out: memoryview) -> int:
        if self.ended_at is not None:
            return 0
        try:
            count = self.sock.recv_into(out, 0, self._flags)
        except BlockingIOError:
            return 0
        except OSError:
            count = 0
        if not count:
            self.ended_at = time.monotonic()
        self.received += count
        return count

    def close(self) -> None:
        """Closes the connection. Safe to call twice."""
        self.sock.close()


def _derive(secret: bytes, purpose: bytes) -> bytes:
    return hashlib.blake2b(key=secret, person=purpose, digest_size=SECRET_BYTES).digest()
