"""Weights & Biases, through ``wandb``. ``WANDB_MODE=offline`` needs no account."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from macft.errors import ConfigError
from macft.report.events import Sample
from macft.report.sample_table import COLUMNS, sample_cells
from macft.report.trackers.tracker import TrackedRun


class WandbTracker:
    """Opens a run; its settings come from wandb's own environment variables and files."""

    def __init__(self, run: TrackedRun):
        import wandb

        # Without its capture of the console, which would repeat the live display.
        settings = wandb.Settings(console="off")
        if wandb.setup().settings.mode in ("online", "shared") and not wandb.login(prompt=False):
            raise ConfigError("you are not logged in; run `wandb login`, or set WANDB_MODE=offline")
        self._run = wandb.init(
            project=run.project,
            name=run.name,
            id=run.id,
            resume="allow",
            dir=run.folder,
            config=dict(run.config),
            settings=settings,
        )
        # wandb's own step can't go back, as it does where a run resumes from an earlier checkpoint.
        self._run.define_metric("*", step_metric="step")

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Adds one entry to the history."""
        self._run.log({**values, "step": step})

    def show(self, samples: Sequence[Sample], step: int) -> None:
        """Adds the samples as a table."""
        import wandb

        rows = [list(sample_cells(sample)) for sample in samples]
        self._run.log({"samples": wandb.Table(columns=list(COLUMNS), data=rows), "step": step})

    def finish(self, results: Mapping[str, float], reason: str) -> None:
        """Writes the summary and uploads the rest."""
        self._run.summary.update({**results, **({"reason": reason} if reason else {})})
        self._run.finish(exit_code=1 if reason == "failed" else 0)
