"""A password-authenticated key exchange: two machines that share a short code agree on strong keys.

SPEKE (Jablon, ISO/IEC 11770-4) over the 2048-bit group of RFC 3526: Diffie-Hellman with a generator derived from the
code. An exchange tests a single guess of the code and reveals nothing else. Messages are then encrypted with
ChaCha20-Poly1305, with a key for each direction.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import socket
import struct
from collections.abc import Callable, Mapping
from typing import TypeAlias

import msgpack
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from macft.errors import LaunchError

_PRIME = int(
    "FFFFFFFFFFFFFFFFC90FDAA22168C234C4C6628B80DC1CD129024E088A67CC74020BBEA63B139B22514A08798E3404DD"
    "EF9519B3CD3A431B302B0A6DF25F14374FE1356D6D51C245E485B576625E7EC6F44C42E9A637ED6B0BFF5CB6F406B7ED"
    "EE386BFB5A899FA5AE9F24117C4B1FE649286651ECE45B3DC2007CB8A163BF0598DA48361C55D39A69163FA8FD24CF5F"
    "83655D23DCA3AD961C62F356208552BB9ED529077096966D670C354E4ABC9804F1746C08CA18217C32905E462E36CE3B"
    "E39E772C180E86039B2783A2EC07A28FB5C55DF06F4C52C9DE2BCBF6955817183995497CEA956AE515D2261898FA0510"
    "15728E5A8AACAA68FFFFFFFFFFFFFFFF",
    16,
)
_BYTES = 256
_LABEL = b"macft pairing 1\0"
_MAX_MESSAGE = 262_144
_PROTOCOL_ERROR = "pairing: the other side does not follow the protocol"

Message: TypeAlias = Mapping[str, object]


class WrongCode(LaunchError):
    """The other side has a different code."""


class PakeExchange:
    """One side of one exchange.

    Args:
        code: As typed; case, spaces and dashes are ignored.
        is_host: Whether this side made the code.

    Attributes:
        public: The value to send to the other side, 256 bytes.
    """

    def __init__(self, code: str, *, is_host: bool):
        plain = code.replace("-", "").replace(" ", "").lower().encode()
        generator = pow(int.from_bytes(hashlib.shake_256(_LABEL + plain).digest(_BYTES + 32)), 2, _PRIME)
        self._secret, self._is_host = secrets.randbelow(_PRIME // 2 - 2) + 2, is_host
        self.public = pow(generator, self._secret, _PRIME).to_bytes(_BYTES)

    def keys(self, theirs: bytes) -> list[bytes]:
        """Four keys of 32 bytes: confirmation and cipher of the host, then of the guest.

        Args:
            theirs: The other side's public value.

        Raises:
            LaunchError: it is not a valid public value.
        """
        value = _check_public(theirs)
        if theirs == self.public:  # a reflection
            raise LaunchError(_PROTOCOL_ERROR)
        shared = pow(value, self._secret, _PRIME).to_bytes(_BYTES)
        both = self.public + theirs if self._is_host else theirs + self.public
        material = hashlib.shake_256(_LABEL + shared + both).digest(128)
        return [material[start : start + 32] for start in range(0, 128, 32)]


class Channel:
    """An encrypted connection between the two sides of a :class:`PakeExchange`.

    Raises:
        WrongCode: the other side has a different code.
        LaunchError: it is silent or does not follow the protocol.

    Args:
        connection: To the other side.
        code: As typed.
        is_host: Whether this side made the code.
        equal: Compares the other side's confirmation with the one expected: each call is a guess of the code.
    """

    def __init__(
        self,
        connection: socket.socket,
        code: str,
        *,
        is_host: bool,
        equal: Callable[[bytes, bytes], bool] = hmac.compare_digest,
    ):
        self._socket, self._equal = connection, equal
        # The host hears the guest first: a connection that says nothing, or something else, costs no computation.
        theirs = self._read_public() if is_host else b""
        exchange = PakeExchange(code, is_host=is_host)
        self._write(exchange.public)
        host_confirms, host_cipher, guest_confirms, guest_cipher = exchange.keys(theirs or self._read_public())
        # The guest first proves that it knows the code. A wrong guess gets no answer with which to test other guesses.
        if is_host:
            self._compare(self._read(), guest_confirms)
            self._write(_confirmation(host_confirms))
        else:
            self._write(_confirmation(guest_confirms))
            try:
                answer = self._read()
            except LaunchError:
                raise WrongCode("pairing: the code is wrong, or the other side has ended") from None
            self._compare(answer, host_confirms)
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
        except (InvalidTag, ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException):
            raise LaunchError("pairing: a message was changed on its way") from None
        self._received += 1
        if not isinstance(message, dict):
            raise LaunchError(_PROTOCOL_ERROR)
        return message

    def close(self) -> None:
        """Closes the connection."""
        self._socket.close()

    def _compare(self, confirmation: bytes, key: bytes) -> None:
        if not self._equal(confirmation, _confirmation(key)):
            raise WrongCode("pairing: the code is wrong")

    def _read_public(self) -> bytes:
        public = self._read()
        _check_public(public)
        return public

    def _write(self, message: bytes) -> None:
        try:
            self._socket.sendall(struct.pack(">I", len(message)) + message)
        except OSError as error:
            raise LaunchError(f"pairing: the connection broke ({error})") from None

    def _read(self) -> bytes:
        (length,) = struct.unpack(">I", self._read_exactly(4))
        if length > _MAX_MESSAGE:
            raise LaunchError(_PROTOCOL_ERROR)
        return self._read_exactly(length)

    def _read_exactly(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            try:
                received = self._socket.recv(count - len(data))
            except OSError as error:
                raise LaunchError(f"pairing: the other side is silent ({error})") from None
            if not received:
                raise LaunchError("pairing: the other side has ended")
            data += received
        return bytes(data)


def new_code() -> str:
    """A code to type: eight digits in two groups."""
    digits = f"{secrets.randbelow(10**8):08d}"
    return f"{digits[:4]}-{digits[4:]}"


def _check_public(public: bytes) -> int:
    """The number of a public value. Raises LaunchError for 0, 1 and -1, which give a known result for any code."""
    value = int.from_bytes(public)
    if len(public) != _BYTES or not 2 <= value <= _PRIME - 2:
        raise LaunchError(_PROTOCOL_ERROR)
    return value


def _confirmation(key: bytes) -> bytes:
    return hmac.digest(key, _LABEL + b"confirm", "sha256")
