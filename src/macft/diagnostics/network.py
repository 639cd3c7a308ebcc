"""Checks of links, ports and clocks."""

from __future__ import annotations

import platform
import socket
from collections.abc import Mapping

from macft.diagnostics import Finding
from macft.network import links, macos
from macft.network.system_tools import output_of

_CLOCK_SECONDS = 5.0


def check(port: int) -> list[Finding]:
    """Checks this machine; a run needs ``port`` and the next two."""
    return [*link_findings(links.discover()), *_thunderbolt(), *port_findings(port)]


def link_findings(own_links: tuple[links.Link, ...]) -> list[Finding]:
    """One finding for each link, and a warning if there is no cable."""
    cables = links.physical(own_links)
    findings = [Finding("links", "ok", describe(link)) for link in own_links]
    if not cables:
        text = (
            "no network with an IPv4 address, apart from VPNs and virtual ones"
            if own_links
            else "no network but loopback"
        )
        findings.append(Finding("links", "problem", text, "plug in a Thunderbolt or Ethernet cable"))
    elif all(link.kind == "wifi" for link in cables):
        text = "Wi-Fi alone; gradients take many times longer than over a cable"
        findings.append(Finding("links", "warning", text, "plug in a Thunderbolt or Ethernet cable"))
    return findings


def describe(link: links.Link) -> str:
    """``en5: Thunderbolt, 10.0.0.1/30, 40 Gbit/s``."""
    name = {"thunderbolt": "Thunderbolt", "ethernet": "Ethernet", "wifi": "Wi-Fi", "other": "VPN or virtual"}[link.kind]
    if link.speed_mbit is None:
        speed = "speed unknown"
    elif link.speed_mbit >= 1000:
        speed = f"{link.speed_mbit / 1000:g} Gbit/s"
    else:
        speed = f"{link.speed_mbit} Mbit/s"
    return f"{link.name}: {name}, {link.address}, {speed}"


def port_findings(port: int) -> list[Finding]:
    """Checks ``port`` (rendezvous) and the next two (ring, membership)."""
    findings = []
    for number in (port, port + 1, port + 2):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("0.0.0.0", number))
            except OSError as error:
                text = f"port {number} can't be listened on: {error.strerror}"
                fix = f"lsof -nP -iTCP:{number} -sTCP:LISTEN   # or set topology.port"
                findings.append(Finding("ports", "problem", text, fix))
    return findings or [Finding("ports", "ok", f"{port} to {port + 2} are free")]


def _thunderbolt() -> list[Finding]:
    if platform.system() != "Darwin":
        return []
    text = output_of("system_profiler", "SPThunderboltDataType", "-json", timeout=20.0) or ""
    return thunderbolt_findings(macos.thunderbolt_ports(text))


def thunderbolt_findings(ports: list[macos.ThunderboltPort]) -> list[Finding]:
    """One finding for each Thunderbolt port that leads to a computer."""
    return [
        Finding(
            "Thunderbolt", "ok", f"port {port.number}: {', '.join(port.hosts)} at {port.speed_mbit / 1000:g} Gbit/s"
        )
        for port in ports
        if port.hosts and port.speed_mbit
    ]


def clock_findings(offsets: Mapping[str, float]) -> list[Finding]:
    """Checks the clocks; ``offsets`` is {host: seconds that its clock is ahead of this machine's}, of those reached."""
    findings = []
    for host, offset in offsets.items():
        if abs(offset) > _CLOCK_SECONDS:
            text = f"{host}'s clock is {offset:+.0f} s off; logs and TensorBoard will not line up"
            fix = f"ssh {host} sudo sntp -sS time.apple.com"
            findings.append(Finding("clocks", "warning", text, fix))
    if offsets and not findings:
        findings.append(Finding("clocks", "ok", "synchronised"))
    return findings
