"""The lines a person gets to read: what can't be seen, and when a governor acts and why."""

from __future__ import annotations

from collections.abc import Sequence

from macft.parallel.node_status import NodeStatus
from macft.thermal.readings import STATES, Conditions
from macft.thermal.settings import ThermalConfig

# A change of duty is worth a line from this size on; the governor itself moves in much smaller steps.
_WORTH_A_LINE = 0.15


class Notices:
    """Remembers what was last told of each node, so that each turn is told once."""

    def __init__(self, config: ThermalConfig):
        self._config = config
        self._told: dict[int, tuple[float, bool]] = {}

    def lines(self, nodes: Sequence[NodeStatus], shares: Sequence[float]) -> list[str]:
        """One line for each node whose governor has begun, ended or clearly changed what it does."""
        found = []
        for rank, (node, share) in enumerate(zip(nodes, shares, strict=True)):
            duty, paused = self._told.get(rank, (1.0, False))
            is_back = node.duty >= 1.0 and duty < 1.0
            if node.paused == paused and not is_back and abs(node.duty - duty) < _WORTH_A_LINE:
                continue
            self._told[rank] = (node.duty, node.paused)
            found.append(self._line(rank, node, share, len(nodes)))
        return found

    def _line(self, rank: int, node: NodeStatus, share: float, count: int) -> str:
        who = f"thermal: node {rank}" if count > 1 else "thermal: this node"
        why = self._why(node)
        rows = f", {share:.0%} of the rows" if count > 1 else ""
        if node.paused and share > 0:
            return f"{who} crawls at {node.duty:.0%} of the time, nobody else can take its rows{why}"
        if node.paused:
            return f"{who} pauses, the others take its rows{why}"
        if node.duty >= 1.0:
            return f"{who} is back at full speed{rows}{why}"
        return f"{who} may work {node.duty:.0%} of the time{rows}{why}"

    def _why(self, node: NodeStatus) -> str:
        config, told = self._config, ""
        if node.reason == "thermal state" and node.state is not None:
            told = f"thermal state {STATES[node.state]}, limit {config.state_limit}"
        elif node.reason == "power" and node.watts is not None:
            told = f"{node.watts:.1f} W, limit {_number(config.watts_limit)}"
        elif node.temperature is not None and node.reason in ("", "temperature"):
            told = f"{node.temperature:.0f} C, limit {_number(config.temperature_limit)}"
        elif node.reason:
            told = node.reason
        return f" ({told})" if told else ""


def blind_spots(config: ThermalConfig, conditions: Conditions, reasons: Sequence[str]) -> list[str]:
    """What the budget limits and nobody can see, in one line with the sensors' reasons; nothing where all is seen."""
    wanted = [
        ("temperature", config.temperature_limit is not None and conditions.temperature is None),
        ("thermal state", config.state_limit is not None and conditions.state is None),
        ("power", config.watts_limit is not None and conditions.watts is None),
        ("battery", config.battery_floor > 0 and conditions.on_battery is None),
    ]
    unseen = [name for name, is_unseen in wanted if is_unseen]
    if not unseen or config.sensor == "none":
        return []
    told = [reason.removeprefix("thermal: ") for reason in reasons]
    if "power" not in unseen:  # nobody asked for it
        told = [reason for reason in told if not reason.startswith("no watts ")]
    because = "; ".join(dict.fromkeys(told))
    why = f" ({because})" if because else ""
    return [f"thermal: no reading of {', '.join(unseen)} here, so those limits do nothing{why}"]


def _number(limit: float | None) -> str:
    return "none" if limit is None else f"{limit:g}"
