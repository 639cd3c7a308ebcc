"""Who speaks for a run: rank 0, whichever node that is just now."""

from __future__ import annotations

import contextlib
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import replace

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
    SilentReporter,
    StepDone,
    change_line,
)

_MOST_REMEMBERED = 100_000


class QuietReporter(SilentReporter):
    """Says what the user of this very node has to know, warnings on stderr, and nothing else.

    ``tells_changes`` of the nodes too: whoever has a node join wants to see that it does.
    """

    def __init__(self, *, tells_changes: bool):
        self._tells_changes = tells_changes

    def noted(self, event: Noted) -> None:
        """A warning or an error: one line."""
        if event.level != "info":
            with contextlib.suppress(OSError):
                print(f"{event.level}: {event.text}", file=sys.stderr)

    def nodes_changed(self, event: NodesChanged) -> None:
        """One line."""
        if self._tells_changes:
            with contextlib.suppress(OSError):
                print(f"after step {event.step}: {change_line(event)}", flush=True)

    def run_ended(self, event: RunEnded) -> None:
        """How, and with which adapter, so that it can be compared with the others'. An error is told elsewhere."""
        if event.reason != "failed":
            with contextlib.suppress(OSError):
                print(f"{event.reason}; adapter sha256 {event.adapter_sha256}", flush=True)


class FailoverReporter(Reporter):
    """Lets its ``speaker`` report while this node is rank 0; remembers what there was to tell while another one is.

    When this node becomes rank 0, ``speak`` makes the speaker, given the last step that stands reported, and it is told
    what has happened since: nothing is lost with the node that spoke before. ``last_reported``: the last
    step that stands in this node's run folder, which with ``topology=local`` is that of all.
    """

    def __init__(
        self,
        speak: Callable[[int], Reporter],
        *,
        last_reported: Callable[[], int],
        speaker: Reporter | None,
        quiet: QuietReporter,
    ):
        self._speak, self._last_reported, self._speaker, self._quiet = speak, last_reported, speaker, quiet
        self._started: RunStarted | None = None
        self._missed: deque[tuple[int, Callable[[Reporter], None]]] = deque(maxlen=_MOST_REMEMBERED)
        self._missed_steps: deque[int] = deque(maxlen=_MOST_REMEMBERED // 2)

    def run_started(self, event: RunStarted) -> None:
        """Kept for a speaker to come."""
        self._started = event
        if self._speaker is not None:
            self._speaker.run_started(event)

    def step_done(self, event: StepDone) -> None:
        """Told or remembered."""
        if self._speaker is None:
            self._missed_steps.append(event.step)
        self._tell(event.step, lambda reporter: reporter.step_done(event))

    def evaluated(self, event: Evaluated) -> None:
        """Told or remembered."""
        self._tell(event.step, lambda reporter: reporter.evaluated(event))

    def metric_scored(self, event: MetricScored) -> None:
        """Told or remembered."""
        self._tell(event.step, lambda reporter: reporter.metric_scored(event))

    def nodes_changed(self, event: NodesChanged) -> None:
        """Told or remembered."""
        if self._speaker is None:
            self._quiet.nodes_changed(event)
        self._tell(event.step, lambda reporter: reporter.nodes_changed(event))

    def samples_shown(self, event: SamplesShown) -> None:
        """Told."""
        if self._speaker is not None:
            self._speaker.samples_shown(event)

    def checkpoint_saved(self, event: CheckpointSaved) -> None:
        """Told."""
        if self._speaker is not None:
            self._speaker.checkpoint_saved(event)

    def noted(self, event: Noted) -> None:
        """Told; a warning is this node's own business and is told anyway."""
        (self._speaker or self._quiet).noted(event)

    def phase_progress(self, event: PhaseProgress) -> None:
        """Told."""
        if self._speaker is not None:
            self._speaker.phase_progress(event)

    def run_ended(self, event: RunEnded) -> None:
        """Told; in a line where another node speaks."""
        (self._speaker or self._quiet).run_ended(event)

    def lead(self, *, is_main: bool, step: int) -> None:
        """Begins or ends to speak."""
        if not is_main:
            self.close()
        elif self._speaker is None:
            told = self._told_until(step)
            try:
                self._speaker = self._speak(max(told, 0))
            except OSError as error:  # telling about a run must never end it
                self._quiet.noted(Noted(f"this node can't report the run: {error}", "warning"))
                return
            if self._started is not None:
                self._speaker.run_started(replace(self._started, first_step=step))
            for at, tell in self._missed:
                if at > told:
                    tell(self._speaker)
            self._missed.clear()
            self._missed_steps.clear()

    def _told_until(self, step: int) -> int:
        """The last step of which everything has surely been reported, -1 for not even the start."""
        reported = min(self._last_reported(), step)
        if reported in self._missed_steps:
            reported -= 1  # the one who spoke may have been lost before it told of that step's validation
        return reported or -1

    def close(self) -> None:
        """The speaker's. Safe to call twice."""
        if self._speaker is not None:
            self._speaker.close()
            self._speaker = None

    def _tell(self, step: int, tell: Callable[[Reporter], None]) -> None:
        if self._speaker is not None:
            tell(self._speaker)
        else:
            self._missed.append((step, tell))
