"""What a node may use now, given the settings, the time of day and its power supply."""

from __future__ import annotations

from dataclasses import dataclass

from macft.thermal.readings import Conditions, state_level
from macft.thermal.settings import ThermalConfig, quiet_minutes

# A paused node starts again once its charge is this many percent above the floor.
_BATTERY_HYSTERESIS = 5.0


@dataclass(frozen=True)
class Cap:
    """The largest part of the time to spend computing, 0 to 1, and the reason if it is less than 1."""

    duty: float = 1.0
    reason: str = ""


class Budget:
    """The limits of a :class:`~macft.thermal.settings.ThermalConfig`."""

    def __init__(self, config: ThermalConfig):
        self.temperature = config.temperature_limit
        self.state = None if config.state_limit is None else state_level(config.state_limit)
        self.watts = config.watts_limit
        self.min_duty = config.min_duty
        self._config = config
        self._quiet = None if config.quiet_hours is None else quiet_minutes(config.quiet_hours)
        self._is_low = False

    def cap(self, conditions: Conditions, minute: int) -> Cap:
        """The cap at ``minute`` of the local day (0 to 1439); a duty of 0 asks for a pause."""
        config, caps = self._config, [Cap()]
        on_battery = bool(conditions.on_battery)
        if config.battery_floor > 0 and on_battery and conditions.battery is not None:
            floor = config.battery_floor + (_BATTERY_HYSTERESIS if self._is_low else 0.0)
            self._is_low = conditions.battery < floor
        else:
            self._is_low = False
        if self._is_low:
            caps.append(Cap(0.0, "battery"))
        if on_battery and config.on_battery != "full":
            caps.append(Cap(config.battery_duty if config.on_battery == "slow" else 0.0, "on battery"))
        if self._quiet is not None and _within(minute, *self._quiet):
            caps.append(Cap(config.quiet_duty, "quiet hours"))
        return min(caps, key=lambda cap: cap.duty)


def _within(minute: int, start: int, end: int) -> bool:
    return start <= minute < end if start <= end else minute >= start or minute < end
