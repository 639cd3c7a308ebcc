"""SwanLab, through ``swanlab``. ``SWANLAB_MODE=offline`` needs no account."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from macft.report.events import Sample
from macft.report.sample_table import markdown_table
from macft.report.trackers.tracker import TrackedRun

_STATES = {"failed": "crashed", "interrupted": "aborted"}


class SwanlabTracker:
    """Opens a run; its settings come from swanlab's own environment variables and files."""

    def __init__(self, run: TrackedRun):
        import swanlab

        self._run = swanlab.init(
            project=run.project,
            name=run.name,
            id=run.id,
            resume="allow",
            log_dir=str(run.folder / "swanlog"),
            config=dict(run.config),
            settings=swanlab.Settings(interactive=False),  # a question would stop nobody but this thread
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Adds the values of a step."""
        self._run.log(dict(values), step=step)

    def show(self, samples: Sequence[Sample], step: int) -> None:
        """Adds the samples as a text: a table in Markdown."""
        import swanlab

        self._run.log({"samples": swanlab.Text("\n".join(markdown_table(samples)))}, step=step)

    def finish(self, results: Mapping[str, float], reason: str) -> None:
        """Adds the results, which SwanLab keeps as values of one step, and ends the run."""
        if results:
            self._run.log(dict(results))
        self._run.finish(state=_STATES.get(reason, "success"), error="see macft's log" if reason == "failed" else None)
