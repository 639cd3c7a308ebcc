"""``summary.json`` and ``summary.md``: the results of a run."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from typing import Any

from macft import __version__
from macft.device.durable import write_atomically
from macft.report.durations import duration
from macft.report.events import (
    BlocksMoved,
    Event,
    NodesChanged,
    RunEnded,
    RunEnding,
    RunStarted,
    Sample,
    SamplesShown,
    StepDone,
)
from macft.report.result_text import result_name, result_text
from macft.report.run_folder import RunFolder
from macft.report.sample_table import markdown_table
from macft.report.sinks.metrics_file import plain

_PACKAGES = ("mlx", "mlx-lm", "pyzmq", "numpy")


class SummaryWriter:
    """Collects what the summary needs and writes it when the run ends, for whatever reason.

    Speed and peak memory (bytes, this node's) are those since the start or the last resume. ``changes`` of the nodes
    are those that were reported earlier, by another node or before a resume.
    """

    def __init__(self, folder: RunFolder, changes: Sequence[NodesChanged] = ()):
        self._folder = folder
        self._facts: dict[str, object] = {}
        self._tokens, self._seconds, self._peak_memory = 0, 0.0, 0
        self._last_loss: float | None = None
        self._traces = 0
        self._changes = [_line(event) for event in changes]
        self._moves: list[str] = []
        self._samples: list[Sample] = []
        self._written: RunEnded | None = None

    def handle(self, event: Event) -> None:
        """Collects facts; writes both files at the end. Raises OSError where that fails."""
        match event:
            case RunStarted():
                self._facts = _facts(event)
            case StepDone():
                self._tokens += event.tokens
                self._seconds += event.seconds
                self._peak_memory = max(self._peak_memory, event.peak_memory)
                self._last_loss = event.loss
                self._traces = event.traces
            case NodesChanged():
                self._changes.append(_line(event))
                self._facts["nodes_at_the_end"] = len(event.names)
            case BlocksMoved():
                self._moves.append(f"after step {event.step}: {event.line}")
            case SamplesShown():
                self._samples = event.samples
            case RunEnding():
                self._write(event.end)
                self._written = event.end
            case RunEnded() if event is not self._written:
                self._write(event)

    def close(self) -> None:
        """Has nothing to release."""

    def _write(self, event: RunEnded) -> None:
        facts: dict[str, object] = {
            "reason": event.reason,
            "detail": event.detail,
            "warnings": event.warnings,
            "steps": event.steps,
            "seconds": round(event.seconds, 3),
            "results": event.final,
            "samples": self._samples,
            "last_train_loss": self._last_loss,
            "tokens_per_second": round(self._tokens / self._seconds, 1) if self._seconds else None,
            "peak_memory_bytes": self._peak_memory,
            "compiled_shapes": self._traces or None,
            "energy": event.energy,
            "energy_used": event.energy.line if event.energy else None,
            "adapter_folder": event.adapter_folder,
            "adapter_sha256": event.adapter_sha256,
            **self._facts,
            "membership_changes": self._changes,
            "moved_blocks": self._moves,
            "versions": _versions(),
        }
        values: dict[str, Any] = {name: plain(value) for name, value in facts.items()}
        write_atomically(self._folder.summary, json.dumps(values, indent=2, allow_nan=False) + "\n")
        write_atomically(self._folder.summary_text, _markdown(values))


def _facts(event: RunStarted) -> dict[str, object]:
    return {
        "model": event.model,
        "adapter": event.adapter,
        "trainable_parameters": event.trainable_parameters,
        "total_parameters": event.total_parameters,
        "train_rows": event.train_rows,
        "valid_rows": event.valid_rows,
        "test_rows": event.test_rows,
        "batch_size": event.batch_size,
        "nodes": event.world_size,
        "device": event.device,
        "weights": event.layout,
        "notes": event.notes,
    }


def _line(event: NodesChanged) -> str:
    return f"after step {event.step}: {event.line}"


def _versions() -> dict[str, str]:
    versions = {"macft": __version__, "python": platform.python_version(), "platform": platform.platform()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _markdown(values: Mapping[str, Any]) -> str:
    lines = ["# Run summary", ""]
    if results := values["results"]:
        lines += ["| result | before | after |", "| --- | --- | --- |"]
        for name in results:
            if name.removesuffix("_before") in results and name.endswith("_before"):
                continue  # shown in the row of its name
            before, after = (_result(name, results.get(key)) for key in (f"{name}_before", name))
            lines.append(f"| {result_name(name)} | {before} | {after} |")
        lines.append("")
    lines += ["| run | |", "| --- | --- |"]
    for name, value in values.items():
        if value not in (None, "") and not isinstance(value, dict | list):
            lines.append("| {} | {} |".format(*(_cell(text) for text in _as_read(name, value))))
    lines += ["", *(f"- warning: {_cell(warning)}" for warning in values["warnings"])]
    lines += [f"- {_cell(change)}" for change in [*values["membership_changes"], *values["moved_blocks"]]]
    lines += [f"- {_cell(note)}" for note in values.get("notes", [])]
    if values["samples"]:
        lines += ["", "## Samples", "", *markdown_table([Sample(**sample) for sample in values["samples"]])]
    versions = ", ".join(f"{name} {version}" for name, version in values["versions"].items())
    return "\n".join([*lines, "", f"Versions: {versions}", ""])


def _as_read(name: str, value: object) -> tuple[str, str]:
    """A fact's name and value, with units, as people read them."""
    if name == "seconds" and isinstance(value, int | float):
        return "time", duration(value)
    if name.endswith("_bytes") and isinstance(value, int | float):
        return _words(name.removesuffix("_bytes")), f"{value / 1e9:.2f} GB"
    return _words(name), _number(value)


def _result(name: str, value: object) -> str:
    return result_text(name, value) if isinstance(value, int | float) else "" if value is None else str(value)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _number(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _cell(value: object) -> str:
    return " ".join(str(value).replace("|", "\\|").split())
