"""Where the ranks of a run meet: each reports its address, and all get everybody's.

Rank 0's machine (or the launcher of a local run) listens; the ranks say who they are and which run, configuration and
version they have. Whatever doesn't match is refused at once with the reason, before any model is loaded.
"""

from __future__ import annotations

import secrets
import threading
import time
from dataclasses import dataclass
from typing import Any

import msgpack
import zmq

import macft
from macft.collective.link import Links, listening_socket
from macft.collective.ring import Ring
from macft.collective.settings import CollectiveConfig
from macft.collective.wire import PROTOCOL_VERSION, TOKEN_BYTES
from macft.errors import RendezvousError

_MAX_MESSAGE_BYTES = 65536
_POLL_MS = 100


@dataclass(frozen=True)
class Membership:
    """Addresses and names by rank, and the run's secret ``token``."""

    addresses: tuple[str, ...]
    names: tuple[str, ...]
    token: bytes


class RendezvousServer:
    """Listens in a thread of its own until every rank has come, one doesn't fit, or ``timeout`` seconds have passed."""

    def __init__(self, bind: str, *, world_size: int, run_id: str, fingerprint: str, timeout: float):
        self._world_size, self._timeout = world_size, timeout
        self._expected = {
            "protocol": PROTOCOL_VERSION,
            "version": macft.__version__,
            "run": run_id,
            "world_size": world_size,
            "fingerprint": fingerprint,
        }
        self._members: dict[int, tuple[bytes, str, str]] = {}
        self._stop = threading.Event()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 500)
        self._socket.setsockopt(zmq.MAXMSGSIZE, _MAX_MESSAGE_BYTES)
        try:
            self._socket.bind(f"tcp://{bind}")
        except zmq.ZMQError as error:
            self._socket.close(0)
            self._context.term()
            raise RendezvousError(
                f"rendezvous: {bind} can't be listened on ({error.strerror}); "
                "is another run using this port, and is the address this machine's?"
            ) from error
        endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.address = endpoint.removeprefix("tcp://")
        self._thread = threading.Thread(target=self._serve, name="macft-rendezvous", daemon=True)

    def start(self) -> None:
        """Begins to listen."""
        self._thread.start()

    def close(self) -> None:
        """Ends the thread and frees the port. Safe to call twice."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        if not self._socket.closed:
            self._socket.close(500)
            self._context.term()

    def _serve(self) -> None:
        deadline = time.monotonic() + self._timeout
        while not self._stop.is_set():
            if self._socket.poll(_POLL_MS):
                self._take(self._socket.recv_multipart())
            if len(self._members) == self._world_size:
                self._answer_all()
                return
            if time.monotonic() > deadline:
                missing = ", ".join(str(rank) for rank in range(self._world_size) if rank not in self._members)
                self._refuse_all(
                    f"rank {missing} did not come to {self.address} within {self._timeout:.0f} s; "
                    "is macft started there, and can it reach this address?"
                )
                return

    def _take(self, frames: list[bytes]) -> None:
        sender, hello = frames[0], _mapping(frames[-1])
        if hello is None:
            return  # not a macft rank
        rank, name, address = hello.get("rank"), hello.get("name"), hello.get("address")
        reason = self._objection(hello)
        if reason:
            self._send(sender, {"refused": reason})
            # A rank that doesn't fit won't come again: the others needn't wait for the time-out.
            self._refuse_all(reason)
            self._stop.set()
        else:
            self._members[int(rank or 0)] = (sender, str(name), str(address))

    def _objection(self, hello: dict[str, Any]) -> str:
        """Why a rank can't take part; empty if it can."""
        rank, name = hello.get("rank"), hello.get("name")
        who = f"rank {rank} ({name})"
        if type(rank) is not int or not 0 <= rank < self._world_size:
            return f"{who} is not from 0 to {self._world_size - 1}"
        if not isinstance(name, str) or not isinstance(hello.get("address"), str) or len(name) > 255:
            return f"{who} did not say its name and address"
        words = {
            "protocol": "speaks protocol {theirs}, this rank speaks {ours}; install the same macft everywhere",
            "version": "runs macft {theirs}, this rank runs {ours}; install the same version everywhere",
            "world_size": "expects {theirs} nodes, this rank expects {ours}; use the same topology everywhere",
            "run": "belongs to another run ({theirs}); this is {ours}",
            "fingerprint": "has another configuration; give the same command on every node",
        }
        for key, text in words.items():
            if hello.get(key) != self._expected[key]:
                return f"{who} " + text.format(theirs=hello.get(key), ours=self._expected[key])
        if rank in self._members:
            return f"{who} came twice, also as {self._members[rank][1]}; each node needs a rank of its own"
        return ""

    def _answer_all(self) -> None:
        ranks = sorted(self._members)
        answer = {
            "addresses": [self._members[rank][2] for rank in ranks],
            "names": [self._members[rank][1] for rank in ranks],
            "token": secrets.token_bytes(TOKEN_BYTES),
        }
        for rank in ranks:
            self._send(self._members[rank][0], answer)

    def _refuse_all(self, reason: str) -> None:
        for sender, _, _ in self._members.values():
            self._send(sender, {"refused": reason})

    def _send(self, receiver: bytes, answer: dict[str, Any]) -> None:
        self._socket.send_multipart([receiver, msgpack.packb(answer)])


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
) -> Ring:
    """Reports to the rendezvous at ``server`` (host:port) and joins the ring once all ranks are there.

    ``bind`` is the address (host:port) on which this rank listens for its left neighbour.

    Raises:
        RendezvousError: nobody answers, a rank is missing, or the ranks don't fit together.
        CollectiveError: a rank was lost while the ring was being closed.
    """
    context: zmq.Context[Any] = zmq.Context()
    try:
        listener, port = listening_socket(context, bind, piece_bytes=settings.piece_bytes)
    except zmq.ZMQError as error:
        context.term()
        raise RendezvousError(f"rank {rank}: {bind} can't be listened on ({error.strerror})") from error
    hello = {
        "protocol": PROTOCOL_VERSION,
        "version": macft.__version__,
        "run": run_id,
        "world_size": world_size,
        "fingerprint": fingerprint,
        "rank": rank,
        "name": name,
        "address": f"{bind.rsplit(':', 1)[0]}:{port}",
    }
    try:
        membership = _report(context, server, hello, start_timeout)
    except BaseException:
        listener.close(0)
        context.term()
        raise
    links = Links(
        context,
        listener,
        rank=rank,
        addresses=membership.addresses,
        names=membership.names,
        token=membership.token,
        timeout=settings.timeout,
        patience=settings.patience,
    )
    ring = Ring(context, links, piece_bytes=settings.piece_bytes)
    try:
        ring.barrier()
    except BaseException:
        ring.close()
        raise
    return ring


def _report(context: zmq.Context[Any], server: str, hello: dict[str, Any], timeout: float) -> Membership:
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, _MAX_MESSAGE_BYTES)
    try:
        socket.connect(f"tcp://{server}")
        socket.send(msgpack.packb(hello))
        # The server itself waits `timeout` for the last rank; its answer names the missing ones, so let it come first.
        if not socket.poll(int((timeout + 5.0) * 1000)):
            raise RendezvousError(
                f"rank {hello['rank']}: nobody answers at {server} within {timeout:.0f} s; "
                "is macft started on the first host, and can this machine reach it?"
            )
        answer = _mapping(socket.recv())
    finally:
        socket.close(0)
    if answer is not None and isinstance(answer.get("refused"), str):
        raise RendezvousError(f"rendezvous at {server}: {answer['refused']}")
    try:
        assert answer is not None
        addresses, names, token = tuple(answer["addresses"]), tuple(answer["names"]), answer["token"]
        if not (len(addresses) == len(names) == hello["world_size"] and len(token) == TOKEN_BYTES):
            raise ValueError
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise RendezvousError(
            f"rendezvous at {server}: the answer is not macft's; is the port another program's?"
        ) from error
    return Membership(addresses, names, token)


def _mapping(data: bytes) -> dict[str, Any] | None:
    try:
        value = msgpack.unpackb(data, strict_map_key=True)
    except Exception:  # msgpack raises several unrelated types for malformed input
        return None
    return value if isinstance(value, dict) else None
