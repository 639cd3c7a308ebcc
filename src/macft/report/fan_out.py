"""Sends each event to every reporter that was asked for."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from macft.report.console import ConsoleReporter
from macft.report.events import (
    CheckpointSaved,
    Evaluated,
    MetricScored,
    NodesChanged,
    Noted,
    PhaseProgress,
    Reporter,
    RunEnded,
    RunStarted,
    SamplesShown,
    StepDone,
)
from macft.report.failover import FailoverReporter, QuietReporter
from macft.report.metrics_file import MetricsFile, changes_told, last_step
from macft.report.run_folder import RunFolder
from macft.report.settings import ReportConfig
from macft.report.summary import SummaryWriter
from macft.report.tensorboard import TensorBoard


class FanOut(Reporter):
    """A reporter made of reporters.

    Telling about a run must never end it: a reporter that fails, on a full disk for instance, is dropped with
    one line on stderr, and the others go on.
    """

    def __init__(self, reporters: Sequence[Reporter]):
        self._reporters = list(reporters)

    def run_started(self, event: RunStarted) -> None:
        """To all."""
        self._send(lambda reporter: reporter.run_started(event))

    def step_done(self, event: StepDone) -> None:
        """To all."""
        self._send(lambda reporter: reporter.step_done(event))

    def evaluated(self, event: Evaluated) -> None:
        """To all."""
        self._send(lambda reporter: reporter.evaluated(event))

    def metric_scored(self, event: MetricScored) -> None:
        """To all."""
        self._send(lambda reporter: reporter.metric_scored(event))

    def samples_shown(self, event: SamplesShown) -> None:
        """To all."""
        self._send(lambda reporter: reporter.samples_shown(event))

    def checkpoint_saved(self, event: CheckpointSaved) -> None:
        """To all."""
        self._send(lambda reporter: reporter.checkpoint_saved(event))

    def noted(self, event: Noted) -> None:
        """To all."""
        self._send(lambda reporter: reporter.noted(event))

    def phase_progress(self, event: PhaseProgress) -> None:
        """To all."""
        self._send(lambda reporter: reporter.phase_progress(event))

    def nodes_changed(self, event: NodesChanged) -> None:
        """To all."""
        self._send(lambda reporter: reporter.nodes_changed(event))

    def lead(self, *, is_main: bool, step: int) -> None:
        """To all."""
        self._send(lambda reporter: reporter.lead(is_main=is_main, step=step))

    def run_ended(self, event: RunEnded) -> None:
        """To all."""
        self._send(lambda reporter: reporter.run_ended(event))

    def close(self) -> None:
        """Closes all. Safe to call twice."""
        self._send(lambda reporter: reporter.close())
        self._reporters.clear()

    def _send(self, call: Callable[[Reporter], None]) -> None:
        for reporter in list(self._reporters):
            try:
                call(reporter)
            except Exception as error:
                self._reporters.remove(reporter)
                with contextlib.suppress(Exception):
                    reporter.close()  # frees the terminal's live display; may fail for the same reason
                _complain(type(reporter).__name__, error)


def build(
    config: ReportConfig,
    folder: RunFolder,
    *,
    hparams: Mapping[str, Any],
    is_main: bool,
    first_step: int,
    is_newcomer: bool = False,
) -> Reporter:
    """The reporters ``config`` asks for; on ranks other than 0 (``is_main`` false) one that warns, and ends in a line.

    On a newcomer that one tells of changes of the nodes as well.

    ``hparams`` is the whole configuration as nested plain values; ``first_step`` counts the updates made
    before this start, 0 unless the run resumes. A reporter that can't be set up is left out with one line on
    stderr.

    Raises:
        OSError: the run's folder can't be made.
    """

    def speak(step: int) -> FanOut:
        return _all(config, folder, hparams=hparams, first_step=step)

    speaker = speak(first_step) if is_main else None
    quiet = QuietReporter(tells_changes=is_newcomer)
    return FailoverReporter(speak, last_reported=lambda: last_step(folder.metrics), speaker=speaker, quiet=quiet)


def _all(config: ReportConfig, folder: RunFolder, *, hparams: Mapping[str, Any], first_step: int) -> FanOut:
    folder.create()
    changes = changes_told(folder.metrics, first_step) if first_step else []
    makers: list[tuple[bool, str, Callable[[], Reporter]]] = [
        (True, SummaryWriter.__name__, lambda: SummaryWriter(folder, changes)),
        (
            config.tensorboard,
            TensorBoard.__name__,
            lambda: TensorBoard(folder.tensorboard, hparams=hparams, first_step=first_step),
        ),
        # After TensorBoard: a step that stands here has been told to both, should this node be killed.
        (
            config.metrics_file,
            MetricsFile.__name__,
            lambda: MetricsFile(folder.metrics, first_step=first_step),
        ),
        (config.console, ConsoleReporter.__name__, lambda: ConsoleReporter(every=config.every, changes=changes)),
    ]
    reporters = []
    for wanted, name, make in makers:
        if not wanted:
            continue
        try:
            reporters.append(make())
        except Exception as error:
            _complain(name, error)
    return FanOut(reporters)


def _complain(name: str, error: Exception) -> None:
    reason = " ".join(str(error).split()) or type(error).__name__
    with contextlib.suppress(OSError):
        print(f"{name} stops reporting, training goes on: {reason}", file=sys.stderr)
