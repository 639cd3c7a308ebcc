"""One node's run, from a checked configuration to the finished adapter."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path

from macft.collective.base import Collective
from macft.collective.elastic import ElasticCollective
from macft.config.schema import TrainConfig
from macft.config.yaml import to_yaml
from macft.device import fault_points
from macft.device.durable import write_atomically
from macft.errors import CollectiveError, MacftError, MembershipChanged, PeerStopped
from macft.report.events import RunStarted
from macft.report.phase_lines import PhaseLines
from macft.report.run_folder import RunFolder
from macft.report.sinks.callbacks import Callbacks
from macft.run.agreed_end import AgreedEnd
from macft.run.node_descriptions import describe_nodes
from macft.run.prepare import Run, prepare
from macft.run.role import planned_world_size
from macft.run.scoring import score_before
from macft.training.state import TrainState
from macft.training.stop_request import Stopped, StopRequest


def run_node(
    config: TrainConfig,
    collective: Collective,
    folder: Path,
    *,
    resume: bool,
    stop: StopRequest,
    phases: PhaseLines,
    callbacks: Callbacks | None = None,
) -> str:
    """Trains this rank's part; returns why it ended: finished, early_stopped or interrupted.

    It returns only once this rank knows that the results are on a disk; see :mod:`macft.run.agreed_end`. ``phases``
    tell of the preparation, and are closed after it.

    Raises:
        MacftError: whatever went wrong, in one line; rank 0 has reported it before.
        KeyboardInterrupt: a stop was requested, here or on another rank, before there was anything to save.
    """
    started = time.perf_counter()
    elastic = collective if isinstance(collective, ElasticCollective) else None
    stop.last_words = collective.tell_stopped
    if elastic is not None:
        stop.follow(lambda: elastic.stop_wanted)
        elastic.tell_stop(lambda: stop.requested_here)
    fault_points.reach("load")
    try:
        with phases:
            run = _prepared(config, collective, elastic, folder, phases, resume=resume, stop=stop, callbacks=callbacks)
    except PeerStopped:
        raise KeyboardInterrupt from None
    stop.defer("the run ends before its next step")
    ending = AgreedEnd(run, started)
    try:
        _report_start(run)
        try:
            return _train_together(run, elastic, ending)
        except PeerStopped as error:
            return ending.alone(error if run.state.ended else None)
        except CollectiveError as error:
            if not run.state.ended:
                raise
            return ending.alone(error)
    except MacftError as error:
        ending.fail(error)
        raise
    finally:
        run.close()


def _prepared(
    config: TrainConfig,
    collective: Collective,
    elastic: ElasticCollective | None,
    folder: Path,
    phases: PhaseLines,
    *,
    resume: bool,
    stop: StopRequest,
    callbacks: Callbacks | None,
) -> Run:
    try:
        return prepare(config, collective, RunFolder(folder), phases, resume=resume, stop=stop, callbacks=callbacks)
    except MembershipChanged as error:
        if isinstance(error.__cause__, PeerStopped):
            raise error.__cause__ from None
        if elastic is None:
            raise
        # A node was lost before all were ready: this one prepares by itself, then joins those who are left.
        elastic.step_out()
        return prepare(config, collective, RunFolder(folder), phases, resume=resume, stop=stop)


def _train_together(run: Run, elastic: ElasticCollective | None, ending: AgreedEnd) -> str:
    """Trains and ends the run, in one ring after another."""
    together = elastic is None or elastic.is_member or run.trainer.regroup()
    while together:
        _write_members(run)
        try:
            run.reporter.handle(describe_nodes(run))
            return _train(run, ending)
        except MembershipChanged:
            together = run.trainer.regroup()
    return ending.alone()


def _train(run: Run, ending: AgreedEnd) -> str:
    """From the step that the run is at to its end."""
    state = run.state
    run.stop.plan = lambda: _plan_to_stop(state)
    if not state.ended:
        try:
            score_before(run)
        except Stopped:
            state.ended = "interrupted"
    reason = run.trainer.train()
    return ending.interrupt() if reason == "interrupted" else ending.finish(reason, state.progress.before)


def _plan_to_stop(state: TrainState) -> str:
    """What is told to a user who wants to stop the run now."""
    if state.progress.step == 0 and state.begun_step < 0:
        return "no step was made yet, so there is nothing to save"
    return "the current step is finished, then the state and the adapter are saved"


def _write_members(run: Run) -> None:
    """Writes the members' addresses, which a newcomer asks. The run goes on where that fails."""
    elastic = run.trainer.nodes.elastic
    if elastic is None or not elastic.is_member or elastic.rank != 0:
        return
    view = elastic.members
    members = [{"name": name, "address": at} for name, at in zip(view.names, view.addresses, strict=True)]
    with contextlib.suppress(OSError):
        write_atomically(run.folder.members, json.dumps({"members": members}, indent=2) + "\n")


def _report_start(run: Run) -> None:
    config, data = run.config, run.data
    run.reporter.handle(
        RunStarted(
            run_folder=run.folder.path,
            device=run.device,
            model=config.model.path,
            adapter=run.model.adaptation.description,
            trainable_parameters=run.model.adaptation.trainable_parameters,
            total_parameters=run.model.adaptation.total_parameters,
            train_rows=len(data.train.rows),
            valid_rows=run.valid_rows,
            test_rows=len(data.test.rows),
            batch_size=config.training.batch_size,
            total_steps=run.trainer.total_steps,
            first_step=run.state.progress.step,
            rank=run.collective.rank,
            world_size=planned_world_size(run.collective),
            shares=str(config.topology.shares),
            config_yaml=to_yaml(config),
            notes=run.notes,
            layout=run.layout,
        )
    )
