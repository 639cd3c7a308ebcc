"""The network links of this machine: Thunderbolt, Ethernet, Wi-Fi, with address and negotiated speed."""

from __future__ import annotations

import ipaddress
import platform
import socket
from dataclasses import dataclass
from pathlib import Path

import psutil

from macft.network import macos
from macft.network.system_tools import output_of

KINDS = ("thunderbolt", "ethernet", "wifi", "other")
"""Best first."""
_SYS = Path("/sys/class/net")
_LINUX_WIRED = "1"
"""ARPHRD_ETHER of if_arp.h."""


@dataclass(frozen=True)
class Link:
    """An interface that is up and has an address.

    Attributes:
        name: The system's name, ``en0``.
        kind: One of :data:`KINDS`.
        address: IPv4 with prefix length, ``192.168.0.1/24``.
        speed_mbit: The negotiated speed in Mbit/s; None if the system does not report it.
    """

    name: str
    kind: str
    address: str
    speed_mbit: int | None = None

    @property
    def host(self) -> str:
        """The address without its prefix length."""
        return self.address.split("/")[0]

    def reaches(self, other: Link) -> bool:
        """Whether both are in one subnet."""
        own = ipaddress.ip_interface(self.address).network
        return own.prefixlen < own.max_prefixlen and ipaddress.ip_interface(other.address).ip in own

    def overlaps(self, other: Link) -> bool:
        """Whether their subnets have addresses in common."""
        own, theirs = (ipaddress.ip_interface(link.address).network for link in (self, other))
        return own.overlaps(theirs)


def discover() -> tuple[Link, ...]:
    """All links except loopback, ordered by kind (Thunderbolt, Ethernet, Wi-Fi, other), then by speed."""
    mac_kinds = _mac_kinds() if platform.system() == "Darwin" else None
    stats = psutil.net_if_stats()
    result = []
    for name, entries in psutil.net_if_addrs().items():
        if name not in stats or not stats[name].isup:
            continue
        for entry in entries:
            if entry.family != socket.AF_INET or entry.address.startswith("127."):
                continue
            prefix = ipaddress.ip_network(f"0.0.0.0/{entry.netmask or '255.255.255.255'}").prefixlen
            kind, speed = mac_kinds.get(name, ("other", None)) if mac_kinds is not None else linux_kind(name)
            result.append(Link(name, kind, f"{entry.address}/{prefix}", speed or stats[name].speed or None))
    return tuple(sorted(result, key=order))


def order(link: Link) -> tuple[int, int, str]:
    """The sort key that puts the better link first."""
    return KINDS.index(link.kind), -(link.speed_mbit or 0), link.name


def linux_kind(name: str, root: Path = _SYS) -> tuple[str, int | None]:
    """Kind and speed (Mbit/s) of a Linux interface, from sysfs below ``root``."""
    folder = root / name
    if (folder / "wireless").is_dir() or (folder / "phy80211").exists():
        return "wifi", None
    driver = (folder / "device" / "driver").resolve().name if (folder / "device" / "driver").exists() else ""
    if driver == "thunderbolt-net" or name.startswith("thunderbolt"):
        return "thunderbolt", _speed(folder)
    is_wired = _read(folder / "type") == _LINUX_WIRED
    return ("ethernet", _speed(folder)) if is_wired else ("other", None)


def _speed(folder: Path) -> int | None:
    text = _read(folder / "speed")
    return int(text) if text.isdigit() else None  # -1 if the driver does not know it


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _mac_kinds() -> dict[str, tuple[str, int | None]]:
    return macos.kinds(
        output_of("networksetup", "-listallhardwareports") or "",
        output_of("system_profiler", "SPThunderboltDataType", "-json", timeout=20.0) or "",
        output_of("ifconfig") or "",
    )
