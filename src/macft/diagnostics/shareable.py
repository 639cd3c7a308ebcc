"""The report that people attach to a public issue: what matters about a machine, and nothing about its owner.

It has only the facts that are listed here, and no text of them keeps a name, an address, a serial number or a path in
the home folder.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import platform
import re
import socket
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from macft.diagnostics import Finding
from macft.network.links import Link

FORMAT = 1
# Topics whose text is of use and names nothing of the owner's. Of the others only the level is told.
_TOLD = ("packages", "python", "BLAS", "memory", "disk speed", "power", "sleep", "thermal", "GPU memory")
_PRIVATE = re.compile(
    r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w.]|\.\d)"  # IPv4
    r"|(?<![\w:])(?:[0-9A-Fa-f]{2}[:-]){5}[0-9A-Fa-f]{2}(?![\w:])"  # MAC
    r"|(?<![\w:])(?=[0-9A-Fa-f:]*:[0-9A-Fa-f:]*:)[0-9A-Fa-f:]{3,}(?:%\w+)?(?![\w:])"  # IPv6
    r"|[\w.+-]+@[\w-]+(?:\.[\w-]+)*"  # mail addresses, and user@host
    r"|(?<!\w)(?=[A-Z0-9]*\d)(?=[A-Z0-9]*[A-Z])[A-Z0-9]{10,12}(?!\w)"  # serial numbers of Macs
    r"|[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}"  # hardware ids
)
_HIDDEN = "..."


def own_names() -> list[str]:
    """What identifies this machine or its user in a text: home folder, user, host names."""
    host = socket.gethostname()
    names = [str(Path.home()), os.environ.get("HOME", ""), host, host.split(".")[0], hex(uuid.getnode())[2:]]
    with contextlib.suppress(OSError, KeyError):
        names.append(getpass.getuser())
    return sorted({name for name in names if len(name) > 1}, key=len, reverse=True)


def without_names(text: str, names: Iterable[str]) -> str:
    """``text`` without ``names``, addresses, serial numbers and hardware ids."""
    for name in names:
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", _HIDDEN, text, flags=re.IGNORECASE)
    return _PRIVATE.sub(_HIDDEN, text)


def shareable(
    versions: Mapping[str, str],
    device: str,
    links: Sequence[Link],
    findings: Sequence[Finding],
    sensors: Mapping[str, Sequence[str]],
    smoke: Mapping[str, object],
) -> dict[str, Any]:
    """The report as plain values.

    Args:
        versions: Of Python and the packages.
        device: What MLX computes on.
        links: This machine's; their kinds and speeds are told.
        findings: The doctor's.
        sensors: Lists of texts: which give values, and why others don't.
        smoke: What came of a short run.
    """
    report: dict[str, Any] = {
        "macft_doctor_report": FORMAT,
        "versions": dict(versions),
        "system": " ".join([platform.system(), platform.mac_ver()[0] or platform.release(), platform.machine()]),
        "device": device,
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "cores": psutil.cpu_count(),
        "links": [{"kind": link.kind, "speed_mbit": link.speed_mbit} for link in links],
        "checks": [
            {"topic": each.topic, "level": each.level, **({"text": each.text} if each.topic in _TOLD else {})}
            for each in findings
        ],
        "sensors": {name: list(texts) for name, texts in sensors.items()},
        "smoke_run": dict(smoke),
    }
    return {key: _cleaned(value, own_names()) for key, value in report.items()}


def _cleaned(value: Any, names: list[str]) -> Any:
    if isinstance(value, str):
        return without_names(value, names)
    if isinstance(value, dict):
        return {key: _cleaned(each, names) for key, each in value.items()}
    return [_cleaned(each, names) for each in value] if isinstance(value, list) else value
