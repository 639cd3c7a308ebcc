"""Forming a cluster, under attack: the machine of `cluster init`, one that joins it, and the announcement by mDNS."""

from __future__ import annotations

import os
import queue
import socket
import struct
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import msgpack

from harness.fuzz.answer import SECONDS, Answer
from macft.errors import LaunchError
from macft.network.links import discover
from macft.pairing import discovery, pake
from macft.pairing.guest import join_pairing
from macft.pairing.host import PairingHost
from macft.pairing.member import this_machine
from macft.topology.settings import TopologyConfig

CODE = "1234-5678"
TOKEN = b"t" * 16
_MACHINES = 40
"""So many that the cluster is never complete."""
_HOSTS = ["10.1.0.1", "10.1.0.2"]
_CLUSTER = {"hosts": _HOSTS, "ssh": ["me@a", "me@b"], "python": ["/usr/bin/python3"], "keys": {}}


class Relay:
    """A port whose connections, one after the other, bring bytes for ``use``: what comes until the sender's end.

    This process goes on with them as somebody who knows the code would, which an attacker from outside can't.
    """

    def __init__(self, use: Callable[[bytes], None]):
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        self._use = use
        self.used = 0
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            connection, _ = self._server.accept()
            with connection, suppress(OSError):
                connection.settimeout(0.2)
                data = bytearray()
                with suppress(OSError):
                    while len(data) < 300_000 and (piece := connection.recv(65_536)):
                        data += piece
                self._use(bytes(data))
            self.used += 1


def send_as_message(channel: pake.Channel, plain: bytes) -> None:
    """Sends ``plain``, encrypted, in place of a message."""
    channel._write(channel._sending.encrypt(struct.pack("<4xQ", channel._sent), plain, None))
    channel._sent += 1


class PairingTarget:
    """A machine that waits for others to join its cluster; ``encrypted``: the attacker knows the code."""

    def __init__(self, *, encrypted: bool):
        os.environ["MACFT_KEYS"] = os.environ["MACFT_CONFIG"] = tempfile.mkdtemp()
        self._done = 0
        self._notes = {"ended by three wrong codes": 0, "lines shown": 0}
        self._new_host()
        self._relay = Relay(self._speak) if encrypted else None

    def _new_host(self) -> None:
        self._host = PairingHost(CODE, _MACHINES, self._show)
        self._ended: Future[Any] = Future()
        threading.Thread(target=self._form, args=(self._host, self._ended), daemon=True).start()

    def _form(self, host: PairingHost, ended: Future[Any]) -> None:
        try:
            ended.set_result(host.form(3600))
        except BaseException as error:
            ended.set_exception(error)

    def _show(self, _: str) -> None:
        self._notes["lines shown"] += 1

    def _speak(self, data: bytes) -> None:
        """Sends ``data`` to the host in place of what a machine with the code says of itself, and of its "ready"."""
        with socket.create_connection(("127.0.0.1", self._host.port), SECONDS) as connection, suppress(LaunchError):
            connection.settimeout(SECONDS)
            channel = pake.Channel(connection, CODE, is_host=False)
            send_as_message(channel, data)
            channel.receive(SECONDS)
            send_as_message(channel, data)

    def open(self) -> Answer:
        if self._relay is not None:
            member, ready = this_machine(1234).to_message(), {"ready": True}
            other = {**member, "key": "11" * 32}
            valid = [msgpack.packb(message).hex() for message in (member, other, other, ready)]
            return Answer(addresses=[self._relay.address], valid=valid)
        public = pake.PakeExchange(CODE, is_host=False).first_frame
        framed = len(public).to_bytes(4, "big") + public
        return Answer(
            addresses=[f"127.0.0.1:{self._host.port}"],
            valid=[framed.hex(), (framed + (32).to_bytes(4, "big") + bytes(32)).hex()],
        )

    def check(self) -> Answer:
        """A machine with the right code and this machine's name is heard, and told why it can't join."""
        self._done += 1
        if self._ended.done():
            if "three wrong codes" not in str(self._ended.exception()):
                return Answer(wrong=f"it ended: {self._ended.exception()!r}", done=self._done)
            self._notes["ended by three wrong codes"] += 1
            self._new_host()
        try:
            with socket.create_connection(("127.0.0.1", self._host.port), SECONDS) as connection:
                connection.settimeout(SECONDS)
                channel = pake.Channel(connection, CODE, is_host=False)
                channel.send(this_machine(1234).to_message())
                answer = channel.receive(SECONDS)
        except (LaunchError, OSError) as error:
            # A third wrong code may have been counted just before: then no code is right any more.
            with suppress(TimeoutError, LaunchError):
                self._ended.result(5)
            if self._ended.done():
                return self.check()
            return Answer(wrong=f"a machine with the right code is not let in: {error}", done=self._done)
        wrong = "" if "refused" in answer else f"answered {answer}"
        return Answer(wrong=wrong, done=self._done, notes=self._notes)


class GuestTarget:
    """A machine that joins a cluster; the machine of `init` is the attacker, who knows the code if ``encrypted``."""

    def __init__(self, *, encrypted: bool):
        os.environ["MACFT_KEYS"] = os.environ["MACFT_CONFIG"] = tempfile.mkdtemp()
        self._encrypted, self._done = encrypted, 0
        self._host = socket.create_server(("127.0.0.1", 0))
        self._wrong: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._relay = Relay(self._attack)

    def _join(self) -> Future[TopologyConfig]:
        joined: Future[TopologyConfig] = Future()

        def join() -> None:
            try:
                joined.set_result(join_pairing([self._host.getsockname()[:2]], CODE, lambda _: None))
            except BaseException as error:
                joined.set_exception(error)

        threading.Thread(target=join, daemon=True).start()
        return joined

    def _attack(self, data: bytes) -> None:
        with self._lock:
            joined = self._join()
            connection, _ = self._host.accept()
            with connection, suppress(OSError, LaunchError):
                connection.settimeout(SECONDS)
                if not self._encrypted:
                    connection.sendall(data)
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(65_536):
                        pass
                else:
                    channel = pake.Channel(connection, CODE, is_host=True)
                    channel.receive(SECONDS)
                    if len(data) % 4:
                        channel.send({"token": TOKEN})
                        channel.receive(SECONDS)
                    send_as_message(channel, data)
            try:
                joined.result(SECONDS)
            except LaunchError:
                pass
            except BaseException as error:
                self._wrong.put(f"the guest ended with {type(error).__name__}: {error}; after {data[:300].hex()}")

    def open(self) -> Answer:
        if not self._encrypted:
            public = pake.PakeExchange(CODE, is_host=True).first_frame
            framed = len(public).to_bytes(4, "big") + public
            frames = [framed, framed + (32).to_bytes(4, "big") + bytes(32)]
        else:
            cluster = {**_CLUSTER, "keys": {"a": "11" * 32}}
            measure = {"measure": {"address": "127.0.0.1", "port": 9}}
            frames = [msgpack.packb(each) for each in (cluster, measure, {"token": TOKEN}, {"refused": "why"})]
        return Answer(addresses=[self._relay.address], valid=[frame.hex() for frame in frames])

    def check(self) -> Answer:
        """The machine joins a cluster whose host does as it must."""
        self._done += 1
        with self._lock:
            joined = self._join()
            connection, _ = self._host.accept()
            with connection:
                connection.settimeout(SECONDS)
                channel = pake.Channel(connection, CODE, is_host=True)
                channel.receive(SECONDS)
                channel.send({"token": TOKEN})
                channel.receive(SECONDS)
                channel.send(_CLUSTER)
                hosts = joined.result(SECONDS).hosts
        wrong = "" if hosts == _HOSTS else f"it has joined {hosts}"
        with suppress(queue.Empty):
            wrong = wrong or self._wrong.get_nowait()
        return Answer(wrong=wrong, done=self._done)


class AnnouncementTarget:
    """The announcement of a cluster by mDNS: what others on the network send is read by the zeroconf library."""

    def __init__(self, *, encrypted: bool):  # noqa: ARG002
        self._done = 0
        self._address = discover()[0].host
        self._announced = discovery.announce("fuzzed", [self._address], 4000)
        self._announced.__enter__()

    def open(self) -> Answer:
        from zeroconf import DNSOutgoing, DNSPointer, DNSQuestion, const

        question, answer = DNSOutgoing(const._FLAGS_QR_QUERY), DNSOutgoing(const._FLAGS_QR_RESPONSE)
        question.add_question(DNSQuestion(discovery.SERVICE, const._TYPE_PTR, const._CLASS_IN))
        pointer = DNSPointer(discovery.SERVICE, const._TYPE_PTR, const._CLASS_IN, 60, f"other.{discovery.SERVICE}")
        answer.add_answer_at_time(pointer, 0)
        return Answer(
            addresses=[f"{self._address}:5353"], valid=[p.hex() for m in (question, answer) for p in m.packets()]
        )

    def check(self) -> Answer:
        self._done += 1
        offers = discovery.discover_offers(SECONDS / 2, cluster="fuzzed")
        found = [offer for offer in offers if offer.cluster == "fuzzed" and offer.port == 4000]
        return Answer(wrong="" if found else f"not found among {offers}", done=self._done)
