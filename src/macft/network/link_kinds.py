"""What a kind of link can carry, for plans: from reports, and from links that were shaped here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from macft.errors import ConfigError

_UNITS = {"kb": 1e3, "mb": 1e6, "gb": 1e9}
_SPEED = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>kb|mb|gb)(?:/s)?", re.IGNORECASE)
_LATENCY = 3e-4


@dataclass(frozen=True)
class LinkKind:
    """``name`` for a person, bytes a second in the slower direction, and seconds that a message takes besides."""

    name: str
    bandwidth: float
    latency: float


LINK_KINDS = {
    # A guess; 4.9 to 54 ms there and back were reported.
    "wifi": LinkKind("Wi-Fi", 30e6, 5e-3),
    # Measured on a shaped link (benchmarks/scaling.md).
    "ethernet": LinkKind("1 Gbit/s Ethernet", 117e6, 150e-6),
    "ethernet2.5": LinkKind("2.5 Gbit/s Ethernet", 292e6, 100e-6),
    "ethernet10": LinkKind("10 Gbit/s Ethernet", 1.17e9, 60e-6),
    # IP over Thunderbolt, reported: 5.3 Gbit/s in the slower direction of two Macs.
    "thunderbolt4": LinkKind("Thunderbolt 4", 0.66e9, 300e-6),
    # Reported: 52 to 63 Gbit/s with four streams, 0.34 to 0.70 ms there and back.
    "thunderbolt5": LinkKind("Thunderbolt 5", 6.5e9, 250e-6),
}


def find_links(wanted: Any) -> list[LinkKind]:
    """``plan.link``: a name of :data:`LINK_KINDS` or bytes a second (``"500MB"``), or a list of these.

    Raises:
        ConfigError: it is none of these.
    """
    texts = wanted if isinstance(wanted, list) else [wanted]
    if not texts:
        raise ConfigError("plan.link: give one link, or one for each Mac")
    return [_find(text) for text in texts]


def _find(text: object) -> LinkKind:
    kind = LINK_KINDS.get(str(text).lower())
    if kind is not None:
        return kind
    match = _SPEED.fullmatch(str(text).strip())
    if match is None or not float(match["number"]):
        names = ", ".join(LINK_KINDS)
        raise ConfigError(f"plan.link: '{text}' is not one of {names}, or bytes a second such as 500MB")
    return LinkKind(f"{match[0]} a second", float(match["number"]) * _UNITS[match["unit"].lower()], _LATENCY)
