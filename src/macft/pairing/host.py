"""The host's side of pairing: makes the code, admits the guests, measures the links and forms the cluster."""

from __future__ import annotations

import itertools
import logging
import queue
import secrets
import time
from collections.abc import Callable, Sequence

from macft.errors import LaunchError, MacftError
from macft.network.link_probe import TOKEN_BYTES, LinkMeasurement, ProbeServer, measure
from macft.network.links import Link, for_contact
from macft.pairing.admission import Admission, Guest, NotAdmitted
from macft.pairing.member import Member, common_networks, is_further_cable, this_machine, topology_from
from macft.pairing.pake import NOT_THE_PROTOCOL, WrongCode
from macft.pairing.protocol import MEASURE_SECONDS, checked
from macft.pairing.ring_order import ring_order
from macft.rendezvous import keystore
from macft.topology.settings import MAX_PATHS, TopologyConfig

_MAX_WRONG_CODES = 3
_MIN_MACHINES = 2
_MAX_SHOWN = 50
"""Lines about machines that were not let in; whoever makes more is not somebody who made a mistake."""
_LOOK_SECONDS = 1.0
_log = logging.getLogger("macft.pairing")


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
        self._count, self._show = count, show
        self._token = secrets.token_bytes(TOKEN_BYTES)
        self._probe = ProbeServer(self._token)
        self._own = this_machine(self._probe.port)
        self._admission = Admission(
            self._own, code, self._token, room=count - 1, most_wrong=_MAX_WRONG_CODES, show=show
        )
        self.port = self._admission.port

    @property
    def addresses(self) -> list[str]:
        """This machine's addresses, the one to try first at the beginning."""
        return [link.host for link in for_contact(self._own.links)]

    def form(self, seconds: float) -> TopologyConfig:
        """Waits for the guests, measures the links, and sends the result to the guests.

        Raises:
            LaunchError: too many wrong codes, a guest did not arrive within ``seconds``, or no network connects all.
        """
        try:
            return self._finish(self._await_guests(seconds))
        except MacftError as error:
            _send_all(self._admission.guests(), {"refused": str(error)})
            raise
        finally:
            self._admission.close()
            self._probe.close()

    def _await_guests(self, seconds: float) -> list[Guest]:
        """Waits until all guests are here, up to ``seconds`` for each."""
        wrong_codes = refused = 0
        deadline = time.monotonic() + seconds
        while len(guests := self._admission.guests()) < self._count - 1:
            left = deadline - time.monotonic()
            if left <= 0:
                missing = self._count - 1 - len(guests)
                raise LaunchError(f"pairing: {missing} more machines did not join within {seconds:g} s")
            try:
                outcome = self._admission.outcomes.get(timeout=min(left, _LOOK_SECONDS))
            except queue.Empty:
                continue
            match outcome:
                case WrongCode():
                    wrong_codes += 1
                    _log.warning("wrong code, %d of %d", wrong_codes, _MAX_WRONG_CODES)
                    self._show(f"a machine used a wrong code ({wrong_codes} of {_MAX_WRONG_CODES} tries)")
                    if wrong_codes == _MAX_WRONG_CODES:
                        raise LaunchError("pairing: three wrong codes; start again, with a new code")
                case NotAdmitted():
                    refused += 1
                    _log.warning("not admitted: %s", outcome)
                    if refused <= _MAX_SHOWN:
                        self._show(f"not admitted: {outcome}")
                case Guest():
                    deadline = time.monotonic() + seconds
        return guests

    def _finish(self, guests: list[Guest]) -> TopologyConfig:
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
        self, network: Sequence[Link], members: Sequence[Member], guests: Sequence[Guest]
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


def _measure_from(guest: Guest, address: str, port: int) -> LinkMeasurement:
    """Asks a guest to measure its link to another machine."""
    guest.channel.send({"measure": {"address": address, "port": port}})
    answer = checked(guest.channel.receive(MEASURE_SECONDS))
    if "failed" in answer:
        raise _NoLink(f"from {guest.member.name}: {str(answer['failed'])[:1000]}")
    latency, bandwidth = answer.get("latency"), answer.get("bandwidth")
    if not (isinstance(latency, float) and isinstance(bandwidth, float) and latency > 0 and bandwidth > 0):
        raise LaunchError(NOT_THE_PROTOCOL)
    return LinkMeasurement(latency, bandwidth)


def _send_all(guests: Sequence[Guest], message: dict[str, object]) -> None:
    for guest in guests:
        try:
            guest.channel.send(message)
        except LaunchError:
            continue  # it has already left
