"""Runs the jobs of a sweep one after the other: what a job returns, what follows from a failed one, the last table."""

from __future__ import annotations

import gc
import os
import shlex
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from macft.cli.run_command import INTERRUPTED, exit_status, run_command
from macft.errors import LaunchError, MacftError
from macft.evaluation.metrics import is_higher_better
from macft.launch.run import RanksFailed
from macft.report.run_folder import RunFolder
from macft.report.sweep_table import SweepRow, SweepTable

_FULL_ERROR = "HYDRA_FULL_ERROR"
"""With this variable set to 1 Hydra raises what a sweeper raises; else it prints a traceback and exits."""


class JobFailed(Exception):
    """A job has no value for a sweeper that needs one. The sweeper decides whether it goes on."""


@dataclass(frozen=True)
class Job:
    """One job of a sweep.

    Attributes:
        number: Its index, from 0.
        values: The value of each key that its command sets.
        folder: Its folder.
        sweep_folder: The sweep's.
    """

    number: int
    values: Mapping[str, object]
    folder: Path
    sweep_folder: Path


class Sweep:
    """The jobs of a sweep that have ended, and what they amount to.

    Args:
        swept: The keys with several values.
        planned: How many jobs there are; None if the sweeper chooses their values, for which it needs the results.
        metric: The name of the metric that the jobs are compared by; None for the validation loss.
        prints: Whether the table is printed.
    """

    def __init__(self, swept: list[str], planned: int | None, *, metric: str | None, prints: bool):
        self.swept, self._planned, self._metric, self._prints = swept, planned, metric, prints
        self._rows: list[SweepRow] = []
        self._folder: Path | None = None

    def run(self, job: Job, start: Callable[[], str]) -> float | None:
        """Runs a job by ``start``, which returns why it ended; returns the job's objective, None if it has none.

        A job that fails is a row of the table with its reason, which is printed.

        Raises:
            SystemExit: the job was interrupted, which ends the sweep.
            JobFailed: there is no objective, and the sweeper needs one.
        """
        self._folder = job.sweep_folder
        started = time.monotonic()
        ended, reason = _ended(start)
        gc.collect()  # a model has cycles, and the next job needs its memory
        row = self._row(job, ended, reason, time.monotonic() - started)
        self._rows.append(row)
        self._table.write(self._folder)
        if ended == "interrupted":
            sys.exit(INTERRUPTED)
        if self._planned is None and row.objective is None:
            raise JobFailed(row.reason)
        return row.objective

    def run_all(self, hydra_main: Callable[[], None]) -> int:
        """Calls ``hydra_main``, whose jobs call :meth:`run`, and prints the table; returns the exit status.

        It is 130 after Ctrl-C, 1 if a job has failed or has no value where one is needed, else 0.

        Raises:
            LaunchError: the sweeper has failed.
        """
        shows_traceback = os.environ.get(_FULL_ERROR) == "1"
        os.environ[_FULL_ERROR] = "1"
        trouble: Exception | None = None
        status = 0
        try:
            hydra_main()
        except KeyboardInterrupt:
            status = INTERRUPTED
        except SystemExit as error:
            if error.code != INTERRUPTED:
                raise
            status = INTERRUPTED
        except JobFailed:
            pass
        except Exception as error:
            if shows_traceback:
                raise
            trouble = error
        self._print()
        if trouble is not None and not self._has_failed:
            raise LaunchError(f"hydra/sweeper: {type(trouble).__name__}: {' '.join(str(trouble).split())}")
        return status or int(self._has_failed)

    @property
    def _has_failed(self) -> bool:
        return any(row.reason for row in self._rows)

    @property
    def _table(self) -> SweepTable:
        objective = self._metric or "valid_loss"
        maximize = self._metric is not None and is_higher_better(self._metric)
        return SweepTable(self._rows, self.swept, objective, maximize, self._planned)

    def _row(self, job: Job, ended: str, reason: str | None, seconds: float) -> SweepRow:
        summary = RunFolder(job.folder).read_summary()  # empty on a host other than the first
        results = summary.get("results") or {}
        is_done = ended not in ("failed", "interrupted")
        objective = _number(results.get(self._metric or "valid_loss")) if is_done else None
        if ended == "failed" and not reason:
            reason = summary.get("detail") or "see its logs"
        if is_done and objective is None and self._planned is None:
            reason = f"it has no {self._metric or 'validation loss'}, which the sweeper needs"
        return SweepRow(
            number=job.number,
            folder=os.path.relpath(job.folder, job.sweep_folder) if job.folder.is_dir() else "-",
            values=job.values,
            status=ended,
            reason=reason,
            loss=_number(summary.get("last_train_loss")),
            valid_loss=_number(results.get("valid_loss")),
            metrics={
                name: value for name, value in results.items() if name != "valid_loss" and not name.endswith("_before")
            },
            seconds=seconds,
            objective=objective,
        )

    def _print(self) -> None:
        if not self._prints or self._folder is None:
            return
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        here, folder = Path.cwd(), self._folder
        if folder.is_relative_to(here):
            folder = folder.relative_to(here)
        print(f"\nSweep: {self._table.count}\n\n{self._table.text(width)}\n")
        print(f"compare: tensorboard --logdir {shlex.quote(str(folder))}", flush=True)


def _ended(start: Callable[[], str]) -> tuple[str, str | None]:
    """Why a job ended, and for one that failed the reason in a line, if it is known in this process."""
    ended, reason = "failed", None

    def attempt() -> int:
        nonlocal ended, reason
        try:
            ended = start()
        except MacftError as error:
            reason = "; ".join(str(error).splitlines())
            raise
        return exit_status(ended)

    try:
        status: object = run_command(lambda _: attempt())
    except SystemExit as error:
        status, reason = error.code, error.reason if isinstance(error, RanksFailed) else None
    except Exception as error:  # of this job; the others may go well
        traceback.print_exc()
        return "failed", f"{type(error).__name__}: {' '.join(str(error).split())}"
    return ("interrupted" if status == INTERRUPTED else ended), reason


def _number(value: object) -> float | None:
    """A finite number; a summary has "nan" and "inf" as texts."""
    return float(value) if isinstance(value, int | float) else None
