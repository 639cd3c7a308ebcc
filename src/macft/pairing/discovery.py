"""Finds clusters that are being formed on the same network, by the mDNS service ``_macft._tcp``."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from zeroconf import ServiceBrowser, ServiceInfo, ServiceStateChange, Zeroconf

SERVICE = "_macft._tcp.local."


@dataclass(frozen=True)
class Offer:
    """A cluster that is being formed: its name, and the host's addresses and port."""

    cluster: str
    addresses: tuple[str, ...]
    port: int


@contextmanager
def announce(cluster: str, addresses: Sequence[str], port: int) -> Iterator[None]:
    """Announces the cluster while the context is active."""
    service = ServiceInfo(
        SERVICE, f"{cluster}.{SERVICE}", port, addresses=[socket.inet_aton(address) for address in addresses]
    )
    zeroconf = Zeroconf(interfaces=list(addresses))
    try:
        zeroconf.register_service(service, allow_name_change=True)
        yield
    finally:
        zeroconf.unregister_all_services()
        zeroconf.close()


def discover_offers(addresses: Sequence[str], seconds: float, *, cluster: str | None = None) -> list[Offer]:
    """Searches on the networks of this machine's ``addresses`` for up to ``seconds``.

    Returns early once ``cluster`` is found; without a name, once any cluster is found.
    """
    offers: dict[str, Offer] = {}
    is_found = threading.Event()

    def on_change(zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        if state_change is ServiceStateChange.Removed:
            return
        info = zeroconf.get_service_info(service_type, name, 2000)
        if info is not None and info.port:
            offer = Offer(name.removesuffix(f".{SERVICE}"), tuple(info.parsed_addresses()), info.port)
            offers[name] = offer
            if cluster in (None, offer.cluster):
                is_found.set()

    zeroconf = Zeroconf(interfaces=list(addresses))
    try:
        browser = ServiceBrowser(zeroconf, SERVICE, handlers=[on_change])
        is_found.wait(seconds)
        browser.cancel()  # else its thread stays
    finally:
        zeroconf.close()
    return list(offers.values())
