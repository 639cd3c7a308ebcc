"""A run's folder from Python: its configuration, results and metrics, and the model that came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from macft.api.evaluation import Evaluation, EvaluationOptions, Progress, evaluate_found
from macft.api.loaded_model import Model, load
from macft.config.schema import TrainConfig
from macft.config.yaml import read
from macft.report.events import Event, ReplayedEvent
from macft.report.recorded import events_in
from macft.report.run_folder import RunFolder
from macft.report.scalars import Scalars
from macft.run.tuned_model import TunedModel, find_run


class TrainingRun:
    """A run: one that :func:`macft.fit` has made, or any that :func:`macft.open_run` has found.

    Everything is read from the run's folder when it is asked for; a run that goes on shows what it has so far.
    """

    def __init__(self, folder: Path, *, reason: str | None = None):
        self._folder, self._reason = RunFolder(folder), reason

    def __repr__(self) -> str:
        return f"<TrainingRun {self.folder}: {self.reason or 'not ended'}>"

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self._folder.path

    @property
    def config(self) -> TrainConfig:
        """The configuration it was last started with."""
        return read(self._folder.config)

    @property
    def summary(self) -> dict[str, Any]:
        """``summary.json``: results, speed, memory, energy, versions. Empty until the run has ended."""
        return self._folder.read_summary()

    @property
    def reason(self) -> str | None:
        """Why it ended: finished, early_stopped, interrupted or failed. None: it has not."""
        reason = self.summary.get("reason", self._reason)
        return None if reason is None else str(reason)

    @property
    def results(self) -> dict[str, float]:
        """Final results by name; what was measured before training ends in ``_before``."""
        return {name: float(value) for name, value in self.summary.get("results", {}).items()}

    @property
    def adapter(self) -> Path | None:
        """The adapter's folder, in mlx-lm's format; None until there is one."""
        folder = self._folder.adapters
        return folder if (folder / "adapters.safetensors").is_file() else None

    def events(self) -> list[Event]:
        """All events of the run, from ``metrics.jsonl``; see :mod:`macft.report.events`."""
        return list(events_in(self._folder.metrics))

    def metrics(self) -> list[dict[str, float]]:
        """One row for each step, with TensorBoard's names: ``{"step": 1, "loss/train": 3.2, ...}``.

        Step 0 is before training. A row has what was measured at its step: ``pandas.DataFrame(run.metrics())`` has
        NaN elsewhere. What has been 0 so far is left out, but for the loss and the optimizer's.
        """
        rows: dict[int, dict[str, float]] = {}
        scalars = Scalars()
        for event in self.events():
            if isinstance(event, ReplayedEvent) and (values := scalars.of(event)):
                rows.setdefault(event.step, {"step": event.step}).update(values)
        return [rows[step] for step in sorted(rows)]

    def load(self, *, tuned: bool = True) -> Model:
        """The model with the adapter, or with ``tuned=False`` the base model.

        Raises:
            ConfigError: the run has no adapter yet.
            ModelError: the model can't be found or read.
        """
        return load(self.folder, tuned=tuned)

    def evaluate(
        self,
        *,
        dataset: str | None = None,
        columns: Mapping[str, str] | None = None,
        split: str | None = None,
        rows: int = -1,
        metric: str | Sequence[str] | None = None,
        max_tokens: int | None = None,
        mask_prompt: bool | None = None,
        progress: Progress | None = None,
    ) -> Evaluation:
        """Compares the tuned model with its base model.

        For the arguments see :class:`~macft.api.evaluation.EvaluationOptions`, for ``progress`` and errors
        :func:`~macft.api.evaluation.evaluate_found`.
        """
        return evaluate_found(
            TunedModel.find(self.folder),
            EvaluationOptions(dataset, columns, split, rows, metric, max_tokens, mask_prompt),
            progress=progress,
        )


def open_run(folder: str | Path) -> TrainingRun:
    """The run in ``folder``, whether it has ended or not.

    Raises:
        ConfigError: it is not a run's folder.
    """
    return TrainingRun(find_run(Path(folder)).path)
