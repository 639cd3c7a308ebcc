"""The trackers that ``report.trackers`` may name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from macft.device.durable import write_atomically
from macft.errors import ConfigError
from macft.report.run_folder import RunFolder
from macft.report.trackers.mlflow import MlflowTracker
from macft.report.trackers.sink import TrackerSink
from macft.report.trackers.swanlab import SwanlabTracker
from macft.report.trackers.tracker import TrackedRun, Tracker
from macft.report.trackers.trackio import TrackioTracker
from macft.report.trackers.wandb import WandbTracker

_KINDS: dict[str, Callable[[TrackedRun], Tracker]] = {
    "wandb": WandbTracker,
    "swanlab": SwanlabTracker,
    "trackio": TrackioTracker,
    "mlflow": MlflowTracker,
}

_DECIDING = ("name", "seed", "adapter", "optimizer", "training")
"""The keys of a configuration that tell runs apart which have begun in the same second."""


def require_installed(trackers: Sequence[str]) -> None:
    """Raises ConfigError where the library of a tracker is not installed, with the command that installs it."""
    missing = [name for name in trackers if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"report.trackers: {', '.join(missing)} is not installed; run: python3 -m pip install {' '.join(missing)}"
        )


def tracker_sink(name: str, project: str, folder: RunFolder, config: Mapping[str, Any]) -> TrackerSink:
    """The sink of the tracker ``name`` for the run of ``config`` in ``folder``."""
    folder.trackers.mkdir(parents=True, exist_ok=True)
    run = TrackedRun(
        project=project,
        name=f"{config['name']}-{folder.path.name}",
        id=run_id(folder, config),
        folder=folder.trackers,
        config=config,
    )
    return TrackerSink(name, _KINDS[name], run)


def run_id(folder: RunFolder, config: Mapping[str, Any]) -> str:
    """The run's id: the one it has in its folder, or else one that each of its nodes comes to by itself."""
    path = folder.trackers / "run.json"
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["id"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    facts = [config["dataset"].get("template_time"), *(config.get(key) for key in _DECIDING)]
    made = hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:12]
    write_atomically(path, json.dumps({"id": made}) + "\n")
    return made
