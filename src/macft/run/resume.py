"""What a run that goes on may change of its configuration, and what the user is told of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from macft.cli.shell import command
from macft.config.schema import TrainConfig
from macft.config.validate import to_plain
from macft.config.yaml import read
from macft.errors import CheckpointError, ConfigError
from macft.report.run_folder import RunFolder

_KEPT = ("adapter.type", "adapter.rank", "adapter.targets", "adapter.layers", "adapter.num_layers", "optimizer.name")
"""What the tensors in a checkpoint depend on."""
_ORDER = ("seed", "training.batch_size", "dataset.")
"""What the order of the rows depends on."""
_RELEVANT = ("seed", "model.", "dataset.", "adapter.", "optimizer.", "training.")
_IRRELEVANT = (
    "training.keep_last",
    "training.save_every",
    "training.replicas",
    "training.metric_rows",
    "adapter.init_from",
)


def previous_config(folder: RunFolder) -> TrainConfig | None:
    """The configuration with which the run in ``folder`` was started last; None where this machine has none.

    Raises:
        ConfigError: it can't be read.
    """
    return read(folder.config) if folder.config.exists() else None


def check_resume(folder: RunFolder, config: TrainConfig) -> None:
    """Refuses settings that the run's checkpoints don't fit; reads small files only.

    Raises:
        ConfigError: there is one line for each such key.
    """
    before = previous_config(folder)
    if before is None or not folder.has_checkpoint:
        return
    lines = [
        f"{key}: {new} doesn't fit the run's checkpoints, which were made with {old}; leave it out, or start a new run"
        for key, old, new in _changes(before, config)
        if key in _KEPT
    ]
    if lines:
        raise ConfigError("\n".join(lines))


def check_steps(done: int, total: int) -> None:
    """Raises ConfigError where a run that has made ``done`` updates is to make fewer, ``total``."""
    if done > total:
        raise ConfigError(f"training.steps: {total} is less than the {done} steps already made; use {done} or more")


def no_checkpoint(folder: RunFolder, unreadable: int, reasons: list[str]) -> CheckpointError:
    """The error where ``unreadable`` checkpoints are there, on any node, and none can be read."""
    why = f" ({reasons[0].partition('; skipped')[0]})" if reasons else ", see the other nodes"
    return CheckpointError(
        f"resume: none of the {unreadable} checkpoints in {folder.checkpoints} can be used{why}; to begin from step 0, "
        f"remove them: {command('rm', '-r', folder.checkpoints)}"
    )


def notes_of_changes(before: TrainConfig, config: TrainConfig, step: int) -> list[str]:
    """Lines for the user where the run goes on after ``step`` with other settings than it has had."""
    changes = list(_changes(before, config))
    if not changes:
        return []
    notes = [f"changed after step {step}: " + ", ".join(f"{key} from {old} to {new}" for key, old, new in changes)]
    if step and any(key.startswith(_ORDER) for key, _, _ in changes):
        notes.append("the rows come in another order from here on: some are seen again, and some not at all")
    return notes


def _changes(before: TrainConfig, config: TrainConfig) -> Iterator[tuple[str, Any, Any]]:
    """Key, old and new value of what differs and decides the result."""
    old, new = dict(_leaves(to_plain(before))), dict(_leaves(to_plain(config)))
    for key in [*old, *(key for key in new if key not in old)]:
        if old.get(key) != new.get(key) and key.startswith(_RELEVANT) and key not in _IRRELEVANT:
            yield key, _shown(old.get(key)), _shown(new.get(key))


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)
