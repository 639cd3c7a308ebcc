"""When checkpoints are written, and what is reported of them."""

from __future__ import annotations

import time

from macft.checkpoint.saver import CheckpointSaver
from macft.checkpoint.snapshot import digest
from macft.collective.base import Collective
from macft.device import fault_points
from macft.errors import RanksDiverged
from macft.report.events import CheckpointSaved, Noted, Reporter
from macft.training.state import TrainState


class CheckpointPolicy:
    """The checkpoints of a rank's run: every ``every`` steps (0: never), at each best validation, and at the end."""

    def __init__(
        self, state: TrainState, collective: Collective, saver: CheckpointSaver, reporter: Reporter, *, every: int
    ):
        self._state, self._collective, self._saver, self._reporter = state, collective, saver, reporter
        self._every = every
        self._saved_step = state.progress.step or None

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is written after update ``step`` (from 1), whatever its validation says."""
        return bool(self._every) and step % self._every == 0

    def save_if_due(self) -> None:
        """Saves if it is time to, or if the adapter is the best one so far. Collective: every rank must call it."""
        progress = self._state.progress
        if progress.step > 0 and (progress.step == progress.best_step or self.is_due(progress.step)):
            self.save()

    def save(self) -> None:
        """Begins to write a checkpoint, once all ranks have shown that they hold the same adapter.

        Collective: every rank must call it.

        Raises:
            RanksDiverged: they do not.
        """
        step = self._state.progress.step
        if self._saved_step == step:
            return
        started = time.perf_counter()
        fault_points.reach("checkpoint")
        self._require_equal_ranks(step)
        self._saved_step = step
        snapshot = self._state.capture_all_ranks(is_writer=self._collective.rank < self._saver.writers)
        if snapshot is not None:
            self._saver.begin(snapshot, since=started)

    def report(self, *, wait: bool = False) -> None:
        """Reports the checkpoints that were written, or could not be, since the last call. ``wait``: for the last."""
        if wait:
            self._saver.wait()
        for save in self._saver.news():
            if save.error:
                self._reporter.handle(Noted(f"{save.error}; training goes on", "warning"))
            else:
                self._reporter.handle(CheckpointSaved(save.step, save.path, save.is_best, save.seconds, save.waited))

    def members_changed(self) -> None:
        """Other nodes may keep the checkpoints from now on, so the next one is due in any case."""
        self._saved_step = None

    def last(self) -> str:
        """Where the newest checkpoint is, as part of a sentence."""
        self._saver.wait()
        store = self._saver.store
        steps = store.steps() if self._collective.rank < self._saver.writers else []
        return f"the last good checkpoint is {store.path(steps[0])}" if steps else "no checkpoint was saved yet"

    def _require_equal_ranks(self, step: int) -> None:
        collective = self._collective
        digests = collective.all_gather(digest(self._state.model)) if collective.world_size > 1 else []
        different = [rank for rank, value in enumerate(digests) if value != digests[0]]
        if different:
            raise RanksDiverged(
                f"step {step}: rank {different[0]} holds another adapter than rank 0; {self.last()}. "
                "Do all nodes run the same versions of macft and MLX?"
            )
