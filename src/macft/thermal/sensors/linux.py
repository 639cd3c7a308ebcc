"""Linux: temperatures from sysfs and psutil, power from RAPL, battery from psutil. Often none of them exists."""

from __future__ import annotations

from pathlib import Path

import psutil

from macft.thermal.readings import Reading, reading
from macft.thermal.sensors.base import SensorError, now

# Names of the processor's sensors, the most trusted first.
_CHIPS = ("coretemp", "k10temp", "zenpower", "cpu_thermal", "cpu-thermal", "soc_thermal")


class LinuxTemperature:
    """The highest temperature of the processor's sensors, or of the thermal zones if none has a known name."""

    name = "sysfs temperature"
    kinds: tuple[str, ...] = ("temperature",)

    def __init__(self, root: Path = Path("/sys")):
        self._zones = sorted((root / "class/thermal").glob("thermal_zone*/temp"))

    def read(self) -> list[Reading]:
        values = self._processor_temperatures() or [value for zone in self._zones for value in _millidegrees(zone)]
        readings = [item for value in values for item in reading("temperature", value, now(), self.name)]
        if not readings:
            raise SensorError("this machine shows no temperature")
        return [max(readings, key=lambda item: item.value)]

    def close(self) -> None:
        """Nothing to release."""

    def _processor_temperatures(self) -> list[float]:
        chips = psutil.sensors_temperatures() if hasattr(psutil, "sensors_temperatures") else {}
        for chip in _CHIPS:
            if chip in chips:
                return [float(item.current) for item in chips[chip]]
        return []


class Rapl:
    """Power of the processor packages (powercap), from counters that wrap around; usually only root may read them."""

    name = "RAPL"
    kinds: tuple[str, ...] = ("watts",)

    def __init__(self, root: Path = Path("/sys")):
        self._packages = [
            (folder / "energy_uj", _integer(folder / "max_energy_range_uj"))
            for folder in sorted((root / "class/powercap").glob("intel-rapl:?"))
        ]
        self._last: list[int] = []
        self._time = 0.0

    def read(self) -> list[Reading]:
        time, counts = now(), [_integer(counter) for counter, _ in self._packages]
        known = [count for count in counts if count is not None]
        if not known or len(known) < len(counts):
            raise SensorError("this machine shows no RAPL counter to this user")
        last, passed = self._last, time - self._time
        self._last, self._time = known, time
        if not last or passed <= 0:
            return []
        joules = sum(
            (new - old if new >= old else new - old + (most or 0)) / 1e6
            for new, old, (_, most) in zip(known, last, self._packages, strict=True)
        )
        return reading("watts", joules / passed, time, self.name)

    def close(self) -> None:
        """Nothing to release."""


class Battery:
    """psutil's battery; it works on macOS too, where pmset comes first."""

    name = "battery"
    kinds: tuple[str, ...] = ("battery", "on_battery")

    def read(self) -> list[Reading]:
        battery = psutil.sensors_battery()
        if battery is None:
            return reading("on_battery", 0.0, now(), self.name)
        return [
            *reading("battery", float(battery.percent), now(), self.name),
            *reading("on_battery", float(battery.power_plugged is False), now(), self.name),
        ]

    def close(self) -> None:
        """Nothing to release."""


def _millidegrees(path: Path) -> list[float]:
    value = _integer(path)
    return [] if value is None else [value / 1000.0]


def _integer(path: Path) -> int | None:
    try:
        with path.open("rb") as file:
            return int(file.read(32))
    except (OSError, ValueError):
        return None
