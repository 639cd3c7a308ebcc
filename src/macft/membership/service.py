"""The membership service: a thread of each node that beats, listens to the others, and agrees with them who takes part.

It runs while the node computes, so a node that is busy is never taken for one that is gone. What is decided, and when,
is :mod:`~macft.membership.paxos`'s business; here are the sockets. Beats go over every cable to every node.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import msgpack
import zmq
from zmq.utils.monitor import recv_monitor_message

import macft
from macft.collective.security import Gate, encrypt_to
from macft.collective.settings import CollectiveConfig
from macft.collective.wire import PROTOCOL_VERSION, bind, probe, set_endpoint, split_paths
from macft.errors import CollectiveError, PeerLost
from macft.membership import heartbeats
from macft.membership.paxos import MemberRecord, PaxosMembership, View
from macft.rendezvous.keystore import Keyring

_LOOK_SECONDS = 0.1
_KNOCK_SECONDS = 0.3
_KNOCK_EVERY = 0.5
_MAX_WAITING = 64
# A clock that goes on while a laptop sleeps; on macOS CLOCK_MONOTONIC does.
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class MembershipService:
    """This node's seat among the members, from :meth:`begin` to :meth:`close`.

    Args:
        address: Where to listen: ``host:port``, port 0 for a free one; several paths with ``+``.
        name: For people. settings: ``timeout`` is the silence after which a node is lost, ``heartbeat`` the longest
        time between two beats, ``patience`` how long the others wait for one that lives but doesn't come. keyring: Of
        this machine: only its members are heard, encrypted. None: no encryption. fingerprint: Of what a newcomer must
        have alike.

    Raises:
        CollectiveError: the address can't be listened on.
    """

    def __init__(
        self, address: str, *, name: str, settings: CollectiveConfig, keyring: Keyring | None, fingerprint: str
    ):
        self._settings, self._keyring, self._fingerprint = settings, keyring, fingerprint
        self._links: dict[str, _Link] = {}
        self._context: zmq.Context[Any] = zmq.Context()
        self._gate = None if keyring is None else Gate(self._context, keyring.own)
        self._inbox: zmq.Socket[Any] = self._context.socket(zmq.ROUTER)
        self._inbox.linger = 0
        self._inbox.maxmsgsize = heartbeats.MAX_BYTES
        if self._gate is not None and keyring is not None:
            self._gate.guard(self._inbox)
            self._gate.admit(keyring.members)
        try:
            bound = "+".join(bind(self._inbox, path) for path in address.split("+"))
        except BaseException:
            self._close_sockets()
            raise
        key = b"" if keyring is None else keyring.own.public
        self.seat = MemberRecord(secrets.token_hex(8), name, bound, key)
        self._orders: SimpleQueue[Callable[[float], None]] = SimpleQueue()
        self._news = threading.Condition()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="membership", daemon=True)
        self.view = View(0, (self.seat,))
        """The newest view this node knows."""
        self.disturbed = ""
        """Why the ring of this view can't go on, if so."""
        self.candidates: tuple[str, ...] = ()
        """Names of nodes that could be let in now."""
        self.why: dict[str, str] = {}
        """Why members of the view before are gone, by id."""
        self.waits_for = ""
        self._secret = b""
        self._deserted_since: float | None = None

    def begin(self, view: View, secret: bytes) -> None:
        """Takes part from now on. ``secret`` is known to the members of this run only."""
        self._secret = secret
        now = _now()
        self._agreement = PaxosMembership(
            self.seat, view, silence=self._settings.timeout, patience=self._settings.patience, now=now
        )
        self._publish(now)
        self._thread.start()

    def next_view(self, ring: str, ring_key: bytes, *, after: int, waiting: Callable[[str], bool]) -> View | None:
        """Waits for a view beyond generation ``after`` with this node in it, whose next ring listens at ``ring``.

        A node that has been dropped is let in again this way, and a newcomer for the first time. ``waiting`` is asked
        about every tenth of a second, and told whom this node waits for; None once it answers not to wait any longer.

        Raises:
            PeerLost: nobody is left who could let it in; has been so for the time after which a node is lost.
        """
        self._orders.put(lambda now: self._agreement.ready(ring, ring_key, now))
        while True:
            with self._news:
                self._news.wait(_LOOK_SECONDS)
                if not self._thread.is_alive():
                    raise PeerLost("this node's membership service has ended")
                if self.view.generation > after and self.seat.id in self.view.ids:
                    return self.view
                text, deserted_since = self.waits_for, self._deserted_since
            if deserted_since is not None and _now() - deserted_since > self._settings.timeout:
                raise PeerLost("all other nodes have ended: the run is over, or can't go on, without this one")
            if not waiting(text):
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
        beat_at = knock_at = 0.0
        told: object = None
        while not self._stop.is_set():
            poller.poll(int(_LOOK_SECONDS * 1000) if self._orders.empty() else 0)
            now = _now()
            self._read(now)
            while not self._orders.empty():
                self._orders.get()(now)
            self._agreement.tick(now)
            self._keep_links()
            if now >= knock_at:
                self._look_for_the_dead()
                knock_at = now + _KNOCK_EVERY
            beat = self._agreement.beat(now)
            facts = (beat.view, beat.ready, beat.ballot, beat.proposed, beat.promised, beat.accepted, beat.hears)
            if facts != told or now >= beat_at:
                told, beat_at = facts, now + self._settings.heartbeat / 2
                data = heartbeats.encode(beat, self._secret)
                for link in self._links.values():
                    link.send(data)
            self._publish(now)

    def _read(self, now: float) -> None:
        for _ in range(_MAX_WAITING):
            try:
                parts = self._inbox.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if len(parts) != 2:
                continue
            beat = heartbeats.decode(parts[1], self._secret)
            if beat is not None:
                self._agreement.take(beat, now)
            elif (answer := self._answer(parts[1])) is not None:
                self._inbox.send_multipart([parts[0], msgpack.packb(answer)], zmq.NOBLOCK)

    def _answer(self, data: bytes) -> dict[str, Any] | None:
        """To one that wants to join: the run's secret and members, or why not. None for a stranger."""
        try:
            hello = msgpack.unpackb(data)
        except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException):
            return None
        if not isinstance(hello, dict) or hello.get("join") is not True:
            return None
        for key, ours in _own(self._fingerprint).items():
            if hello.get(key) != ours:
                return {"refused": _REFUSALS[key].format(theirs=str(hello.get(key))[:80], ours=ours)}
        return {"secret": self._secret, "view": heartbeats.plain_view(self._agreement.view)}

    def _keep_links(self) -> None:
        """A link to every member, and to every one that would like to be."""
        wanted = {seat.id: seat for seat in (*self._agreement.view.seats, *self._agreement.newcomers(_now()))}
        wanted.pop(self.seat.id, None)
        for name in [name for name, link in self._links.items() if wanted.get(name) != link.seat]:
            if name not in wanted or wanted[name].address != self._links[name].seat.address:
                self._links.pop(name).close()
        for name, seat in wanted.items():
            if name not in self._links:
                self._links[name] = _Link(self._context, seat, self._keyring, self._settings)

    def _look_for_the_dead(self) -> None:
        """Tells a process that has ended from a machine that is silent: a port without a listener refuses."""
        is_anyone_there = not self._links
        for name, link in self._links.items():
            if link.is_broken() and all(probe(path, _KNOCK_SECONDS) == "ended" for path in link.paths):
                self._agreement.ended(name, _now())
            else:
                is_anyone_there = True
        self._deserted_since = None if is_anyone_there else self._deserted_since or _now()

    def _publish(self, now: float) -> None:
        with self._news:
            agreement = self._agreement
            if agreement.view.generation != self.view.generation:
                self.why = dict(agreement.why)
            self.view = agreement.view
            left_out = "" if agreement.is_member else "the others went on without it"
            self.disturbed = agreement.disturbed(now) or left_out
            self.candidates = tuple(seat.name for seat in agreement.candidates(now)) if agreement.is_member else ()
            self.waits_for = agreement.waits_for(now)
            self._news.notify_all()

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
class _Line:
    sock: zmq.Socket[Any]
    monitor: zmq.Socket[Any]
    stands: bool = True


class _Link:
    """The way to another node: a DEALER over each of its cables; what can't be sent at once is not sent."""

    def __init__(
        self, context: zmq.Context[Any], seat: MemberRecord, keyring: Keyring | None, settings: CollectiveConfig
    ):
        self.seat, self.paths = seat, split_paths(seat.address)
        self._lines: list[_Line] = []
        for path in self.paths:
            sock: zmq.Socket[Any] = context.socket(zmq.DEALER)
            sock.linger, sock.immediate, sock.sndhwm = 0, True, _MAX_WAITING
            sock.heartbeat_ivl = int(settings.heartbeat * 1000)
            sock.heartbeat_timeout = int(settings.timeout * 1000)
            sock.reconnect_ivl_max = 1000
            if keyring is not None:
                encrypt_to(sock, keyring.own, seat.key)
            where = f"inproc://link-{id(sock)}"
            sock.monitor(where, zmq.EVENT_CONNECTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CONNECT_RETRIED)
            monitor: zmq.Socket[Any] = context.socket(zmq.PAIR)
            monitor.linger = 0
            monitor.connect(where)
            with contextlib.suppress(CollectiveError):  # a name that is unknown here: the other paths will do
                sock.connect(set_endpoint(sock, path))
            self._lines.append(_Line(sock, monitor))

    def send(self, data: bytes) -> None:
        """Over every path that stands."""
        for line in self._lines:
            with contextlib.suppress(zmq.Again):
                line.sock.send(data, zmq.NOBLOCK)

    def is_broken(self) -> bool:
        """Whether no path stands."""
        for line in self._lines:
            while line.monitor.poll(0):
                line.stands = recv_monitor_message(line.monitor)["event"] == zmq.EVENT_CONNECTED
        return not any(line.stands for line in self._lines)

    def close(self) -> None:
        """Safe to call twice."""
        for line in self._lines:
            if not line.sock.closed:
                line.sock.disable_monitor()
            line.sock.close()
            line.monitor.close()


_REFUSALS = {
    "protocol": "it speaks protocol version {theirs}, the run {ours}; install the same macft on all nodes",
    "version": "it runs macft {theirs}, the run {ours}; install the same macft on all nodes",
    "fingerprint": "it has another configuration than the run; give the same model, dataset and settings",
}


def hello(fingerprint: str) -> bytes:
    """What a newcomer says first."""
    packed: bytes = msgpack.packb({"join": True, **_own(fingerprint)})
    return packed


def _own(fingerprint: str) -> dict[str, Any]:
    return {"protocol": PROTOCOL_VERSION, "version": macft.__version__, "fingerprint": fingerprint}
