"""What a tracker does, and what it is told of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from macft.report.events import Sample


@dataclass(frozen=True)
class TrackedRun:
    """The run as a tracker shows it.

    Attributes:
        project: The project or experiment in which the tracker keeps it.
        name: For people.
        id: The same each time that the run is resumed, and on a node that goes on reporting it.
        folder: Where the tracker may keep files of this run.
        config: The whole configuration as nested plain values.
    """

    project: str
    name: str
    id: str
    folder: Path
    config: Mapping[str, object]


class Tracker(Protocol):
    """A run in a tracker, which the constructor opens or goes on with.

    All calls come from one thread, which is not the main thread. A call that fails raises whatever the library raises.
    """

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Adds ``values`` by name, as of ``step`` updates."""
        ...

    def show(self, samples: Sequence[Sample], step: int) -> None:
        """Adds a table of samples, as of ``step`` updates."""
        ...

    def finish(self, results: Mapping[str, float], reason: str) -> None:
        """Stores the final results and ends the run; ``reason`` is that of ``RunEnded``, or empty where it goes on."""
        ...
