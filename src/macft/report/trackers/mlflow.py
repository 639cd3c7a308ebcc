"""MLflow, through ``mlflow``: a file on this machine, or the server in ``MLFLOW_TRACKING_URI``."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence

from macft.report.dotted import flat
from macft.report.events import Sample
from macft.report.sample_table import COLUMNS, sample_cells
from macft.report.trackers.tracker import TrackedRun

_ID_TAG = "macft.run_id"
_STATES = {"failed": "FAILED", "interrupted": "KILLED", "": "RUNNING"}
_MOST_PARAMS = 100
"""The most that MLflow takes in one call."""


class MlflowTracker:
    """Opens a run through a client of its own: mlflow's active run may be another one's."""

    def __init__(self, run: TrackedRun):
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")  # the default waits for minutes at each call
        from mlflow import MlflowClient

        self._client = MlflowClient()
        experiment = self._client.get_experiment_by_name(run.project)
        where = experiment.experiment_id if experiment is not None else self._client.create_experiment(run.project)
        found = self._client.search_runs([where], f"tags.`{_ID_TAG}` = '{run.id}'", max_results=1)
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        self._id = self._client.create_run(where, run_name=run.name, tags={_ID_TAG: run.id}).info.run_id
        self._add_params(run.config)

    def _add_params(self, config: Mapping[str, object]) -> None:
        from mlflow.entities import Param

        params = [Param(key, str(value)) for key, value in flat(config).items()]
        for first in range(0, len(params), _MOST_PARAMS):
            self._client.log_batch(self._id, params=params[first : first + _MOST_PARAMS])

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Adds the values of a step."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, float(value), now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def show(self, samples: Sequence[Sample], step: int) -> None:  # noqa: ARG002 - an artifact has no step
        """Adds the samples as an artifact: a table that MLflow shows."""
        rows = [sample_cells(sample) for sample in samples]
        table = {name: [row[column] for row in rows] for column, name in enumerate(COLUMNS)}
        self._client.log_table(self._id, table, artifact_file="samples.json")

    def finish(self, results: Mapping[str, float], reason: str) -> None:
        """Adds the results as metrics and ends the run."""
        if results:
            self.log(results, int(results.get("result/steps", 0)))
        if reason:
            self._client.set_tag(self._id, "macft.reason", reason)
            self._client.set_terminated(self._id, _STATES.get(reason, "FINISHED"))
