"""Sends each event to every sink that was asked for."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from macft.report.events import Event, Reporter, Sink
from macft.report.run_folder import RunFolder
from macft.report.settings import ReportConfig
from macft.report.sinks.console import ConsoleReporter
from macft.report.sinks.event_log import EventLog
from macft.report.sinks.failover import FailoverReporter
from macft.report.sinks.follower import FollowerConsole
from macft.report.sinks.metrics_file import MetricsFile, last_recorded_step, recorded_changes
from macft.report.sinks.summary import SummaryWriter
from macft.report.sinks.tensorboard import TensorBoard
from macft.report.trackers.registry import tracker_sink

log = logging.getLogger("macft.report")
_NAMES = {
    "ConsoleReporter": "the terminal",
    "FollowerConsole": "the terminal",
    "MetricsFile": "metrics.jsonl",
    "SummaryWriter": "summary.json",
    "EventLog": "the log",
    "Callbacks": "a callback",
}
"""What a user calls a sink, by its class; trackers have names of their own."""


class FanOut:
    """A sink made of sinks.

    A run must not end because it can't be reported: a sink that fails, on a full disk for instance, is dropped with
    one line on stderr, and the others go on.
    """

    def __init__(self, sinks: Sequence[Sink]):
        self._sinks = list(sinks)

    def handle(self, event: Event) -> None:
        """Passes the event to all."""
        self._call_all(lambda sink: sink.handle(event))

    def close(self) -> None:
        """Closes all. Safe to call twice."""
        self._call_all(lambda sink: sink.close())
        self._sinks.clear()

    def _call_all(self, call: Callable[[Sink], None]) -> None:
        for sink in list(self._sinks):
            try:
                call(sink)
            except Exception as error:
                self._sinks.remove(sink)
                with contextlib.suppress(Exception):
                    sink.close()  # restores the terminal; may fail for the same reason
                _complain(getattr(sink, "name", type(sink).__name__), error)


def build(
    config: ReportConfig,
    folder: RunFolder,
    *,
    hparams: Mapping[str, object],
    is_main: bool,
    first_step: int,
    is_newcomer: bool = False,
    callbacks: Sink | None = None,
) -> Reporter:
    """The reporter of this rank, with the sinks that ``config`` asks for where the rank is 0 (``is_main``).

    Other ranks print warnings and how the run ended; a newcomer also prints changes of the nodes. A rank that becomes 0
    makes the sinks then. A sink that can't be made is left out with one line on stderr.

    Args:
        hparams: The whole configuration as nested plain values.
        first_step: The updates made before this start, 0 unless the run resumes.
        callbacks: One more sink for the rank that reports.

    Raises:
        OSError: the run's folder can't be made.
    """
    open_leader = partial(_leader_sinks, config, folder, hparams, callbacks)
    return FailoverReporter(
        open_leader,
        leader=open_leader(first_step) if is_main else None,
        follower=FollowerConsole(shows_changes=is_newcomer),
        every_rank=EventLog(),
        last_reported=lambda: last_recorded_step(folder.metrics),
    )


def _leader_sinks(
    config: ReportConfig, folder: RunFolder, hparams: Mapping[str, object], callbacks: Sink | None, first_step: int
) -> FanOut:
    folder.create()
    changes = recorded_changes(folder.metrics, first_step) if first_step else []
    makers: list[tuple[bool, str, Callable[[], Sink]]] = [
        (True, SummaryWriter.__name__, lambda: SummaryWriter(folder, changes)),
        (
            config.tensorboard,
            TensorBoard.__name__,
            lambda: TensorBoard(folder.path, hparams=hparams, first_step=first_step),
        ),
        # After TensorBoard: a step in this file is in both if this node is killed.
        (config.metrics_file, MetricsFile.__name__, lambda: MetricsFile(folder.metrics, first_step=first_step)),
        (config.console, ConsoleReporter.__name__, lambda: ConsoleReporter(every=config.every, changes=changes)),
        *((True, name, partial(tracker_sink, name, config.project, folder, hparams)) for name in config.trackers),
    ]
    sinks: list[Sink] = [] if callbacks is None else [callbacks]
    for is_wanted, name, make in makers:
        if is_wanted:
            try:
                sinks.append(make())
            except Exception as error:
                _complain(name, error)
    return FanOut(sinks)


def _complain(name: str, error: Exception) -> None:
    reason = " ".join(str(error).split()) or type(error).__name__
    name = _NAMES.get(name, name)
    log.warning("%s stops reporting: %s", name, reason)
    with contextlib.suppress(OSError):
        print(f"{name} stops reporting, training goes on: {reason}", file=sys.stderr)
