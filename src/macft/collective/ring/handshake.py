"""Forming a ring: the messages with which two neighbours accept each other.

On each path the left rank connects and the right one decides::

    rank r, DEALER                                         rank r + 1, ROUTER
      |  HELLO(ring id, generation, rank) ------------------>  |
      |  <---------------------------- STREAM(port, secret)    |   with collective.streams
      |  <------------------------------------- CREDIT(32)     |   accepted
      |  <------------------- GOODBYE(PROTOCOL, the reason)    |   or refused: another ring or rank

A connection that sends anything else is ignored.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import zmq

from macft.collective.ring.path import RecvPath, SendPath
from macft.collective.ring.stream import SECRET_BYTES
from macft.collective.wire import MAX_TEXT, Cause, Header, Kind, pack, probe, set_endpoint, unpack
from macft.errors import ProtocolError

PROBE_SECONDS = 0.5
_log = logging.getLogger("macft.ring")


@dataclass(frozen=True)
class RingIdentity:
    """Which ring this is, and this rank's position in it.

    Attributes:
        rank: This rank.
        addresses: ``host:port`` of all ranks, by rank.
        names: Host names, by rank; may be shorter than ``addresses``.
        ring_id: Known to the ranks of this run only.
        generation: Counts the rings of a run.
    """

    rank: int
    addresses: Sequence[str]
    names: Sequence[str]
    ring_id: str
    generation: int

    @cached_property
    def left(self) -> int:
        """The rank that this one receives from."""
        return (self.rank - 1) % len(self.addresses)

    @cached_property
    def right(self) -> int:
        """The rank that this one sends to."""
        return (self.rank + 1) % len(self.addresses)

    def name(self, rank: int) -> str:
        """A rank in messages: ``rank 2 (studio, 192.168.0.2:7071)``."""
        return self._full_names[rank]

    @cached_property
    def _full_names(self) -> list[str]:
        words = [(*self.names[rank : rank + 1], address) for rank, address in enumerate(self.addresses)]
        return [
            f"rank {rank} ({', '.join(dict.fromkeys(word for word in known if word))})"
            for rank, known in enumerate(words)
        ]

    def header(self, kind: Kind) -> Header:
        """The header of a frame that this rank sends."""
        return Header(kind, self.generation, self.rank)


class Handshake:
    """One rank's side of the handshake, on the paths to its right neighbour and from its left one."""

    def __init__(self, ring: RingIdentity, send_paths: Sequence[SendPath], recv_paths: Sequence[RecvPath]):
        self._ring, self._send_paths, self._recv_paths = ring, send_paths, recv_paths

    def is_complete(self, enough: Callable[[Iterable[bool]], bool]) -> bool:
        """Whether both neighbours have accepted each other, on ``enough`` (``any`` or ``all``) of their paths."""
        from_left = enough(bool(path.peer) for path in self._recv_paths)
        return from_left and enough(path.accepted for path in self._send_paths)

    def connect(self) -> str:
        """Says HELLO on the paths whose port answers; returns what :func:`probe` says of the last one tried."""
        state = "alive"
        for path in self._send_paths:
            # Plain TCP shows why a port does not answer; ZeroMQ would retry silently.
            if not path.connected and (state := probe(path.endpoint, PROBE_SECONDS)) == "alive":
                path.sock.connect(set_endpoint(path.sock, path.endpoint))
                path.sock.send(pack(self._ring.header(Kind.HELLO)._replace(text=self._ring.ring_id)))
                path.connected = True
        return state

    def answer(self, path: RecvPath, peer: bytes, frame: zmq.Frame) -> None:
        """Answers the first frame of a new connection: accepts the left neighbour, refuses ranks of other rings.

        Args:
            path: Where the frame arrived.
            peer: ZeroMQ's routing id of the sender.
            frame: The frame.
        """
        try:
            header = unpack(frame.buffer, "a stranger")
        except ProtocolError:
            return
        if header.kind != Kind.HELLO:
            return
        ring = self._ring
        is_left = (header.text, header.generation, header.sender) == (ring.ring_id, ring.generation, ring.left)
        if is_left and not path.peer:
            path.accept_peer(peer, int(frame.get(zmq.SRCFD)), ring.generation, ring.rank)
            return
        text = f"{ring.name(ring.rank)} expects rank {ring.left} of its own run, not another rank {header.sender}"
        _log.warning("refused rank %d, generation %d, at %s", header.sender, header.generation, path.address)
        refusal = ring.header(Kind.GOODBYE)._replace(cause=Cause.PROTOCOL, culprit=header.sender, text=text[:MAX_TEXT])
        path.sock.send_multipart([peer, pack(refusal)], zmq.NOBLOCK)

    def timed_out(self, state: str, timeout: float) -> tuple[int, str]:
        """Why the handshake is not complete after ``timeout`` seconds: the rank to blame and the reason."""
        ring, within = self._ring, f"within {timeout:g} s"
        if not any(path.connected for path in self._send_paths):
            reason = "nothing listens there" if state == "ended" else f"it is {state}"
            return ring.right, (
                f"rank {ring.rank} can't reach {ring.name(ring.right)} {within}: {reason}; "
                "is its address right on this network, and does its firewall let macft in?"
            )
        peer = ring.left if not any(path.peer for path in self._recv_paths) else ring.right
        return peer, f"{ring.name(peer)} did not join the ring {within}; does it still run?"


def stream_secret(offer: Header) -> bytes | None:
    """The secret of a STREAM frame; None if it is not valid."""
    try:
        secret = bytes.fromhex(offer.text)
    except ValueError:
        return None
    return secret if len(secret) == SECRET_BYTES else None
