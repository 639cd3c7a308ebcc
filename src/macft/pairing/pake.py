"""An encrypted connection between two machines that share a short code.

The password-authenticated key exchange is SPAKE2 (Abdalla and Pointcheval 2005) over Ed25519, by the library
``spake2``. An exchange tests a single guess of the code and reveals nothing else. Messages are encrypted with
ChaCha20-Poly1305, with a key for each direction.

Every frame is a length of four bytes, big-endian, and so many bytes. The first one of each side is :data:`_MAGIC`, a
byte with :data:`PAIRING_VERSION`, and the side's element of the exchange. Then each side proves that it knows the code,
the guest first, and messages follow.
"""

from __future__ import annotations

import hmac
import secrets
import select
import socket
import struct
import threading
from collections.abc import Mapping
from typing import TypeAlias

import msgpack
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from spake2 import SPAKE2_A, SPAKE2_B, SPAKEError
from spake2.ed25519_basic import NotOnCurve

from macft.errors import LaunchError

PAIRING_VERSION = 2
"""Of the exchange and of the messages after it. Version 1 had an exchange of macft's own, and no number on the wire."""
_MAGIC = b"macft pairing "
_FIRST_VERSION_BYTES = 256
"""The size of the first frame of version 1."""
_ELEMENT_BYTES = 33
"""The letter of the side, and a point of the curve."""
_KEY_BYTES = 32
_MAX_MESSAGE = 262_144
NOT_THE_PROTOCOL = "pairing: the other side does not follow the protocol"

Message: TypeAlias = Mapping[str, object]


class WrongCode(LaunchError):
    """The other side has a different code."""


class Guesses:
    """Counts wrong codes, over all connections to a host; after ``most`` of them no code is right any more."""

    def __init__(self, most: int):
        self._left, self._lock = most, threading.Lock()

    def judge(self, *, is_right: bool) -> bool:
        """Whether a code that ``is_right`` lets its machine in."""
        with self._lock:
            self._left -= not is_right and self._left > 0
            return is_right and self._left > 0


class PakeExchange:
    """One side of one exchange.

    Args:
        code: As typed; case, spaces and dashes are ignored.
        is_host: Whether this side made the code.

    Attributes:
        first_frame: What to send to the other side.
    """

    def __init__(self, code: str, *, is_host: bool):
        plain = code.replace("-", "").replace(" ", "").lower().encode()
        side = SPAKE2_B if is_host else SPAKE2_A
        self._exchange = side(plain, idA=b"macft guest", idB=b"macft host")
        self.first_frame = _MAGIC + bytes([PAIRING_VERSION]) + self._exchange.start()

    def keys(self, theirs: bytes) -> list[bytes]:
        """Four keys of 32 bytes: confirmation and cipher of the host, then of the guest.

        Args:
            theirs: The other side's first frame.

        Raises:
            LaunchError: it is not one, or one of another version of macft; says which to install.
        """
        version, element = theirs[len(_MAGIC) : len(_MAGIC) + 1], theirs[len(_MAGIC) + 1 :]
        if len(theirs) == _FIRST_VERSION_BYTES and not theirs.startswith(_MAGIC):
            version = b"\1"
        elif not theirs.startswith(_MAGIC) or not version:
            raise LaunchError(NOT_THE_PROTOCOL)
        if version[0] != PAIRING_VERSION:
            age = "an older" if version[0] < PAIRING_VERSION else "a newer"
            raise LaunchError(f"pairing: the other side runs {age} macft; install the same version on all machines")
        try:
            if len(element) != _ELEMENT_BYTES:
                raise ValueError("not an element")
            shared = self._exchange.finish(element)
        except (SPAKEError, NotOnCurve, ValueError):  # also a value that would fix the result, or this side's own
            raise LaunchError(NOT_THE_PROTOCOL) from None
        kdf = HKDF(SHA256(), 4 * _KEY_BYTES, salt=None, info=_MAGIC + bytes([PAIRING_VERSION]))
        material = kdf.derive(shared)
        return [material[start : start + _KEY_BYTES] for start in range(0, len(material), _KEY_BYTES)]


class Channel:
    """An encrypted connection between the two sides of a :class:`PakeExchange`.

    Args:
        connection: To the other side.
        code: As typed.
        is_host: Whether this side made the code.
        guesses: Of the host.

    Raises:
        WrongCode: the other side has a different code.
        LaunchError: it is silent or does not follow the protocol.
    """

    def __init__(self, connection: socket.socket, code: str, *, is_host: bool, guesses: Guesses | None = None):
        self._socket, self._guesses = connection, guesses or Guesses(1)
        exchange = PakeExchange(code, is_host=is_host)
        self._write(exchange.first_frame)
        host_confirms, host_cipher, guest_confirms, guest_cipher = exchange.keys(self._read())
        # The guest first proves that it knows the code. A wrong guess gets no answer with which to test other guesses.
        if is_host:
            self._expect(guest_confirms, is_host=True)
            self._write(_confirmation(host_confirms))
        else:
            self._write(_confirmation(guest_confirms))
            self._expect(host_confirms, is_host=False)
        own, other = (host_cipher, guest_cipher) if is_host else (guest_cipher, host_cipher)
        self._sending, self._receiving = ChaCha20Poly1305(own), ChaCha20Poly1305(other)
        self._sent = self._received = 0

    def send(self, message: Message) -> None:
        """Sends one message."""
        self._write(self._sending.encrypt(struct.pack("<4xQ", self._sent), msgpack.packb(message), None))
        self._sent += 1

    def receive(self, seconds: float) -> Message:
        """Waits up to ``seconds`` for one message.

        Raises:
            LaunchError: there is none, the connection ended, or the message was changed.
        """
        self._socket.settimeout(seconds)
        try:
            plain = self._receiving.decrypt(struct.pack("<4xQ", self._received), self._read(), None)
            message = msgpack.unpackb(plain)
        except (InvalidTag, ValueError, msgpack.UnpackException):
            raise LaunchError("pairing: a message was changed on its way") from None
        self._received += 1
        if not isinstance(message, dict):
            raise LaunchError(NOT_THE_PROTOCOL)
        return message

    @property
    def has_ended(self) -> bool:
        """Whether the other side has left, and nothing of it is left to read."""
        try:
            is_readable = bool(select.select([self._socket], [], [], 0.0)[0])
            return is_readable and not self._socket.recv(1, socket.MSG_PEEK)
        except OSError:
            return True

    def close(self) -> None:
        """Closes the connection."""
        self._socket.close()

    def _expect(self, key: bytes, *, is_host: bool) -> None:
        try:
            confirmation = self._read()
        except LaunchError:
            if is_host:
                raise  # nobody learns anything about the code by leaving here, so it is no guess
            raise WrongCode("pairing: the code is wrong, or the other side has ended") from None
        if not self._guesses.judge(is_right=hmac.compare_digest(confirmation, _confirmation(key))):
            raise WrongCode("pairing: the code is wrong")

    def _write(self, message: bytes) -> None:
        try:
            self._socket.sendall(struct.pack(">I", len(message)) + message)
        except OSError as error:
            raise LaunchError(f"pairing: the connection broke ({error})") from None

    def _read(self) -> bytes:
        (length,) = struct.unpack(">I", self._read_exactly(4))
        if length > _MAX_MESSAGE:
            raise LaunchError(NOT_THE_PROTOCOL)
        return self._read_exactly(length)

    def _read_exactly(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            try:
                received = self._socket.recv(count - len(data))
            except OSError as error:
                if isinstance(error, TimeoutError) and error.errno is None:  # of the socket, not of the network
                    raise LaunchError("pairing: the other side is silent") from None
                raise LaunchError(
                    f"pairing: the connection broke ({error.strerror or error}); is the other machine asleep, or its "
                    "cable unplugged?"
                ) from None
            if not received:
                raise LaunchError("pairing: the other side has ended")
            data += received
        return bytes(data)


def new_code() -> str:
    """A code to type: eight digits in two groups."""
    digits = f"{secrets.randbelow(10**8):08d}"
    return f"{digits[:4]}-{digits[4:]}"


def _confirmation(key: bytes) -> bytes:
    return hmac.digest(key, _MAGIC + b"confirm", "sha256")
