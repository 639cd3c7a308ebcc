"""The layout of a run's folder."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunFolder:
    """Where a run keeps what."""

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
        """What came of it, for programs; ``summary.md`` is for people."""
        return self.path / "summary.json"


def write_atomically(path: Path, text: str) -> None:
    """Replaces ``path`` by ``text`` in one go: a reader sees the old file or the new one, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
