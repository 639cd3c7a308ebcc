"""What a node prints on its own terminal while another node reports the run."""

from __future__ import annotations

import contextlib
import sys

from macft.report.events import Event, NodesChanged, Noted, PhaseProgress, RunEnded, RunStarted, StepDone
from macft.report.phase_lines import PhaseLines

_FIRST_SECONDS, _EVERY_SECONDS = 10.0, 60.0


class FollowerConsole:
    """Prints warnings and errors on stderr, and on stdout how the run ended. ``shows_changes``: also changes of nodes.

    Of a phase that lasts, training included, it prints now and then how far it has come. The last line holds the
    adapter's digest, to be compared with that of other nodes. The command itself prints the error of a run that failed.
    """

    def __init__(self, *, shows_changes: bool):
        self._shows_changes = shows_changes
        self._phases = PhaseLines(lambda line: print(line, flush=True), first=_FIRST_SECONDS, every=_EVERY_SECONDS)
        self._phase: str | None = None

    def handle(self, event: Event) -> None:
        """Prints at most one line at once."""
        with contextlib.suppress(OSError):  # the output is no longer read
            match event:
                case RunStarted():
                    self._advance("training", event.first_step, event.total_steps, "steps")
                case StepDone():
                    self._advance("training", event.step, event.total_steps, "steps")
                case PhaseProgress():
                    self._advance(event.name, event.done, event.total)
                case Noted(text, level) if level != "info":
                    print(f"{level}: {text}", file=sys.stderr)
                case NodesChanged() if self._shows_changes:
                    print(f"after step {event.step}: {event.line}", flush=True)
                case RunEnded():
                    self.close()
                    if event.reason == "failed":
                        return
                    print(f"{event.reason}; adapter sha256 {event.adapter_sha256}", flush=True)

    def close(self) -> None:
        """Ends the lines about phases; they go on with the next event. Safe to call twice."""
        self._phases.close()
        self._phase = None

    def _advance(self, name: str, done: int, total: int, unit: str = "") -> None:
        if self._phase != name:
            self._phase = name
            self._phases.begin(name, total, unit=unit)
        self._phases.advance(done)
