"""``summary.json`` and ``summary.md``: what came of a run."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from typing import Any

from macft.report.events import RunEnded, RunStarted, SilentReporter, StepDone
from macft.report.run_folder import RunFolder, write_atomically

_PACKAGES = ("macft", "mlx", "mlx-lm", "pyzmq", "numpy")


class SummaryWriter(SilentReporter):
    """Collects what the summary needs and writes it when the run ends, for whatever reason."""

    def __init__(self, folder: RunFolder):
        self._folder = folder
        self._facts: dict[str, Any] = {}
        self._tokens, self._seconds, self._peak_memory, self._last_loss = 0, 0.0, 0, float("nan")

    def run_started(self, event: RunStarted) -> None:
        """Remembers what is trained on what."""
        self._facts = {
            "model": event.model,
            "adapter": event.adapter,
            "trainable_parameters": event.trainable_parameters,
            "nodes": event.world_size,
            "batch_size": event.batch_size,
            "train_rows": event.train_rows,
            "device": event.device,
            "notes": event.notes,
        }

    def step_done(self, event: StepDone) -> None:
        """Adds up tokens and time."""
        self._tokens += event.tokens
        self._seconds += event.seconds
        self._peak_memory = max(self._peak_memory, event.peak_memory)
        self._last_loss = event.loss

    def run_ended(self, event: RunEnded) -> None:
        """Writes both files."""
        values = {
            "reason": event.reason,
            "detail": event.detail,
            "steps": event.steps,
            "seconds": round(event.seconds, 3),
            "results": dict(event.final),
            "last_train_loss": self._last_loss if self._last_loss == self._last_loss else None,
            "tokens_per_second": round(self._tokens / self._seconds, 1) if self._seconds else None,
            "peak_memory_bytes": self._peak_memory,
            "adapter_folder": str(event.adapter_folder) if event.adapter_folder else None,
            "adapter_sha256": event.adapter_sha256,
            **self._facts,
            "versions": _versions(),
        }
        write_atomically(self._folder.summary, json.dumps(values, indent=2, allow_nan=False, default=str) + "\n")
        write_atomically(self._folder.summary.with_suffix(".md"), _markdown(values))


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _markdown(values: dict[str, Any]) -> str:
    rows = {**{key: value for key, value in values.items() if not isinstance(value, dict | list)}, **values["results"]}
    lines = ["# Run summary", "", "| | |", "| --- | --- |"]
    lines += [f"| {key.replace('_', ' ')} | {value} |" for key, value in rows.items() if value not in (None, "")]
    versions = ", ".join(f"{name} {version}" for name, version in values["versions"].items())
    return "\n".join([*lines, "", f"Versions: {versions}", ""])
