"""What a sensor says, and what is known about a node when all of them have been heard."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

STATES = ("nominal", "moderate", "heavy", "trapping", "sleeping")
"""macOS's thermal pressure levels, 0 to 4; throttling proper starts at heavy."""
_PROCESS_INFO_STATES = {"fair": 1, "serious": 3, "critical": 4}

# What can be true. Outside of it a reading is an error of the sensor: a GPU of 5 C, a package of 0 W, were reported.
_PLAUSIBLE = {
    "temperature": ("C", 10.0, 130.0),
    "state": ("level", 0.0, 4.0),
    "watts": ("W", 0.05, 2000.0),
    "battery": ("%", 0.0, 100.0),
    "on_battery": ("0/1", 0.0, 1.0),
    "low_power": ("0/1", 0.0, 1.0),
}


@dataclass(frozen=True)
class Reading:
    """One value. ``time`` is in seconds of the sensor's own clock, which only ever runs forward."""

    kind: str
    value: float
    unit: str
    time: float
    source: str
    estimated: bool = False


@dataclass(frozen=True)
class Conditions:
    """The newest plausible value of each kind; None where nobody knows. ``time`` as in :class:`Reading`."""

    time: float
    temperature: float | None = None
    state: int | None = None
    watts: float | None = None
    watts_estimated: bool = False
    battery: float | None = None
    on_battery: bool | None = None
    low_power: bool | None = None


def reading(kind: str, value: float | None, time: float, source: str, *, estimated: bool = False) -> list[Reading]:
    """The reading in a list, or an empty list where the value is missing or can't be true."""
    unit, low, high = _PLAUSIBLE[kind]
    if value is None or not math.isfinite(value) or not low <= value <= high:
        return []
    return [Reading(kind, float(value), unit, time, source, estimated)]


def combine(readings: Iterable[Reading], time: float) -> Conditions:
    """Conditions from readings, of which the first of each kind counts."""
    first: dict[str, Reading] = {}
    for item in readings:
        first.setdefault(item.kind, item)

    def value(kind: str) -> float | None:
        return first[kind].value if kind in first else None

    def flag(kind: str) -> bool | None:
        found = value(kind)
        return None if found is None else found > 0

    state = value("state")
    return Conditions(
        time=time,
        temperature=value("temperature"),
        state=None if state is None else int(state),
        watts=value("watts"),
        watts_estimated="watts" in first and first["watts"].estimated,
        battery=value("battery"),
        on_battery=flag("on_battery"),
        low_power=flag("low_power"),
    )


def state_level(name: str) -> int | None:
    """The level of a pressure level's or of ProcessInfo's name (fair, serious, critical); None for another word."""
    word = name.strip().lower()
    return STATES.index(word) if word in STATES else _PROCESS_INFO_STATES.get(word)
