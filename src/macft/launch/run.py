"""Runs one job on the nodes of its topology.

Modules that only a rank needs are imported where a rank runs in this process, so that a launcher starts without MLX.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from macft.config.schema import TrainConfig
from macft.config.validate import is_elastic, world_size
from macft.config.yaml import must_match, to_yaml
from macft.device import fault_points
from macft.device.awake import keep_awake
from macft.device.durable import identity, write_atomically
from macft.errors import LaunchError
from macft.launch.run_clock import started, started_together
from macft.logs.run_log import last_error, start_log
from macft.report.phase_lines import PhaseLines, printed_phases
from macft.report.run_folder import RunFolder
from macft.report.sinks.callbacks import Callbacks
from macft.report.trackers.registry import require_installed
from macft.run.resume import check_resume
from macft.topology.hosts import own_rank
from macft.training.stop_request import StopRequest, announce


class RanksFailed(SystemExit):
    """Ranks in other processes have failed with a status, and rank 0 has printed why; ``reason`` is that line."""

    def __init__(self, status: int, reason: str | None):
        super().__init__(status)
        self.reason = reason


def run(
    config: TrainConfig,
    folder: Path,
    *,
    resume: bool,
    farewell: Callable[[], str],
    callbacks: Callbacks | None = None,
) -> str:
    """Runs one job in ``folder``, which it has claimed, on the nodes of its topology; returns why it ended.

    ``callbacks`` get the events of a run whose ranks are this process or processes on this machine. ``farewell`` is
    called where this process is ended in the middle of a call: it leaves the folder as it should be, and returns the
    line for the user.

    Raises:
        MacftError: the run is refused, in which case ``config.yaml`` is as it was, or it has failed.
    """
    config = started(config)
    if config.report.console:
        _say_what_starts(config, resume=resume)
    with printed_phases(is_shown=config.report.console) as phases:
        phases.begin("loading libraries")
        return _run(config, folder, phases, resume=resume, farewell=farewell, callbacks=callbacks)


def _run(
    config: TrainConfig,
    folder: Path,
    phases: PhaseLines,
    *,
    resume: bool,
    farewell: Callable[[], str],
    callbacks: Callbacks | None = None,
) -> str:
    keep_awake()
    if resume:
        check_resume(RunFolder(folder), config)
    if config.topology.join is not None:
        from macft.launch.join_run import join_run

        with start_log(folder, "joined", config.report.log_level):
            return join_run(config, folder, config.topology.join, phases, farewell=farewell)
    if config.topology.kind == "local" and config.topology.nodes > 1:
        with start_log(folder, "launcher", config.report.log_level):
            return _run_local(config, folder, phases, resume=resume, farewell=farewell, callbacks=callbacks)
    if config.topology.kind == "ssh":
        from macft.launch.run_over_ssh import run_over_ssh

        with start_log(folder, "launcher", config.report.log_level):
            return _how_it_ended(run_over_ssh(config, folder, phases, resume=resume), folder)
    stop = StopRequest(announce, farewell=farewell)
    with stop.listening():
        if config.topology.kind == "hosts":
            rank = own_rank(config.topology)  # before an import that takes seconds
            from macft.launch.run_on_hosts import run_on_hosts

            with start_log(folder, rank, config.report.log_level):
                return run_on_hosts(config, folder, resume=resume, stop=stop, phases=phases)
        from macft.run.node import run_node

        if config.collective.backend == "mlx":
            from macft.collective.mlx.group import is_launched, join_launched

            if is_launched():
                with (
                    join_launched(config.collective) as group,
                    start_log(folder, group.rank, config.report.log_level),
                ):
                    config = started_together(config, group)
                    return run_node(config, group, folder, resume=resume, stop=stop, phases=phases)
        from macft.collective.solo import Solo

        if callbacks is not None:
            callbacks.stop = lambda: stop.request(may_quit=False)
        fault_points.begin(0)
        with Solo() as collective, start_log(folder, 0, config.report.log_level):
            return run_node(config, collective, folder, resume=resume, stop=stop, phases=phases, callbacks=callbacks)


def _say_what_starts(config: TrainConfig, *, resume: bool) -> None:
    """One line before anything is imported, which can take seconds."""
    data = ", ".join(source.path for source in config.dataset.all_sources())
    nodes = world_size(config)
    where = {"single": "", "local": f", {nodes} processes here"}.get(config.topology.kind, f", {nodes} machines")
    verb = "resuming" if resume else "starting"
    print(f"· {verb} {config.name}: {config.model.path} on {data}{where}", flush=True)


def _run_local(
    config: TrainConfig,
    folder: Path,
    phases: PhaseLines,
    *,
    resume: bool,
    farewell: Callable[[], str],
    callbacks: Callbacks | None,
) -> str:
    from macft.launch.local import LocalRun, RankFailed, launch_local
    from macft.model.fetch.resolve import resolve
    from macft.rendezvous.keystore import keyring_for

    require_installed(config.report.trackers)
    keyring = keyring_for(config.topology, config.collective)
    with StopRequest(announce, farewell=farewell).listening():
        phases.begin(f"finding the model {config.model.path}", once=True)  # a download shows a bar
        resolve(config.model)  # downloaded once, here, where its progress is visible
    proposed = RunFolder(folder).proposed
    write_atomically(proposed, to_yaml(config))
    summary = RunFolder(folder).summary
    before = identity(summary)

    def is_kept() -> bool:
        """Whether the results are on disk, whatever became of the ranks since."""
        return identity(summary) != before and RunFolder(folder).is_finished

    try:
        status = launch_local(
            LocalRun(
                world_size=config.topology.nodes,
                folder=folder,
                run_id=folder.name,
                must_match=must_match(config),
                start_timeout=config.topology.start_timeout,
                resume=resume,
                keyring=keyring,
                elastic=is_elastic(config),
                restart=config.topology.restart,
            ),
            phases,
            watch=None if callbacks is None else _follow(folder, callbacks),
        )
    except RankFailed:
        if not is_kept():
            raise
        return "finished"
    finally:
        proposed.unlink(missing_ok=True)
    if status == 0 and not is_kept():
        raise LaunchError(f"the run has finished, but its results are not in {folder}; see what its ranks say above")
    return "finished" if is_kept() else _how_it_ended(status, folder)


def _follow(folder: Path, callbacks: Callbacks) -> Callable[[Callable[[], None]], None]:
    """Gives ``callbacks`` what rank 0 has written since the last call."""
    from macft.report.recorded import EventReader

    reader = EventReader(RunFolder(folder).metrics, since=time.time())

    def watch(stop: Callable[[], None]) -> None:
        callbacks.stop = stop
        for event in reader.read():
            callbacks.handle(event)

    return watch


def _how_it_ended(status: int, folder: Path) -> str:
    if status == 0:
        return "finished"
    if status == 130:
        return "interrupted"
    raise RanksFailed(status, last_error(folder, 0))
