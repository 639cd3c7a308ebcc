"""The Hydra group ``plan``: what ``python -m macft.plan`` plans for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from macft.device.chips import find_macs
from macft.errors import ConfigError
from macft.network.link_kinds import find_links


@dataclass
class PlanConfig:
    """The Hydra group ``plan``, which a run ignores."""

    # Macs to plan for instead of this machine, one node each: [M1 Air 8GB, M4 Max 64GB], [4x M2 Max 32GB]. For
    # macft.plan also --chips "M1 Air 8GB,M4 Max 64GB".
    chips: list[str] = field(default_factory=list)
    # What connects them: wifi, ethernet (1 Gbit/s), ethernet2.5, ethernet10, thunderbolt4, thunderbolt5, or bytes a
    # second: 500MB. One for all links, or one for each in ring order: [thunderbolt4, thunderbolt4, wifi]. For
    # macft.plan also --link.
    link: Any = "ethernet"


def problems(config: PlanConfig) -> list[str]:
    """One line for each invalid value; reads no file except the table of chips."""
    errors = []
    for chip in config.chips:
        try:
            find_macs([chip])
        except ConfigError as error:
            errors.append(str(error))
    if not errors:
        try:
            find_macs(config.chips)
        except ConfigError as error:
            errors.append(str(error))
    try:
        links = find_links(config.link)
    except ConfigError as error:
        return [*errors, str(error)]
    if not errors and config.chips and len(links) not in (1, count := len(find_macs(config.chips))):
        errors.append(f"plan.link: {len(links)} links for {count} Macs; give one, or one for each")
    return errors


def planned_nodes(config: PlanConfig) -> int | None:
    """How many Macs are planned for; None: as many nodes as the topology has, or the Macs are not valid."""
    try:
        return len(find_macs(config.chips)) or None
    except ConfigError:
        return None
