"""Saves checkpoints in the background, while training goes on."""

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
    """The result of saving one checkpoint; ``error`` is empty if it is on disk.

    ``seconds`` from the request to the end of writing; training was blocked for ``waited`` of them.
    """

    step: int
    path: Path
    is_best: bool
    seconds: float
    waited: float
    error: str = ""


class CheckpointSaver:
    """Writes one checkpoint at a time into ``store``, in its own thread.

    Ranks below ``writers`` save; it is more than 1 if nodes have their own disks. All of them have the same state, so
    nothing is sent. The thread handles bytes only, no MLX arrays.
    """

    def __init__(self, store: CheckpointStore, *, writers: int = 1):
        self.store = store
        self.writers = writers
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[Save] | None = None
        self._news: list[Save] = []
        self._begun, self._errors = 0, list[str]()

    def begin(self, snapshot: Snapshot, *, since: float) -> None:
        """Starts writing ``snapshot`` once the previous one is written.

        ``since`` is when the loop stopped for it, on the clock of ``time.perf_counter``.
        """
        self.wait()
        self._begun += 1
        waited = time.perf_counter() - since
        self._pending = self._thread.submit(self._write, snapshot, since, waited)

    def wait(self) -> None:
        """Waits for the write in progress. Raises what the writing thread has raised."""
        if self._pending is not None:
            future, self._pending = self._pending, None
            save = future.result()
            self._news.append(save)
            if save.error:
                self._errors.append(save.error)

    def news(self) -> list[Save]:
        """The saves that have ended since the last call; does not block."""
        if self._pending is not None and self._pending.done():
            self.wait()
        news, self._news = self._news, []
        return news

    @property
    def trouble(self) -> str:
        """One line for the end of the run if checkpoints were not saved, else "". Waits for the write in progress."""
        self.wait()
        if not self._errors:
            return ""
        steps = self.store.steps()
        newest = f"the newest one on disk is of step {steps[0]}" if steps else "there is none on disk to resume from"
        return (
            f"{len(self._errors)} of {self._begun} checkpoints were not saved, {newest}; the last: {self._errors[-1]}"
        )

    def close(self) -> None:
        """Ends the thread after the write in progress. Safe to call twice."""
        self._thread.shutdown()

    def _write(self, snapshot: Snapshot, since: float, waited: float) -> Save:
        progress = snapshot.progress
        error = ""
        try:
            self.store.save(snapshot)
        except CheckpointError as failure:  # a full or read-only disk does not end the run
            error = str(failure)
        is_best = progress.best_step == progress.step
        seconds = time.perf_counter() - since
        return Save(progress.step, self.store.path(progress.step), is_best, seconds, waited, error)
