"""The host's side of pairing: makes the code, admits the guests, measures the links and forms the cluster."""

from __future__ import annotations

import itertools
import logging
import secrets
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from macft.errors import LaunchError, MacftError
from macft.network.link_probe import TOKEN_BYTES, LinkMeasurement, ProbeServer, measure
from macft.network.links import Link, for_contact
from macft.pairing.member import (
    Member,
    common_networks,
    is_further_cable,
    this_machine,
    topology_from,
    version_objection,
)
from macft.pairing.pake import NOT_THE_PROTOCOL, Channel, WrongCode
from macft.pairing.protocol import HANDSHAKE_SECONDS, MEASURE_SECONDS, checked
from macft.pairing.ring_order import ring_order
from macft.rendezvous import keystore
from macft.topology.settings import MAX_PATHS, TopologyConfig

_MAX_WRONG_CODES = 3
_MIN_MACHINES = 2
_log = logging.getLogger("macft.pairing")


@dataclass
class _Guest:
    member: Member
    channel: Channel


class _NotAdmitted(LaunchError):
    """A guest that cannot join; others still can."""


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
        self._listener = socket.create_server(("0.0.0.0", 0))
        self.port = int(self._listener.getsockname()[1])

    @property
    def addresses(self) -> list[str]:
        """This machine's addresses, the one to try first at the beginning."""
        return [link.host for link in for_contact(self._own.links)]

    def form(self, seconds: float) -> TopologyConfig:
        """Waits for the guests, measures the links, and sends the result to the guests.

        Raises:
            LaunchError: too many wrong codes, a guest did not arrive within ``seconds``, or no network connects all.
        """
        guests: list[_Guest] = []
        try:
            wrong_codes = 0
            while len(guests) < self._count - 1:
                try:
                    newest = self._accept_guest(seconds, guests)
                    guests = [*self._still_here(guests), newest]
                    _log.info("%s has joined, %d of %d", guests[-1].member.name, len(guests) + 1, self._count)
                    self._show(f"{guests[-1].member.name} has joined ({len(guests) + 1} of {self._count})")
                except WrongCode as error:
                    wrong_codes += 1
                    _log.warning("wrong code, %d of %d", wrong_codes, _MAX_WRONG_CODES)
                    self._show(f"a machine used a wrong code ({wrong_codes} of {_MAX_WRONG_CODES} tries)")
                    if wrong_codes == _MAX_WRONG_CODES:
                        raise LaunchError("pairing: three wrong codes; start again, with a new code") from error
                except _NotAdmitted as error:
                    _log.warning("not admitted: %s", error)
                    self._show(f"not admitted: {error}")
            return self._finish(guests)
        except MacftError as error:
            _send_all(guests, {"refused": str(error)})
            raise
        finally:
            for guest in guests:
                guest.channel.close()
            self._listener.close()
            self._probe.close()

    def _still_here(self, guests: Sequence[_Guest]) -> list[_Guest]:
        """Those of ``guests`` that have not left again; they may come back."""
        for guest in guests:
            if guest.channel.has_ended:
                self._show(f"{guest.member.name} has left")
        return [guest for guest in guests if not guest.channel.has_ended]

    def _accept_guest(self, seconds: float, guests: Sequence[_Guest]) -> _Guest:
        self._listener.settimeout(seconds)
        try:
            connection, (address, _) = self._listener.accept()
        except TimeoutError:
            missing = self._count - 1 - len(guests)
            raise LaunchError(f"pairing: {missing} more machines did not join within {seconds:g} s") from None
        connection.settimeout(HANDSHAKE_SECONDS)
        try:
            channel = Channel(connection, self._code, is_host=True)
        except WrongCode:
            connection.close()
            raise
        except LaunchError as error:
            connection.close()
            raise _NotAdmitted(f"{address}: {error}") from None
        try:
            member = Member.from_message(channel.receive(HANDSHAKE_SECONDS))
            others = [self._own, *(guest.member for guest in guests if not guest.channel.has_ended)]
            if objection := version_objection(member) or _key_objection(member, others):
                channel.send({"refused": objection})
                raise LaunchError(objection)
            member = self._with_free_name(member, address, others)
            channel.send({"token": self._token})
            # Only now does its probe answer those who send the token, and a measurement can begin at once.
            if checked(channel.receive(HANDSHAKE_SECONDS)).get("ready") is not True:
                raise LaunchError(NOT_THE_PROTOCOL)
        except LaunchError as error:
            channel.close()
            raise _NotAdmitted(f"{address}: {error}") from None
        return _Guest(member, channel)

    def _with_free_name(self, member: Member, address: str, others: Sequence[Member]) -> Member:
        """``member``, numbered if another machine of the cluster has its name."""
        name = keystore.free_name(member.name, [other.name for other in others])
        if name != member.name:
            self._show(
                f"two machines are named {member.name}; the one at {address} is called {name} here (to rename it: "
                "System Settings > General > Sharing > Local hostname)"
            )
        return replace(member, name=name)

    def _finish(self, guests: list[_Guest]) -> TopologyConfig:
        members = [self._own, *(guest.member for guest in guests)]
        chosen: list[Sequence[Link]] = []
        failures: list[str] = []
        cost: list[list[float]] = []
        for network in common_networks(members):
            if len(chosen) == MAX_PATHS or (chosen and not is_further_cable(network, chosen)):
                continue
            try:
                measured = self._measure(network, members, guests)
            except _NoLink as error:
                failures.append(str(error))
                what = "one more cable between all" if chosen else f"{network[0].name} of {members[0].name}"
                self._show(f"left out, {what}: {error}")
            else:
                cost = cost or measured
                chosen.append(network)
        if not chosen:
            raise LaunchError(f"pairing: no network connects all machines: {'; '.join(failures)}")
        topology = topology_from(members, chosen, ring_order(cost))
        keys = {member.name: member.key for member in members}
        for guest in guests:
            guest.channel.send({"hosts": topology.hosts, "ssh": topology.ssh, "python": topology.python, "keys": keys})
        for line in keystore.trust_all(keystore.key_folder(), keys):
            self._show(line)
        if chosen[0][0].is_link_local:
            self._show(
                f"note: {chosen[0][0].host} is a self-assigned address, which may change after a restart; to prevent "
                "that, set fixed addresses in System Settings > Network and run `init` again"
            )
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
                try:
                    measurement = measure(address, port, self._token)
                except LaunchError as error:
                    raise _NoLink(f"from {members[0].name}: {error}") from None
            else:
                measurement = _measure_from(guests[first - 1], address, port)
            cost[first][second] = cost[second][first] = measurement.cost
            self._show(
                f"{members[first].name} to {members[second].name}: {network[second].kind}, "
                f"{measurement.bandwidth * 8e-9:.2f} Gbit/s, {measurement.latency * 1e6:.0f} us"
            )
        return cost


class _NoLink(LaunchError):
    """Two machines that can't reach each other at their addresses in one network."""


def _key_objection(member: Member, others: Sequence[Member]) -> str:
    """Why a machine with this key can't join; empty if it can."""
    if same := [other.name for other in others if other.key == member.key]:
        return (
            f"{member.name} has the key of {same[0]}: it is the same machine, or was copied from it; on a copy, remove "
            "the file `secret` in the folder that `python -m macft.keys make` names, and join again"
        )
    return ""


def _measure_from(guest: _Guest, address: str, port: int) -> LinkMeasurement:
    """Asks a guest to measure its link to another machine."""
    guest.channel.send({"measure": {"address": address, "port": port}})
    answer = checked(guest.channel.receive(MEASURE_SECONDS))
    if "failed" in answer:
        raise _NoLink(f"from {guest.member.name}: {str(answer['failed'])[:1000]}")
    latency, bandwidth = answer.get("latency"), answer.get("bandwidth")
    if not (isinstance(latency, float) and isinstance(bandwidth, float) and latency > 0 and bandwidth > 0):
        raise LaunchError(NOT_THE_PROTOCOL)
    return LinkMeasurement(latency, bandwidth)


def _send_all(guests: Sequence[_Guest], message: dict[str, object]) -> None:
    for guest in guests:
        try:
            guest.channel.send(message)
        except LaunchError:
            continue  # it has already left
