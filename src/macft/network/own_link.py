"""What the link behind one of this machine's addresses can carry."""

from __future__ import annotations

import ipaddress
import socket

from macft.network.link_kinds import LINK_KINDS, LinkKind
from macft.network.links import Link, discover

# Of the negotiated speed, what TCP carries.
_PAYLOAD = 0.94
_HERE = LinkKind("this machine", 5e9, 3e-5)


def own_link(host: str) -> LinkKind | None:
    """Of the interface that has the address ``host``, a name or an address of this machine; None if none is known.

    A machine's own addresses for itself (127.0.0.1) are as fast as its memory.
    """
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host.strip("[]"), None)}
    except OSError:
        return None
    if any(ipaddress.ip_address(address.split("%")[0]).is_loopback for address in found):
        return _HERE
    return next((_kind_of(link) for link in discover() if link.host in found), None)


def _kind_of(link: Link) -> LinkKind | None:
    if link.kind == "wifi":
        return LINK_KINDS["wifi"]
    if link.kind == "thunderbolt":
        return LINK_KINDS["thunderbolt4"]
    if link.speed_mbit is None:
        return None
    slowest = LINK_KINDS["ethernet"]
    return LinkKind(f"{link.speed_mbit} Mbit/s", link.speed_mbit * 1e6 / 8 * _PAYLOAD, slowest.latency)
