"""Forms a cluster: one machine hosts, the others come with its code, all links are measured, all get the result."""

from __future__ import annotations

import itertools
import secrets
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from macft.errors import LaunchError, MacftError
from macft.network.link_probe import TOKEN_BYTES, LinkMeasurement, ProbeServer, measure
from macft.network.links import Link
from macft.pairing.member import Member, networks, this_machine, topology_of, version_objection
from macft.pairing.pake import Channel, WrongCode
from macft.pairing.ring_order import ring_order
from macft.rendezvous import keystore
from macft.topology.settings import TopologyConfig, problems

_TRIES = 3
_HANDSHAKE_SECONDS = 20.0
_MEASURE_SECONDS = 120.0
_FORM_SECONDS = 3600.0
_TOO_SMALL = 2


@dataclass
class _Guest:
    member: Member
    channel: Channel


class PairingHost:
    """The side that makes the code and waits.

    Args:
        count: Machines of the cluster, this one included.
        show: Prints a line.
    """

    def __init__(self, code: str, count: int, show: Callable[[str], None]):
        if count < _TOO_SMALL:
            raise LaunchError(f"--nodes: {count} machines are no cluster; 2 or more")
        self._code, self._count, self._show = code, count, show
        self._token = secrets.token_bytes(TOKEN_BYTES)
        self._probe = ProbeServer(self._token)
        self._own = this_machine(self._probe.port)
        self._listener = socket.create_server(("0.0.0.0", 0))
        self.port = int(self._listener.getsockname()[1])

    @property
    def addresses(self) -> list[str]:
        """Where this machine can be found."""
        return [link.host for link in self._own.links]

    def form(self, seconds: float) -> TopologyConfig:
        """Waits for the guests, measures, and tells them the result.

        Raises:
            LaunchError: too many wrong codes, nobody came within ``seconds``, or a link can't be measured.
        """
        guests: list[_Guest] = []
        try:
            wrong = 0
            while len(guests) < self._count - 1:
                try:
                    guests.append(self._welcome(seconds, guests))
                    self._show(f"{guests[-1].member.name} has joined ({len(guests) + 1} of {self._count})")
                except WrongCode as error:
                    wrong += 1
                    self._show(f"somebody came with a wrong code ({wrong} of {_TRIES} tries)")
                    if wrong == _TRIES:
                        raise LaunchError("pairing: three wrong codes; begin anew, with a new code") from error
                except _NotAdmitted as error:
                    self._show(f"not admitted: {error}")
            return self._conclude(guests)
        except MacftError as error:
            _tell(guests, {"refused": str(error)})
            raise
        finally:
            for guest in guests:
                guest.channel.close()
            self._listener.close()
            self._probe.close()

    def _welcome(self, seconds: float, guests: Sequence[_Guest]) -> _Guest:
        self._listener.settimeout(seconds)
        try:
            connection, _ = self._listener.accept()
        except TimeoutError:
            missing = self._count - 1 - len(guests)
            raise LaunchError(f"pairing: {missing} more machines did not come within {seconds:g} s") from None
        connection.settimeout(_HANDSHAKE_SECONDS)
        try:
            channel = Channel(connection, self._code, is_host=True)
        except WrongCode:
            connection.close()
            raise
        except LaunchError as error:
            connection.close()
            raise _NotAdmitted(str(error)) from None
        try:
            member = Member.of_message(channel.receive(_HANDSHAKE_SECONDS))
            taken = {self._own.name, *(guest.member.name for guest in guests)}
            objection = version_objection(member)
            if member.name in taken:
                objection = f"there are two machines named {member.name}; give one another name"
            if objection:
                channel.send({"refused": objection})
                raise _NotAdmitted(objection)
            channel.send({"token": self._token})
        except LaunchError as error:
            channel.close()
            raise _NotAdmitted(str(error)) from None
        return _Guest(member, channel)

    def _conclude(self, guests: list[_Guest]) -> TopologyConfig:
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
        topology = topology_of(members, chosen, ring_order(cost))
        everybody = {member.name: member.key for member in members}
        for guest in guests:
            guest.channel.send(
                {"hosts": topology.hosts, "ssh": topology.ssh, "python": topology.python, "keys": everybody}
            )
        trust_all(everybody)
        return topology

    def _measure(
        self, network: Sequence[Link], members: Sequence[Member], guests: Sequence[_Guest]
    ) -> list[list[float]]:
        """Measures the links of one network; returns the seconds to pass on a piece between each two members."""
        cost = [[0.0] * len(members) for _ in members]
        for first, second in itertools.combinations(range(len(members)), 2):
            address, port = network[second].host, members[second].probe_port
            found = measure(address, port, self._token) if first == 0 else _ask(guests[first - 1], address, port)
            cost[first][second] = cost[second][first] = found.cost
            self._show(
                f"{members[first].name} to {members[second].name}: {network[second].kind}, "
                f"{found.bandwidth * 8e-9:.2f} Gbit/s, {found.latency * 1e6:.0f} us"
            )
        return cost


class _NotAdmitted(LaunchError):
    """A guest that does not fit; the others may still come."""


def join(address: str, port: int, code: str, show: Callable[[str], None]) -> TopologyConfig:
    """The side that comes with the code; waits until the cluster is complete.

    Raises:
        WrongCode: the code is wrong.
        LaunchError: the host can't be reached, refuses this machine, or gives up.
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
        probe = ProbeServer(secrets.token_bytes(TOKEN_BYTES))  # nobody's token until the host has given one
        try:
            channel.send(this_machine(probe.port).to_message())
            token = _checked(channel.receive(_HANDSHAKE_SECONDS))["token"]
            probe.admit(token)
            show("joined; waiting for the others")
            while True:
                message = _checked(channel.receive(_FORM_SECONDS))
                if "measure" not in message:
                    break
                channel.send(_answer(message["measure"], token))
        except (KeyError, TypeError, ValueError):
            raise LaunchError("pairing: the other side does not follow the protocol") from None
        finally:
            probe.close()
    hosts, ssh, python = ([str(item) for item in message.get(key, [])] for key in ("hosts", "ssh", "python"))
    topology = TopologyConfig(kind="ssh", hosts=hosts, ssh=ssh, python=python)
    if found_wrong := problems(topology):
        raise LaunchError(f"pairing: the other side sent no proper cluster: {found_wrong[0]}")
    trust_all({str(name): str(key) for name, key in message.get("keys", {}).items()})
    return topology


def _answer(request: Any, token: bytes) -> dict[str, Any]:
    try:
        found = measure(str(request["address"]), int(request["port"]), token)
    except LaunchError as error:
        return {"failed": str(error)}
    return {"latency": found.latency, "bandwidth": found.bandwidth}


def trust_all(everybody: dict[str, str]) -> None:
    """Lets all members take part in this machine's encrypted runs. Raises ConfigError as :func:`keys.trust` does."""
    folder = keystore.key_folder()
    own = keystore.load(folder)
    for name, key in everybody.items():
        if key != own.own.public.hex():
            if own.trusted.get(name, b"").hex() not in ("", key):
                keystore.forget(folder, name)  # set up anew, and paired again
            keystore.trust(folder, name, key)


def _ask(guest: _Guest, address: str, port: int) -> LinkMeasurement:
    guest.channel.send({"measure": {"address": address, "port": port}})
    answer = _checked(guest.channel.receive(_MEASURE_SECONDS))
    if "failed" in answer:
        raise LaunchError(f"{guest.member.name}: {str(answer['failed'])[:1000]}")
    try:
        found = LinkMeasurement(float(answer["latency"]), float(answer["bandwidth"]))
    except (KeyError, TypeError, ValueError):
        raise LaunchError("pairing: the other side does not follow the protocol") from None
    if not (found.latency > 0 and found.bandwidth > 0):
        raise LaunchError("pairing: the other side does not follow the protocol")
    return found


def _checked(message: dict[str, Any]) -> dict[str, Any]:
    if "refused" in message:
        raise LaunchError(str(message["refused"])[:1000])
    return message


def _tell(guests: Sequence[_Guest], message: dict[str, Any]) -> None:
    for guest in guests:
        try:
            guest.channel.send(message)
        except LaunchError:
            continue  # gone already
