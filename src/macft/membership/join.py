"""How a node gets its elastic ring: with the ranks of a ring that has just formed, or by joining a running one."""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgpack
import zmq

from macft.collective.base import Collective
from macft.collective.matching import Texts, read_texts
from macft.collective.ring.listener import Listener
from macft.collective.settings import CollectiveConfig
from macft.collective.solo import Solo
from macft.errors import CollectiveError, RendezvousError
from macft.membership import heartbeat_codec
from macft.membership.elastic_ring import ElasticRing
from macft.membership.service import MembershipService, join_request
from macft.rendezvous.keystore import Keyring
from macft.rendezvous.sockets import RendezvousClient
from macft.topology.settings import split_host

MEMBERSHIP_PORT = 2
"""Offset from ``topology.port`` of the membership service's port; that of the ring is 1."""
_MAX_REASON = 1000
_ANSWER_SECONDS = 5.0
_log = logging.getLogger("macft.membership")


@dataclass(frozen=True)
class MemberConfig:
    """What a node needs to be a member of an elastic run.

    Attributes:
        bind: Where its membership service listens: ``host:port``, several paths with ``+``.
        ring_bind: Where its rings listen.
        name: Its name in messages.
        settings: The configuration group ``collective``.
        keyring: Its keys; None without encryption.
        must_match: Settings and versions that must be the same on all nodes, by name.
        started: When the run started; a newcomer gets it from the run.
    """

    bind: str
    ring_bind: str
    name: str
    settings: CollectiveConfig
    keyring: Keyring | None
    must_match: Texts
    started: str = ""

    def membership(self) -> MembershipService:
        """This node's membership service, not started.

        Raises:
            CollectiveError: ``bind`` cannot be listened on.
        """
        return MembershipService(
            self.bind,
            name=self.name,
            settings=self.settings,
            keyring=self.keyring,
            must_match=self.must_match,
            started=self.started,
        )

    def open_listener(self) -> Listener:
        """Opens the ports of the next ring.

        Raises:
            CollectiveError: ``ring_bind`` cannot be listened on within ``settings.timeout`` seconds.
        """
        deadline = time.monotonic() + self.settings.timeout
        while True:
            try:
                return Listener(self.ring_bind, self.settings, encrypted=self.keyring is not None)
            except CollectiveError:  # the port of the previous ring may not be free yet
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)


def form_elastic_ring(ring: Collective, config: MemberConfig) -> ElasticRing:
    """The elastic ring of the ranks of ``ring``, which it then owns. A collective call: all ranks make it.

    Raises:
        CollectiveError: a port cannot be listened on, or a rank is lost.
    """
    membership = config.membership()
    try:
        return ElasticRing.from_ring(ring, membership, config.open_listener)
    except BaseException:
        membership.close()
        raise


def join_elastic_ring(addresses: Sequence[str], config: MemberConfig, *, timeout: float) -> ElasticRing:
    """The elastic ring of a running run. This node becomes a member in its first ``regroup``.

    Args:
        addresses: Membership services of members (``host:port``), tried in order.
        config: This node.
        timeout: Seconds to wait for an answer.

    Raises:
        RendezvousError: no member answers within ``timeout`` seconds, the reply is invalid, or this node is refused;
            says why.
        CollectiveError: this node cannot listen on ``config.bind``.
    """
    message = join_request(config.must_match)
    deadline = time.monotonic() + timeout
    answer: bytes | None = None
    while answer is None and time.monotonic() < deadline:
        for address in addresses:
            with zmq.Context() as context, RendezvousClient(context, address, config.keyring, message) as client:
                answer = client.receive(min(deadline, time.monotonic() + _ANSWER_SECONDS))
            if answer is not None:
                break
    where = " or ".join(addresses)
    if answer is None:
        raise RendezvousError(f"topology.join: no answer from {where} within {timeout:g} s; is a run active there?")
    try:
        reply = msgpack.unpackb(answer)
        if "refused" in reply:
            raise RendezvousError(f"topology.join: {where} refuses this node: {_refusal(reply['refused'])}")
        view, secret = heartbeat_codec.decode_view(reply["view"]), bytes(reply["secret"])
        started, contents = heartbeat_codec.decode_text(reply["started"]), read_texts(reply["contents"])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError, msgpack.UnpackException):
        raise RendezvousError(f"topology.join: invalid reply from {where}: not a macft membership service") from None
    _log.info("joining the run at %s, view %d: %s", where, view.generation, ", ".join(view.names))
    membership = replace(config, started=started).membership()
    membership.contents = contents or {}
    return ElasticRing(membership, Solo(), view, secret=secret, open_listener=config.open_listener)


def _refusal(reason: object) -> str:
    """The reason of a refusal for the terminal. Raises ValueError if it has control characters or is not a text."""
    if type(reason) is not str or not reason.isprintable():
        raise ValueError("not a printable text")
    return reason[:_MAX_REASON]


def member_addresses(target: str, default_port: int) -> list[str]:
    """The membership services to ask, for a value of ``topology.join``.

    Args:
        target: ``host`` or ``host:port`` as in ``topology.hosts``, or the folder of a local run.
        default_port: ``topology.port``.

    Raises:
        RendezvousError: it is neither, or the folder's list of members is damaged.
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
        raise RendezvousError(f"topology.join: {error}, nor the folder of an active run") from None
    return [f"{host}:{port + MEMBERSHIP_PORT}"]


def local_address_towards(address: str) -> str:
    """This machine's address on the route to ``address`` (``host:port``); no packet is sent.

    Raises:
        RendezvousError: the host is unknown, or there is no route to it.
    """
    host = address.rpartition(":")[0].strip("[]")
    try:
        family = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)[0][0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 1))
            local = str(probe.getsockname()[0])
    except OSError as error:
        raise RendezvousError(f"topology.join: there is no route to {host}: {error}") from None
    return f"[{local}]" if ":" in local else local
