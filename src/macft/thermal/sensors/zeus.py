"""zeus-apple-silicon: energy counters of an Apple chip's rails; power is their difference over time."""

from __future__ import annotations

import importlib
from typing import Any

from macft.thermal.readings import Reading, reading
from macft.thermal.sensors.base import SensorError, now

_RAILS = ("cpu_total_mj", "gpu_mj", "gpu_sram_mj", "dram_mj", "ane_mj")


class Zeus:
    """The chip's power, in W, without display, storage and radios. macmon's board power is preferred."""

    name = "zeus"
    kinds: tuple[str, ...] = ("watts",)

    def __init__(self) -> None:
        try:
            module: Any = importlib.import_module("zeus_apple_silicon")
            self._monitor = module.AppleEnergyMonitor()
        except (ImportError, AttributeError):
            raise SensorError("zeus-apple-silicon is not installed") from None
        self._last: tuple[float, float] | None = None

    def read(self) -> list[Reading]:
        time, joules = now(), total_joules(self._monitor.get_cumulative_energy())
        last, self._last = self._last, (time, joules)
        if last is None or time <= last[0]:
            return []
        return reading("watts", (joules - last[1]) / (time - last[0]), time, self.name)

    def close(self) -> None:
        """Nothing to release."""


def total_joules(metrics: object) -> float:
    """The sum of the rails, in joules. A rail that this chip does not have is None."""
    values = [getattr(metrics, rail, None) for rail in _RAILS]
    known = [float(value) for value in values if value is not None]
    if not known:
        raise SensorError("zeus reads no energy counter on this chip")
    return sum(known) / 1000.0
