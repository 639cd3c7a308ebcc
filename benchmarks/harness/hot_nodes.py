"""Nodes of a run that are hot from their start, by simulated sensors."""

from __future__ import annotations

from collections.abc import Sequence


def hot_nodes(ranks: Sequence[int]) -> list[str]:
    """Overrides: ``ranks`` are Macs that are hot, and stages are looked at after every step."""
    return [
        "topology.rebalance_every=1",
        "thermal=performance",
        "thermal.sensor=simulated",
        "thermal.interval=0.05",
        "thermal.temperature_limit=72",
        "thermal.min_duty=0.3",
        "thermal.simulated.chip=mac-mini-m2",
        "thermal.simulated.speed=40",
        f"thermal.simulated.hot_ranks=[{','.join(map(str, ranks))}]",
        "thermal.simulated.hot_start=76",
    ]
