"""Sends each event to every reporter that was asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from macft.report.console import ConsoleReporter
from macft.report.events import (
    CheckpointSaved,
    Evaluated,
    MetricScored,
    Noted,
    PhaseProgress,
    Reporter,
    RunEnded,
    RunStarted,
    SamplesShown,
    SilentReporter,
    StepDone,
)
from macft.report.metrics_file import MetricsFile
from macft.report.run_folder import RunFolder
from macft.report.settings import ReportConfig
from macft.report.summary import SummaryWriter
from macft.report.tensorboard import TensorBoard


class FanOut:
    """A reporter made of reporters. One that fails, on a full disk for instance, is dropped with a word; training goes on."""

    def __init__(self, reporters: list[Reporter]):
        self._reporters = reporters

    def _send(self, call: Callable[[Reporter], None]) -> None:
        for reporter in list(self._reporters):
            try:
                call(reporter)
            except OSError as error:
                self._reporters.remove(reporter)
                print(f"{type(reporter).__name__} stops reporting: {error}", file=sys.stderr)

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

    def run_ended(self, event: RunEnded) -> None:
        """To all."""
        self._send(lambda reporter: reporter.run_ended(event))

    def close(self) -> None:
        """Closes all."""
        self._send(lambda reporter: reporter.close())


def build(
    config: ReportConfig, folder: RunFolder, *, hparams: Mapping[str, Any], is_main: bool, first_step: int
) -> Reporter:
    """The reporters ``config`` asks for; on ranks other than 0 (``is_main`` false) one that says nothing."""
    if not is_main:
        return SilentReporter()
    reporters: list[Reporter] = [SummaryWriter(folder)]
    if config.metrics_file:
        reporters.append(MetricsFile(folder.metrics, first_step=first_step))
    if config.tensorboard:
        reporters.append(TensorBoard(folder.tensorboard, hparams=hparams, first_step=first_step))
    if config.console:
        reporters.append(ConsoleReporter(every=config.every))
    return FanOut(reporters)
