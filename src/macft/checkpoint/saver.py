"""Saves checkpoints in the background: training goes on while the disk works."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from macft.checkpoint.snapshot import Snapshot
from macft.checkpoint.store import CheckpointStore
from macft.errors import CheckpointError


@dataclass(frozen=True)
class Save:
    """What became of one checkpoint; ``error`` is empty where it is safely on disk.

    ``seconds`` from the loop's wish to the end of writing, of which training stood still for ``waited``.
    """

    step: int
    path: Path
    is_best: bool
    seconds: float
    waited: float
    error: str = ""


class CheckpointSaver:
    """Writes one checkpoint at a time into ``store`` from a thread of its own.

    ``writers``: so many ranks, from rank 0, save; more than one where nodes have disks of their own. All of them hold
    the same state, so nothing is sent. The thread sees bytes only, never MLX.
    """

    def __init__(self, store: CheckpointStore, *, writers: int = 1):
        self.store = store
        self.writers = writers
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[Save] | None = None
        self._news: list[Save] = []
        self._begun, self._errors = 0, list[str]()

    def begin(self, snapshot: Snapshot, *, since: float) -> None:
        """Starts to write ``snapshot``, after the one under way; ``since`` is when the loop stopped for it."""
        self.wait()
        self._begun += 1
        waited = time.perf_counter() - since
        self._pending = self._thread.submit(self._write, snapshot, since, waited)

    def wait(self) -> None:
        """Returns when nothing is being written any more. What the writer did not expect is raised here."""
        if self._pending is not None:
            future, self._pending = self._pending, None
            save = future.result()
            self._news.append(save)
            if save.error:
                self._errors.append(save.error)

    def news(self) -> list[Save]:
        """What has ended since the last call; waits for nothing."""
        if self._pending is not None and self._pending.done():
            self.wait()
        news, self._news = self._news, []
        return news

    @property
    def trouble(self) -> str:
        """One line for the end of the run if checkpoints were lost, else nothing. Waits for the one under way."""
        self.wait()
        if not self._errors:
            return ""
        steps = self.store.steps()
        newest = f"the newest one on disk is of step {steps[0]}" if steps else "there is none on disk to resume from"
        return (
            f"{len(self._errors)} of {self._begun} checkpoints were not saved, {newest}; the last: {self._errors[-1]}"
        )

    def close(self) -> None:
        """Ends the thread, after the write under way. Safe to call twice."""
        self._thread.shutdown()

    def _write(self, snapshot: Snapshot, since: float, waited: float) -> Save:
        progress = snapshot.progress
        error = ""
        try:
            self.store.save(snapshot)
        except CheckpointError as failure:  # the disk is full or read-only: no reason to lose what was learnt
            error = str(failure)
        is_best = progress.best_step == progress.step
        seconds = time.perf_counter() - since
        return Save(progress.step, self.store.path(progress.step), is_best, seconds, waited, error)
