"""The layout of a run's folder."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunFolder:
    """Where a run keeps what. A part appears once there is something to put there."""

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
        """The whole tuned model, only where its weights fit no other checkpoint."""
        return self.path / "model"

    @property
    def checkpoints(self) -> Path:
        """What a resume needs."""
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
        """What came of it, for programs."""
        return self.path / "summary.json"

    @property
    def summary_text(self) -> Path:
        """What came of it, for people."""
        return self.path / "summary.md"

    @property
    def members(self) -> Path:
        """Where the nodes that take part just now can be reached."""
        return self.path / "members.json"

    @property
    def logs(self) -> Path:
        """The output of ranks that have no terminal."""
        return self.path / "logs"

    def create(self) -> None:
        """Makes the folder itself, where it is not there yet."""
        self.path.mkdir(parents=True, exist_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Replaces ``path`` by ``text`` in one go: a reader sees the old file or the new one, never half."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # the name must not reach the disk before the contents do
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
