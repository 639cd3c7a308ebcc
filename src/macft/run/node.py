"""One node's run, from a checked configuration to the finished adapter."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path

from macft.checkpoint.snapshot import digest
from macft.collective.base import Collective
from macft.collective.elastic import ElasticCollective
from macft.config.overrides import resume_command
from macft.config.schema import TrainConfig
from macft.config.yaml import to_yaml
from macft.device.durable import write_atomically
from macft.errors import MacftError, MembershipChanged
from macft.report.callbacks import Callbacks
from macft.report.events import RunEnded, RunStarted
from macft.report.run_folder import RunFolder
from macft.run.prepare import Run, planned_world_size, prepare
from macft.run.results import choose_final_adapter, save_final_adapter, score_after, score_before
from macft.thermal.energy import summarize
from macft.training.stop_request import StopRequest


def run_node(
    config: TrainConfig,
    collective: Collective,
    folder: Path,
    *,
    resume: bool,
    stop: StopRequest,
    callbacks: Callbacks | None = None,
) -> str:
    """Trains this rank's part; returns why it ended: finished, early_stopped or interrupted.

    Raises:
        MacftError: whatever went wrong, in one line; rank 0 has reported it before.
    """
    started = time.perf_counter()
    elastic = collective if isinstance(collective, ElasticCollective) else None
    try:
        run = prepare(config, collective, RunFolder(folder), resume=resume, stop=stop, callbacks=callbacks)
    except MembershipChanged:
        if elastic is None:
            raise
        # A node was lost before all were ready: this one prepares by itself, then joins those who are left.
        elastic.step_out()
        run = prepare(config, collective, RunFolder(folder), resume=resume, stop=stop)
    try:
        _report_start(run)
        together = elastic is None or elastic.is_member or run.trainer.regroup()
        while together:
            _write_members(run)
            try:
                return _train(run, started)
            except MembershipChanged:
                together = run.trainer.regroup()
        return _interrupted(run, started)
    except MacftError as error:
        _report_end(run, "failed", started, detail=str(error))
        raise
    finally:
        run.close()


def _train(run: Run, started: float) -> str:
    """From the step that the run is at to its end."""
    before = score_before(run)
    reason = run.trainer.train()
    if reason == "interrupted":
        return _interrupted(run, started)
    loss = choose_final_adapter(run)
    adapter_folder = save_final_adapter(run)
    final = score_after(run, before, loss)
    return _report_end(run, reason, started, final, adapter_folder=adapter_folder)


def _interrupted(run: Run, started: float) -> str:
    detail = f"go on with: {resume_command(run.folder.path)}"
    return _report_end(run, "interrupted", started, detail=detail)


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
            adapter=run.adaptation.description,
            trainable_parameters=run.adaptation.trainable_parameters,
            total_parameters=run.adaptation.total_parameters,
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


def _report_end(
    run: Run,
    reason: str,
    started: float,
    final: Mapping[str, float] | None = None,
    *,
    detail: str = "",
    adapter_folder: Path | None = None,
) -> str:
    trainer = run.trainer
    trainer.checkpoints.report(wait=True)
    trouble = run.saver.trouble
    run.reporter.handle(
        RunEnded(
            reason=reason,
            steps=run.state.progress.step,
            seconds=time.perf_counter() - started,
            final=final or {},
            adapter_folder=adapter_folder,
            adapter_sha256=digest(run.loaded.model).hex(),
            detail=detail,
            energy=summarize(trainer.statuses, run.config.thermal, tokens=trainer.tokens),
            warnings=[trouble] if trouble else [],
        )
    )
    return reason
