"""A simulated Mac, heated by this process's real load, and an estimate of power for machines without a sensor."""

from __future__ import annotations

from macft.thermal.load import Load, LoadMeter
from macft.thermal.readings import Reading, reading
from macft.thermal.sensors.base import now
from macft.thermal.settings import SimulationConfig
from macft.thermal.simulated_mac import CHIPS, SimulatedMac

# The power of an idle laptop, as a part of its power under load.
_IDLE_PART = 0.1


class SimulatedSensor:
    """Temperature, state and power of a :class:`~macft.thermal.simulated_mac.SimulatedMac`, in simulated time."""

    name = "simulated"
    kinds: tuple[str, ...] = ("temperature", "state", "watts", "on_battery")

    def __init__(self, config: SimulationConfig, load: Load, *, rank: int):
        self._config, self._load = config, LoadMeter(load)
        blanket = config.blanket if rank in config.hot_ranks else 1.0
        self.mac = SimulatedMac(CHIPS[config.chip], ambient=config.ambient, blanket=blanket)
        if rank in config.hot_ranks and config.hot_start is not None:
            self.mac.die = self.mac.case = config.hot_start
        self._time = 0.0

    def read(self) -> list[Reading]:
        part, passed = self._load.read()
        self._time += passed * self._config.speed
        if 0 < self._config.blanket_seconds <= self._time:
            self.mac.blanket = 1.0
        self.mac.run(part, passed * self._config.speed)
        return [
            *reading("temperature", self.mac.die, self._time, self.name),
            *reading("state", self.mac.state, self._time, self.name),
            *reading("watts", self.mac.watts, self._time, self.name, estimated=True),
            *reading("on_battery", 0.0, self._time, self.name),
        ]

    def close(self) -> None:
        """Nothing to release."""


class AssumedPower:
    """An estimate from ``thermal.assumed_watts`` and the load, marked as estimated."""

    name = "assumed power"
    kinds: tuple[str, ...] = ("watts",)

    def __init__(self, watts: float, load: Load):
        self._watts, self._load = watts, LoadMeter(load)

    def read(self) -> list[Reading]:
        part, _ = self._load.read()
        watts = self._watts * (_IDLE_PART + (1 - _IDLE_PART) * part)
        return reading("watts", watts, now(), self.name, estimated=True)

    def close(self) -> None:
        """Nothing to release."""
