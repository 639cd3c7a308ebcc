"""Finds clusters that are being formed on the same network, by the mDNS service ``_macft._tcp``."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from zeroconf import ServiceBrowser, ServiceInfo, ServiceStateChange, Zeroconf

from macft.errors import LaunchError
from macft.network import links

SERVICE = "_macft._tcp.local."
_ANSWER_MS = 10_000
"""How long a machine that announces a cluster may take to give its addresses; a busy one needs seconds."""


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


def discover_offers(seconds: float, *, cluster: str | None = None) -> list[Offer]:
    """Searches on this machine's networks for up to ``seconds``.

    Returns early once ``cluster`` is found; without a name, once any cluster is found. The addresses of an offer are in
    the order in which to try them: those in a network of this machine first, the best network at the beginning.

    Raises:
        LaunchError: this machine has no network.
    """
    own = links.for_contact(links.discover())
    if not own:
        raise LaunchError("this machine has no network; plug in a cable, then run `python -m macft.doctor`")
    offers: dict[str, Offer] = {}
    is_found = threading.Event()

    def on_change(zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        if state_change is ServiceStateChange.Removed:
            return
        info = zeroconf.get_service_info(service_type, name, _ANSWER_MS)
        if info is not None and info.port:
            addresses = sorted(info.parsed_addresses(), key=lambda address: _distance(address, own))
            offer = Offer(name.removesuffix(f".{SERVICE}"), tuple(addresses), info.port)
            offers[name] = offer
            if cluster in (None, offer.cluster):
                is_found.set()

    zeroconf = Zeroconf(interfaces=[link.host for link in own])
    try:
        browser = ServiceBrowser(zeroconf, SERVICE, handlers=[on_change])
        is_found.wait(seconds)
        browser.cancel()  # else its thread stays
    finally:
        zeroconf.close()
    return list(offers.values())


def _distance(address: str, own: Sequence[links.Link]) -> int:
    """The place in ``own`` of the link that leads to ``address``; behind all of them if none does."""
    return next((place for place, link in enumerate(own) if link.contains(address)), len(own))
