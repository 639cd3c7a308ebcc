"""Sends a run's events to a tracker, from a thread of its own: a slow or lost connection never holds up training."""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable

from macft.report.events import Event, ReplayedEvent, RunEnded, RunStarted, SamplesShown
from macft.report.scalars import Scalars, results
from macft.report.trackers.tracker import TrackedRun, Tracker

_MOST_WAITING = 20_000
"""Events that wait for a tracker; more than that are not worth their memory."""
_SAY_AFTER_SECONDS = 2.0
_FINISH_SECONDS = 120.0
_Task = Callable[[Tracker], None]


class TrackerSink:
    """Keeps the tracker called ``name``, which ``open_tracker`` opens in the thread.

    What the tracker raises is raised by the next call, or by :meth:`close`.
    """

    def __init__(self, name: str, open_tracker: Callable[[TrackedRun], Tracker], run: TrackedRun):
        self.name = name
        self._tasks: queue.Queue[_Task | None] = queue.Queue(_MOST_WAITING)
        self._scalars = Scalars()
        self._trouble: BaseException | None = None
        self._is_told, self._is_closed, self._step = False, False, 0
        self._thread = threading.Thread(target=self._work, args=(open_tracker, run), name=f"macft-{name}", daemon=True)
        self._thread.start()

    def handle(self, event: Event) -> None:
        """Queues the event's numbers."""
        self._raise_trouble()
        match event:
            case RunStarted():
                self._step = event.first_step
            case RunEnded():
                self._end(event)
            case SamplesShown():
                samples, at = event.samples, event.step
                self._put(lambda tracker: tracker.show(samples, at))
            case _:
                if isinstance(event, ReplayedEvent):
                    self._step = event.step
                if values := self._scalars.of(event):
                    step = self._step
                    self._put(lambda tracker: tracker.log(values, step))

    def close(self) -> None:
        """Ends the tracker's run and waits until all is sent, at most two minutes. Safe to call twice."""
        if self._is_closed:
            return
        self._is_closed = True
        try:
            if not self._is_told:
                self._put(lambda tracker: tracker.finish({}, ""))
            self._put(None)
        except TimeoutError:  # it has been dropped because it is too far behind
            return
        self._thread.join(_SAY_AFTER_SECONDS)
        if self._thread.is_alive():
            print(f"{self.name}: sending the rest of the run", file=sys.stderr, flush=True)
            self._thread.join(_FINISH_SECONDS)
        if self._thread.is_alive():
            raise TimeoutError(f"it has not taken the rest of the run within {_FINISH_SECONDS:.0f} s")
        self._raise_trouble()

    def _end(self, event: RunEnded) -> None:
        values, reason = results(event), event.reason
        self._is_told = True
        self._put(lambda tracker: tracker.finish(values, reason))

    def _put(self, task: _Task | None) -> None:
        try:
            self._tasks.put_nowait(task)
        except queue.Full:
            raise TimeoutError(f"{_MOST_WAITING} events wait for it") from None

    def _raise_trouble(self) -> None:
        trouble, self._trouble = self._trouble, None
        if trouble is not None:
            raise RuntimeError(" ".join(str(trouble).split()) or type(trouble).__name__) from trouble

    def _work(self, open_tracker: Callable[[TrackedRun], Tracker], run: TrackedRun) -> None:
        try:
            tracker = open_tracker(run)
            while (task := self._tasks.get()) is not None:
                task(tracker)
        except (Exception, SystemExit) as error:  # whatever a library does: the run goes on
            self._trouble = error
