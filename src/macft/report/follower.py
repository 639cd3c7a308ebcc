"""What a node prints on its own terminal while another node reports the run."""

from __future__ import annotations

import contextlib
import sys

from macft.report.events import Event, NodesChanged, Noted, RunEnded


class FollowerConsole:
    """Prints warnings and errors on stderr, and on stdout how the run ended. ``shows_changes``: also changes of nodes.

    The last line holds the adapter's digest, to be compared with that of other nodes. The command itself prints the
    error of a run that failed.
    """

    def __init__(self, *, shows_changes: bool):
        self._shows_changes = shows_changes

    def handle(self, event: Event) -> None:
        """Prints at most one line."""
        with contextlib.suppress(OSError):  # the output is no longer read
            match event:
                case Noted(text, level) if level != "info":
                    print(f"{level}: {text}", file=sys.stderr)
                case NodesChanged() if self._shows_changes:
                    print(f"after step {event.step}: {event.line}", flush=True)
                case RunEnded() if event.reason != "failed":
                    print(f"{event.reason}; adapter sha256 {event.adapter_sha256}", flush=True)

    def close(self) -> None:
        """Has nothing to release."""
