"""One port of macft at work in a process of its own: ``python -m harness.fuzz.targets NAME plain|encrypted``.

It answers each line on standard input with a line of JSON: :class:`Answer`. ``open``: where it listens. ``check``: the
work that the port is for is done once more, and its result is compared with what is known.
"""

from __future__ import annotations

import faulthandler
import json
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import numpy as np

from harness.fuzz.answer import SECONDS, Answer, Target, wait_for
from harness.fuzz.channel_target import ChannelTarget, accepted
from harness.fuzz.monitor_target import MonitorTarget
from harness.fuzz.pairing_targets import AnnouncementTarget, GuestTarget, PairingTarget
from macft.collective.base import Collective
from macft.collective.mlx.health import Health, HealthServer, ask
from macft.collective.ring.listener import Listener
from macft.collective.ring.ring import Ring
from macft.collective.ring.security import KeyPair
from macft.collective.ring.stream import StreamOut, StreamPort, new_buffer
from macft.collective.settings import CollectiveConfig
from macft.collective.solo import Solo
from macft.collective.wire import Cause, Header, Kind, pack, unpack
from macft.errors import LaunchError, RendezvousError
from macft.membership import heartbeat_codec
from macft.membership.elastic_ring import ElasticRing
from macft.membership.paxos import View
from macft.membership.service import MembershipService, join_request
from macft.network.link_probe import ProbeServer, measure
from macft.rendezvous.connect import RankConfig, join_rendezvous
from macft.rendezvous.keystore import Keyring
from macft.rendezvous.roster import agreed_values
from macft.rendezvous.server import RendezvousServer

SETTINGS = CollectiveConfig(timeout=20.0, heartbeat=0.5)
_SIZES = (3, 1_000, 40_000)
TOKEN = b"t" * 16


class Sums:
    """Ranks that add up all along, in threads; every sum is checked."""

    def __init__(self) -> None:
        self.done = 0
        self.wrong = ""
        self._turn = threading.Condition()

    def add_for_ever(self, rank: int, world_size: int, ring: Collective) -> None:
        """One rank's part."""
        expected = world_size * (world_size + 1) / 2
        try:
            while True:
                arrays = [np.full(size, rank + 1.0, np.float32) for size in _SIZES]
                for array in arrays:
                    ring.all_reduce([array])
                right = all((array == expected).all() for array in arrays)
                with self._turn:
                    self.wrong = self.wrong or ("" if right else "a wrong sum")
                    self.done += rank == 0
                    self._turn.notify_all()
        except BaseException as error:
            with self._turn:
                self.wrong = self.wrong or f"rank {rank}: {type(error).__name__}: {error}"
                self._turn.notify_all()

    def check(self) -> Answer:
        """Waits until two more rounds of sums, begun after this call, have come out right."""
        with self._turn:
            goal = self.done + 2
            if not self._turn.wait_for(lambda: self.done >= goal or self.wrong, SECONDS):
                faulthandler.dump_traceback()  # of all threads, on standard error
                self.wrong = "the ring stands still"
            return Answer(wrong=self.wrong, done=self.done)


class RingTarget:
    """Two ranks; rank 1's port for its left neighbour is attacked."""

    def __init__(self, *, encrypted: bool):
        self._listeners = [Listener("127.0.0.1:0", SETTINGS, encrypted=encrypted) for _ in range(2)]
        self._pairs = [listener.security._gate.pair for listener in self._listeners if listener.security]
        self._addresses = [listener.address for listener in self._listeners]
        self._sums = Sums()
        for rank in range(2):
            threading.Thread(target=self._run, args=(rank,), daemon=True).start()

    def _run(self, rank: int) -> None:
        listener = self._listeners[rank]
        if listener.security is not None:
            listener.security.meet([pair.public for pair in self._pairs], rank)
        ring = Ring(rank, 2, self._addresses, listener, ring_id="live")
        self._sums.add_for_ever(rank, 2, ring)

    def open(self) -> Answer:
        return Answer(
            addresses=[self._addresses[1]],
            valid=[frame.hex() for frame in ring_frames()],
            server=self._pairs[1].public.hex() if self._pairs else "",
            keys=[(pair.public.hex(), pair.secret.hex()) for pair in self._pairs[:1]],
        )

    def check(self) -> Answer:
        return self._sums.check()


def ring_frames() -> list[bytes]:
    """The header of each kind of frame, as rank 0 of the ring sends it to rank 1."""
    data = Header(Kind.PIECE, 0, 0, 1, 160_000, 7, 1, 0, "<f4", 80_000)
    headers = [
        Header(Kind.HELLO, 0, 0, text="live"),
        Header(Kind.CREDIT, 0, 0, frames=16),
        Header(Kind.GOODBYE, 0, 0, cause=int(Cause.PROTOCOL), culprit=1, text="why"),
        Header(Kind.STREAM, 0, 0, port=4000, text="ab" * 32),
        data,
        *(data._replace(kind=kind, dtype="") for kind in (Kind.BROADCAST, Kind.GATHER, Kind.BARRIER, Kind.EXCHANGE)),
    ]
    return [pack(header) for header in headers]


class MembershipTarget:
    """Three members of an elastic run that add up; the membership service of each is attacked."""

    def __init__(self, *, encrypted: bool):
        pair = KeyPair.new() if encrypted else None
        self._keyring = Keyring(pair, {}) if pair is not None else None
        self._services = [
            MembershipService(
                "127.0.0.1:0", name=f"n{rank}", settings=SETTINGS, keyring=self._keyring, must_match={"seed": "0"}
            )
            for rank in range(3)
        ]
        self._sums = Sums()
        self._view = View(0, tuple(service.own for service in self._services))
        self._secret = b"secret of this run"
        self._rings = [
            ElasticRing(service, Solo(), self._view, secret=self._secret, open_listener=self._listener)
            for service in self._services
        ]
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda ring: ring.regroup(lambda _: True), self._rings))
        self._view = self._services[0].state.view
        for rank, ring in enumerate(self._rings):
            threading.Thread(target=self._sums.add_for_ever, args=(rank, 3, ring), daemon=True).start()

    def _listener(self) -> Listener:
        return Listener("127.0.0.1:0", SETTINGS, encrypted=self._keyring is not None)

    def open(self) -> Answer:
        keyring = self._keyring
        return Answer(
            addresses=[service.own.address for service in self._services],
            valid=[frame.hex() for frame in self.valid_frames()],
            server=keyring.own.public.hex() if keyring else "",
            keys=[(keyring.own.public.hex(), keyring.own.secret.hex())] if keyring else [],
        )

    def valid_frames(self) -> list[bytes]:
        """A heartbeat of each member, as it is sent."""
        beats = [service._paxos.heartbeat(0.0) for service in self._services]
        return [heartbeat_codec.encode_heartbeat(beat, self._secret) for beat in beats]

    def check(self) -> Answer:
        answer = self._sums.check()
        for service in self._services:
            state = service.state
            if (state.view, state.candidates, state.ring_failure) != (self._view, (), ""):
                answer.wrong = answer.wrong or f"the members changed: {state}"
        return answer


class JoinTarget(MembershipTarget):
    """The same, for requests to join."""

    def valid_frames(self) -> list[bytes]:
        return [join_request({"seed": "0"}), join_request({"seed": "1"})]


class RendezvousTarget:
    """A rendezvous of two ranks. One that was ended by a well-formed misfit is followed by another one."""

    def __init__(self, *, encrypted: bool):
        self._keyring = Keyring(KeyPair.new(), {}) if encrypted else None
        self._notes = {"ended by a rank that does not fit": 0, "a rank's place taken": 0, "refusals printed": 0}
        self._done = 0
        self._new_server()

    def _new_server(self) -> None:
        self._server = RendezvousServer(
            world_size=2, run_id="run", timeout=SECONDS, keyring=self._keyring, on_refusal=self._count_refusal
        )
        self._server.start()

    def _count_refusal(self, _: str) -> None:
        self._notes["refusals printed"] += 1

    def _config(self, rank: int) -> RankConfig:
        return RankConfig(self._server.address, rank, 2, "run", {"seed": "0"}, f"n{rank}", SECONDS, self._keyring)

    def open(self) -> Answer:
        messages = [
            {
                **agreed_values("run", 2),
                "rank": rank,
                "name": f"n{rank}",
                "address": "127.0.0.1:4000",
                "must_match": {"seed": "0"},
                **({"key": bytes(32)} if self._keyring else {}),
            }
            for rank in range(2)
        ]
        import msgpack

        return Answer(
            addresses=[self._server.address],
            valid=[msgpack.packb(message).hex() for message in messages],
            server=self._keyring.own.public.hex() if self._keyring else "",
            keys=[(self._keyring.own.public.hex(), self._keyring.own.secret.hex())] if self._keyring else [],
        )

    def check(self) -> Answer:
        wrong = ""
        with ThreadPoolExecutor(2) as pool:
            ranks = [
                pool.submit(join_rendezvous, self._config(rank), f"127.0.0.1:{4000 + rank}", bytes(32))
                for rank in range(2)
            ]
            results = [_outcome(rank) for rank in ranks]
        self._server.close()
        if any(isinstance(result, RendezvousError) for result in results):
            # A rank came first that does not fit, or another one has taken a rank: both ranks are told in a line.
            texts = [str(result) for result in results]
            self._notes["ended by a rank that does not fit"] += 1
            if not all(isinstance(result, RendezvousError) for result in results):
                # Whoever may connect and comes first takes a rank's place (docs/security.md); that rank is told.
                self._notes["a rank's place taken"] += 1
                if not any("all ranks have met already" in text for text in texts):
                    wrong = f"one rank goes on: {texts}"
            if any(not text.isprintable() or len(text) > 2_000 for text in texts):
                wrong = f"control characters for the terminal: {texts}"
        elif any(isinstance(result, BaseException) for result in results):
            wrong = repr(results)
        self._done += 1
        self._new_server()
        return Answer(wrong=wrong, done=self._done, notes=self._notes)


class StreamTarget:
    """The port of a stream, which opens anew after each connection that it has let in."""

    def __init__(self, *, encrypted: bool):
        self._encrypted = encrypted
        self._done = 0
        self._frames: list[Any] = []
        self._port = StreamPort("127.0.0.1", encrypted=encrypted)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            stream = accepted(self._port, 4096)
            port = StreamPort("127.0.0.1", encrypted=self._encrypted)
            with suppress(ValueError):
                while stream.ended_at is None:
                    frame = stream.read(lambda data: unpack(data, "it"), new_buffer, blocking=True)
                    if frame is not None:
                        self._frames.append(bytes(frame.body))
            stream.close()
            self._port = port

    def open(self) -> Answer:
        return Answer(addresses=[f"127.0.0.1:{self._port.port}"], valid=[self._port.secret.hex()])

    def check(self) -> Answer:
        port = self._port
        out = StreamOut.connect("127.0.0.1:1", port.port, port.secret, 4096, encrypted=self._encrypted)
        if out is None:
            return Answer(wrong="the port can't be reached", done=self._done)
        body = np.full(1000, self._done % 256, np.uint8).tobytes()
        self._done += 1
        out.send(pack(Header(Kind.BROADCAST, 0, 0, 1, length=len(body))), body)
        out.finish()
        wrong = "" if wait_for(lambda: self._port is not port) else "the stream is not let in"
        out.close()
        if not wrong and (not self._frames or self._frames.pop() != body):
            wrong = "another body than was sent"
        return Answer(wrong=wrong, done=self._done)


class HealthTarget:
    """The port on which ranks of MLX's own communication report."""

    def __init__(self, *, encrypted: bool):  # noqa: ARG002
        self._server = HealthServer("127.0.0.1:0", lambda: Health(rank=1, operation=7))
        self._server.secret = "ours"
        self._done = 0

    def open(self) -> Answer:
        return Answer(addresses=[self._server.address], valid=[b"anything: the server reads nothing".hex()])

    def check(self) -> Answer:
        found = ask(self._server.address, "ours")
        self._done += 1
        return Answer(wrong="" if found == Health(rank=1, operation=7) else f"answered {found}", done=self._done)


class ProbeTarget:
    """The port that answers the measurement of a link."""

    def __init__(self, *, encrypted: bool):  # noqa: ARG002
        self._server = ProbeServer(TOKEN)
        self._done = 0

    def open(self) -> Answer:
        # All but the last byte: who knows the token may measure.
        return Answer(
            addresses=[f"127.0.0.1:{self._server.port}"], valid=[TOKEN[:-1].hex(), (b"u" * 16 + b"." * 50).hex()]
        )

    def check(self) -> Answer:
        self._done += 1
        try:
            measure("127.0.0.1", self._server.port, TOKEN)
        except LaunchError as error:
            return Answer(wrong=str(error), done=self._done)
        return Answer(done=self._done)


def _serve_target(*, encrypted: bool) -> Target:
    from harness.fuzz.serve_target import ServeTarget  # which needs MLX and a model

    return ServeTarget(encrypted=encrypted)


TARGETS: dict[str, Callable[..., Target]] = {
    "ring": RingTarget,
    "stream": StreamTarget,
    "membership": MembershipTarget,
    "join": JoinTarget,
    "rendezvous": RendezvousTarget,
    "pairing": PairingTarget,
    "link probe": ProbeTarget,
    "health": HealthTarget,
    "announcement": AnnouncementTarget,
    "channel": ChannelTarget,
    "guest": GuestTarget,
    "serve": _serve_target,
    "monitor": MonitorTarget,
}


def _outcome(future: Future[Any]) -> Any:
    try:
        return future.result(SECONDS)
    except BaseException as error:
        return error


def main() -> None:
    faulthandler.enable()
    failed: list[str] = []
    threading.excepthook = lambda args: failed.append(f"{args.thread}: {args.exc_type.__name__}: {args.exc_value}")
    target = TARGETS[sys.argv[1]](encrypted=sys.argv[2] != "plain")
    for line in sys.stdin:
        answer = target.open() if line.strip() == "open" else target.check()
        if failed and not answer.wrong:
            answer.wrong = f"a thread has ended: {failed[0]}"
        print(json.dumps(asdict(answer)), flush=True)


if __name__ == "__main__":
    main()
