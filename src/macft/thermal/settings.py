"""Limits of heat and power: the Hydra group ``thermal``."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from macft.thermal.readings import STATES, state_level
from macft.thermal.simulated_mac import CHIPS

SENSORS = ("auto", "macos", "linux", "simulated", "none")
ON_BATTERY = ("full", "slow", "pause")
_HOURS = re.compile(r"([01]?\d|2[0-3]):([0-5]\d)-([01]?\d|2[0-3]):([0-5]\d)")


@dataclass
class SimulationConfig:
    """A Mac that is only computed: ``thermal.simulated``."""

    # One of the chips in src/macft/thermal/simulated_mac.py.
    chip: str = "macbook-pro-13-m2"
    # Temperature of the room, in C.
    ambient: float = 25.0
    # Ranks whose Mac lies on a blanket.
    hot_ranks: list[int] = field(default_factory=list)
    # Temperature at which these begin, in C, as if in use for long. Null: that of the room.
    hot_start: float | None = None
    # The blanket multiplies the thermal resistance between case and room by this.
    blanket: float = 2.5
    # Simulated seconds after which the blanket is taken away; 0 means never.
    blanket_seconds: float = 0.0
    # Simulated seconds that pass in a real one.
    speed: float = 1.0


@dataclass
class ThermalConfig:
    """The Hydra group ``thermal``. A limit of null is no limit."""

    # Keep the budget below. Off: nothing is read and nothing is done.
    enabled: bool = True
    # auto: what this machine has. macos, linux: that system's. simulated: a computed Mac. none: nothing is read.
    sensor: str = "auto"
    # Seconds between two readings.
    interval: float = 2.0
    # Highest temperature of the chip, in C.
    temperature_limit: float | None = None
    # Highest thermal state that is left alone: nominal, moderate, heavy or trapping (macOS's pressure levels).
    state_limit: str | None = None
    # Highest power, in W: the whole machine's where it can be read, the chip's otherwise.
    watts_limit: float | None = None
    # Away from mains power: full speed, slow (at most battery_duty), or pause.
    on_battery: str = "full"
    # Largest part of the time spent computing when on_battery is slow.
    battery_duty: float = 0.5
    # Pause below this charge, in percent, while away from mains power.
    battery_floor: float = 0.0
    # Local time of day in which to be quiet, such as "22:00-07:00".
    quiet_hours: str | None = None
    # Largest part of the time spent computing in quiet hours; 0 pauses.
    quiet_duty: float = 0.5
    # A node that rests still computes this part of the time, unless others take all its rows.
    min_duty: float = 0.1
    # Power of the machine under full load, in W, for an estimate where no sensor gives it.
    assumed_watts: float | None = None
    # Price of a kWh, in `currency`.
    power_price: float = 0.30
    # Name of the currency.
    currency: str = "EUR"
    # Grams of CO2 for a kWh.
    co2_grams_per_kwh: float = 300.0
    # The Mac that thermal.sensor=simulated computes.
    simulated: SimulationConfig = field(default_factory=SimulationConfig)


def problems(config: ThermalConfig) -> list[str]:
    """One line for each value that cannot be right; no I/O."""
    lines = []
    for key, value, choices in (
        ("sensor", config.sensor, SENSORS),
        ("on_battery", config.on_battery, ON_BATTERY),
        ("simulated.chip", config.simulated.chip, tuple(CHIPS)),
    ):
        if value not in choices:
            lines.append(f"thermal.{key}: '{value}' is not one of {', '.join(choices)}")
    if config.state_limit is not None and state_level(config.state_limit) is None:
        lines.append(f"thermal.state_limit: '{config.state_limit}' is not one of {', '.join(STATES)}")
    if config.quiet_hours is not None and _HOURS.fullmatch(config.quiet_hours) is None:
        lines.append(f"thermal.quiet_hours: '{config.quiet_hours}' is not written like 22:00-07:00")
    for key, number, low, high in (
        ("interval", config.interval, 0.05, 60.0),
        ("temperature_limit", config.temperature_limit, 30.0, 110.0),
        ("watts_limit", config.watts_limit, 1.0, 10_000.0),
        ("battery_duty", config.battery_duty, 0.0, 1.0),
        ("battery_floor", config.battery_floor, 0.0, 95.0),
        ("quiet_duty", config.quiet_duty, 0.0, 1.0),
        ("min_duty", config.min_duty, 0.02, 1.0),
        ("assumed_watts", config.assumed_watts, 1.0, 10_000.0),
        ("power_price", config.power_price, 0.0, 1e6),
        ("co2_grams_per_kwh", config.co2_grams_per_kwh, 0.0, 1e5),
        ("simulated.ambient", config.simulated.ambient, -20.0, 60.0),
        ("simulated.hot_start", config.simulated.hot_start, -20.0, 120.0),
        ("simulated.blanket", config.simulated.blanket, 1.0, 20.0),
        ("simulated.blanket_seconds", config.simulated.blanket_seconds, 0.0, 1e9),
        ("simulated.speed", config.simulated.speed, 0.1, 1000.0),
    ):
        if number is not None and not (math.isfinite(number) and low <= number <= high):
            lines.append(f"thermal.{key}: {number} must be from {low:g} to {high:g}")
    return lines


def quiet_minutes(text: str) -> tuple[int, int]:
    """``"22:00-07:30"`` to minutes of the day, (1320, 450)."""
    match = _HOURS.fullmatch(text)
    if match is None:
        raise ValueError(f"'{text}' is not written like 22:00-07:00")
    hours = [int(group) for group in match.groups()]
    return hours[0] * 60 + hours[1], hours[2] * 60 + hours[3]
