"""A Mac as a thermal circuit: die and case as two capacities, two resistances, a fan, and the firmware's throttle.

Lumped RC model (the usual one: Skadron et al., "Temperature-aware microarchitecture", ISCA 2003)::

    power -> [die] --sink_resistance-- [case] --case_resistance / (1 + fan_gain * fan)-- room

Where the figures come from:

- ``trip``, ``release``, ``full_watts``, ``clamped_watts`` and ``clamped_speed`` of macbook-pro-13-m2 are a published
  measurement (V. Yuryev, Max Tech, 29 June 2022): the chip goes to 108 C, the GPU then drops from 1393 to 289 MHz and
  the package from 29.46 to 7.31 W, down to 84 C, and up again, in waves. Speed is taken as proportional to the clock.
- ``case_capacity`` is the mass of the aluminium case (about half of the machine's) at 0.9 J/(g K); ``die_capacity``
  is fitted to a rise of the die within some 20 seconds.
- The resistances are assumptions. With them, at 25 C, the Pro throttles after a few minutes and the Air (no fan, the
  same chip at 20 W) after about ten, as reviews report; an M3 Max and a Mac mini do not throttle.

The model is for tuning and testing a controller. It does not predict how a particular machine behaves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

_STEP_SECONDS = 0.5


@dataclass(frozen=True)
class SimulatedChip:
    """Temperatures in C, power in W, resistances in K/W, capacities in J/K; ``speed`` relative to an M2's."""

    speed: float
    full_watts: float
    idle_watts: float
    sink_resistance: float
    die_capacity: float
    case_resistance: float
    case_capacity: float
    fan_gain: float
    fan_start: float
    fan_full: float
    trip: float
    release: float
    clamped_speed: float
    clamped_watts: float


_PRO_13 = SimulatedChip(
    speed=1.0,
    full_watts=29.46,
    idle_watts=2.0,
    sink_resistance=1.8,
    die_capacity=12.0,
    case_resistance=4.5,
    case_capacity=500.0,
    fan_gain=0.6,
    fan_start=60.0,
    fan_full=95.0,
    trip=108.0,
    release=84.0,
    clamped_speed=289 / 1393,
    clamped_watts=7.31,
)

CHIPS: dict[str, SimulatedChip] = {
    "macbook-pro-13-m2": _PRO_13,
    "macbook-air-m2": replace(_PRO_13, full_watts=20.0, idle_watts=1.5, case_resistance=3.6, fan_gain=0.0, speed=0.9),
    "macbook-pro-16-m3-max": replace(
        _PRO_13,
        speed=3.0,
        full_watts=78.0,
        idle_watts=5.0,
        sink_resistance=0.45,
        die_capacity=40.0,
        case_resistance=1.1,
        case_capacity=1000.0,
        fan_gain=1.5,
        clamped_watts=15.0,
    ),
    "mac-mini-m2": replace(_PRO_13, sink_resistance=1.0, case_resistance=1.8, case_capacity=600.0),
}


class SimulatedMac:
    """The state of one simulated Mac, which starts at ``ambient``, the temperature of the room in C.

    ``blanket`` multiplies the resistance between case and room; it may be changed at any time.
    """

    def __init__(self, chip: SimulatedChip, *, ambient: float = 25.0, blanket: float = 1.0):
        self.chip, self.ambient, self.blanket = chip, ambient, blanket
        self.die = self.case = ambient
        self.clamped = False
        self.watts = chip.idle_watts

    @property
    def state(self) -> int:
        """macOS's pressure level: heavy while clamped, moderate near the trip point."""
        return 2 if self.clamped else 1 if self.die > self.chip.trip - 5.0 else 0

    @property
    def fan(self) -> float:
        """0 to 1."""
        chip = self.chip
        return min(1.0, max(0.0, (self.die - chip.fan_start) / (chip.fan_full - chip.fan_start)))

    def run(self, load: float, seconds: float) -> float:
        """Simulates ``seconds``, of which the part ``load`` (0 to 1) is spent computing; returns the work done.

        Work is in seconds of an unthrottled M2.
        """
        work, left = 0.0, seconds
        while left > 1e-9:
            part = min(_STEP_SECONDS, left)
            left -= part
            work += self._step(min(1.0, max(0.0, load)), part)
        return work

    def _step(self, load: float, seconds: float) -> float:
        chip = self.chip
        self.clamped = self.die > chip.release if self.clamped else self.die >= chip.trip
        busy_watts = chip.clamped_watts if self.clamped else chip.full_watts
        self.watts = chip.idle_watts + load * (busy_watts - chip.idle_watts)
        to_case = (self.die - self.case) / chip.sink_resistance
        outside = chip.case_resistance * self.blanket / (1 + chip.fan_gain * self.fan)
        self.die += (self.watts - to_case) / chip.die_capacity * seconds
        self.case += (to_case - (self.case - self.ambient) / outside) / chip.case_capacity * seconds
        return seconds * load * chip.speed * (chip.clamped_speed if self.clamped else 1.0)
