"""When stages of a pipeline should hand over blocks: measured times of the stages, and what heat and power allow.

Every rank sees the same statuses and comes to the same answer, as with :mod:`macft.parallel.balance`. Which blocks move
is decided elsewhere: this only says when to look for another layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from macft.parallel.node_status import NodeStatus
from macft.parallel.stage_layout import StageLayout

# Weight of the newest measurement.
_SMOOTHING = 0.3
# Steps after a change of the layout that aren't measured: blocks are read, and caches filled.
_WARM_UP = 2
# A pipeline is uneven if its slowest stage takes so many times as long as the mean of its stages.
_UNEVEN = 1.08
# Another layout is looked for after so many times `every` uneven steps in a row, and then not for so many.
_CONFIRMED, _REST = 2, 8
_LEAST_SECONDS = 1e-9


@dataclass(frozen=True)
class StageSpeeds:
    """By rank: ``seconds`` a token that its stage is busy (None: not measured), the part of the time it may compute.

    ``reasons``: why that is less than 1; empty where it isn't.
    """

    seconds: tuple[float | None, ...]
    duties: tuple[float, ...]
    reasons: tuple[str, ...]


class StageBalancer:
    """Measures the stages of a layout. ``every``: ``topology.rebalance_every``."""

    def __init__(self, world_size: int, *, every: int):
        self._every = max(1, every)
        self._seconds: list[float | None] = [None] * world_size
        self._duties = [1.0] * world_size
        self._reasons = [""] * world_size
        self._measured = [0] * world_size
        self._uneven = 0
        self._rest = 0

    @property
    def speeds(self) -> StageSpeeds:
        """What is known now."""
        return StageSpeeds(tuple(self._seconds), tuple(self._duties), tuple(self._reasons))

    def state_dict(self) -> dict[str, Any]:
        """What a node that joins needs to decide as the others do, in types that msgpack has."""
        return {"every": self._every, "rest": self._rest}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], world_size: int) -> StageBalancer:
        """The inverse of :meth:`state_dict`, for nodes that have changed: their stages are measured anew."""
        balancer = cls(world_size, every=state["every"])
        balancer._rest = state["rest"]
        return balancer

    def observe(self, statuses: Sequence[NodeStatus], layout: StageLayout) -> bool:
        """Takes the statuses of a step, by rank; returns whether another layout should be looked for now."""
        for rank, status in enumerate(statuses):
            self._measure(rank, status)
        self._rest = max(0, self._rest - 1)
        self._uneven = self._uneven + 1 if self._is_uneven(layout) else 0
        if self._rest or self._uneven < _CONFIRMED * self._every:
            return False
        self._uneven, self._rest = 0, _REST * self._every
        return True

    def layout_changed(self) -> None:
        """The stages have other blocks: they are measured anew."""
        self._seconds = [None] * len(self._seconds)
        self._measured = [0] * len(self._measured)

    def _measure(self, rank: int, status: NodeStatus) -> None:
        self._duties[rank] += _SMOOTHING * (status.duty - self._duties[rank])
        self._reasons[rank] = status.reason
        if status.tokens <= 0:
            return
        self._measured[rank] += 1
        if self._measured[rank] <= _WARM_UP:
            return
        seconds = max(status.busy_seconds - (status.wait_seconds or 0.0), _LEAST_SECONDS) / status.tokens
        known = self._seconds[rank]
        self._seconds[rank] = seconds if known is None else known + _SMOOTHING * (seconds - known)

    def _is_uneven(self, layout: StageLayout) -> bool:
        """Whether blocks could move: a stage is slower than others, or a rank that may compute has none."""
        for pipeline in layout.pipelines:
            loads = []
            for stage in pipeline:
                seconds = self._seconds[stage.rank]
                if seconds is None:
                    return False
                loads.append(seconds / self._duties[stage.rank])
            if max(loads) > _UNEVEN * sum(loads) / len(loads):
                return True
        used = {stage.rank for pipeline in layout.pipelines for stage in pipeline}
        return len(used) < min(len(self._seconds), layout.blocks * len(layout.pipelines))
