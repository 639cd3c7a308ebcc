"""Energy: power over time, what it costs and what it emits."""

from __future__ import annotations

from dataclasses import dataclass

JOULES_PER_KWH = 3.6e6


class EnergyMeter:
    """Adds up one node's energy in joules, by the trapezoidal rule between readings."""

    def __init__(self) -> None:
        self.joules = self.peak_watts = self.seconds = 0.0
        self.estimated = False
        self._last: tuple[float, float] | None = None

    def add(self, time: float, watts: float | None, *, estimated: bool) -> None:
        """Takes a reading at ``time`` in seconds. A gap, None, is not filled in."""
        if watts is None:
            self._last = None
            return
        if self._last is not None and time > self._last[0]:
            passed = time - self._last[0]
            self.joules += passed * (watts + self._last[1]) / 2
            self.seconds += passed
        self._last = (time, watts)
        self.peak_watts = max(self.peak_watts, watts)
        self.estimated = self.estimated or estimated


@dataclass(frozen=True)
class EnergySummary:
    """A run's energy. ``joules`` by rank, None where a node has no reading; watts are those of all nodes together."""

    joules_by_rank: list[float | None]
    joules: float
    joules_per_token: float | None
    average_watts: float | None
    peak_watts: float
    kwh: float
    cost: float
    currency: str
    co2_grams: float
    estimated: bool

    @property
    def line(self) -> str:
        """For people, in one line."""
        missing = sum(value is None for value in self.joules_by_rank)
        parts = [
            f"{self.joules:,.0f} J ({self.kwh:.4f} kWh)",
            f"{self.joules_per_token:.3g} J/token" if self.joules_per_token is not None else "",
            f"{self.average_watts:.1f} W on average, {self.peak_watts:.1f} W at most" if self.average_watts else "",
            f"{self.cost:.4f} {self.currency}",
            f"{self.co2_grams:.1f} g CO2",
            "estimated" if self.estimated else "",
            f"{missing} of {len(self.joules_by_rank)} nodes without a reading" if missing else "",
        ]
        return ", ".join(part for part in parts if part)


def summarize(
    joules_by_rank: list[float | None],
    *,
    peak_watts: float,
    tokens: int,
    seconds: float,
    estimated: bool,
    price: float,
    currency: str,
    co2_grams_per_kwh: float,
) -> EnergySummary | None:
    """The summary, or None where no node could tell."""
    known = [value for value in joules_by_rank if value is not None]
    if not known:
        return None
    joules = sum(known)
    kwh = joules / JOULES_PER_KWH
    return EnergySummary(
        joules_by_rank=joules_by_rank,
        joules=joules,
        joules_per_token=joules / tokens if tokens else None,
        average_watts=joules / seconds if seconds > 0 else None,
        peak_watts=peak_watts,
        kwh=kwh,
        cost=kwh * price,
        currency=currency,
        co2_grams=kwh * co2_grams_per_kwh,
        estimated=estimated,
    )
