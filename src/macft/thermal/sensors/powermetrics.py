"""``powermetrics``, if sudo may run it without a password: thermal pressure and the chip's power."""

from __future__ import annotations

import math
import plistlib
from collections.abc import Mapping
from typing import Any

from macft.thermal.readings import Reading, reading, state_level
from macft.thermal.sensors.base import SensorError, now, output_of

_ARGUMENTS = ["-n", "powermetrics", "-s", "thermal,cpu_power,gpu_power", "-i", "500", "-n1", "-f", "plist"]
_MOST_BYTES = 1 << 20


class Powermetrics:
    """One sample as a property list; ``sudo -n`` fails at once if a password is needed."""

    name = "powermetrics"
    kinds: tuple[str, ...] = ("state", "watts")

    def read(self) -> list[Reading]:
        return parse_plist(output_of(["sudo", *_ARGUMENTS]), self.name)

    def close(self) -> None:
        """Nothing to release."""


def parse_plist(output: bytes, source: str) -> list[Reading]:
    """Readings of the last sample; samples are separated by NUL. Energies are mJ over the interval.

    Raises:
        SensorError: it is not a property list of powermetrics.
    """
    samples = [sample for sample in output[:_MOST_BYTES].split(b"\0") if sample.strip()]
    try:
        values: Any = plistlib.loads(samples[-1], fmt=plistlib.FMT_XML)
    except Exception:  # the XML parser has many ways to refuse
        raise SensorError("powermetrics' output is not a property list") from None
    if not isinstance(values, dict):
        raise SensorError("powermetrics' output has no values")
    time, pressure = now(), values.get("thermal_pressure")
    level = state_level(pressure) if isinstance(pressure, str) else None
    return [
        *reading("state", level, time, source),
        *reading("watts", _watts(values), time, source),
    ]


def _watts(values: Mapping[str, object]) -> float | None:
    processor, elapsed = values.get("processor"), _number(values.get("elapsed_ns"))
    if not isinstance(processor, dict) or elapsed is None or elapsed <= 0:
        return None
    millijoules = [_number(processor.get(key)) for key in ("cpu_energy", "gpu_energy", "ane_energy")]
    known = [value for value in millijoules if value is not None and value >= 0]
    return sum(known) / 1000.0 / (elapsed / 1e9) if known else None


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e18:
        return None
    return float(value) if math.isfinite(value) else None
