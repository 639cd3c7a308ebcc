"""The time at which a run starts: fixed once, the same on all nodes, and kept in each node's run folder for a resume.

Chat templates that show the time see this one; see :mod:`macft.data.template_clock`.
"""

from __future__ import annotations

from dataclasses import replace

from macft.collective.base import Collective
from macft.config.schema import TrainConfig
from macft.data.template_clock import now


def started(config: TrainConfig, time: str | None = None) -> TrainConfig:
    """``config`` with its time: ``time``, or else the one it has, or else that of this call."""
    time = time or config.dataset.template_time or now()
    return replace(config, dataset=replace(config.dataset, template_time=time))


def started_together(config: TrainConfig, collective: Collective) -> TrainConfig:
    """``config`` with rank 0's time. A collective call."""
    own = started(config)
    time = collective.broadcast(str(own.dataset.template_time).encode()).decode()
    return started(config, time)
