"""Readings of sensors, and a node's conditions, which combine them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

STATES = ("nominal", "moderate", "heavy", "trapping", "sleeping")
"""macOS's thermal pressure levels, 0 to 4; throttling proper starts at heavy."""
_PROCESS_INFO_STATES = {"fair": 1, "serious": 3, "critical": 4}

# Possible values; any other is an error of the sensor. A GPU of 5 C and a package of 0 W have been seen.
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
    """One value. ``time`` is in seconds of the sensor's own clock, which is monotonic."""

    kind: str
    value: float
    unit: str
    time: float
    source: str
    estimated: bool = False


@dataclass(frozen=True)
class Conditions:
    """The newest plausible value of each kind, None if unknown. ``time`` is as in :class:`Reading`.

    ``temperature`` is in C, ``state`` an index of :data:`STATES`, ``battery`` a charge in percent.
    """

    time: float
    temperature: float | None = None
    state: int | None = None
    watts: float | None = None
    watts_estimated: bool = False
    battery: float | None = None
    on_battery: bool | None = None
    low_power: bool | None = None


def reading(kind: str, value: float | None, time: float, source: str, *, estimated: bool = False) -> list[Reading]:
    """A list of one reading; empty if the value is missing or impossible."""
    unit, low, high = _PLAUSIBLE[kind]
    if value is None or not math.isfinite(value) or not low <= value <= high:
        return []
    return [Reading(kind, float(value), unit, time, source, estimated)]


def combine(readings: Iterable[Reading], time: float) -> Conditions:
    """Conditions at ``time``, from the first reading of each kind."""
    first: dict[str, Reading] = {}
    for item in readings:
        first.setdefault(item.kind, item)

    def value(kind: str) -> float | None:
        return first[kind].value if kind in first else None

    def flag(kind: str) -> bool | None:
        number = value(kind)
        return None if number is None else number > 0

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
