"""Results of a run: losses and metrics, and the adapter that is exported."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from macft.checkpoint.snapshot import Snapshot, restore_adapter
from macft.collective.newest import find_newest
from macft.config.overrides import resume_command
from macft.device.durable import sync_all
from macft.errors import CheckpointError, ModelError
from macft.model.adapters.files import save_adapter, save_model
from macft.report.events import Noted
from macft.run.prepare import Run
from macft.run.scoring import score_after


def results_of(run: Run, before: Mapping[str, Any], loss: float | None) -> dict[str, float]:
    """Losses and metrics of the adapter that is exported, whose validation loss is ``loss``; shows the samples.

    Raises:
        Stopped: a stop was requested.
    """
    progress = run.state.progress
    final: dict[str, float] = {}
    if progress.first_valid_loss is not None and loss is not None:
        final |= {"valid_loss_before": progress.first_valid_loss, "valid_loss": loss}
    return final | score_after(run, before)


def choose_final_adapter(run: Run) -> float | None:
    """Loads the best checkpoint's adapter if ``training.export`` says so; returns the validation loss of the adapter.

    A collective call.
    """
    progress, store = run.state.progress, run.saver.store
    if run.state.has_final_adapter:
        return progress.best_valid_loss
    if not _wants_best(run):
        return progress.valid_loss
    if progress.best_step == 0:
        run.reporter.handle(Noted("no validation was better than before training; the last adapter is kept", "warning"))
        return progress.valid_loss
    stored = b""
    if progress.best_step in store.steps():
        try:
            stored = store.load(int(progress.best_step or 0)).pack()
        except CheckpointError as error:
            run.reporter.handle(Noted(str(error), "warning"))
    newest = find_newest(run.collective, [bool(stored)])
    if newest.position == (False,):
        run.reporter.handle(
            Noted(f"the best adapter, of step {progress.best_step}, was not saved; the last one is kept")
        )
        return progress.valid_loss
    restore_adapter(Snapshot.unpack(newest.share(lambda: stored)), run.model.loaded.model)
    run.state.has_final_adapter = True
    return progress.best_valid_loss


def has_final_adapter(run: Run) -> bool:
    """Whether this rank can have the adapter that is exported without the others."""
    progress = run.state.progress
    if run.state.has_final_adapter or not _wants_best(run) or progress.best_step == 0:
        return True
    return progress.best_step in run.saver.store.steps()


def _wants_best(run: Run) -> bool:
    """Whether another adapter than the last one is to be exported."""
    progress = run.state.progress
    return run.config.training.export == "best" and progress.best_step not in (None, progress.step)


def save_adapter_folder(run: Run) -> Path:
    """Writes the adapter folder of this rank's run folder, and returns it once it is on disk.

    Raises:
        ModelError: it can't be written.
    """
    loaded, folder = run.model.loaded, run.folder.adapters
    try:
        save_adapter(folder, loaded.model, run.model.adaptation.mlx_lm_config, model_name=str(loaded.path.absolute()))
        sync_all(folder)
        if run.config.adapter.type == "full" and loaded.was_quantized:
            # The tuned weights don't fit the quantised checkpoint they came from, so the whole model goes along.
            save_model(run.folder.model, loaded)
            sync_all(run.folder.model)
    except (OSError, RuntimeError) as error:  # MLX's own writing raises the latter
        why = " ".join(str(error).split()) if isinstance(error, RuntimeError) else error.strerror or error
        raise ModelError(
            f"the adapter can't be written to {folder} ({why}); make room there, then continue with: "
            f"{resume_command(run.folder.path)}"
        ) from error
    return folder
