"""The pairing protocol: forms a cluster of machines that share a code.

One machine is the host, all others are guests. Messages are maps, encrypted by :class:`~macft.pairing.pake.Channel`::

    guest                                      host
      |  Member ------------------------------->  |
      |  <------------------ {token} or {refused} |
      |  <------------- {measure: address, port}  |   for each link that this guest measures
      |  {latency, bandwidth} or {failed} ----->  |
      |  <---- {hosts, ssh, python, keys}         |   the cluster, once all links are measured
"""

from __future__ import annotations

import hmac
import itertools
import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from macft.errors import LaunchError, MacftError
from macft.network.connections import ConnectionServer
from macft.network.link_probe import TOKEN_BYTES, LinkMeasurement, ProbeServer, measure
from macft.network.links import Link
from macft.pairing.member import Member, networks, this_machine, topology_from, version_objection
from macft.pairing.pake import Channel, Message, WrongCode
from macft.pairing.ring_order import ring_order
from macft.rendezvous import keystore
from macft.topology.settings import TopologyConfig, problems

_MAX_WRONG_CODES = 3
_MAX_SHOWN = 20
"""Different lines about machines that were not admitted."""
_HANDSHAKE_SECONDS = 20.0
_MEASURE_SECONDS = 120.0
_FORM_SECONDS = 3600.0
_MIN_MACHINES = 2
_PROTOCOL_ERROR = "pairing: the other side does not follow the protocol"
_log = logging.getLogger("macft.pairing")


@dataclass
class _Guest:
    member: Member
    channel: Channel


class PairingHost:
    """The side that makes the code and waits for the guests.

    Args:
        code: The code that the guests must know.
        count: The number of machines of the cluster, this one included.
        show: Prints a line.
    """

    def __init__(self, code: str, count: int, show: Callable[[str], None]):
        if count < _MIN_MACHINES:
            raise LaunchError(f"--nodes: {count} machines are not a cluster; it needs 2 or more")
        self._code, self._count, self._show = code, count, show
        self._token = secrets.token_bytes(TOKEN_BYTES)
        self._probe = ProbeServer(self._token)
        self._own = this_machine(self._probe.port)
        self._guesses = _Guesses()
        self._arrivals: SimpleQueue[_Guest | LaunchError] = SimpleQueue()
        server = socket.create_server(("0.0.0.0", 0))
        self._connections = ConnectionServer(server, self._greet, seconds=_HANDSHAKE_SECONDS, name="pairing")
        self.port = self._connections.port

    @property
    def addresses(self) -> list[str]:
        """This machine's addresses."""
        return [link.host for link in self._own.links]

    def form(self, seconds: float) -> TopologyConfig:
        """Waits for the guests, measures the links, and sends the result to the guests.

        Raises:
            LaunchError: too many wrong codes, a guest did not arrive within ``seconds`` of the one before, or a link
                cannot be measured.
        """
        guests: list[_Guest] = []
        shown: set[str] = set()
        try:
            while len(guests) < self._count - 1:
                deadline = time.monotonic() + seconds
                while not self._take_arrival(guests, deadline, seconds, shown):
                    pass
            return self._finish(guests)
        except MacftError as error:
            _send_all(guests, {"refused": str(error)})
            raise
        finally:
            self._connections.close()
            while not self._arrivals.empty():
                if isinstance(late := self._arrivals.get(), _Guest):
                    late.channel.close()
            for guest in guests:
                guest.channel.close()
            self._probe.close()

    def _take_arrival(self, guests: list[_Guest], deadline: float, seconds: float, shown: set[str]) -> bool:
        """Waits for the next connection that has said what it is; admits it, or returns False."""
        try:
            arrival = self._arrivals.get(timeout=max(0.0, deadline - time.monotonic()))
        except Empty:
            missing = self._count - 1 - len(guests)
            raise LaunchError(f"pairing: {missing} more machines did not join within {seconds:g} s") from None
        try:
            if isinstance(arrival, LaunchError):
                raise arrival
            self._admit(arrival, guests)
        except WrongCode as error:
            _log.warning("wrong code, %d of %d", self._guesses.wrong, _MAX_WRONG_CODES)
            self._show(f"a machine used a wrong code ({self._guesses.wrong} of {_MAX_WRONG_CODES} tries)")
            if self._guesses.wrong == _MAX_WRONG_CODES:
                raise LaunchError("pairing: three wrong codes; start again, with a new code") from error
            return False
        except LaunchError as error:
            if str(error) not in shown and len(shown) < _MAX_SHOWN:
                shown.add(str(error))
                _log.warning("not admitted: %s", error)
                self._show(f"not admitted: {error}")
            return False
        guests.append(arrival)
        _log.info("%s has joined, %d of %d", arrival.member.name, len(guests) + 1, self._count)
        self._show(f"{arrival.member.name} has joined ({len(guests) + 1} of {self._count})")
        return True

    def _greet(self, connection: socket.socket, is_known: Callable[[], None]) -> None:
        """Hears who is there. In a thread of the connection's own, so that nobody waits for one that is silent."""
        own = connection.dup()  # the channel's, which outlives this call
        own.settimeout(_HANDSHAKE_SECONDS)
        try:
            channel = Channel(own, self._code, is_host=True, equal=self._guesses.equal)
            is_known()
            self._arrivals.put(_Guest(Member.from_message(channel.receive(_HANDSHAKE_SECONDS)), channel))
        except LaunchError as error:
            own.close()
            self._arrivals.put(error)
        except OSError:  # ended by the server: it took too long, or too many others came
            own.close()

    def _admit(self, guest: _Guest, guests: Sequence[_Guest]) -> None:
        """Sends the guest the token. Raises LaunchError, which it is told too, if it can't take part."""
        used_names = {self._own.name, *(other.member.name for other in guests)}
        objection = version_objection(guest.member)
        if guest.member.name in used_names:
            objection = f"there are two machines named {guest.member.name}; give one another name"
        try:
            guest.channel.send({"refused": objection} if objection else {"token": self._token})
        except LaunchError:
            guest.channel.close()
            raise
        if objection:
            guest.channel.close()
            raise LaunchError(objection)

    def _finish(self, guests: list[_Guest]) -> TopologyConfig:
        members = [self._own, *(guest.member for guest in guests)]
        best, *others = networks(members)
        cost = self._measure(best, members, guests)
        chosen = [best]
        for network in others:
            try:
                self._measure(network, members, guests)
            except LaunchError as error:
                self._show(f"left out, one more cable between all: {error}")
            else:
                chosen.append(network)
        topology = topology_from(members, chosen, ring_order(cost))
        keys = {member.name: member.key for member in members}
        for guest in guests:
            guest.channel.send({"hosts": topology.hosts, "ssh": topology.ssh, "python": topology.python, "keys": keys})
        trust_all(keys)
        _log.info("cluster of %d machines: %s", len(members), ", ".join(topology.hosts))
        return topology

    def _measure(
        self, network: Sequence[Link], members: Sequence[Member], guests: Sequence[_Guest]
    ) -> list[list[float]]:
        """Measures the links of one network; returns the seconds to send 1 MB between each two members, [n, n]."""
        cost = [[0.0] * len(members) for _ in members]
        for first, second in itertools.combinations(range(len(members)), 2):
            address, port = network[second].host, members[second].probe_port
            if first == 0:
                measurement = measure(address, port, self._token)
            else:
                measurement = _measure_from(guests[first - 1], address, port)
            cost[first][second] = cost[second][first] = measurement.cost
            self._show(
                f"{members[first].name} to {members[second].name}: {network[second].kind}, "
                f"{measurement.bandwidth * 8e-9:.2f} Gbit/s, {measurement.latency * 1e6:.0f} us"
            )
        return cost


class _Guesses:
    """Counts wrong codes, also of connections at the same time; after the last one no code is right."""

    def __init__(self) -> None:
        self.wrong = 0
        self._lock = threading.Lock()

    def equal(self, given: bytes, expected: bytes) -> bool:
        """Whether a guess is right."""
        with self._lock:
            if self.wrong < _MAX_WRONG_CODES and hmac.compare_digest(given, expected):
                return True
            self.wrong = min(self.wrong + 1, _MAX_WRONG_CODES)
            return False


def join_pairing(address: str, port: int, code: str, show: Callable[[str], None]) -> TopologyConfig:
    """The guest's side: joins with the code and waits until the cluster is complete.

    Raises:
        WrongCode: the code is wrong.
        LaunchError: the host cannot be reached, refuses this machine, or fails.
    """
    try:
        connection = socket.create_connection((address, port), 10.0)
    except OSError as error:
        raise LaunchError(
            f"{address}:{port} can't be reached ({error}); does `macft.cluster init` run there?"
        ) from None
    connection.settimeout(_HANDSHAKE_SECONDS)
    with connection:
        channel = Channel(connection, code, is_host=False)
        probe = ProbeServer(secrets.token_bytes(TOKEN_BYTES))  # a token that nobody knows, until the host sends one
        try:
            channel.send(this_machine(probe.port).to_message())
            token = _checked(channel.receive(_HANDSHAKE_SECONDS))["token"]
            if not isinstance(token, bytes):
                raise ValueError("not a token")
            probe.admit(token)
            show("joined; waiting for the others")
            while True:
                message = _checked(channel.receive(_FORM_SECONDS))
                if "measure" not in message:
                    break
                channel.send(_measure_for_host(message["measure"], token))
        except (KeyError, TypeError, ValueError):
            raise LaunchError(_PROTOCOL_ERROR) from None
        finally:
            probe.close()
    hosts, ssh, python = (_texts(message, key) for key in ("hosts", "ssh", "python"))
    topology = TopologyConfig(kind="ssh", hosts=hosts, ssh=ssh, python=python)
    if lines := problems(topology):
        raise LaunchError(f"pairing: the other side sent no valid cluster: {lines[0]}")
    keys = message.get("keys", {})
    if not isinstance(keys, dict):
        raise LaunchError(_PROTOCOL_ERROR)
    trust_all({str(name): str(key) for name, key in keys.items()})
    _log.info("joined the cluster of %s", ", ".join(topology.hosts))
    return topology


def trust_all(keys: Mapping[str, str]) -> None:
    """Trusts all machines, {name: key in hexadecimal}. Raises ConfigError as ``keystore.trust`` does."""
    folder = keystore.key_folder()
    keyring = keystore.load(folder)
    for name, key in keys.items():
        if key != keyring.own.public.hex():
            if keyring.trusted.get(name, b"").hex() not in ("", key):
                keystore.forget(folder, name)  # it has a new key and was paired again
            keystore.trust(folder, name, key)


def _measure_for_host(request: object, token: bytes) -> Message:
    """Measures the link that the host asks for."""
    if not isinstance(request, dict):
        raise TypeError("not a request")
    try:
        measurement = measure(str(request["address"]), int(request["port"]), token)
    except LaunchError as error:
        return {"failed": str(error)}
    return {"latency": measurement.latency, "bandwidth": measurement.bandwidth}


def _measure_from(guest: _Guest, address: str, port: int) -> LinkMeasurement:
    """Asks a guest to measure its link to another machine."""
    guest.channel.send({"measure": {"address": address, "port": port}})
    answer = _checked(guest.channel.receive(_MEASURE_SECONDS))
    if "failed" in answer:
        raise LaunchError(f"{guest.member.name}: {str(answer['failed'])[:1000]}")
    latency, bandwidth = answer.get("latency"), answer.get("bandwidth")
    if not (isinstance(latency, float) and isinstance(bandwidth, float) and latency > 0 and bandwidth > 0):
        raise LaunchError(_PROTOCOL_ERROR)
    return LinkMeasurement(latency, bandwidth)


def _checked(message: Message) -> Message:
    if "refused" in message:
        raise LaunchError(str(message["refused"])[:1000])
    return message


def _texts(message: Message, key: str) -> list[str]:
    values = message.get(key, [])
    if not isinstance(values, list):
        raise LaunchError(_PROTOCOL_ERROR)
    return [str(value) for value in values]


def _send_all(guests: Sequence[_Guest], message: Message) -> None:
    for guest in guests:
        try:
            guest.channel.send(message)
        except LaunchError:
            continue  # it has already left
