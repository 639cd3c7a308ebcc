"""Runs from Python: what ``macft train`` does with one job."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

from macft.api import configuration
from macft.api.training_run import TrainingRun
from macft.config.schema import TrainConfig
from macft.errors import ConfigError, MacftError, TrainingError
from macft.launch.run import RanksFailed, run
from macft.report.latest import followed
from macft.report.sinks.callbacks import Callback, Callbacks
from macft.run.claim import Claim, claim


def fit(config: TrainConfig, *, folder: str | Path | None = None, callbacks: Sequence[Callback] = ()) -> TrainingRun:
    """Trains, on this machine with one process or with several (``topology=local``), and returns the run.

    Ctrl-C, or a notebook's stop button, stops after the current step: the run's ``reason`` is then "interrupted", and
    :func:`resume` goes on with it.

    Args:
        config: From :func:`macft.compose`, and perhaps changed.
        folder: Where the results go. Default: ``runs/NAME/TIME`` in the working folder.
        callbacks: Each is called with every event (:mod:`macft.report.events`) in order. One that raises
            :class:`macft.StopTraining` stops the run after the step that is being computed; one that raises anything
            else is not called again, and its traceback goes to stderr. With several processes the events come from
            ``metrics.jsonl``, a moment later and without ``PhaseProgress``.

    Raises:
        ConfigError: the configuration can't be right, or the folder holds another run.
        MacftError: the run was refused, or it failed.
    """
    config = configuration.checked(config)
    wanted = Path(folder).expanduser() if folder is not None else _default_folder(config)
    with claim(wanted, config, key="folder", is_named=folder is not None) as taken:
        return _fit(config, taken, callbacks, resume=False)


def resume(folder: str | Path, overrides: Sequence[str] = (), *, callbacks: Sequence[Callback] = ()) -> TrainingRun:
    """Goes on with the run in ``folder`` from its newest checkpoint, with other settings if there are ``overrides``.

    Raises:
        ConfigError: there is no run, or its checkpoints don't fit the settings.
        MacftError: the run was refused, or it failed.
    """
    path = followed(Path(folder).expanduser())
    config = configuration.of_run(path, overrides)
    with claim(path, config, key="folder", resume=True) as taken:
        return _fit(config, taken, callbacks, resume=True)


def run_claimed(config: TrainConfig, taken: Claim, *, resume: bool, callbacks: Callbacks | None = None) -> str:
    """Runs one job in the folder it has ``taken``; returns why it ended. Its logs stay where they tell more.

    Raises:
        MacftError: the run was refused, or it failed.
        RanksFailed: it failed in other processes, the first of which has printed why.
    """
    try:
        return run(config, taken.path, resume=resume, farewell=taken.abandon, callbacks=callbacks)
    except MacftError as error:
        taken.keeps_logs = error.needs_logs
        raise
    except Exception:
        taken.keeps_logs = True
        raise


def _fit(config: TrainConfig, taken: Claim, callbacks: Sequence[Callback], *, resume: bool) -> TrainingRun:
    if config.topology.kind not in ("single", "local") or config.topology.join is not None:
        raise ConfigError(
            "topology: a run on other machines is started by the command `macft train`; from Python use "
            "topology=single or topology=local"
        )
    if callbacks and config.topology.kind == "local" and config.topology.nodes > 1 and not config.report.metrics_file:
        raise ConfigError("report.metrics_file: callbacks of a run with several processes read that file; leave it on")
    try:
        reason = run_claimed(config, taken, resume=resume, callbacks=Callbacks(callbacks) if callbacks else None)
    except RanksFailed as failed:
        kind: Callable[[str], MacftError] = ConfigError if failed.code == ConfigError.exit_code else TrainingError
        raise kind(failed.reason or f"the run failed with status {failed.code}; see {taken.path / 'logs'}") from None
    return TrainingRun(taken.path, reason=reason)


def _default_folder(config: TrainConfig) -> Path:
    return Path("runs") / config.name / f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
