"""Finds machines that form a cluster, on the same network, by the service ``_macft._tcp``."""

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
    """A cluster that is being formed: its name, and where to knock."""

    cluster: str
    addresses: tuple[str, ...]
    port: int


@contextmanager
def offered(cluster: str, addresses: Sequence[str], port: int) -> Iterator[None]:
    """Announces the cluster while active."""
    service = ServiceInfo(
        SERVICE, f"{cluster}.{SERVICE}", port, addresses=[socket.inet_aton(address) for address in addresses]
    )
    announcer = Zeroconf(interfaces=list(addresses))
    try:
        announcer.register_service(service, allow_name_change=True)
        yield
    finally:
        announcer.unregister_all_services()
        announcer.close()


def seek(addresses: Sequence[str], seconds: float, *, cluster: str | None = None) -> list[Offer]:
    """Looks around on this machine's ``addresses``; ends early once ``cluster``, or without a name any, is found."""
    found: dict[str, Offer] = {}
    enough = threading.Event()

    def on_change(zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        if state_change is ServiceStateChange.Removed:
            return
        info = zeroconf.get_service_info(service_type, name, 2000)
        if info is not None and info.port:
            offer = Offer(name.removesuffix(f".{SERVICE}"), tuple(info.parsed_addresses()), info.port)
            found[name] = offer
            if cluster in (None, offer.cluster):
                enough.set()

    browser_of = Zeroconf(interfaces=list(addresses))
    try:
        ServiceBrowser(browser_of, SERVICE, handlers=[on_change])
        enough.wait(seconds)
    finally:
        browser_of.close()
    return list(found.values())
