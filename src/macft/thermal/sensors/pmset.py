"""``pmset``: battery, mains power and low power mode of a Mac."""

from __future__ import annotations

import re

from macft.thermal.readings import Reading, reading
from macft.thermal.sensors.base import SensorError, now, output_of

_SOURCE = re.compile(r"^Now drawing from '(AC Power|Battery Power|UPS Power)'", re.MULTILINE)
_CHARGE = re.compile(r"InternalBattery[^\n]*?\t\s*(\d{1,3})%;")
_LOW_POWER = re.compile(r"^\s*lowpowermode\s+(\d{1,2})\s*$", re.MULTILINE)
_POWER_MODE = re.compile(r"^\s*powermode\s+(\d{1,2})\s*$", re.MULTILINE)


class Pmset:
    """``pmset -g batt`` and ``pmset -g``."""

    name = "pmset"
    kinds: tuple[str, ...] = ("battery", "on_battery", "low_power")

    def read(self) -> list[Reading]:
        battery = parse_battery(output_of(["pmset", "-g", "batt"]), self.name)
        return battery + parse_modes(output_of(["pmset", "-g"]), self.name)

    def close(self) -> None:
        """Nothing to release."""


def parse_battery(output: bytes, source: str) -> list[Reading]:
    """Charge and source of ``pmset -g batt``. A desktop has no charge; raises SensorError for any other text."""
    text, time = output.decode("utf-8", "replace"), now()
    drawn = _SOURCE.search(text)
    if drawn is None:
        if "No batteries available" in text:
            return reading("on_battery", 0.0, time, source)
        raise SensorError("pmset printed something unknown")
    charge = _CHARGE.search(text)
    return [
        *reading("on_battery", float(drawn[1] != "AC Power"), time, source),
        *reading("battery", float(charge[1]) if charge else None, time, source),
    ]


def parse_modes(output: bytes, source: str) -> list[Reading]:
    """Low power mode of ``pmset -g``: ``lowpowermode`` 0 or 1, on newer systems ``powermode`` 0 to 2 where 1 is low."""
    text = output.decode("utf-8", "replace")
    mode = _LOW_POWER.search(text) or _POWER_MODE.search(text)
    return reading("low_power", float(mode[1] == "1"), now(), source) if mode else []
