"""Meets the other ranks at the rendezvous and forms the collective that the configuration names."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgpack
import zmq

from macft.collective.base import Collective
from macft.collective.matching import Texts
from macft.collective.mlx.group import MlxListener
from macft.collective.ring.listener import Listener
from macft.collective.ring.ring import Ring
from macft.collective.settings import CollectiveConfig
from macft.errors import RendezvousError
from macft.rendezvous.keystore import Keyring
from macft.rendezvous.roster import MAX_NAME, Roster, agreed_values, unpack_message
from macft.rendezvous.sockets import RendezvousClient

_MAX_REASON = 1000
_REPLY_SECONDS = 1.0
"""How much longer than the server a rank waits: the server's reply names the missing ranks."""
_FIRST_WAIT_SECONDS = 3.0
_WAIT_SECONDS = 5.0
"""A rank that waits says so after the first, then each time after the second."""
_log = logging.getLogger("macft.rendezvous")


@dataclass(frozen=True)
class RankConfig:
    """What a rank needs to join a run.

    Attributes:
        server: ``host:port`` of the rendezvous.
        rank: This rank.
        world_size: The number of ranks.
        run_id: Of the run.
        must_match: Settings and versions that must be the same on all ranks, by name.
        name: This rank's name in messages.
        timeout: Seconds to wait until all ranks have met.
        keyring: The server must be one of its members, and trust this machine. None: no encryption.
        names: All ranks' names, if they are known, for ``on_waiting``.
        on_waiting: Called with a line about whom this rank waits for, every few seconds.
    """

    server: str
    rank: int
    world_size: int
    run_id: str
    must_match: Texts
    name: str
    timeout: float = 60.0
    keyring: Keyring | None = None
    names: Sequence[str] = ()
    on_waiting: Callable[[str], None] = lambda _: None


def connect(config: RankConfig, settings: CollectiveConfig, *, bind: str = "127.0.0.1:0") -> Collective:
    """Meets the other ranks and joins the collective of ``settings.backend``; see :func:`connect_ring`.

    MLX's own communication is not encrypted, so only the ring uses ``config.keyring``.
    """
    if settings.backend == "ring":
        return connect_ring(config, settings, bind=bind)
    listener = MlxListener(bind, settings)
    try:
        roster = join_rendezvous(config, listener.address)
    except BaseException:
        listener.close()
        raise
    return listener.join(config.rank, roster.addresses, names=roster.names, secret=roster.ring_id)


def connect_ring(config: RankConfig, settings: CollectiveConfig, *, bind: str = "127.0.0.1:0") -> Ring:
    """Meets the other ranks and forms the ring with them.

    Args:
        config: This rank.
        settings: The configuration group ``collective``.
        bind: Where this rank listens for its left neighbour (``host:port``, several paths with ``+``). The port is open
            before the others get its address.

    Raises:
        RendezvousError: see :func:`join_rendezvous`.
        CollectiveError: ``bind`` cannot be listened on, or a neighbour cannot be reached; names it.
    """
    listener = Listener(bind, settings, encrypted=config.keyring is not None)
    try:
        ring_key = b"" if listener.security is None else listener.security.public_key
        roster = join_rendezvous(config, listener.address, ring_key)
        if listener.security is not None:
            listener.security.meet(roster.keys, config.rank)
    except BaseException:
        listener.close()
        raise
    ring = Ring(config.rank, config.world_size, roster.addresses, listener, names=roster.names, ring_id=roster.ring_id)
    ring.tune()
    return ring


def join_rendezvous(config: RankConfig, ring_address: str, ring_key: bytes = b"") -> Roster:
    """Reports to the server and waits until all ranks have met.

    Args:
        config: This rank.
        ring_address: Where its ring listens.
        ring_key: The public key of its ring (32 bytes); only with ``config.keyring``.

    Raises:
        RendezvousError: the server does not answer, a rank is missing, or one is refused; says which and why.
    """
    server, keyring = config.server, config.keyring
    message = {
        **agreed_values(config.run_id, config.world_size),
        "rank": config.rank,
        "name": config.name[:MAX_NAME],
        "address": ring_address,
        "must_match": dict(config.must_match),
    }
    if keyring is not None:
        message["key"] = ring_key
    problem = no_answer = "no answer"
    whom = f"the rendezvous at {server}"
    deadline = time.monotonic() + config.timeout + _REPLY_SECONDS
    tells_at = time.monotonic() + _FIRST_WAIT_SECONDS
    with zmq.Context() as context, RendezvousClient(context, server, keyring, msgpack.packb(message)) as client:
        while True:
            data = client.receive(min(deadline, tells_at))
            if data is None:
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                config.on_waiting(f"waiting for {whom}; {left:.0f} s left")
                tells_at = time.monotonic() + _WAIT_SECONDS
                continue
            answer = unpack_message(data) or {}
            if "refused" in answer:
                raise RendezvousError(f"rendezvous at {server}: {str(answer['refused'])[:_MAX_REASON]}")
            if "addresses" in answer:
                roster = Roster.from_message(answer, config.world_size, is_encrypted=keyring is not None)
                if roster is None:
                    raise RendezvousError(
                        f"rendezvous at {server}: its list of ranks is malformed; is that this macft?"
                    )
                _log.info("met the other ranks at %s: %s", server, ", ".join(roster.addresses))
                return roster
            problem = str(answer.get("waiting", ""))[:_MAX_REASON] or problem
            whom = _missing(answer.get("missing"), config) or whom
    reason = f"{problem} within {config.timeout:g} s; is macft running there, and is the port open?"
    raise RendezvousError(f"rendezvous at {server}: {reason if problem == no_answer else problem}")


def _missing(ranks: object, config: RankConfig) -> str:
    """The ranks that have not arrived, with their names; empty if ``ranks``, from the wire, is not a list of some."""
    if not isinstance(ranks, list) or len(ranks) > config.world_size:
        return ""
    known = [rank for rank in ranks if type(rank) is int and 0 <= rank < config.world_size]
    return ", ".join(f"rank {rank}" + (f" ({config.names[rank]})" if config.names else "") for rank in known)
