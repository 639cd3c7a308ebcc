"""Where the ranks of a run meet: each sends its address and gets those of all.

Rank 0's machine, or the launcher of a local run, runs the server. A rank with another version, run, configuration or
world size is refused at once with the reason, and so are all others, before any model is loaded. With a keyring only
machines whose keys are trusted can connect. Each rank then also sends the public key of its ring, so that the ring
admits exactly the ranks that have met here.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgpack
import zmq

from macft.collective.matching import Texts, difference, read_texts
from macft.errors import RendezvousError
from macft.rendezvous.keystore import Keyring
from macft.rendezvous.roster import Message, Roster, agreed_values, is_address, is_key, is_text, unpack_message
from macft.rendezvous.sockets import RendezvousSocket

_MAX_REFUSALS = 3
_POLL_SECONDS = 0.05
_log = logging.getLogger("macft.rendezvous")

# What the ranks must agree on, and the reason for refusing a rank that differs.
_DIFFERENCES = {
    "protocol": "speaks protocol version {theirs}, the others {ours}; install the same macft on all nodes",
    "version": "runs macft {theirs}, the others {ours}; install the same macft on all nodes",
    "run_id": "belongs to run {theirs}, the others to {ours}; start the same command on all nodes",
    "world_size": "expects {theirs} nodes, the others {ours}; give the same topology on all nodes",
}


class _Arrival(NamedTuple):
    """A rank that has arrived, with ZeroMQ's routing id of its connection."""

    routing_id: bytes
    name: str
    address: str
    key: bytes


class RendezvousServer:
    """Listens in a thread of its own, in any process, until all ranks have arrived.

    Args:
        bind: ``host:port``; port 0 takes a free one.
        world_size: The number of ranks.
        run_id: Of the run; ranks of another one are refused.
        must_match: Settings and versions that must be the same on all ranks, by name. None: those of the first rank to
            arrive.
        timeout: Seconds from :meth:`start` within which all ranks must arrive.
        names: Names of the expected ranks, if known, for the message about missing ranks.
        keyring: Only its members can connect. None: no encryption.
        on_refusal: Called, in the server's thread, with a line for each connection that is refused.

    Raises:
        RendezvousError: the address cannot be listened on.
    """

    def __init__(
        self,
        bind: str = "127.0.0.1:0",
        *,
        world_size: int,
        run_id: str,
        must_match: Texts | None = None,
        timeout: float = 60.0,
        names: Sequence[str] = (),
        keyring: Keyring | None = None,
        on_refusal: Callable[[str], None] = lambda _: None,
    ):
        self._world_size, self._timeout, self._names = world_size, timeout, names
        self._is_encrypted, self._on_refusal = keyring is not None, on_refusal
        self._agreed, self._must_match = agreed_values(run_id, world_size), must_match
        self._arrivals: dict[int, _Arrival] = {}
        self._roster: Roster | None = None
        self._error: RendezvousError | None = None
        self._reason = self._given_up = ""
        self._stop, self._ended = threading.Event(), threading.Event()
        self._refusals: list[str] = []
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            self._listener = RendezvousSocket(self._context, bind, keyring)
        except BaseException:
            self._context.term()
            raise
        self._socket = self._listener.socket
        self._thread = threading.Thread(target=self._serve, name="rendezvous", daemon=True)

    @property
    def address(self) -> str:
        """``host:port`` with the actual port."""
        return self._listener.address

    @property
    def arrived(self) -> tuple[int, ...]:
        """The ranks that have arrived so far."""
        return tuple(self._arrivals)

    @property
    def has_met(self) -> bool:
        """Whether all ranks have arrived and been told of each other."""
        return self._roster is not None and self._ended.is_set()

    def start(self) -> None:
        """Starts answering."""
        _log.info("rendezvous at %s waits for %d ranks", self.address, self._world_size)
        self._thread.start()

    def wait(self) -> Roster:
        """Waits until all ranks have met. Raises RendezvousError with the reason if they did not."""
        self._ended.wait()
        if self._roster is None:
            raise self._error or RendezvousError(f"rendezvous at {self.address}: closed before all ranks arrived")
        return self._roster

    def give_up(self, reason: str) -> None:
        """Refuses all ranks, soon: one of them can't come. Without effect once they have met."""
        self._given_up = reason

    def close(self) -> None:
        """Ends the thread and frees the port, within about a second. Safe to call twice."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self._ended.set()
        self._listener.close()
        self._context.term()

    def _serve(self) -> None:
        deadline = time.monotonic() + self._timeout
        while not self._stop.is_set():
            if self._socket.poll(int(_POLL_SECONDS * 1000)):
                self._receive(self._socket.recv_multipart())
            elif self._given_up and not self._ended.is_set():
                self._refuse_all(self._given_up)
            elif time.monotonic() > deadline and not self._ended.is_set():
                self._refuse_all(self._missing_ranks())
            for line in self._listener.refusals():
                self._refusals = [*self._refusals[-_MAX_REFUSALS:], line]
                _log.warning("refused a connection: %s", line)
                self._on_refusal(line)
        self._listener.close()  # its last answers are sent while `close` waits
        self._ended.set()

    def _receive(self, parts: list[bytes]) -> None:
        message = unpack_message(parts[1]) if len(parts) == 2 else None
        if message is None or "protocol" not in message or "rank" not in message:
            return  # not a rank
        routing_id = parts[0]
        if self._ended.is_set():  # a late rank gets the result, rather than no answer
            reason = self._reason or "all ranks have met already; one that comes back adds topology.join=HOST"
            self._send(routing_id, {"refused": reason})
            return
        if objection := self._objection(message):
            self._refuse_all("".join(filter(str.isprintable, objection)), routing_id)
            return
        self._add(routing_id, message)
        # A rank whose connection has ended must not count: it may return with another address.
        self._arrivals = {
            rank: arrival for rank, arrival in self._arrivals.items() if self._send(arrival.routing_id, {"waiting": ""})
        }
        if len(self._arrivals) == self._world_size:
            arrivals = [self._arrivals[rank] for rank in range(self._world_size)]
            keys = tuple(arrival.key for arrival in arrivals) if self._is_encrypted else ()
            self._roster = Roster(
                tuple(arrival.address for arrival in arrivals),
                tuple(arrival.name for arrival in arrivals),
                secrets.token_hex(16),
                keys,
            )
            self._send_all(self._roster.to_message())
            _log.info("all %d ranks have met: %s", self._world_size, ", ".join(self._roster.addresses))
            self._ended.set()
        else:
            missing = [rank for rank in range(self._world_size) if rank not in self._arrivals]
            self._send_all({"waiting": self._missing_ranks(), "missing": missing})

    def _add(self, routing_id: bytes, message: Message) -> None:
        rank, name, address, key = message["rank"], message["name"], message["address"], message.get("key")
        assert isinstance(rank, int)  # all four have passed _objection
        self._arrivals[rank] = _Arrival(routing_id, str(name), str(address), key if is_key(key) else b"")
        _log.info("rank %d (%s, %s) arrived, %d of %d", rank, name, address, len(self._arrivals), self._world_size)

    def _objection(self, message: Message) -> str:
        """Why a rank is refused; empty if it is not."""
        rank, name, address = message["rank"], message.get("name"), message.get("address")
        who = f"rank {str(rank)[:20]} ({str(name)[:80]})"
        for key, text in _DIFFERENCES.items():
            if type(message.get(key)) is not type(self._agreed[key]) or message[key] != self._agreed[key]:
                return f"{who} {text.format(theirs=str(message.get(key))[:80], ours=self._agreed[key])}"
        texts = read_texts(message.get("must_match"))
        if texts is None:
            return f"{who} sent no valid settings"
        self._must_match = texts if self._must_match is None else self._must_match
        if different := difference(texts, self._must_match):
            return f"{who} has other settings or versions than the others: {different}; make them the same on all nodes"
        if type(rank) is not int or not 0 <= rank < self._world_size:
            return f"{who} is not one of ranks 0 to {self._world_size - 1}"
        if not (is_text(name) and is_address(address)):
            return f"{who} sent no valid name and address"
        if self._is_encrypted and not is_key(message.get("key")):
            return f"{who} sent no valid key of its ring"
        if rank in self._arrivals and self._send(self._arrivals[rank].routing_id, {"waiting": ""}):
            other = self._arrivals[rank].address
            return f"{who} arrived twice, from {other} and {address}; give each node a rank of its own"
        return ""

    def _missing_ranks(self) -> str:
        missing = [rank for rank in range(self._world_size) if rank not in self._arrivals]
        known = [f"{rank} ({self._names[rank]})" if rank < len(self._names) else str(rank) for rank in missing]
        ranks = "rank" if len(missing) == 1 else "ranks"
        trusted = ", and is this machine's key trusted there" if self._is_encrypted else ""
        hint = f"is macft running there, {'' if trusted else 'and '}is the port open{trusted}?"
        return (
            f"{ranks} {', '.join(known)} did not arrive within {self._timeout:g} s; {'; '.join(self._refusals) or hint}"
        )

    def _refuse_all(self, reason: str, routing_id: bytes | None = None) -> None:
        """Ends the rendezvous; the ranks that have arrived, and the sender at ``routing_id``, get the reason."""
        _log.warning("rendezvous failed: %s", reason)
        self._reason, self._error = reason, RendezvousError(f"rendezvous at {self.address}: {reason}")
        if routing_id is not None:
            self._send(routing_id, {"refused": reason})
        self._send_all({"refused": reason})
        self._ended.set()

    def _send_all(self, message: Message) -> None:
        for arrival in self._arrivals.values():
            self._send(arrival.routing_id, message)

    def _send(self, routing_id: bytes, message: Message) -> bool:
        """Sends a message; False if the receiver is gone."""
        try:
            self._socket.send_multipart([routing_id, msgpack.packb(message)], zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        return True
