"""What comes of a run: the metric before and after training, the adapter that is kept, samples."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from macft.checkpoint.snapshot import Snapshot, restore_adapter
from macft.data.load import chosen_rows
from macft.errors import CheckpointError, DataError, ModelError
from macft.evaluation.answers import Scored, score_answers
from macft.evaluation.metrics import metric
from macft.evaluation.record import expected_text, question_text
from macft.model.adapter_files import save_adapter, save_model
from macft.report.events import MetricScored, Noted, PhaseProgress, Sample, SamplesShown
from macft.run.prepare import Run, is_scored


def _records(run: Run) -> list[dict[str, Any]]:
    rows = chosen_rows(len(run.data.test.records), run.config.training.metric_rows, run.config.seed)
    return [run.data.test.records[i] for i in rows]


def _score(run: Run, when: str) -> Scored | None:
    name, training = run.config.dataset.metric, run.config.training
    if name is None or not is_scored(run.config):
        return None
    records = _records(run)
    if not records:
        raise DataError(f"training.metric_rows: dataset {run.config.dataset.path} has no test rows to score")
    result = score_answers(
        run.loaded.model,
        run.loaded.tokenizer,
        records,
        metric(name),
        run.collective,
        max_tokens=training.metric_max_tokens,
        progress=lambda done, total: run.reporter.handle(PhaseProgress(f"answering, {when}", done, total)),
    )
    step = run.trainer.progress.step
    run.reporter.handle(MetricScored(step, name, "test", when, result.value, len(records), result.seconds))
    return result


def score_before(run: Run) -> Mapping[str, Any]:
    """The metric of the untrained model, kept in the run's progress so that a resumed run needn't repeat it."""
    progress = run.trainer.progress
    if not progress.before and progress.step == 0 and (scored := _score(run, "before")):
        progress.before = {"value": scored.value, "answers": scored.answers, "right": scored.right}
    return progress.before


def score_after(run: Run, before: Mapping[str, Any], loss: float | None) -> dict[str, float]:
    """The results of the adapter chosen, whose validation loss is ``loss``."""
    progress = run.trainer.progress
    final: dict[str, float] = {}
    if progress.first_valid_loss is not None and loss is not None:
        final |= {"valid_loss_before": progress.first_valid_loss, "valid_loss": loss}
    scored = _score(run, "after")
    if scored is None:
        return final
    name = str(run.config.dataset.metric)
    if before:
        final[f"{name}_before"] = float(before["value"])
    final[name] = scored.value
    records = _records(run)
    samples = [
        Sample(
            prompt=question_text(records[i]),
            expected=expected_text(records[i]),
            before=before["answers"][i] if before else None,
            after=scored.answers[i],
            before_correct=before["right"][i] if before else None,
            after_correct=scored.right[i],
        )
        for i in range(min(run.config.report.samples, len(records)))
    ]
    run.reporter.handle(SamplesShown(progress.step, samples))
    return final


def choose_final_adapter(run: Run) -> float | None:
    """Puts the best checkpoint's adapter into the model where that is to be exported; returns its validation loss."""
    progress, saver, collective = run.trainer.progress, run.trainer.saver, run.collective
    if run.trainer.has_final_adapter:
        return progress.best_valid_loss
    if run.config.training.export != "best" or progress.best_step in (None, progress.step):
        return progress.valid_loss
    if progress.best_step == 0:
        run.reporter.handle(Noted("no validation was better than before training; the last adapter is kept", "warning"))
        return progress.valid_loss
    stored = b""
    if progress.best_step in saver.store.steps():
        try:
            stored = saver.store.load(int(progress.best_step or 0)).pack()
        except CheckpointError as error:
            run.reporter.handle(Noted(str(error), "warning"))
    holders = [rank for rank, has in enumerate(collective.all_gather(b"1" if stored else b"")) if has]
    if not holders:
        run.reporter.handle(
            Noted(f"the best adapter, of step {progress.best_step}, was not saved; the last one is kept")
        )
        return progress.valid_loss
    restore_adapter(Snapshot.unpack(collective.broadcast(stored, holders[0])), run.loaded.model)
    run.trainer.has_final_adapter = True
    return progress.best_valid_loss


def save_final_adapter(run: Run) -> Path | None:
    """Writes the adapter folder, on rank 0, and returns it.

    Raises:
        ModelError: it can't be written.
    """
    if run.collective.rank != 0:
        return None
    loaded, folder = run.loaded, run.folder.adapters
    source = str(loaded.path) if run.config.model.path != str(loaded.path) else run.config.model.path
    try:
        save_adapter(folder, loaded.model, run.adaptation.mlx_lm_config, model_name=source)
        if run.config.adapter.type == "full" and loaded.was_quantized:
            # The tuned weights don't fit the quantised checkpoint they came from, so the whole model goes along.
            save_model(run.folder.path / "model", loaded)
    except OSError as error:
        raise ModelError(
            f"the adapter can't be written to {folder} ({error.strerror or error}); make room there, then go on with: "
            f"python -m macft.train +resume={run.folder.path}"
        ) from error
    return folder
