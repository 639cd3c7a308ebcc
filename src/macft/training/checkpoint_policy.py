"""When a checkpoint may be written, and what is told of it."""

from __future__ import annotations

import time

import mlx.nn as nn
import mlx.optimizers as optim

from macft.checkpoint.saver import CheckpointSaver
from macft.checkpoint.snapshot import Progress, capture, digest
from macft.collective.base import Collective
from macft.errors import RanksDiverged
from macft.report.events import CheckpointSaved, Noted, Reporter
from macft.training.diloco import OuterOptimizer
from macft.training.gradient_reducer import GradientReducer


class CheckpointPolicy:
    """Checkpoints of a rank's run. ``saved_step``: that of the last one, None if the next is due in any case."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: optim.Optimizer,
        collective: Collective,
        exchange: GradientReducer,
        outer: OuterOptimizer | None,
        saver: CheckpointSaver,
        reporter: Reporter,
        saved_step: int | None,
    ):
        self._model, self._optimizer, self._collective = model, optimizer, collective
        self._exchange, self._outer = exchange, outer
        self._saver, self._reporter = saver, reporter
        self.saved_step = saved_step

    def save(self, progress: Progress) -> None:
        """Has a checkpoint written, after all ranks have shown that they hold the same adapter.

        Raises:
            RanksDiverged: they don't.
        """
        if self.saved_step == progress.step:
            return
        started = time.perf_counter()
        self._require_equal_ranks(progress.step)
        self.saved_step = progress.step
        codec = self._exchange.capture()
        outer = self._outer.capture(self._optimizer, self._exchange) if self._outer else []
        if self._collective.rank < self._saver.writers:
            snapshot = capture(self._model, self._optimizer, progress, codec=codec, outer=outer)
            self._saver.begin(snapshot, since=started)

    def tell(self, *, wait: bool = False) -> None:
        """Reports the checkpoints that have been written, or could not be, since the last call."""
        if wait:
            self._saver.wait()
        for save in self._saver.news():
            if save.error:
                self._reporter.handle(Noted(f"{save.error}; training goes on", "warning"))
            else:
                self._reporter.handle(CheckpointSaved(save.step, save.path, save.is_best, save.seconds, save.waited))

    def last(self) -> str:
        """Where the newest checkpoint is, as part of a sentence."""
        self._saver.wait()
        store = self._saver.store
        steps = store.steps() if self._collective.rank < self._saver.writers else []
        return f"the last good checkpoint is {store.path(steps[0])}" if steps else "no checkpoint was saved yet"

    def _require_equal_ranks(self, step: int) -> None:
        collective = self._collective
        digests = collective.all_gather(digest(self._model)) if collective.world_size > 1 else []
        different = [rank for rank, value in enumerate(digests) if value != digests[0]]
        if different:
            raise RanksDiverged(
                f"step {step}: rank {different[0]} holds another adapter than rank 0; {self.last()}. "
                "Do all nodes run the same versions of macft and MLX?"
            )
