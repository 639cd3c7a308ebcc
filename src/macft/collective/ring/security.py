"""CURVE encryption of a ring's sockets, and a ZAP handler that admits the holders of known keys only.

CURVE (ZeroMQ RFC 26, based on CurveCP) encrypts and authenticates every frame with keys of its connection. A frame that
is changed, repeated, or from another connection ends the connection on which it arrives. ZAP (RFC 27) is ZeroMQ's
protocol for asking a handler whether to admit the holder of a key.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import zmq
from zmq.utils import z85

KEY_BYTES = 32
_OVERHEAD = 64
"""Bytes that CURVE adds to a frame (33), rounded up; ZeroMQ counts them towards its limit."""
_DOMAIN = b"macft"
_MAX_REFUSED = 8


class KeyPair(NamedTuple):
    """A Curve25519 key pair, each key as its 32 bytes."""

    public: bytes
    secret: bytes

    @classmethod
    def new(cls) -> KeyPair:
        """A new random pair."""
        public, secret = zmq.curve_keypair()
        return cls(z85.decode(public), z85.decode(secret))

    @classmethod
    def from_secret(cls, secret: bytes) -> KeyPair:
        """The pair of the secret key ``secret`` (32 bytes)."""
        return cls(z85.decode(zmq.curve_public(z85.encode(secret))), secret)


class Refused(NamedTuple):
    """A refused connection from ``address``, whose sender holds the secret key of ``key``."""

    address: str
    key: bytes


class Gate:
    """Answers ZAP requests of one ZeroMQ context, in a thread of its own.

    A connection waits until :meth:`admit` has been called for the first time. Without the gate's thread no connection
    is admitted: guarded sockets require an answer.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], pair: KeyPair):
        self.pair = pair
        self.refused: deque[Refused] = deque(maxlen=_MAX_REFUSED)
        self._zap: zmq.Socket[bytes] = context.socket(zmq.REP)
        self._commands: zmq.Socket[bytes] = context.socket(zmq.PAIR)
        self._inbox: zmq.Socket[bytes] = context.socket(zmq.PAIR)
        for sock in (self._zap, self._commands, self._inbox):
            sock.linger = 0
        self._zap.bind("inproc://zeromq.zap.01")
        self._inbox.bind("inproc://gate")
        self._commands.connect("inproc://gate")
        self._thread = threading.Thread(target=self._serve, name="gate", daemon=True)
        self._thread.start()

    def guard(self, sock: zmq.Socket[bytes]) -> None:
        """Makes ``sock`` accept only encrypted connections of admitted keys. Call it before ``bind``."""
        _allow_overhead(sock)
        sock.curve_server = 1
        sock.curve_secretkey = z85.encode(self.pair.secret)
        sock.zap_domain = _DOMAIN
        sock.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # refuse connections if there is no handler

    def admit(self, keys: Iterable[bytes]) -> None:
        """Admits new connections of the holders of ``keys`` (32 bytes each) only; open connections remain."""
        self._commands.send_multipart([b"admit", *keys])

    def close(self) -> None:
        """Ends the thread. Safe to call twice."""
        if not self._commands.closed:
            self._commands.send(b"close")
            self._thread.join()
            self._commands.close()

    def _serve(self) -> None:
        admitted: frozenset[bytes] | None = None
        poller = zmq.Poller()
        poller.register(self._inbox, zmq.POLLIN)
        with self._inbox, self._zap:
            while True:
                ready = dict(poller.poll())
                if self._inbox in ready:
                    command, *keys = self._inbox.recv_multipart()
                    if command == b"close":
                        return
                    if admitted is None:
                        poller.register(self._zap, zmq.POLLIN)
                    admitted = frozenset(keys)
                elif self._zap in ready:
                    self._answer(self._zap.recv_multipart(), admitted or frozenset())

    def _answer(self, request: list[bytes], admitted: frozenset[bytes]) -> None:
        version, number, domain, address, _, mechanism, *credentials = request
        key = credentials[0] if credentials else b""
        status, text = b"400", b"this key is not trusted here"
        if (version, domain, mechanism) == (b"1.0", _DOMAIN, b"CURVE") and key in admitted:
            status, text = b"200", b""
        elif (refused := Refused(address.decode(errors="replace"), key)) not in self.refused:
            self.refused.append(refused)
        self._zap.send_multipart([b"1.0", number, status, text, b"", b""])


def encrypt_to(sock: zmq.Socket[bytes], pair: KeyPair, server: bytes) -> None:
    """Makes ``sock`` connect encrypted, as ``pair``, to the holder of the public key ``server`` only.

    Call it before ``connect``.
    """
    _allow_overhead(sock)
    sock.curve_publickey, sock.curve_secretkey = z85.encode(pair.public), z85.encode(pair.secret)
    sock.curve_serverkey = z85.encode(server)


def _allow_overhead(sock: zmq.Socket[bytes]) -> None:
    if (limit := int(sock.maxmsgsize)) >= 0:  # -1: none
        sock.maxmsgsize = limit + _OVERHEAD


class RingSecurity:
    """The keys of one rank's ring. Its own pair is new for each ring, so no key outlives the run."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]):
        self._gate = Gate(context, KeyPair.new())
        self._right = b""

    @property
    def public_key(self) -> bytes:
        """This rank's public key (32 bytes), which the other ranks need."""
        return self._gate.pair.public

    def meet(self, keys: Sequence[bytes], rank: int) -> None:
        """Admits the ranks whose public keys are ``keys``, ordered by rank; this one is ``rank``."""
        self._right = keys[(rank + 1) % len(keys)]
        self._gate.admit(keys)

    def apply(self, sock: zmq.Socket[bytes]) -> None:
        """Encrypts a ROUTER, or a DEALER to the right neighbour, before it is bound or connected."""
        if sock.type == zmq.ROUTER:
            self._gate.guard(sock)
        else:
            encrypt_to(sock, self._gate.pair, self._right)

    def close(self) -> None:
        """Ends the gate's thread. Safe to call twice."""
        self._gate.close()
