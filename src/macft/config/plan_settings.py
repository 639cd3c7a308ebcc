"""The Hydra group ``plan``: what ``python -m macft.plan`` plans for."""

from __future__ import annotations

from dataclasses import dataclass, field

from macft.device.chips import find_mac
from macft.errors import ConfigError


@dataclass
class PlanConfig:
    """The Hydra group ``plan``, which a run ignores."""

    # Macs to plan for instead of this machine, one node each: [M1 Air 8GB, M4 Max 64GB]. For macft.plan also
    # --chips "M1 Air 8GB,M4 Max 64GB".
    chips: list[str] = field(default_factory=list)


def problems(config: PlanConfig) -> list[str]:
    """One line for each invalid value; reads no file except the table of chips."""
    errors = []
    for chip in config.chips:
        try:
            find_mac(chip)
        except ConfigError as error:
            errors.append(str(error))
    return errors
