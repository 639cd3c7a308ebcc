"""The membership service: a thread in each node that sends heartbeats, receives those of others, and agrees on views.

It runs while the node computes, so a busy node is never considered lost. The agreement itself is in
:mod:`~macft.membership.paxos`; this module has the sockets. Heartbeats go over every cable to every node.
"""

from __future__ import annotations

import logging
import math
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from typing import NotRequired, TypedDict

import msgpack
import zmq

import macft
from macft.collective.matching import Texts, difference, read_texts
from macft.collective.ring.security import Gate
from macft.collective.settings import CollectiveConfig
from macft.collective.wire import PROTOCOL_VERSION, bind, probe
from macft.errors import PeerLost
from macft.membership import heartbeat_codec
from macft.membership.paxos import MemberRecord, PaxosMembership, View
from macft.membership.peer_connection import MAX_QUEUED, PeerConnection
from macft.rendezvous.keystore import Keyring

_POLL_SECONDS = 0.1
_PROBE_INTERVAL = 0.5
_PROBE_SECONDS = 0.3
"""Most seconds of a round of probes. This node sends no heartbeats meanwhile, so it is also limited by the timeout."""
# A clock that advances while a laptop sleeps; on macOS CLOCK_MONOTONIC does.
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
_log = logging.getLogger("macft.membership")


class JoinReply(TypedDict):
    """The reply to a node that wants to join: secret, start, newest view and contents, or why it is refused."""

    refused: NotRequired[str]
    secret: NotRequired[bytes]
    started: NotRequired[str]
    view: NotRequired[heartbeat_codec.EncodedView]
    contents: NotRequired[dict[str, str]]


@dataclass(frozen=True)
class MembershipState:
    """What the thread of the membership service knows, at one moment.

    Attributes:
        view: The newest view.
        departures: Why members of the previous view are not in this one, by id.
        ring_failure: Why the ring of this view can no longer be used; empty if it can.
        candidates: Names of nodes that could join now.
        waiting_for: What this node waits for if it has left its ring, in words.
        alone_since: When the last other node was found to have ended; None while there are others.
        stop_wanted: Whether any member wants, or wanted, the run to stop.
    """

    view: View
    departures: Mapping[str, str] = field(default_factory=dict)
    ring_failure: str = ""
    candidates: tuple[str, ...] = ()
    waiting_for: str = ""
    alone_since: float | None = None
    stop_wanted: bool = False


@dataclass(frozen=True)
class _Probe:
    """The last probe of a node without a connection."""

    at: float
    has_ended: bool


class MembershipService:
    """This node's part in the agreement on members, from :meth:`start` to :meth:`close`.

    Attributes:
        own: This node.
        started: When the run started, in words; what its first members agreed on, and newcomers take over.
        contents: What all members' data and weights are, as texts by name; empty until they have compared them.
        wants_stop: Called in the thread: whether this node's user wants the run to stop, which the others are told.
        state: What the thread knows. It replaces the whole object, so the values of one object belong together.

    Args:
        address: Where to listen: ``host:port``, port 0 for a free one; several paths with ``+``.
        name: This node's name in messages.
        settings: ``timeout`` is the silence after which a node is lost, ``heartbeat`` the longest time between two
            heartbeats, ``patience`` how long the others wait for a node that is alive but busy.
        keyring: Heartbeats are encrypted and only those of its members accepted. None: no encryption.
        must_match: Settings and versions that a newcomer must have, too, by name.

    Raises:
        CollectiveError: the address cannot be listened on.
    """

    own: MemberRecord
    state: MembershipState
    _paxos: PaxosMembership  # of the thread, from `start` on

    def __init__(
        self,
        address: str,
        *,
        name: str,
        settings: CollectiveConfig,
        keyring: Keyring | None,
        must_match: Texts,
        started: str = "",
    ):
        self.started = started
        self.contents: Texts = {}
        self.wants_stop: Callable[[], bool] = lambda: False
        self._stop_wanted = False
        self._settings, self._keyring, self._must_match = settings, keyring, must_match
        self._peers: dict[str, PeerConnection] = {}
        self._probes: dict[str, _Probe] = {}
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
        self.state = MembershipState(View(0, (self.own,)))
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
            PeerLost: all other nodes have been gone for the time after which a node is lost, or the thread of this
                service has ended.
        """
        self._commands.put(lambda now: self._paxos.set_ready(ring, ring_key, now))
        while True:
            with self._changed:
                self._changed.wait(_POLL_SECONDS)
                if not self._thread.is_alive():
                    raise PeerLost("this node's membership service has ended")
                state = self.state
            if state.view.generation > after and self.own.id in state.view.ids:
                return state.view
            if state.alone_since is not None and _now() - state.alone_since > self._settings.timeout:
                raise PeerLost("all other nodes have ended; the run has finished, or can't continue, without this node")
            if not waiting(state.waiting_for):
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
            self._update_peers()
            if now >= probe_at:
                self._probe_broken_peers()
                probe_at = now + _PROBE_INTERVAL
            # A wish travels on, for who had it may be gone before all have heard of it.
            self._stop_wanted = self._stop_wanted or self.wants_stop()
            beat = replace(self._paxos.heartbeat(now), stops=self._stop_wanted)
            facts = replace(beat, number=0)  # the number counts what is sent, and is no reason to send
            if facts != sent or now >= send_at:
                sent, send_at = facts, now + self._settings.heartbeat / 2
                data = heartbeat_codec.encode_heartbeat(beat, self._secret)
                for peer in self._peers.values():
                    peer.send(data)
            self._publish(now)

    def _read(self, now: float) -> None:
        for _ in range(MAX_QUEUED):
            try:
                parts = self._inbox.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if len(parts) != 2:
                continue
            heartbeat = heartbeat_codec.decode_heartbeat(parts[1], self._secret)
            if heartbeat is not None:
                self._paxos.receive(heartbeat, now)
                is_member = heartbeat.sender.id in self._paxos.view.ids
                self._stop_wanted = self._stop_wanted or (heartbeat.stops and is_member)
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
        if reason := self._objection(request):
            _log.warning("refused a node that wants to join: %s", reason)
            return {"refused": reason}
        _log.info("a node asks to join; sent it view %d", self._paxos.view.generation)
        view = heartbeat_codec.encode_view(self._paxos.view)
        return {"secret": self._secret, "started": self.started, "view": view, "contents": dict(self.contents)}

    def _objection(self, request: Mapping[str, object]) -> str:
        """Why the node that sent ``request`` can't join; empty if it can."""
        for key, ours in _versions().items():
            if request.get(key) != ours:
                theirs = "".join(filter(str.isprintable, str(request.get(key))[:80]))
                return _REFUSALS[key].format(theirs=theirs, ours=ours)
        texts = read_texts(request.get("must_match"))
        if texts is None:
            return "it sent no valid settings"
        if different := difference(texts, self._must_match):
            return f"its settings or versions differ from the run's: {different}; make them the same as the run's"
        return ""

    def _update_peers(self) -> None:
        """Keeps a connection to every member and every newcomer."""
        wanted = {node.id: node for node in (*self._paxos.view.members, *self._paxos.newcomers(_now()))}
        wanted.pop(self.own.id, None)
        for node, peer in list(self._peers.items()):
            if node not in wanted or wanted[node].address != peer.member.address:
                self._peers.pop(node).close()
        for node, member in wanted.items():
            if node not in self._peers:
                self._peers[node] = PeerConnection(self._context, member, self._keyring, self._settings)

    def _probe_broken_peers(self) -> None:
        """Distinguishes a process that has ended from a silent machine: its port refuses connections.

        A silent machine takes all the time that is left for its probe. So those that were probed longest ago are first.
        """
        broken = [node for node, peer in self._peers.items() if peer.is_broken()]
        self._probes = {node: last for node, last in self._probes.items() if node in broken}
        deadline = _now() + min(_PROBE_SECONDS, self._settings.timeout / 4)
        never = _Probe(-math.inf, has_ended=False)
        for node in sorted(broken, key=lambda node: self._probes.get(node, never).at):
            if _now() >= deadline:
                break
            has_ended = all(_has_ended(path, deadline) for path in self._peers[node].paths)
            self._probes[node] = _Probe(_now(), has_ended)
            if has_ended:
                self._paxos.mark_ended(node, _now())
        ended = [node for node, last in self._probes.items() if last.has_ended]
        is_alone = bool(self._peers) and len(ended) == len(self._peers)
        self._alone_since = (self._alone_since or _now()) if is_alone else None

    def _publish(self, now: float) -> None:
        """Replaces the state that the main thread reads."""
        paxos, before = self._paxos, self.state
        left_out = "" if paxos.is_member else "the other nodes continued without this one"
        state = MembershipState(
            view=paxos.view,
            departures=paxos.departures,
            ring_failure=paxos.ring_failure(now) or left_out,
            candidates=tuple(node.name for node in paxos.candidates(now)) if paxos.is_member else (),
            waiting_for=paxos.waiting_for(now),
            alone_since=self._alone_since,
            stop_wanted=self._stop_wanted,
        )
        if state.ring_failure and not before.ring_failure:
            _log.info("the ring of view %d can't be used any more: %s", state.view.generation, state.ring_failure)
        if state.candidates and state.candidates != before.candidates:
            _log.info("nodes that can join: %s", ", ".join(state.candidates))
        with self._changed:
            self.state = state
            self._changed.notify_all()

    def _close_sockets(self) -> None:
        for peer in self._peers.values():
            peer.close()
        self._inbox.close()
        if self._gate is not None:
            self._gate.close()
        self._context.term()


def _now() -> float:
    return time.clock_gettime(_CLOCK)


def _has_ended(path: str, deadline: float) -> bool:
    """Whether the process that listened at ``path`` has ended, as far as a probe shows until ``deadline``."""
    remaining = deadline - _now()
    return remaining > 0 and probe(path, remaining) == "ended"


_REFUSALS = {
    "protocol": "it speaks protocol version {theirs}, the run {ours}; install the same macft on all nodes",
    "version": "it runs macft {theirs}, the run {ours}; install the same macft on all nodes",
}


def join_request(must_match: Texts) -> bytes:
    """The first message of a node that wants to join."""
    packed: bytes = msgpack.packb({"join": True, **_versions(), "must_match": dict(must_match)})
    return packed


def _versions() -> dict[str, object]:
    return {"protocol": PROTOCOL_VERSION, "version": macft.__version__}
