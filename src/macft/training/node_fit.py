"""Whether this node's memory holds its part of the run when nodes or stages change, and how the part is then computed.

A node that gets more rows may need smaller micro-batches, one that gets more blocks may have to read some from disk.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

from macft.device.mlx_device import keep_within
from macft.errors import ConfigError
from macft.model.execution import Execution
from macft.parallel.stage_layout import StageLayout
from macft.training.batch_loader import BatchLoader
from macft.training.gradients.gradient import StepGradient

log = logging.getLogger("macft.training")


class Fitted(NamedTuple):
    """How a node computes its part, which takes up to ``peak`` bytes of its ``budget``."""

    execution: Execution
    peak: float
    budget: float


Refit = Callable[[StageLayout, int, int], Fitted]
"""Layout, rank and world size to how that rank computes its part. Raises ConfigError where its memory is too small."""


class NodeFit:
    """Adapts ``compute`` and ``loader`` to this node's part. ``refit``: None where memory can't be predicted."""

    def __init__(self, refit: Refit | None, compute: StepGradient, loader: BatchLoader):
        self._refit, self._compute, self._loader = refit, compute, loader
        self._found: Fitted | None = None

    def obstacle(self, layout: StageLayout, rank: int, world_size: int) -> str:
        """Why ``rank``'s part doesn't fit this node's memory; empty if it does. :meth:`take` then makes it so."""
        self._found = None
        if self._refit is None:
            return ""
        try:
            self._found = self._refit(layout, rank, world_size)
        except ConfigError as error:
            # Without the key, and the settings with which it would fit: those of a run can't be changed now.
            return str(error).partition(": ")[2].partition("; ")[0] or str(error)
        return ""

    def take(self) -> None:
        """Computes from now on as the last :meth:`obstacle` has found."""
        if self._found is None:
            return
        execution, peak, budget = self._found
        size = execution.micro_batch_size
        log.info("memory: about %.2f GB of %.1f GB expected, micro-batches of %s rows", peak / 1e9, budget / 1e9, size)
        keep_within(budget, peak)
        self._loader.micro_batch_size = size
        self._compute.adopt(execution)
