"""The guest's side of pairing: joins a cluster that another machine forms."""

from __future__ import annotations

import logging
import secrets
import socket
from collections.abc import Callable, Sequence

from macft.errors import LaunchError
from macft.network.connections import end_if_unreachable
from macft.network.link_probe import CONNECT_SECONDS, TOKEN_BYTES, ProbeServer, measure
from macft.pairing.member import this_machine
from macft.pairing.pake import NOT_THE_PROTOCOL, Channel, Message
from macft.pairing.protocol import HANDSHAKE_SECONDS, checked, texts
from macft.rendezvous import keystore
from macft.topology.settings import TopologyConfig, problems

_FORM_SECONDS = 3600.0
_log = logging.getLogger("macft.pairing")


def join_pairing(addresses: Sequence[tuple[str, int]], code: str, show: Callable[[str], None]) -> TopologyConfig:
    """Joins with the code and waits until the cluster is complete.

    Args:
        addresses: Addresses and ports of the host; the first one that answers is used.
        code: As typed.
        show: Prints a line.

    Raises:
        WrongCode: the code is wrong.
        LaunchError: the host cannot be reached, refuses this machine, or fails.
    """
    # A token that nobody knows, until the host sends one.
    probe = ProbeServer(secrets.token_bytes(TOKEN_BYTES))
    try:
        own = this_machine(probe.port)
        with _connected(addresses) as connection:
            connection.settimeout(HANDSHAKE_SECONDS)
            end_if_unreachable(connection)
            channel = Channel(connection, code, is_host=False)
            channel.send(own.to_message())
            token = checked(channel.receive(HANDSHAKE_SECONDS)).get("token")
            if not isinstance(token, bytes):
                raise LaunchError(NOT_THE_PROTOCOL)
            probe.admit(token)
            channel.send({"ready": True})
            show("joined; waiting for the others")
            while "measure" in (message := checked(channel.receive(_FORM_SECONDS))):
                channel.send(_measure_for_host(message["measure"], token))
    finally:
        probe.close()
    hosts, ssh, python = (texts(message, key) for key in ("hosts", "ssh", "python"))
    topology = TopologyConfig(kind="ssh", hosts=hosts, ssh=ssh, python=python)
    if lines := problems(topology):
        raise LaunchError(f"pairing: the other side sent no valid cluster: {lines[0]}")
    keys = message.get("keys", {})
    if not isinstance(keys, dict):
        raise LaunchError(NOT_THE_PROTOCOL)
    for line in keystore.trust_all(keystore.key_folder(), {str(name): str(key) for name, key in keys.items()}):
        show(line)
    _log.info("joined the cluster of %s", ", ".join(topology.hosts))
    return topology


def _connected(addresses: Sequence[tuple[str, int]]) -> socket.socket:
    """A connection to the first of ``addresses`` that answers."""
    failures = []
    for address, port in addresses:
        try:
            return socket.create_connection((address, port), CONNECT_SECONDS)
        except OSError as error:
            failures.append(f"{address}:{port} can't be reached ({error.strerror or error})")
    raise LaunchError(f"{'; '.join(failures)}; does `macft.cluster init` run there, and is a firewall on?")


def _measure_for_host(request: object, token: bytes) -> Message:
    """Measures the link that the host asks for."""
    address, port = (request.get("address"), request.get("port")) if isinstance(request, dict) else (None, None)
    if not isinstance(address, str) or not isinstance(port, int):
        raise LaunchError(NOT_THE_PROTOCOL)
    try:
        measurement = measure(address, port, token)
    except LaunchError as error:
        return {"failed": str(error)}
    return {"latency": measurement.latency, "bandwidth": measurement.bandwidth}
