"""The layout of a run's folder."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


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
    def tensorboard(self) -> Path:
        """TensorBoard's event files."""
        return self.path / "tensorboard"

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

    def create(self) -> None:
        """Makes the folder itself, if it does not exist."""
        self.path.mkdir(parents=True, exist_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Replaces the contents of ``path``; a reader sees the old file or the new one, never a part.

    Raises:
        OSError: it can't be written; the old file is left as it was.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # the name must not reach the disk before the contents do
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
