"""Lines for the user: which readings are missing, and when a governor acts and why."""

from __future__ import annotations

from collections.abc import Sequence

from macft.parallel.node_status import NodeStatus
from macft.thermal.readings import STATES, Conditions
from macft.thermal.settings import ThermalConfig

# A smaller change of duty gets no line; the governor's own steps are much smaller.
_NOTABLE_CHANGE = 0.15


class Notices:
    """Remembers the last line about each node, so that each change is reported once."""

    def __init__(self, config: ThermalConfig):
        self._config = config
        self._reported: dict[int, tuple[float, bool]] = {}

    def lines(
        self, nodes: Sequence[NodeStatus], shares: Sequence[float], blocks: Sequence[int] | None = None
    ) -> list[str]:
        """One line for each node whose governor has clearly changed its decision.

        By rank: nodes, their shares of the rows, and in a pipeline how many blocks their stages have.
        """
        lines = []
        for rank, (node, share) in enumerate(zip(nodes, shares, strict=True)):
            if is_notable_change(*self._reported.get(rank, (1.0, False)), node.duty, node.paused):
                self._reported[rank] = (node.duty, node.paused)
                if blocks is None:
                    lines.append(self._line(rank, node, share, len(nodes)))
                else:
                    lines.append(self._stage_line(rank, node, blocks[rank]))
        return lines

    def _line(self, rank: int, node: NodeStatus, share: float, count: int) -> str:
        who = f"thermal: node {rank}" if count > 1 else "thermal: this node"
        why = self._why(node)
        rows = f", {share:.0%} of the rows" if count > 1 else ""
        if node.paused and share > 0:
            return f"{who} may work only {node.duty:.0%} of the time, no other node can take its rows{why}"
        if node.paused:
            return f"{who} pauses, the others take its rows{why}"
        if node.duty >= 1.0:
            return f"{who} is back at full speed{rows}{why}"
        return f"{who} may work {node.duty:.0%} of the time{rows}{why}"

    def _stage_line(self, rank: int, node: NodeStatus, blocks: int) -> str:
        now = "is back at full speed" if node.duty >= 1.0 else f"may work {node.duty:.0%} of the time"
        return f"thermal: node {rank} {now}, {blocks} block{'' if blocks == 1 else 's'}{self._why(node)}"

    def _why(self, node: NodeStatus) -> str:
        config, cause = self._config, ""
        if node.reason == "thermal state" and node.state is not None:
            cause = f"thermal state {STATES[node.state]}, limit {config.state_limit}"
        elif node.reason == "power" and node.watts is not None:
            cause = f"{node.watts:.1f} W, limit {_number(config.watts_limit)}"
        elif node.temperature is not None and node.reason in ("", "temperature"):
            cause = f"{node.temperature:.0f} C, limit {_number(config.temperature_limit)}"
        elif node.reason:
            cause = node.reason
        return f" ({cause})" if cause else ""


def is_notable_change(old_duty: float, was_paused: bool, duty: float, paused: bool) -> bool:
    """Whether a governor's decision differs enough from an older one to be reported."""
    is_back = duty >= 1.0 and old_duty < 1.0
    return paused != was_paused or is_back or abs(duty - old_duty) >= _NOTABLE_CHANGE


def missing_readings(config: ThermalConfig, conditions: Conditions, reasons: Sequence[str]) -> list[str]:
    """One line with the limits that no sensor here can check, and the sensors' reasons; no line if there are none."""
    wanted = [
        ("temperature", config.temperature_limit is not None and conditions.temperature is None),
        ("thermal state", config.state_limit is not None and conditions.state is None),
        ("power", config.watts_limit is not None and conditions.watts is None),
        ("battery", config.battery_floor > 0 and conditions.on_battery is None),
    ]
    missing = [name for name, is_missing in wanted if is_missing]
    if not missing or config.sensor == "none":
        return []
    shown = [reason.removeprefix("thermal: ") for reason in reasons]
    if "power" not in missing:  # there is no limit of power
        shown = [reason for reason in shown if not reason.startswith("no watts ")]
    why = f" ({'; '.join(dict.fromkeys(shown))})" if shown else ""
    names = ", ".join(missing)
    return [f"thermal: no sensor here for {names}; these limits are off{why}"]


def _number(limit: float | None) -> str:
    return "none" if limit is None else f"{limit:g}"
