"""The network links of this machine: Thunderbolt, Ethernet, Wi-Fi, with address and negotiated speed."""

from __future__ import annotations

import ipaddress
import platform
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

from macft.network import macos
from macft.network.system_tools import output_of

KINDS = ("thunderbolt", "ethernet", "wifi", "other")
"""Best first; other: VPNs, and networks of containers and virtual machines."""
_SYS = Path("/sys/class/net")
_LINUX_WIRED = "1"
"""ARPHRD_ETHER of if_arp.h."""
# Docker, Podman, LXC, libvirt, VMware, VirtualBox, Kubernetes; ZeroTier, taps, and the like.
_VIRTUAL = re.compile(
    r"(docker|br-[0-9a-f]{12}|veth|podman|cni|lxc|lxd|incus|virbr|vnet|vmnet|vboxnet|flannel|cali|cilium|kube|"
    r"zt|tap|tun|wg|tailscale|dummy|macvtap|ifb)"
)


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

    @property
    def is_link_local(self) -> bool:
        """Whether the machine has given itself the address (169.254.0.0/16), because nobody else did."""
        return ipaddress.ip_interface(self.address).ip.is_link_local

    def reaches(self, other: Link) -> bool:
        """Whether both are in one subnet."""
        own = ipaddress.ip_interface(self.address).network
        return own.prefixlen < own.max_prefixlen and self.contains(other.host)

    def contains(self, host: str) -> bool:
        """Whether an address is in its subnet."""
        return ipaddress.ip_address(host) in ipaddress.ip_interface(self.address).network

    def overlaps(self, other: Link) -> bool:
        """Whether their subnets have addresses in common."""
        own, theirs = (ipaddress.ip_interface(link.address).network for link in (self, other))
        return own.overlaps(theirs)


def discover() -> tuple[Link, ...]:
    """All links except loopback, in the order of :func:`order`."""
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
            kind, speed = linux_kind(name) if mac_kinds is None else macos.kind_of(name, mac_kinds)
            result.append(Link(name, kind, f"{entry.address}/{prefix}", speed or stats[name].speed or None))
    return tuple(sorted(result, key=order))


def order(link: Link) -> tuple[int, bool, int, str]:
    """The sort key that puts the better link first: by kind, self-assigned addresses last, by speed."""
    return KINDS.index(link.kind), link.is_link_local, -(link.speed_mbit or 0), link.name


def physical(links: Iterable[Link]) -> tuple[Link, ...]:
    """Those that are a cable or Wi-Fi. The others are VPNs, and networks of containers and virtual machines."""
    return tuple(link for link in links if link.kind != "other")


def for_contact(links: Iterable[Link]) -> list[Link]:
    """The links at which another machine may find this one: the most likely first, self-assigned addresses last."""
    return sorted(physical(links), key=lambda link: (link.is_link_local, order(link)))


def linux_kind(name: str, root: Path = _SYS) -> tuple[str, int | None]:
    """Kind and speed (Mbit/s) of a Linux interface, from sysfs below ``root``."""
    folder = root / name
    if (folder / "wireless").is_dir() or (folder / "phy80211").exists():
        return "wifi", None
    driver = (folder / "device" / "driver").resolve().name if (folder / "device" / "driver").exists() else ""
    if driver == "thunderbolt-net" or name.startswith("thunderbolt"):
        return "thunderbolt", _speed(folder)
    is_wired = _read(folder / "type") == _LINUX_WIRED and not _is_virtual(name, folder)
    return ("ethernet", _speed(folder)) if is_wired else ("other", None)


def _is_virtual(name: str, folder: Path) -> bool:
    """Whether an interface that looks like Ethernet is a tunnel, or leads to containers or virtual machines."""
    if (folder / "tun_flags").exists() or _VIRTUAL.match(name):
        return True
    if (folder / "bridge").is_dir():  # it leads out of the machine if one of its ports does
        ports = [path.name for path in (folder / "brif").glob("*")]
        return all(_VIRTUAL.match(port) for port in ports)
    return False


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
