"""trackio, through ``trackio``: on this machine, or in a Space with ``TRACKIO_SPACE_ID``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from macft.report.dotted import flat
from macft.report.events import Sample
from macft.report.sample_table import COLUMNS, sample_cells
from macft.report.trackers.tracker import TrackedRun


class TrackioTracker:
    """Opens a run; trackio names runs and has no ids."""

    def __init__(self, run: TrackedRun):
        import trackio

        self._run = trackio.init(
            project=run.project,
            name=run.name,
            resume="allow",
            config=flat(run.config),
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Adds the values of a step."""
        self._run.log(dict(values), step=step)

    def show(self, samples: Sequence[Sample], step: int) -> None:
        """Adds the samples as a table."""
        import trackio

        rows = [list(sample_cells(sample)) for sample in samples]
        self._run.log({"samples": trackio.Table(columns=list(COLUMNS), data=rows)}, step=step)

    def finish(self, results: Mapping[str, float], reason: str) -> None:  # noqa: ARG002 - trackio has no end states
        """Adds the results and ends the run."""
        if results:
            self._run.log(dict(results))
        self._run.finish()
