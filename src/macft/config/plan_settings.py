"""What ``python -m macft.plan`` plans for: the Hydra group ``plan``."""

from __future__ import annotations

from dataclasses import dataclass, field

from macft.device.chips import find_mac
from macft.errors import ConfigError


@dataclass
class PlanConfig:
    """The Hydra group ``plan``. A run itself takes no notice of it."""

    # Macs to plan for instead of this machine, one node each: [M1 Air 8GB, M4 Max 64GB]. On the command line of
    # macft.plan also: --chips "M1 Air 8GB,M4 Max 64GB".
    chips: list[str] = field(default_factory=list)


def problems(config: PlanConfig) -> list[str]:
    """One line for each value that can't be right; no I/O but the table of chips."""
    found = []
    for chip in config.chips:
        try:
            find_mac(chip)
        except ConfigError as error:
            found.append(str(error))
    return found
