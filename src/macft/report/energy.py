"""The energy that a run has used."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Energy:
    """A run's energy from the first step of this start to the last, with validations, without scoring before and after.

    ``joules_by_rank`` has None for a node without a power reading. Watts are the sum of all nodes. ``estimated``: the
    power of at least one node comes from a model, not from a sensor.
    """

    joules_by_rank: list[float | None]
    joules: float
    joules_per_token: float | None
    joules_per_target_token: float | None
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
            f"{self.joules:,.0f} J",
            f"{self.joules_per_token:.3g} J/token" if self.joules_per_token is not None else "",
            f"{self.joules_per_target_token:.3g} J/target token" if self.joules_per_target_token is not None else "",
            f"{self.average_watts:.1f} W on average" if self.average_watts is not None else "",
            f"{self.peak_watts:.1f} W at most",
            f"{self.kwh:.3g} kWh",
            f"{self.cost:.3g} {self.currency}",
            f"{self.co2_grams:.3g} g CO2",
            "estimated" if self.estimated else "",
            f"{missing} of {len(self.joules_by_rank)} nodes without a reading" if missing else "",
        ]
        return ", ".join(part for part in parts if part)
