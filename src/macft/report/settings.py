"""What a run tells, and where: the Hydra group ``report``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class ReportConfig:
    """The Hydra group ``report``."""

    # Progress and results on the terminal.
    console: bool = True
    # TensorBoard events in the run's folder.
    tensorboard: bool = True
    # metrics.jsonl in the run's folder, one event a line.
    metrics_file: bool = True
    # Steps between lines on the terminal.
    every: int = 10
    # Answers shown side by side, before and after training.
    samples: int = 3


def problems(config: ReportConfig) -> list[str]:
    """One line for each value that can't be right; no I/O."""
    found = []
    if config.every < 1:
        found.append(f"report.every: {config.every} must be 1 or more")
    if config.samples < 0:
        found.append(f"report.samples: {config.samples} must be 0 (none) or more")
    return found
