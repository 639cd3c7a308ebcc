"""Where the ranks of a run meet: each tells its address, and all get everybody's.

Rank 0's machine, or the launcher of a local run, listens. A rank whose version, run, configuration or place
does not fit is refused at once with the reason, and so are the others: before any model is loaded, nobody
waits in vain. With a keyring only machines whose keys are trusted are heard at all, and each rank also tells the
public key of its ring, so that the ring lets in exactly the ranks that have met here.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
import zmq

import macft
from macft.collective.listener import Listener
from macft.collective.ring import Ring
from macft.collective.security import KEY_BYTES
from macft.collective.settings import CollectiveConfig
from macft.collective.wire import PROTOCOL_VERSION, split_paths
from macft.errors import RendezvousError
from macft.rendezvous.handshake import RendezvousClient, RendezvousSocket
from macft.rendezvous.keystore import Keyring

_MAX_NAME = 255
_MAX_REASON = 1000
_MAX_REFUSALS = 3
_LOOK_SECONDS = 0.05
_NEWS_SECONDS = 1.0
"""How much longer than the server a rank waits, for the server's answer names who is missing."""

# What the ranks must agree on, and what to say of one that differs.
_AGREED = {
    "protocol": "speaks protocol version {theirs}, the others {ours}; install the same macft on all nodes",
    "version": "runs macft {theirs}, the others {ours}; install the same macft on all nodes",
    "run_id": "belongs to run {theirs}, the others to {ours}; start the same command on all nodes",
    "world_size": "expects {theirs} nodes, the others {ours}; give the same topology on all nodes",
    "fingerprint": "has another configuration than the others; give the same command on all nodes",
}


@dataclass(frozen=True)
class Roster:
    """Ring addresses (``host:port``) and names by rank, and an id that only these ranks know.

    ``keys`` are the public keys of the ranks' rings, by rank; empty where the run is not encrypted.
    """

    addresses: tuple[str, ...]
    names: tuple[str, ...]
    ring_id: str
    keys: tuple[bytes, ...] = ()


class RendezvousServer:
    """Listens in a thread of its own, in any process, until all ranks are there.

    Args:
        bind: ``host:port``; port 0 takes a free one.
        world_size: Number of ranks to come.
        run_id: Of the run; ranks of another one are refused.
        fingerprint: SHA-256 of the resolved configuration. None: that of the first rank to come.
        timeout: Seconds from :meth:`start` within which all ranks must come.
        names: Of the expected ranks where they are known, to say who is missing.
        keyring: Of this machine: only its members are heard. None: no encryption.
        on_refusal: Called, in the server's thread, with a line for each one that is not let in.

    Raises:
        RendezvousError: the address can't be listened on.
    """

    def __init__(
        self,
        bind: str = "127.0.0.1:0",
        *,
        world_size: int,
        run_id: str,
        fingerprint: str | None = None,
        timeout: float = 60.0,
        names: Sequence[str] = (),
        keyring: Keyring | None = None,
        on_refusal: Callable[[str], None] = lambda _: None,
    ):
        self._world_size, self._timeout, self._names = world_size, timeout, names
        self._is_encrypted, self._on_refusal = keyring is not None, on_refusal
        self._agreed = {**_own(run_id, world_size), "fingerprint": fingerprint}
        self._members: dict[int, tuple[bytes, dict[str, Any]]] = {}
        self._membership: Roster | None = None
        self._error: RendezvousError | None = None
        self._reason = ""
        self._stop, self._ended = threading.Event(), threading.Event()
        self._refusals: list[str] = []
        self._context: zmq.Context[Any] = zmq.Context()
        try:
            self._door = RendezvousSocket(self._context, bind, keyring)
        except BaseException:
            self._context.term()
            raise
        self._socket = self._door.socket
        self._thread = threading.Thread(target=self._serve, name="rendezvous", daemon=True)

    @property
    def address(self) -> str:
        """``host:port`` with the true port."""
        return self._door.address

    @property
    def arrived(self) -> tuple[int, ...]:
        """The ranks that have come so far."""
        return tuple(self._members)

    def start(self) -> None:
        """Begins to answer."""
        self._thread.start()

    def wait(self) -> Roster:
        """Waits until the ranks have met. Raises RendezvousError with the reason if they did not."""
        self._ended.wait()
        if self._membership is None:
            raise self._error or RendezvousError(f"rendezvous at {self._door.address}: closed before all ranks came")
        return self._membership

    def close(self) -> None:
        """Ends the thread and frees the port, within about a second. Safe to call twice."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self._ended.set()
        self._door.close()
        self._context.term()

    def _serve(self) -> None:
        deadline = time.monotonic() + self._timeout
        while not self._stop.is_set():
            if self._socket.poll(int(_LOOK_SECONDS * 1000)):
                self._take(self._socket.recv_multipart())
            elif time.monotonic() > deadline and not self._ended.is_set():
                self._refuse(self._who_is_missing())
            for line in self._door.refusals():
                self._refusals = [*self._refusals[-_MAX_REFUSALS:], line]
                self._on_refusal(line)
        self._door.close()  # its last answers leave while `close` waits
        self._ended.set()

    def _take(self, parts: list[bytes]) -> None:
        hello = _unpack(parts[1]) if len(parts) == 2 else None
        if hello is None or "fingerprint" not in hello or "rank" not in hello:
            return  # a stranger
        if self._ended.is_set():  # one that comes late hears how it ended, rather than nothing
            self._send(
                parts[0],
                {"refused": self._reason or "all ranks have met already; one that comes back adds topology.join=HOST"},
            )
            return
        if self._agreed["fingerprint"] is None:
            self._agreed["fingerprint"] = hello["fingerprint"]
        if objection := self._objection(hello):
            self._refuse(objection, parts[0])
            return
        self._members[hello["rank"]] = (parts[0], hello)
        # A rank that came and went again must not count: it may be on its way back, at another address.
        self._members = {rank: at for rank, at in self._members.items() if self._send(at[0], {"waiting": ""})}
        if len(self._members) == self._world_size:
            ordered = [self._members[rank][1] for rank in range(self._world_size)]
            addresses, names = tuple(m["address"] for m in ordered), tuple(m["name"] for m in ordered)
            keys = tuple(m["key"] for m in ordered) if self._is_encrypted else ()
            self._membership = Roster(addresses, names, secrets.token_hex(16), keys)
            ring_id = self._membership.ring_id
            self._tell({"addresses": addresses, "names": names, "ring_id": ring_id, "keys": keys})
            self._ended.set()
        else:
            self._tell({"waiting": self._who_is_missing()})

    def _objection(self, hello: dict[str, Any]) -> str:
        rank, name, address = hello["rank"], hello.get("name"), hello.get("address")
        who = f"rank {str(rank)[:20]} ({str(name)[:80]})"
        for key, text in _AGREED.items():
            if type(hello.get(key)) is not type(self._agreed[key]) or hello[key] != self._agreed[key]:
                return f"{who} {text.format(theirs=str(hello.get(key))[:80], ours=self._agreed[key])}"
        if type(rank) is not int or not 0 <= rank < self._world_size:
            return f"{who} is not one of ranks 0 to {self._world_size - 1}"
        if not (_is_text(name) and _is_text(address) and _is_address(address)):
            return f"{who} gave no proper name and address"
        if self._is_encrypted and not _is_key(hello.get("key")):
            return f"{who} gave no proper key of its ring"
        if rank in self._members and self._send(self._members[rank][0], {"waiting": ""}):
            other = self._members[rank][1]
            return f"{who} came twice, from {other['address']} and {address}; give each node a rank of its own"
        return ""

    def _who_is_missing(self) -> str:
        missing = [rank for rank in range(self._world_size) if rank not in self._members]
        known = [f"{rank} ({self._names[rank]})" if rank < len(self._names) else str(rank) for rank in missing]
        ranks = "rank" if len(missing) == 1 else "ranks"
        trusted = ", and is this machine's key trusted there" if self._is_encrypted else ""
        why = (
            "; ".join(self._refusals)
            or f"is macft running there, {'' if trusted else 'and '}is the port open{trusted}?"
        )
        return f"{ranks} {', '.join(known)} did not come within {self._timeout:g} s; {why}"

    def _refuse(self, reason: str, sender: bytes | None = None) -> None:
        self._reason, self._error = reason, RendezvousError(f"rendezvous at {self._door.address}: {reason}")
        if sender is not None:
            self._send(sender, {"refused": reason})
        self._tell({"refused": reason})
        self._ended.set()

    def _tell(self, message: dict[str, Any]) -> None:
        for sender, _ in self._members.values():
            self._send(sender, message)

    def _send(self, receiver: bytes, message: dict[str, Any]) -> bool:
        """Whether the receiver is still there."""
        try:
            self._socket.send_multipart([receiver, msgpack.packb(message)], zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        return True


def join(
    server: str,
    *,
    rank: int,
    world_size: int,
    run_id: str,
    fingerprint: str,
    ring_address: str,
    name: str,
    timeout: float = 60.0,
    keyring: Keyring | None = None,
    ring_key: bytes = b"",
) -> Roster:
    """Reports to the server at ``host:port`` and waits, up to ``timeout`` seconds, until all have met.

    With a ``keyring`` the server must be one of its members, and have this machine among its own; ``ring_key`` is
    the public key of this rank's ring.

    Raises:
        RendezvousError: nobody answers, a rank is missing, or one does not fit or is not trusted; says which and why.
    """
    own: dict[str, Any] = {"rank": rank, "name": name[:_MAX_NAME], "address": ring_address, "fingerprint": fingerprint}
    if keyring is not None:
        own["key"] = ring_key
    problem = "nobody answers"
    hello = msgpack.packb({**_own(run_id, world_size), **own})
    deadline = time.monotonic() + timeout + _NEWS_SECONDS
    with zmq.Context() as context, RendezvousClient(context, server, keyring, hello) as visit:
        while (data := visit.receive(deadline)) is not None:
            answer = _unpack(data) or {}
            if "refused" in answer:
                raise RendezvousError(f"rendezvous at {server}: {str(answer['refused'])[:_MAX_REASON]}")
            if "addresses" in answer:
                return _membership(answer, server, world_size, is_encrypted=keyring is not None)
            problem = str(answer.get("waiting", ""))[:_MAX_REASON] or problem
    reason = f"{problem} within {timeout:g} s; is macft running there, and is the port open?"
    raise RendezvousError(f"rendezvous at {server}: {reason if problem == 'nobody answers' else problem}")


def connect_ring(
    server: str,
    *,
    rank: int,
    world_size: int,
    run_id: str,
    fingerprint: str,
    name: str,
    settings: CollectiveConfig,
    start_timeout: float,
    bind: str = "127.0.0.1:0",
    keyring: Keyring | None = None,
) -> Ring:
    """Meets the other ranks at ``server`` and joins the ring with them.

    ``bind`` is where this rank listens for its left neighbour; the port is open before the others learn of
    it. With a ``keyring`` the rendezvous and the ring are encrypted.

    Raises:
        RendezvousError: see :func:`join`.
        CollectiveError: ``bind`` can't be listened on, or a neighbour can't be reached; names it.
    """
    listener = Listener(bind, settings, encrypted=keyring is not None)
    try:
        membership = join(
            server,
            rank=rank,
            world_size=world_size,
            run_id=run_id,
            fingerprint=fingerprint,
            ring_address=listener.address,
            name=name,
            timeout=start_timeout,
            keyring=keyring,
            ring_key=b"" if listener.security is None else listener.security.public_key,
        )
        if listener.security is not None:
            listener.security.meet(membership.keys, rank)
    except BaseException:
        listener.close()
        raise
    addresses, names = membership.addresses, membership.names
    ring = Ring(rank, world_size, addresses, listener, names=names, ring_id=membership.ring_id)
    ring.tune()
    return ring


def _own(run_id: str, world_size: int) -> dict[str, Any]:
    return {
        "protocol": PROTOCOL_VERSION,
        "version": macft.__version__,
        "run_id": run_id,
        "world_size": world_size,
    }


def _membership(answer: dict[str, Any], server: str, world_size: int, *, is_encrypted: bool) -> Roster:
    addresses, names, ring_id = answer["addresses"], answer.get("names"), answer.get("ring_id")
    keys = answer.get("keys")
    if (
        not (isinstance(addresses, list) and isinstance(names, list) and len(addresses) == len(names) == world_size)
        or not all(map(_is_text, [*addresses, *names, ring_id]))
        or not all(map(_is_address, addresses))
        or not (isinstance(keys, list) and len(keys) == (world_size if is_encrypted else 0) and all(map(_is_key, keys)))
    ):
        raise RendezvousError(f"rendezvous at {server}: its list of ranks is malformed; is that this macft?")
    return Roster(tuple(addresses), tuple(names), str(ring_id), tuple(keys))


def _unpack(data: bytes) -> dict[str, Any] | None:
    """A message; None for anything that is not one."""
    try:
        message = msgpack.unpackb(data)
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException):
        return None
    return message if isinstance(message, dict) and all(isinstance(key, str) for key in message) else None


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _MAX_NAME


def _is_key(value: Any) -> bool:
    return isinstance(value, bytes) and len(value) == KEY_BYTES


def _is_address(value: Any) -> bool:
    try:
        split_paths(str(value))
    except ValueError:
        return False
    return True
