"""The layout of a run's folder."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from macft.device.durable import write_atomically
from macft.report import latest


@dataclass(frozen=True)
class RunFolder:
    """The paths in a run's folder. A file or folder exists once there is something to store in it."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def adapters(self) -> Path:
        """The trained adapter, in mlx-lm's format."""
        return self.path / "adapters"

    @property
    def model(self) -> Path:
        """The whole tuned model, only if the adapter alone cannot be used."""
        return self.path / "model"

    @property
    def checkpoints(self) -> Path:
        """The state to resume from."""
        return self.path / "checkpoints"

    @property
    def curves(self) -> list[Path]:
        """TensorBoard's event files. They lie in the folder itself, so that TensorBoard calls the run by its name."""
        return sorted(self.path.glob("events.out.tfevents.*"))

    @property
    def trackers(self) -> Path:
        """What experiment trackers keep of the run on this machine."""
        return self.path / "trackers"

    @property
    def metrics(self) -> Path:
        """All events, one JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        """The results, for programs."""
        return self.path / "summary.json"

    @property
    def summary_text(self) -> Path:
        """The results, for people."""
        return self.path / "summary.md"

    @property
    def members(self) -> Path:
        """The names and addresses of the current members."""
        return self.path / "members.json"

    @property
    def contents(self) -> Path:
        """What the rows and weights were that the run began with, for a resume."""
        return self.path / "contents.json"

    @property
    def logs(self) -> Path:
        """The log of each rank, and the output of those without a terminal."""
        return self.path / "logs"

    @property
    def proposed(self) -> Path:
        """The configuration of a start, until its checks have passed: for the ranks in other processes."""
        return self.path / ".config.proposed.yaml"

    def results(self) -> list[str]:
        """The names of what a run has left here; another run must not write over it."""
        found = [path.name for path in (self.config, self.metrics, self.summary, self.adapters) if path.exists()]
        return found + ([self.checkpoints.name] if self.has_checkpoint else [])

    @property
    def has_checkpoint(self) -> bool:
        """Whether a checkpoint is stored."""
        return any(self.checkpoints.glob("step-*"))

    @property
    def is_finished(self) -> bool:
        """Whether the results of a run that came to its end are stored."""
        has_ended = self.read_summary().get("reason") in ("finished", "early_stopped")
        return has_ended and (self.adapters / "adapters.safetensors").is_file() and self.config.is_file()

    def read_summary(self) -> dict[str, Any]:
        """The content of ``summary.json``; empty where there is none that can be read."""
        try:
            summary = json.loads(self.summary.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return summary if isinstance(summary, dict) else {}

    def clear(self) -> None:
        """Removes a run that another one replaces: all but its logs. Raises OSError where that fails."""
        files = (self.config, self.metrics, self.summary, self.summary_text, self.members, self.contents)
        for path in (*files, *self.curves):
            path.unlink(missing_ok=True)
        for path in (self.checkpoints, self.adapters, self.model, self.trackers):
            if path.is_dir():
                shutil.rmtree(path)

    @property
    def logdir(self) -> Path:
        """What TensorBoard is to show: the folder of this run and its like, or this one where others are there too."""
        parent = self.path.absolute().parent
        try:
            are_runs = all((each / self.config.name).is_file() for each in parent.iterdir() if each.name != latest.NAME)
        except OSError:
            are_runs = False
        return self.path.parent if are_runs else self.path

    def begin(self, config: str) -> None:
        """Makes the folder that of a run with ``config``, in YAML: all checks have passed. Raises OSError.

        It becomes ``runs/latest``.
        """
        self.create()
        write_atomically(self.config, config)
        latest.point_to(self.path)

    def create(self) -> None:
        """Makes the folder itself, if it does not exist."""
        self.path.mkdir(parents=True, exist_ok=True)
