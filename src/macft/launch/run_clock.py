"""The time at which a run starts: fixed once, the same on all nodes, and kept in each node's run folder for a resume.

Chat templates that show the time see this one; see :mod:`macft.data.template_clock`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from macft.collective.base import Collective
from macft.config.schema import TrainConfig
from macft.config.yaml import to_yaml
from macft.data.template_clock import now
from macft.report.run_folder import RunFolder, write_atomically


def started(config: TrainConfig, time: str | None = None) -> TrainConfig:
    """``config`` with its time: ``time``, or else the one it has, or else that of this call."""
    time = time or config.dataset.template_time or now()
    return replace(config, dataset=replace(config.dataset, template_time=time))


def started_together(config: TrainConfig, collective: Collective, folder: Path) -> TrainConfig:
    """``config`` with rank 0's time; stored in ``folder`` where it was another one. A call of all ranks."""
    own = started(config)
    time = collective.broadcast(str(own.dataset.template_time).encode()).decode()
    return own if time == config.dataset.template_time else stored(started(config, time), folder)


def stored(config: TrainConfig, folder: Path) -> TrainConfig:
    """``config``, after it was written to the run's ``folder``."""
    write_atomically(RunFolder(folder).config, to_yaml(config))
    return config
