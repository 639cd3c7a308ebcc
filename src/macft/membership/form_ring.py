"""How a team begins: out of the ranks that have met, or by asking one of its members to be let in."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgpack
import zmq

from macft.collective.base import Collective
from macft.collective.listener import Listener
from macft.collective.settings import CollectiveConfig
from macft.collective.solo import Solo
from macft.errors import CollectiveError, RendezvousError
from macft.membership import heartbeats
from macft.membership.elastic_ring import ElasticRing
from macft.membership.service import MembershipService, hello
from macft.rendezvous.handshake import RendezvousClient
from macft.rendezvous.keystore import Keyring
from macft.topology.settings import split_host

MEMBERSHIP_PORT = 2
"""How far from ``topology.port`` a node's membership service listens; the ring is at 1."""
_MAX_REASON = 1000
_ANSWER_SECONDS = 5.0


@dataclass(frozen=True)
class MemberConfig:
    """What a node brings into a team.

    ``bind`` is where its membership service listens, ``ring_bind`` where its rings do; ``name`` is for people;
    ``fingerprint`` of what all nodes must have alike.
    """

    bind: str
    ring_bind: str
    name: str
    settings: CollectiveConfig
    keyring: Keyring | None
    fingerprint: str

    def membership(self) -> MembershipService:
        """This node's membership service, not begun yet."""
        return MembershipService(
            self.bind, name=self.name, settings=self.settings, keyring=self.keyring, fingerprint=self.fingerprint
        )

    def open_listener(self) -> Listener:
        """The ports of the next ring."""
        deadline = time.monotonic() + self.settings.timeout
        while True:
            try:
                return Listener(self.ring_bind, self.settings, encrypted=self.keyring is not None)
            except CollectiveError:  # the port of the ring before may take a moment to be free
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)


def form_elastic_ring(ring: Collective, place: MemberConfig) -> ElasticRing:
    """The team of the ranks of ``ring``, which it then owns. A call of all ranks.

    Raises:
        CollectiveError: a port can't be listened on, or a rank is lost.
    """
    membership = place.membership()
    try:
        return ElasticRing.of_ring(ring, membership, place.open_listener)
    except BaseException:
        membership.close()
        raise


def join_elastic_ring(doors: Sequence[str], place: MemberConfig, *, timeout: float) -> ElasticRing:
    """A team that this node is going to be in: its first ``regroup`` waits until it is let in.

    ``doors`` are where members' services listen (``host:port``); the first that answers will do.

    Raises:
        RendezvousError: nobody answers within ``timeout`` seconds, or this node is not let in; says why.
    """
    message = hello(place.fingerprint)
    deadline = time.monotonic() + timeout
    answer: bytes | None = None
    while answer is None and time.monotonic() < deadline:
        for door in doors:
            with zmq.Context() as context, RendezvousClient(context, door, place.keyring, message) as visit:
                answer = visit.receive(min(deadline, time.monotonic() + _ANSWER_SECONDS))
            if answer is not None:
                break
    where = " or ".join(doors)
    if answer is None:
        raise RendezvousError(f"topology.join: nobody answers at {where} within {timeout:g} s; does a run go on there?")
    try:
        told = msgpack.unpackb(answer)
        if "refused" in told:
            raise RendezvousError(f"topology.join: {where} does not let this node in: {told['refused'][:_MAX_REASON]}")
        view, secret = heartbeats.to_view(told["view"]), bytes(told["secret"])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError, msgpack.UnpackException):
        raise RendezvousError(f"topology.join: what answers at {where} is no run of macft") from None
    return ElasticRing(place.membership(), Solo(), view, secret=secret, open_listener=place.open_listener)


def member_addresses(target: str, default_port: int) -> list[str]:
    """Where ``topology.join`` knocks: ``host`` or ``host:port`` as in ``topology.hosts``, or the folder of a local run.

    Raises:
        RendezvousError: it is neither.
    """
    members = Path(target).expanduser() / "members.json"
    if members.is_file():
        try:
            return [str(member["address"]).split("+")[0] for member in json.loads(members.read_text())["members"]]
        except (ValueError, TypeError, KeyError):
            raise RendezvousError(f"topology.join: {members} can't be read") from None
    try:
        host, port = split_host(target, default_port)
    except ValueError as error:
        raise RendezvousError(f"topology.join: {error}, nor the folder of a run that goes on") from None
    return [f"{host}:{port + MEMBERSHIP_PORT}"]


def local_address_towards(door: str) -> str:
    """This machine's address on the way to ``host:port``; no packet is sent."""
    host = door.rpartition(":")[0].strip("[]")
    try:
        family = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)[0][0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 1))
            found = str(probe.getsockname()[0])
    except OSError as error:
        raise RendezvousError(f"topology.join: there is no way to {host}: {error}") from None
    return f"[{found}]" if ":" in found else found
