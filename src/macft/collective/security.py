"""CURVE on a ring's sockets, and a ZAP handler that lets in the holders of known keys, and nobody else.

CURVE (ZeroMQ RFC 26, after CurveCP) encrypts and authenticates every frame with keys of the single connection, so a
frame that is changed, repeated, or from another connection ends the connection it came over. ZAP (RFC 27) is the
question that ZeroMQ asks for each connection: may the holder of this key come in?
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import zmq
from zmq.utils import z85

KEY_BYTES = 32
_OVERHEAD = 64
"""Bytes by which CURVE makes a frame longer (33), which ZeroMQ counts towards its limit; rounded up."""
_DOMAIN = b"macft"
_MAX_REFUSED = 8


class KeyPair(NamedTuple):
    """A Curve25519 key pair, each key as its 32 bytes."""

    public: bytes
    secret: bytes

    @classmethod
    def new(cls) -> KeyPair:
        """A pair nobody has had before."""
        public, secret = zmq.curve_keypair()
        return cls(z85.decode(public), z85.decode(secret))

    @classmethod
    def of_secret(cls, secret: bytes) -> KeyPair:
        """The pair that ``secret`` (32 bytes) belongs to."""
        return cls(z85.decode(zmq.curve_public(z85.encode(secret))), secret)


class Refused(NamedTuple):
    """A connection that was not let in, though its sender proved to hold the secret of ``key``."""

    address: str
    key: bytes


class Gate:
    """Answers ZAP requests in one ZeroMQ context, in a thread of its own.

    A connection waits for its answer until :meth:`admit` has been called for the first time. Without the gate's
    thread nobody comes in: guarded sockets insist on an answer.
    """

    def __init__(self, context: zmq.Context[Any], pair: KeyPair):
        self.pair = pair
        self.refused: deque[Refused] = deque(maxlen=_MAX_REFUSED)
        self._zap: zmq.Socket[Any] = context.socket(zmq.REP)
        self._orders: zmq.Socket[Any] = context.socket(zmq.PAIR)
        self._inbox: zmq.Socket[Any] = context.socket(zmq.PAIR)
        for sock in (self._zap, self._orders, self._inbox):
            sock.linger = 0
        self._zap.bind("inproc://zeromq.zap.01")
        self._inbox.bind("inproc://gate")
        self._orders.connect("inproc://gate")
        self._thread = threading.Thread(target=self._serve, name="gate", daemon=True)
        self._thread.start()

    def guard(self, sock: zmq.Socket[Any]) -> None:
        """Makes ``sock``, before it is bound, take encrypted connections of admitted keys only."""
        _allow_overhead(sock)
        sock.curve_server = 1
        sock.curve_secretkey = z85.encode(self.pair.secret)
        sock.zap_domain = _DOMAIN
        sock.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # no handler, no entry

    def admit(self, keys: Iterable[bytes]) -> None:
        """From now on the holders of ``keys`` (32 bytes each) may come in, and no others; those inside stay."""
        self._orders.send_multipart([b"admit", *keys])

    def close(self) -> None:
        """Ends the thread. Safe to call twice."""
        if not self._orders.closed:
            self._orders.send(b"close")
            self._thread.join()
            self._orders.close()

    def _serve(self) -> None:
        admitted: frozenset[bytes] | None = None
        poller = zmq.Poller()
        poller.register(self._inbox, zmq.POLLIN)
        with self._inbox, self._zap:
            while True:
                ready = dict(poller.poll())
                if self._inbox in ready:
                    order, *keys = self._inbox.recv_multipart()
                    if order == b"close":
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


def encrypt_to(sock: zmq.Socket[Any], pair: KeyPair, server: bytes) -> None:
    """Makes ``sock``, before it connects, talk encrypted, as ``pair``, to the holder of the key ``server`` only."""
    _allow_overhead(sock)
    sock.curve_publickey, sock.curve_secretkey = z85.encode(pair.public), z85.encode(pair.secret)
    sock.curve_serverkey = z85.encode(server)


def _allow_overhead(sock: zmq.Socket[Any]) -> None:
    if (limit := int(sock.maxmsgsize)) >= 0:  # -1: none
        sock.maxmsgsize = limit + _OVERHEAD


class RingSecurity:
    """The keys of one rank's ring. Its own pair is made for this ring, so nothing outlives the run."""

    def __init__(self, context: zmq.Context[Any]):
        self._gate = Gate(context, KeyPair.new())
        self._right = b""

    @property
    def public_key(self) -> bytes:
        """What the other ranks must know of this one; 32 bytes."""
        return self._gate.pair.public

    def meet(self, keys: Sequence[bytes], rank: int) -> None:
        """Opens the ring to the ranks whose public keys are ``keys``, by rank; this one is ``rank``."""
        self._right = keys[(rank + 1) % len(keys)]
        self._gate.admit(keys)

    def apply(self, sock: zmq.Socket[Any]) -> None:
        """Protects a ROUTER, or a DEALER to the right neighbour, before it is bound or connected."""
        if sock.type == zmq.ROUTER:
            self._gate.guard(sock)
        else:
            encrypt_to(sock, self._gate.pair, self._right)

    def close(self) -> None:
        """Ends the gate's thread. Safe to call twice."""
        self._gate.close()
