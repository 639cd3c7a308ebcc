"""Lets the rank that leads the run report it, and another one take over when that rank is lost."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from macft.report.events import Event, Noted, ReplayedEvent, Reporter, RunStarted, Sink, StepDone

_MAX_REMEMBERED_EVENTS = 100_000
_MAX_RECENT_EVENTS = 16
log = logging.getLogger("macft.report")


class FailoverReporter(Reporter):
    """Reports the run through ``leader`` while this node is rank 0, and through ``follower`` while it is not.

    A follower remembers the events that have to be replayed. When it becomes rank 0, ``open_leader`` makes the sink,
    given the last step that is completely reported, and the sink gets the events after that step. So nothing is missing
    when the rank that reported is lost.

    Args:
        open_leader: Makes the sink that reports the run, given the last step that is already reported.
        leader: The sink with which this node begins if it is rank 0.
        follower: Gets each event while another node reports.
        every_rank: Gets each event once, whoever reports.
        last_reported: Returns the last step in this node's run folder, which all nodes share with ``topology=local``.
    """

    def __init__(
        self,
        open_leader: Callable[[int], Sink],
        *,
        leader: Sink | None,
        follower: Sink,
        every_rank: Sink,
        last_reported: Callable[[], int],
    ):
        self._open_leader, self._leader, self._follower = open_leader, leader, follower
        self._every_rank, self._last_reported = every_rank, last_reported
        self._started: RunStarted | None = None
        self._missed: deque[ReplayedEvent] = deque(maxlen=_MAX_REMEMBERED_EVENTS)
        self._recent: deque[ReplayedEvent] = deque(maxlen=_MAX_RECENT_EVENTS)

    def handle(self, event: Event) -> None:
        """Passes the event to the leader or the follower sink."""
        self._every_rank.handle(event)
        if isinstance(event, RunStarted):
            self._started = event
        if isinstance(event, ReplayedEvent):
            self._recent.append(event)
        if self._leader is not None:
            self._leader.handle(event)
            return
        self._follower.handle(event)
        if isinstance(event, ReplayedEvent):
            self._missed.append(event)

    def lead(self, *, is_main: bool, step: int) -> None:
        """Begins to report the run where it was left, or stops reporting it."""
        if not is_main:
            self._close_leader()
        elif self._leader is None:
            reported = self._reported_until(step)
            try:
                self._leader = self._open_leader(max(reported, 0))
            except OSError as error:  # a run must not end because it can't be reported
                self._follower.handle(Noted(f"this node can't report the run: {error}", "warning"))
                return
            self._follower.close()
            if self._started is not None:
                self._leader.handle(replace(self._started, first_step=step))
            missed = [event for event in self._missed if event.step > reported]
            log.info("this rank reports the run now; replays %d events after step %d", len(missed), reported)
            for event in missed:
                self._leader.handle(event)
            self._missed.clear()

    def recent(self, step: int) -> list[ReplayedEvent]:
        """This rank's last events, from that of update ``step`` on."""
        return [event for event in self._recent if event.step >= step]

    def catch_up(self, events: Sequence[ReplayedEvent]) -> None:
        """Takes those of another rank's events that this rank has not had.

        When a node is lost, one rank may have made an update that another has not. That one takes over the state, and
        with this the events; otherwise nobody would report the step if the other one does not lead.
        """
        had = {(event.type_name, event.step) for event in self._recent}
        for event in events:
            if (event.type_name, event.step) not in had:
                self.handle(event)

    def close(self) -> None:
        """Closes all sinks. Safe to call twice."""
        self._close_leader()
        self._follower.close()
        self._every_rank.close()

    def _close_leader(self) -> None:
        if self._leader is not None:
            self._leader.close()
            self._leader = None

    def _reported_until(self, step: int) -> int:
        """The last step of which everything has been reported, -1 if not even the start has been."""
        reported = min(self._last_reported(), step)
        if any(isinstance(event, StepDone) and event.step == reported for event in self._missed):
            reported -= 1  # the previous leader may have been lost before it reported the validation after that step
        return reported or -1
