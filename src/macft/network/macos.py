"""Parses what macOS reports about its network: ``networksetup``, ``system_profiler`` and ``ifconfig``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

_PORT = re.compile(r"Hardware Port: (?P<port>.+)\nDevice: (?P<device>\S+)")
_SPEED = re.compile(r"^(?P<gigabits>\d+(?:\.\d+)?) Gb/s")
_INTERFACE = re.compile(r"^(?P<name>\w+): flags=", re.MULTILINE)
_MEDIA = re.compile(r"\tmedia: .*?\((?P<number>\d+(?:\.\d+)?)(?P<unit>G?)base", re.IGNORECASE)
_MAX_DEPTH = 16


@dataclass(frozen=True)
class ThunderboltPort:
    """A Thunderbolt port of this Mac.

    Attributes:
        number: As in ``Thunderbolt 1``.
        speed_mbit: The speed of the link in Mbit/s; None if nothing is plugged in.
        hosts: Names of the computers at the other end, also behind docks.
    """

    number: str
    speed_mbit: int | None
    hosts: tuple[str, ...]


def hardware_ports(text: str) -> dict[str, str]:
    """Parses ``networksetup -listallhardwareports`` to {device: name of the port}."""
    return {match["device"]: match["port"].strip() for match in _PORT.finditer(text)}


def thunderbolt_ports(text: str) -> list[ThunderboltPort]:
    """Parses ``system_profiler SPThunderboltDataType -json``; an empty list for anything else."""
    try:
        buses = json.loads(text)["SPThunderboltDataType"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return []
    ports = []
    for bus in buses if isinstance(buses, list) else []:
        if not isinstance(bus, dict):
            continue
        hosts = tuple(_hosts(bus.get("_items"), 0))
        for key, tag in bus.items():
            if key.startswith("receptacle_") and key.endswith("_tag") and isinstance(tag, dict):
                # An unused port says "Up to 40 Gb/s", which does not match.
                speed = _SPEED.match(str(tag.get("current_speed_key", "")))
                mbit = round(float(speed["gigabits"]) * 1000) if speed else None
                ports.append(ThunderboltPort(str(tag.get("receptacle_id_key", "?")), mbit, hosts))
    return ports


def _hosts(items: object, depth: int) -> Iterator[str]:
    """Names of the devices that are computers: only these have a domain of their own."""
    for item in items if isinstance(items, list) and depth < _MAX_DEPTH else []:
        if isinstance(item, dict):
            if "domain_uuid_key" in item:
                yield str(item.get("device_name_key") or item.get("_name", "a computer"))
            yield from _hosts(item.get("_items"), depth + 1)


def interfaces(text: str) -> dict[str, str]:
    """Parses ``ifconfig`` to {interface: its block of lines}."""
    starts = [(match["name"], match.start()) for match in _INTERFACE.finditer(text)]
    ends = [start for _, start in starts[1:]] + [len(text)]
    return {name: text[start:end] for (name, start), end in zip(starts, ends, strict=True)}


def media_speed(block: str) -> int | None:
    """The negotiated speed in an interface's block of ``ifconfig``, Mbit/s: ``media: autoselect (1000baseT ...``."""
    match = _MEDIA.search(block)
    return round(float(match["number"]) * (1000 if match["unit"] else 1)) if match else None


def kinds(ports_text: str, thunderbolt_text: str, ifconfig_text: str) -> dict[str, tuple[str, int | None]]:
    """{device: (kind, speed in Mbit/s)} of all hardware ports, from the output of the three tools."""
    ports = hardware_ports(ports_text)
    blocks = interfaces(ifconfig_text)
    speeds = {f"Thunderbolt {port.number}": port.speed_mbit for port in thunderbolt_ports(thunderbolt_text)}
    result: dict[str, tuple[str, int | None]] = {}
    for device, port in ports.items():
        if port == "Wi-Fi":
            result[device] = "wifi", None
        elif port == "Thunderbolt Bridge":
            members = re.findall(r"\tmember: (\w+) ", blocks.get(device, ""))
            used = [speed for member in members if (speed := speeds.get(ports.get(member, ""))) is not None]
            result[device] = "thunderbolt", max(used, default=None)
        elif re.fullmatch(r"Thunderbolt \d+", port):
            result[device] = "thunderbolt", speeds.get(port)
        else:
            result[device] = "ethernet", media_speed(blocks.get(device, ""))
    return result


def kind_of(device: str, known: Mapping[str, tuple[str, int | None]]) -> tuple[str, int | None]:
    """Kind and speed (Mbit/s) of a device, from the result of :func:`kinds`.

    What is no hardware port is a VPN (``utun0``) or a bridge to virtual machines (``bridge100``). If the tools reported
    nothing at all, names have to do.
    """
    if not known and re.fullmatch(r"en\d+|bridge0", device):
        return "ethernet", None
    return known.get(device, ("other", None))
