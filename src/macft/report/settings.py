"""What a run reports, and where: the Hydra group ``report``."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from macft.logs.run_log import LEVELS

MOST_SAMPLES = 16
OBJECTIVES = ("valid_loss", "metric")
_PROJECT = re.compile(r"[0-9A-Za-z_.+-]+")
"""What all trackers take."""
TRACKERS = ("wandb", "swanlab", "trackio", "mlflow")


@dataclass
class ReportConfig:
    """The Hydra group ``report``."""

    # Progress and results on the terminal.
    console: bool = True
    # TensorBoard events in the run's folder.
    tensorboard: bool = True
    # metrics.jsonl in the run's folder, one event a line.
    metrics_file: bool = True
    # Experiment trackers, by the names of their packages: wandb, swanlab, trackio, mlflow.
    trackers: list[str] = field(default_factory=list)
    # The project, or experiment, in which they keep the run.
    project: str = "macft"
    # Keys that TensorBoard's HPARAMS tab shows first; a sweep adds its own.
    hparams: list[str] = field(default_factory=list)
    # Steps between lines on the terminal.
    every: int = 10
    # Held-out rows whose answers before and after training are shown side by side; 0 means none.
    samples: int = 3
    # Level of each rank's log, logs/macft-rank-N.log in the run's folder: debug, info, warning or error.
    log_level: str = "info"
    # What a sweep compares, and a job returns to a sweeper such as Optuna's: valid_loss, of the exported adapter, or
    # metric, its score in dataset.metric (the first of several).
    objective: str = "valid_loss"
    # Replaces the run that is in the folder hydra.run.dir, once all checks have passed. Without it such a folder is
    # refused.
    overwrite: bool = False


def problems(config: ReportConfig) -> list[str]:
    """One line for each value that cannot be right; no I/O."""
    lines = []
    if config.every < 1:
        lines.append(f"report.every: {config.every} must be 1 or more")
    if not 0 <= config.samples <= MOST_SAMPLES:
        lines.append(f"report.samples: {config.samples} must be from 0 (none) to {MOST_SAMPLES}")
    lines += [
        f"report.trackers: '{name}' is not one of {', '.join(TRACKERS)}"
        for name in config.trackers
        if name not in TRACKERS
    ]
    if not _PROJECT.fullmatch(config.project):
        lines.append(f"report.project: '{config.project}' must be letters, digits and any of - _ . +")
    if config.log_level not in LEVELS:
        lines.append(f"report.log_level: '{config.log_level}' is not one of {', '.join(LEVELS)}")
    if config.objective not in OBJECTIVES:
        lines.append(f"report.objective: '{config.objective}' is not one of {', '.join(OBJECTIVES)}")
    return lines
