"""macOS's own view: thermal pressure (notify(3)) and ``ProcessInfo.thermalState``. Neither needs special rights."""

from __future__ import annotations

import importlib
import re
from typing import Any

from macft.thermal.readings import Reading, reading
from macft.thermal.sensors.base import SensorError, now, output_of

_KEY = "com.apple.system.thermalpressurelevel"
_LINE = re.compile(rf"{re.escape(_KEY)}\s+(\d{{1,9}})\s*")
# ProcessInfo: 0 nominal, 1 fair (moderate and heavy), 2 serious (trapping), 3 critical (sleeping).
_FROM_PROCESS_INFO = {0: 0, 1: 1, 2: 3, 3: 4}


class ThermalPressure:
    """``notifyutil -g``: 0 nominal, 1 moderate, 2 heavy, 3 trapping, 4 sleeping. About 2 ms a call."""

    name = "thermal pressure"
    kinds: tuple[str, ...] = ("state",)

    def read(self) -> list[Reading]:
        return reading("state", parse_pressure(output_of(["notifyutil", "-g", _KEY])), now(), self.name)

    def close(self) -> None:
        """Nothing to release."""


class ProcessInfoState:
    """``NSProcessInfo.thermalState`` through pyobjc: coarser; since macOS 10.10.3."""

    name = "ProcessInfo.thermalState"
    kinds: tuple[str, ...] = ("state", "low_power")

    def __init__(self) -> None:
        try:
            foundation: Any = importlib.import_module("Foundation")
        except ImportError:
            raise SensorError("pyobjc-framework-Cocoa is not installed") from None
        self._info = foundation.NSProcessInfo.processInfo()

    def read(self) -> list[Reading]:
        level = int(self._info.thermalState())
        low_power = float(bool(self._info.isLowPowerModeEnabled()))
        return [
            *reading("state", _FROM_PROCESS_INFO.get(level), now(), self.name),
            *reading("low_power", low_power, now(), self.name),
        ]

    def close(self) -> None:
        """Nothing to release."""


def parse_pressure(output: bytes) -> int:
    """The level in ``notifyutil -g``'s line; raises SensorError for anything else."""
    match = _LINE.fullmatch(output.decode("utf-8", "replace"))
    if match is None:
        raise SensorError("notifyutil printed something unknown")
    level = int(match[1])
    if level > 4:
        raise SensorError(f"thermal pressure {level} is not from 0 to 4")
    return level
