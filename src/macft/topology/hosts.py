"""Finds which of the listed hosts this machine is."""

from __future__ import annotations

import socket
from ipaddress import ip_address

import psutil

from macft.errors import ConfigError
from macft.topology.settings import TopologyConfig, host_paths


def own_rank(config: TopologyConfig) -> int:
    """This machine's index in ``topology.hosts``.

    Raises:
        ConfigError: none of the hosts, or more than one, is this machine; the message lists its addresses.
    """
    if config.rank is not None:
        return config.rank
    own = own_addresses()
    matches = [
        rank
        for rank, host in enumerate(config.hosts)
        if any(_addresses(name) & own for name, _ in host_paths(host, config.port))
    ]
    if len(matches) == 1:
        return matches[0]
    what = "none of them is" if not matches else f"places {matches} are all"
    listed = ", ".join(sorted(filter(_can_be_listed, own))) or "none but loopback"
    raise ConfigError(f"topology.hosts: {what} this machine (its addresses: {listed}); set topology.rank=0, 1, ...")


def own_addresses() -> set[str]:
    """The IPv4 and IPv6 addresses of all interfaces."""
    families = (socket.AF_INET, socket.AF_INET6)
    return {
        entry.address.split("%", 1)[0]
        for entries in psutil.net_if_addrs().values()
        for entry in entries
        if entry.family in families
    }


def _can_be_listed(address: str) -> bool:
    parsed = ip_address(address)
    return not (parsed.is_loopback or (parsed.version == 6 and parsed.is_link_local))


def _addresses(name: str) -> set[str]:
    try:
        return {str(info[4][0]) for info in socket.getaddrinfo(name.strip("[]"), None)}
    except OSError:
        return set()
