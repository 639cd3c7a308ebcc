"""The membership service: a thread in each node that sends heartbeats, receives those of others, and agrees on views.

It runs while the node computes, so a busy node is never considered lost. The agreement itself is in
:mod:`~macft.membership.paxos`; this module has the sockets. Heartbeats go over every cable to every node.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from queue import SimpleQueue
from typing import NotRequired, TypedDict

import msgpack
import zmq
from zmq.utils.monitor import recv_monitor_message

import macft
from macft.collective.security import Gate, encrypt_to
from macft.collective.settings import CollectiveConfig
from macft.collective.wire import PROTOCOL_VERSION, bind, probe, set_endpoint, split_paths
from macft.errors import CollectiveError, PeerLost
from macft.membership import heartbeat_codec
from macft.membership.paxos import MemberRecord, PaxosMembership, View
from macft.rendezvous.keystore import Keyring

_POLL_SECONDS = 0.1
_PROBE_SECONDS = 0.3
_PROBE_INTERVAL = 0.5
_MAX_QUEUED = 64
# A clock that advances while a laptop sleeps; on macOS CLOCK_MONOTONIC does.
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
_log = logging.getLogger("macft.membership")


class JoinReply(TypedDict):
    """The reply to a node that wants to join: the run's secret and newest view, or why it is refused."""

    refused: NotRequired[str]
    secret: NotRequired[bytes]
    view: NotRequired[heartbeat_codec.EncodedView]


class MembershipService:
    """This node's part in the agreement on members, from :meth:`start` to :meth:`close`.

    Args:
        address: Where to listen: ``host:port``, port 0 for a free one; several paths with ``+``.
        name: This node's name in messages.
        settings: ``timeout`` is the silence after which a node is lost, ``heartbeat`` the longest time between two
            heartbeats, ``patience`` how long the others wait for a node that is alive but busy.
        keyring: Heartbeats are encrypted and only those of its members accepted. None: no encryption.
        fingerprint: Of the configuration that a newcomer must share.

    Raises:
        CollectiveError: the address cannot be listened on.
    """

    def __init__(
        self, address: str, *, name: str, settings: CollectiveConfig, keyring: Keyring | None, fingerprint: str
    ):
        self._settings, self._keyring, self._fingerprint = settings, keyring, fingerprint
        self._links: dict[str, _Link] = {}
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._gate = None if keyring is None else Gate(self._context, keyring.own)
        self._inbox: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        self._inbox.linger = 0
        self._inbox.maxmsgsize = heartbeat_codec.MAX_BYTES
        if self._gate is not None and keyring is not None:
            self._gate.guard(self._inbox)
            self._gate.admit(keyring.members)
        try:
            bound = "+".join(bind(self._inbox, path) for path in address.split("+"))
        except BaseException:
            self._close_sockets()
            raise
        key = b"" if keyring is None else keyring.own.public
        self.own = MemberRecord(secrets.token_hex(8), name, bound, key)
        self._commands: SimpleQueue[Callable[[float], None]] = SimpleQueue()
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="membership", daemon=True)
        self.view = View(0, (self.own,))
        """The newest view this node knows."""
        self.ring_failure = ""
        """Why the ring of this view can no longer be used; empty if it can."""
        self.candidates: tuple[str, ...] = ()
        """Names of nodes that could join now."""
        self.departures: Mapping[str, str] = {}
        """Why members of the previous view are not in this one, by id."""
        self._waiting_for = ""
        self._secret = b""
        self._alone_since: float | None = None

    def start(self, view: View, secret: bytes) -> None:
        """Starts the thread. ``secret`` is known to the members of this run only."""
        self._secret = secret
        now = _now()
        self._paxos = PaxosMembership(
            self.own, view, silence=self._settings.timeout, patience=self._settings.patience, now=now
        )
        self._publish(now)
        self._thread.start()

    def next_view(self, ring: str, ring_key: bytes, *, after: int, waiting: Callable[[str], bool]) -> View | None:
        """Waits for a view with a generation above ``after`` that has this node, whose next ring listens at ``ring``.

        A newcomer joins this way, and a node that was dropped rejoins. ``waiting`` is called about ten times a second
        with what this node waits for; if it returns False, the result is None.

        Raises:
            PeerLost: all other nodes have been gone for the time after which a node is lost.
        """
        self._commands.put(lambda now: self._paxos.set_ready(ring, ring_key, now))
        while True:
            with self._changed:
                self._changed.wait(_POLL_SECONDS)
                if not self._thread.is_alive():
                    raise PeerLost("this node's membership service has ended")
                if self.view.generation > after and self.own.id in self.view.ids:
                    return self.view
                waiting_for, alone_since = self._waiting_for, self._alone_since
            if alone_since is not None and _now() - alone_since > self._settings.timeout:
                raise PeerLost("all other nodes have ended: the run is over, or can't go on, without this one")
            if not waiting(waiting_for):
                return None

    def close(self) -> None:
        """Ends the thread and frees the port. Safe to call twice."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self._close_sockets()

    def _serve(self) -> None:
        poller = zmq.Poller()
        poller.register(self._inbox, zmq.POLLIN)
        send_at = probe_at = 0.0
        sent: object = None
        while not self._stop.is_set():
            poller.poll(int(_POLL_SECONDS * 1000) if self._commands.empty() else 0)
            now = _now()
            self._read(now)
            while not self._commands.empty():
                self._commands.get()(now)
            self._paxos.tick(now)
            self._update_links()
            if now >= probe_at:
                self._probe_broken_links()
                probe_at = now + _PROBE_INTERVAL
            beat = self._paxos.heartbeat(now)
            facts = (beat.view, beat.ready, beat.ballot, beat.proposed, beat.promised, beat.accepted, beat.hears)
            if facts != sent or now >= send_at:
                sent, send_at = facts, now + self._settings.heartbeat / 2
                data = heartbeat_codec.encode_heartbeat(beat, self._secret)
                for link in self._links.values():
                    link.send(data)
            self._publish(now)

    def _read(self, now: float) -> None:
        for _ in range(_MAX_QUEUED):
            try:
                parts = self._inbox.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if len(parts) != 2:
                continue
            heartbeat = heartbeat_codec.decode_heartbeat(parts[1], self._secret)
            if heartbeat is not None:
                self._paxos.receive(heartbeat, now)
            elif (reply := self._reply(parts[1])) is not None:
                self._inbox.send_multipart([parts[0], msgpack.packb(reply)], zmq.NOBLOCK)

    def _reply(self, data: bytes) -> JoinReply | None:
        """The reply to a join request; None if ``data`` is not one."""
        try:
            request = msgpack.unpackb(data)
        except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException):
            return None
        if not isinstance(request, dict) or request.get("join") is not True:
            return None
        for key, ours in _requirements(self._fingerprint).items():
            if request.get(key) != ours:
                reason = _REFUSALS[key].format(theirs=str(request.get(key))[:80], ours=ours)
                _log.warning("refused a node that wants to join: %s", reason)
                return {"refused": reason}
        _log.info("a node asks to join; sent it view %d", self._paxos.view.generation)
        return {"secret": self._secret, "view": heartbeat_codec.encode_view(self._paxos.view)}

    def _update_links(self) -> None:
        """Keeps a link to every member and every newcomer."""
        wanted = {node.id: node for node in (*self._paxos.view.members, *self._paxos.newcomers(_now()))}
        wanted.pop(self.own.id, None)
        for node in [node for node, link in self._links.items() if wanted.get(node) != link.member]:
            if node not in wanted or wanted[node].address != self._links[node].member.address:
                self._links.pop(node).close()
        for node, member in wanted.items():
            if node not in self._links:
                self._links[node] = _Link(self._context, member, self._keyring, self._settings)

    def _probe_broken_links(self) -> None:
        """Distinguishes a process that has ended from a silent machine: its port refuses connections."""
        is_anyone_alive = not self._links
        for node, link in self._links.items():
            if link.is_broken() and all(probe(path, _PROBE_SECONDS) == "ended" for path in link.paths):
                self._paxos.mark_ended(node, _now())
            else:
                is_anyone_alive = True
        self._alone_since = None if is_anyone_alive else self._alone_since or _now()

    def _publish(self, now: float) -> None:
        """Copies the state that the main thread reads."""
        with self._changed:
            paxos = self._paxos
            if paxos.view.generation != self.view.generation:
                self.departures = dict(paxos.departures)
            self.view = paxos.view
            left_out = "" if paxos.is_member else "the others went on without it"
            failure = paxos.ring_failure(now) or left_out
            if failure and not self.ring_failure:
                _log.info("the ring of view %d can't be used any more: %s", paxos.view.generation, failure)
            self.ring_failure = failure
            candidates = tuple(node.name for node in paxos.candidates(now)) if paxos.is_member else ()
            if candidates != self.candidates and candidates:
                _log.info("nodes that can join: %s", ", ".join(candidates))
            self.candidates = candidates
            self._waiting_for = paxos.waiting_for(now)
            self._changed.notify_all()

    def _close_sockets(self) -> None:
        for link in self._links.values():
            link.close()
        self._inbox.close()
        if self._gate is not None:
            self._gate.close()
        self._context.term()


def _now() -> float:
    return time.clock_gettime(_CLOCK)


@dataclass
class _Connection:
    sock: zmq.Socket[bytes]
    monitor: zmq.Socket[bytes]
    is_open: bool = True


class _Link:
    """The connections to another node: a DEALER over each of its cables. What cannot be sent at once is dropped."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        member: MemberRecord,
        keyring: Keyring | None,
        settings: CollectiveConfig,
    ):
        self.member, self.paths = member, split_paths(member.address)
        self._connections: list[_Connection] = []
        for path in self.paths:
            sock: zmq.Socket[bytes] = context.socket(zmq.DEALER)
            sock.linger, sock.immediate, sock.sndhwm = 0, True, _MAX_QUEUED
            sock.heartbeat_ivl = int(settings.heartbeat * 1000)
            sock.heartbeat_timeout = int(settings.timeout * 1000)
            sock.reconnect_ivl_max = 1000
            if keyring is not None:
                encrypt_to(sock, keyring.own, member.key)
            monitor_address = f"inproc://link-{id(sock)}"
            sock.monitor(monitor_address, zmq.EVENT_CONNECTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CONNECT_RETRIED)
            monitor: zmq.Socket[bytes] = context.socket(zmq.PAIR)
            monitor.linger = 0
            monitor.connect(monitor_address)
            with contextlib.suppress(CollectiveError):  # a name that is unknown here; another path may work
                sock.connect(set_endpoint(sock, path))
            self._connections.append(_Connection(sock, monitor))

    def send(self, data: bytes) -> None:
        """Sends over every open connection."""
        for connection in self._connections:
            with contextlib.suppress(zmq.Again):
                connection.sock.send(data, zmq.NOBLOCK)

    def is_broken(self) -> bool:
        """Whether no connection is open."""
        for connection in self._connections:
            while connection.monitor.poll(0):
                connection.is_open = recv_monitor_message(connection.monitor)["event"] == zmq.EVENT_CONNECTED
        return not any(connection.is_open for connection in self._connections)

    def close(self) -> None:
        """Safe to call twice."""
        for connection in self._connections:
            if not connection.sock.closed:
                connection.sock.disable_monitor()
            connection.sock.close()
            connection.monitor.close()


_REFUSALS = {
    "protocol": "it speaks protocol version {theirs}, the run {ours}; install the same macft on all nodes",
    "version": "it runs macft {theirs}, the run {ours}; install the same macft on all nodes",
    "fingerprint": "it has another configuration than the run; give the same model, dataset and settings",
}


def join_request(fingerprint: str) -> bytes:
    """The first message of a node that wants to join."""
    packed: bytes = msgpack.packb({"join": True, **_requirements(fingerprint)})
    return packed


def _requirements(fingerprint: str) -> dict[str, object]:
    return {"protocol": PROTOCOL_VERSION, "version": macft.__version__, "fingerprint": fingerprint}
