"""The end of a run: its results are on a disk before any rank says that it has ended, and all ranks know.

The results are the adapter, the summary and the configuration, in the run folder of one rank: the leader's, or that of
the first other rank that can write them. A rank ends well only if it knows that they are there. Each step is a call of
all ranks, and can be made again: if a rank is lost meanwhile, the others form a new ring and begin the end anew.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgpack

from macft.checkpoint.snapshot import digest
from macft.collective.solo import Solo
from macft.config.overrides import resume_command
from macft.device import fault_points
from macft.device.durable import identity
from macft.errors import CollectiveError, ModelError
from macft.report.events import Noted, PhaseProgress, RunEnded, RunEnding
from macft.run.prepare import Run
from macft.run.results import choose_final_adapter, has_final_adapter, results_of, save_adapter_folder
from macft.run.role import host_name
from macft.thermal.energy import summarize
from macft.training.stop_request import Stopped

_ENDING = "the run ends anyway, and its results are saved"
log = logging.getLogger("macft.run")


class _Kept(NamedTuple):
    """Which rank keeps the results, and the folder of its adapter; None where there is nothing to try yet."""

    rank: int
    adapter: Path | None


class AgreedEnd:
    """The end of ``run`` on this rank; ``started`` is when it began, on the clock of ``time.perf_counter``."""

    def __init__(self, run: Run, started: float):
        self._run, self._started = run, started
        self._results: dict[str, float] | None = None
        self._kept: RunEnded | None = None

    def finish(self, reason: str, before: Mapping[str, Any]) -> str:
        """Training has come to its end for ``reason``; returns why the run ended. A collective call.

        ``before`` is the score before training.

        Raises:
            ModelError: no rank can write the results; all ranks raise it alike.
            MembershipChanged, CollectiveError: a rank is lost.
        """
        run = self._run
        run.stop.plan = _ENDING
        loss = choose_final_adapter(run)
        kept = self._keep_adapter(0)
        try:
            self._score(before, loss)
        except Stopped:
            reason = run.state.ended = "interrupted"
        detail = "" if reason != "interrupted" else f"continue with: {resume_command(run.folder.path)}"
        return self._agree(reason, kept, detail=detail)

    def interrupt(self) -> str:
        """All ranks have agreed to stop, and the state is saved: exports the adapter as it is, to be tried.

        A collective call; returns why the run ended. A disk that can't be written is a warning.
        """
        run = self._run
        run.stop.plan = "the adapter is saved"
        kept = _Kept(0, None)
        if run.state.progress.step:
            try:
                kept = self._keep_adapter(0)
            except ModelError as error:
                run.reporter.handle(Noted(str(error), "warning"))
        return self._agree("interrupted", kept, detail=f"continue with: {resume_command(run.folder.path)}")

    def alone(self, error: CollectiveError | None = None) -> str:
        """Ends the run where this rank has nobody left to agree with; returns why it ended.

        After the last step all ranks have the same adapter, so this one saves the results if it doesn't know them kept.

        Raises:
            CollectiveError: ``error``, if this rank has not come to the end, or can't have the adapter that the others
                have.
        """
        run, state = self._run, self._run.state
        if not state.ended:
            if error is not None:
                raise error
            self._report(self._event("interrupted", detail=f"continue with: {resume_command(run.folder.path)}"))
            return "interrupted"
        if state.is_kept or self._is_on_disk():
            self._report(self._kept or self._event(state.ended))
            return state.ended
        log.warning("no other node is left; this rank saves the results")
        if error is not None and state.ended != "interrupted" and not has_final_adapter(run):
            raise error
        run.collective = Solo()
        run.reporter.lead(is_main=True, step=state.progress.step)
        if state.ended == "interrupted":
            return self.interrupt()
        return self.finish(state.ended, state.progress.before)

    def fail(self, error: Exception) -> None:
        """The run has failed with ``error``."""
        self._report(self._event("failed", detail=str(error)))

    def _keep_adapter(self, first: int) -> _Kept:
        """Writes the adapter on the first rank, from ``first`` on, that can; all learn which. A collective call."""
        fault_points.reach("export")
        run = self._run
        collective, troubles = run.collective, list[str]()
        for rank in range(first, collective.world_size):
            name, folder, trouble = host_name(run.config, collective), "", ""
            if rank == collective.rank:
                run.reporter.handle(PhaseProgress("saving the adapter", 0, 1))
                try:
                    folder = str(save_adapter_folder(run))
                except ModelError as error:
                    trouble = str(error)
            name, folder, trouble = msgpack.unpackb(collective.broadcast(msgpack.packb([name, folder, trouble]), rank))
            if not trouble:
                if troubles:
                    text = f"{troubles[0]}; so the results are on rank {rank} ({name}), in {Path(folder).parent}"
                    run.reporter.handle(Noted(text, "warning"))
                if rank:
                    run.reporter.lead(is_main=rank == collective.rank, step=run.state.progress.step)
                return _Kept(rank, Path(folder))
            troubles.append(f"{name}: {trouble}" if collective.world_size > 1 else trouble)
        with contextlib.suppress(CollectiveError):  # all know now
            collective.barrier()
        raise ModelError(troubles[0] if troubles else "no node can write the results")

    def _score(self, before: Mapping[str, Any], loss: float | None) -> None:
        """Scores the exported adapter, unless all ranks have done so before a rank was lost."""
        fault_points.reach("scoring")
        self._run.stop.plan = "the adapter is there; its answers are left out"
        if not all(self._run.collective.all_gather(b"scored" if self._results is not None else b"")):
            self._results = results_of(self._run, before, loss)
        self._run.stop.plan = _ENDING

    def _agree(self, reason: str, kept: _Kept, *, detail: str) -> str:
        """Writes the summary where the adapter is, and tells all ranks that the results are kept."""
        run = self._run
        while True:
            is_keeper = run.collective.rank == kept.rank
            event = self._event(reason, adapter=kept.adapter if is_keeper else None, detail=detail)
            trouble = self._write_summary(event) if is_keeper else ""
            run.state.is_kept = run.state.is_kept or (is_keeper and not trouble)
            fault_points.reach("farewell")
            trouble = run.collective.broadcast(trouble.encode(), kept.rank).decode()
            if not trouble or reason == "interrupted":
                break
            kept = self._keep_adapter(kept.rank + 1)
        run.state.is_kept, self._kept = True, event
        run.collective.barrier()  # who is lost before it has heard so is no reason to begin anew
        self._report(event)
        return reason

    def _write_summary(self, event: RunEnded) -> str:
        """Why summary and configuration are not on this rank's disk; empty if they are."""
        folder = self._run.folder
        before = identity(folder.summary)
        self._run.reporter.handle(RunEnding(event))
        written = identity(folder.summary) not in (None, before) and folder.config.is_file()
        return "" if written else f"the summary can't be written to {folder.path}"

    def _is_on_disk(self) -> bool:
        """Whether another rank has left these results in this rank's folder, which local ranks share."""
        run = self._run
        summary = run.folder.read_summary()
        expected = (run.state.ended, digest(run.model.loaded.model).hex())
        is_there = (run.folder.adapters / "adapters.safetensors").is_file()
        return is_there and (summary.get("reason"), summary.get("adapter_sha256")) == expected

    def _event(self, reason: str, *, adapter: Path | None = None, detail: str = "") -> RunEnded:
        run = self._run
        run.trainer.checkpoints.report(wait=True)
        trouble = run.saver.trouble
        return RunEnded(
            reason=reason,
            steps=run.state.progress.step,
            seconds=time.perf_counter() - self._started,
            final=(self._results or {}) if reason not in ("failed", "interrupted") else {},
            adapter_folder=adapter,
            adapter_sha256=digest(run.model.loaded.model).hex(),
            detail=detail,
            energy=summarize(
                run.trainer.statuses,
                run.config.thermal,
                tokens=run.trainer.tokens,
                target_tokens=run.trainer.target_tokens,
            ),
            warnings=[trouble] if trouble else [],
        )

    def _report(self, event: RunEnded) -> None:
        self._run.reporter.handle(event)
