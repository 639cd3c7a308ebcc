"""Shares of the rows that follow the nodes' measured speed, and what heat and power let them do.

Every rank sees the same statuses (they are sent with the gradient) and computes the same shares: only +, -, * and / on
float64, which give the same bits on every machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from macft.parallel.node_status import NodeStatus

# Weight of the newest measurement in a node's speed.
_SMOOTHING = 0.3
# Shares move only if one of them changes by this part of itself and by this much of the whole.
_RELATIVE, _ABSOLUTE = 0.08, 0.01
# A node without rows can't be measured, so its speed moves towards the others' mean by this part each time the shares
# are computed, until it gets rows again.
_DRIFT = 0.05
# Shorter times are not used.
_MIN_SECONDS = 1e-6


class ShareBalancer:
    """Shares of the ranks, adding up to 1.

    ``policy`` is ``"auto"`` (measured tokens/s), ``"equal"``, or one share for each rank. Under all three a node's
    share is multiplied by its duty, and is 0 while it is paused, unless all are.
    """

    def __init__(self, policy: str | Sequence[float], world_size: int, *, every: int):
        self._world_size, self._every = world_size, max(1, every)
        self._is_auto = policy == "auto"
        base = [1.0] * world_size if isinstance(policy, str) else [float(share) for share in policy]
        if len(base) != world_size or any(not share >= 0 for share in base) or not sum(base) > 0:
            raise ValueError("there must be one share of 0 or more for each rank, and one above 0")
        self._base = base
        self._speeds: list[float | None] = [None] * world_size
        self._measurements = [0] * world_size
        self._steps = 0
        self.shares = _normalized(base)

    def state_dict(self) -> dict[str, Any]:
        """The whole state, in types that msgpack and JSON have."""
        return {
            "auto": self._is_auto,
            "every": self._every,
            "base": self._base,
            "speeds": self._speeds,
            "measurements": self._measurements,
            "steps": self._steps,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], old_ranks: Sequence[int | None]) -> ShareBalancer:
        """The state of :meth:`state_dict` for another group of nodes.

        ``old_ranks``: for each new rank the rank that the node had, None for a node that joined. That one counts as the
        mean of the others until it has been measured.
        """
        stayed = [float(state["base"][old]) for old in old_ranks if old is not None]
        mean = sum(stayed) / len(stayed) if sum(stayed) > 0 else 1.0
        base = [mean if old is None else float(state["base"][old]) for old in old_ranks]
        balancer = cls(base if sum(base) > 0 else [1.0] * len(base), len(base), every=state["every"])
        balancer._is_auto, balancer._steps = state["auto"], state["steps"]
        balancer._speeds = [None if old is None else state["speeds"][old] for old in old_ranks]
        # The first step of a node that joined is a warm-up and isn't measured.
        balancer._measurements = [0 if old is None else state["measurements"][old] for old in old_ranks]
        if balancer._is_auto:
            balancer.shares = _normalized(balancer._known_speeds())
        return balancer

    def observe(self, statuses: Sequence[NodeStatus]) -> bool:
        """Takes the statuses of a step, by rank; returns whether the shares have changed."""
        self._steps += 1
        for rank, status in enumerate(statuses):
            self._measure(rank, status)
        pausing = any(status.paused != (share == 0) for status, share in zip(statuses, self.shares, strict=True))
        if self._steps % self._every and not pausing:
            return False
        target = self._target(statuses)
        if not any(self._differs(new, old) for new, old in zip(target, self.shares, strict=True)):
            return False
        self.shares = target
        return True

    def _measure(self, rank: int, status: NodeStatus) -> None:
        if status.tokens <= 0 or status.busy_seconds < _MIN_SECONDS:
            return
        self._measurements[rank] += 1
        if self._measurements[rank] == 1:
            return  # the first step compiles, and is a warm-up
        speed, known = status.tokens / status.busy_seconds, self._speeds[rank]
        self._speeds[rank] = speed if known is None else known + _SMOOTHING * (speed - known)

    def _target(self, statuses: Sequence[NodeStatus]) -> list[float]:
        base = self._measured_speeds(statuses) if self._is_auto else self._base
        weights = [0.0 if node.paused else share * node.duty for share, node in zip(base, statuses, strict=True)]
        return _normalized(weights if sum(weights) > 0 else base)

    def _known_speeds(self) -> list[float]:
        known = [speed for speed in self._speeds if speed is not None]
        mean = sum(known) / len(known) if known else 1.0
        return [mean if speed is None else speed for speed in self._speeds]

    def _measured_speeds(self, statuses: Sequence[NodeStatus]) -> list[float]:
        known = [speed for speed in self._speeds if speed is not None]
        mean = sum(known) / len(known) if known else 1.0
        for rank, status in enumerate(statuses):
            speed = self._speeds[rank]
            if speed is not None and status.tokens <= 0 and not status.paused and speed < mean:
                self._speeds[rank] = speed + _DRIFT * (mean - speed)
        return self._known_speeds()

    @staticmethod
    def _differs(new: float, old: float) -> bool:
        return (new == 0) != (old == 0) or abs(new - old) > max(_RELATIVE * old, _ABSOLUTE)


def _normalized(weights: Sequence[float]) -> list[float]:
    total = sum(weights)
    return [weight / total for weight in weights]
