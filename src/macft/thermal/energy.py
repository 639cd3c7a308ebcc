"""Energy: power over time, what it costs and what it emits."""

from __future__ import annotations

from collections.abc import Sequence

from macft.parallel.node_status import NodeStatus
from macft.report.energy import Energy
from macft.thermal.settings import ThermalConfig

JOULES_PER_KWH = 3.6e6


class EnergyMeter:
    """Adds up one node's energy in joules, by the trapezoidal rule between readings."""

    def __init__(self) -> None:
        self.joules = self.peak_watts = self.seconds = 0.0
        self.estimated = False
        self._last: tuple[float, float] | None = None

    def add(self, time: float, watts: float | None, *, estimated: bool) -> None:
        """Adds a reading in watts at ``time`` in seconds. None is a gap, during which nothing is added."""
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


def summarize(nodes: Sequence[NodeStatus], config: ThermalConfig, *, tokens: int, target_tokens: int) -> Energy | None:
    """A run's energy from the nodes' last statuses; None if no node reads its power.

    ``tokens`` are all that were computed, ``target_tokens`` those with a loss.
    """
    known = [node.joules for node in nodes if node.joules is not None]
    if not known:
        return None
    joules = sum(known)
    powers = [node.joules / node.metered_seconds for node in nodes if node.joules is not None and node.metered_seconds]
    kwh = joules / JOULES_PER_KWH
    return Energy(
        joules_by_rank=[node.joules for node in nodes],
        joules=joules,
        joules_per_token=joules / tokens if tokens else None,
        joules_per_target_token=joules / target_tokens if target_tokens else None,
        average_watts=sum(powers) if powers else None,
        peak_watts=sum(node.peak_watts or 0.0 for node in nodes),
        kwh=kwh,
        cost=kwh * config.power_price,
        currency=config.currency,
        co2_grams=kwh * config.co2_grams_per_kwh,
        estimated=any(node.estimated for node in nodes),
    )
