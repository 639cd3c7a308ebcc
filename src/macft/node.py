"""One node's run, from a checked configuration to the finished adapter: the rooms put together."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.optimizers as optim

from macft.checkpoint.saver import CheckpointSaver
from macft.checkpoint.snapshot import Progress, Snapshot, capture, digest, restore, restore_adapter
from macft.checkpoint.store import CheckpointStore
from macft.collective.base import Collective
from macft.collective.elastic import ElasticCollective
from macft.config.schema import TrainConfig
from macft.config.validate import to_plain
from macft.config.yaml import to_yaml
from macft.data.load import LoadedData, chosen_rows, read, tokenize_all
from macft.data.order import RowOrder
from macft.errors import CheckpointError, DataError, MacftError, MembershipChanged, ModelError
from macft.evaluation.answers import Scored, score_answers
from macft.evaluation.metrics import metric
from macft.evaluation.record import expected_text, question_text
from macft.model.adapt import Adaptation, adapt
from macft.model.adapter_files import load_adapter_weights, save_adapter, save_model
from macft.model.device import prepare_device
from macft.model.load import LoadedModel, load, load_tokenizer
from macft.model.resolve import resolve
from macft.plan.balance import Balance
from macft.plan.settle import settle
from macft.report import fan_out
from macft.report.events import (
    MetricScored,
    Noted,
    PhaseProgress,
    Reporter,
    RunEnded,
    RunStarted,
    Sample,
    SamplesShown,
)
from macft.report.run_folder import RunFolder, write_atomically
from macft.stop import StopRequest
from macft.thermal.energy import summarize
from macft.thermal.guard import ThermalGuard
from macft.training.exchange import GradientExchange
from macft.training.gradient import GradientComputer
from macft.training.loop import Trainer
from macft.training.optimizer import make_optimizer
from macft.training.outer import OuterOptimizer
from macft.training.pace import FullSpeed
from macft.training.settings import TrainingConfig, steps_for


@dataclass
class _Run:
    """What the phases of a run share."""

    config: TrainConfig
    collective: Collective
    folder: RunFolder
    loaded: LoadedModel
    data: LoadedData
    adaptation: Adaptation
    optimizer: optim.Optimizer
    trainer: Trainer
    reporter: Reporter
    guard: ThermalGuard | None


def run_node(config: TrainConfig, collective: Collective, folder: Path, *, resume: bool, stop: StopRequest) -> str:
    """Trains this rank's part.

    Raises:
        MacftError: whatever went wrong, in one line; rank 0 has reported it before.
    """
    started = time.perf_counter()
    elastic = collective if isinstance(collective, ElasticCollective) else None
    try:
        run = _prepare(config, collective, RunFolder(folder), resume=resume, stop=stop)
    except MembershipChanged:
        if elastic is None:
            raise
        # Before all were ready a node was lost: this one gets ready by itself, then meets those who are left.
        elastic.step_out()
        run = _prepare(config, collective, RunFolder(folder), resume=resume, stop=stop)
    try:
        _announce(run)
        together = elastic is None or elastic.is_member or run.trainer.regroup()
        while together:
            _show_members(run)
            try:
                return _train(run, started)
            except MembershipChanged:
                together = run.trainer.regroup()
        return _interrupted(run, started)
    except MacftError as error:
        _end(run, "failed", started, {}, str(error))
        raise
    finally:
        run.trainer.saver.close()
        if run.guard is not None:
            run.guard.close()
        run.reporter.close()


def _train(run: _Run, started: float) -> str:
    """From wherever the run is to its end."""
    before = _score_before(run)
    reason = run.trainer.train()
    if reason == "interrupted":
        return _interrupted(run, started)
    loss = _choose_final_adapter(run)
    adapter_folder = _save_adapter(run)
    final = _score_after(run, before, loss)
    return _end(run, reason, started, final, "", adapter_folder)


def _interrupted(run: _Run, started: float) -> str:
    return _end(run, "interrupted", started, {}, f"go on with: python -m macft.train +resume={run.folder.path}")


def _prepare(
    config: TrainConfig, collective: Collective, folder: RunFolder, *, resume: bool, stop: StopRequest
) -> _Run:
    # Whatever can go wrong without a model goes wrong before one is fetched and loaded.
    optimizer = make_optimizer(config.optimizer)
    raw = read(config.dataset, seed=config.seed)
    model_folder = resolve(config.model)
    tokenizer = load_tokenizer(config.model, model_folder)
    data = tokenize_all(raw, config.dataset, tokenizer, need_test=_is_scored(config))
    order = RowOrder(
        data.train.source_sizes, data.train.source_weights, batch_size=config.training.batch_size, seed=config.seed
    )
    device = prepare_device()
    elastic = collective if isinstance(collective, ElasticCollective) else None
    is_newcomer = elastic is not None and not elastic.is_member
    world_size = _world_size(collective)
    training, plan_notes = settle(config, model_folder, data.train.rows, order, collective, world_size=world_size)
    config = replace(config, training=training)
    loaded = load(config.model, model_folder, tokenizer)
    adaptation = adapt(loaded.model, config.adapter, seed=config.seed)
    if config.adapter.init_from is not None and collective.rank == 0:
        load_adapter_weights(Path(config.adapter.init_from).expanduser(), loaded.model)
    compute = GradientComputer(
        loaded.model,
        adaptation.dropout_keys,
        seed=config.seed,
        checkpoint_blocks=config.training.grad_checkpoint,
        bucket_bytes=config.collective.bucket_bytes,
        packing=config.training.packing,
        compiling=config.training.compile,
        loss_chunk=config.training.loss_chunk,
    )
    store = CheckpointStore(folder.checkpoints, keep_last=config.training.keep_last)
    has_own_disk = config.topology.kind in ("hosts", "ssh")
    saver = CheckpointSaver(store, writers=config.training.replicas if has_own_disk else 1)
    exchange = GradientExchange(collective, config.collective.codec, config.collective.powersgd_rank)
    progress, notes, outer = _agree_on_state(config.training, loaded, optimizer, exchange, store, resume=resume)
    reporter = fan_out.build(
        config.report,
        folder,
        hparams=to_plain(config),
        is_main=collective.rank == 0 and not is_newcomer,
        first_step=progress.step,
        is_newcomer=is_newcomer,
    )
    valid_rows = chosen_rows(len(data.valid.rows), config.training.eval_rows, config.seed)
    guard: ThermalGuard | None = None
    if config.thermal.enabled:
        guard = ThermalGuard(config.thermal, rank=collective.rank, stop=lambda: stop.requested)
    trainer = Trainer(
        model=loaded.model,
        optimizer=optimizer,
        compute=compute,
        collective=collective,
        train_rows=data.train.rows,
        valid_rows=[data.valid.rows[i] for i in valid_rows],
        order=order,
        total_steps=steps_for(config.training, order.steps_per_epoch),
        config=config.training,
        optimizer_config=config.optimizer,
        saver=saver,
        reporter=reporter,
        progress=progress,
        stop=stop,
        exchange=exchange,
        outer=outer,
        balance=Balance(_shares(config, world_size), world_size, every=config.topology.rebalance_every),
        pace=guard or FullSpeed(),
        elastic=elastic,
    )
    run = _Run(config, collective, folder, loaded, data, adaptation, optimizer, trainer, reporter, guard)
    run.data.notes[:0] = [device, *loaded.notes, *plan_notes]
    run.data.notes += notes
    return run


def _world_size(collective: Collective) -> int:
    """How many nodes the run has, as far as a newcomer knows yet."""
    return len(collective.members.ids) if isinstance(collective, ElasticCollective) else collective.world_size


def _shares(config: TrainConfig, world_size: int) -> str | list[float]:
    """As configured; a newcomer, which is told them, may come to another number of nodes."""
    shares = config.topology.shares
    return "equal" if isinstance(shares, list) and len(shares) != world_size else shares


def _agree_on_state(
    training: TrainingConfig,
    loaded: LoadedModel,
    optimizer: optim.Optimizer,
    exchange: GradientExchange,
    store: CheckpointStore,
    *,
    resume: bool,
) -> tuple[Progress, list[str], OuterOptimizer | None]:
    """Every rank begins with the same state: rank 0's fresh one, or that of the newest checkpoint."""
    collective = exchange.collective
    found, notes = store.newest_valid() if resume else (None, [])
    # Any node may hold the newest one that is whole; the first of them gives it to all.
    steps = [int(step) for step in collective.all_gather(str(found.progress.step if found else 0).encode())]
    source = steps.index(max(steps))
    if source:
        notes.append(f"the newest checkpoint that can be used, of step {max(steps)}, is on node {source}'s disk")
    elif resume and not max(steps):
        why = "none of its checkpoints can be used" if notes else "no checkpoint was saved before the run stopped"
        notes.append(f"{why}; it starts from the beginning")
    payload = b""
    if collective.rank == source:
        payload = (found or capture(loaded.model, optimizer, Progress())).pack()
    snapshot = Snapshot.unpack(collective.broadcast(payload, source))
    progress = Progress()
    if snapshot.progress.step == 0:
        restore_adapter(snapshot, loaded.model)
    else:
        progress = restore(snapshot, loaded.model, optimizer)
        if snapshot.codec:
            exchange.restore(snapshot.codec)
    if training.sync != "diloco":
        return progress, notes, None
    rate, momentum = training.outer_learning_rate, training.outer_momentum
    outer = OuterOptimizer(loaded.model, learning_rate=rate, momentum=momentum)
    if snapshot.outer:
        outer.restore(snapshot.outer, loaded.model, optimizer, collective.rank)
    notes.append(f"training.sync=diloco: the nodes meet every {training.inner_steps} steps; between two meetings the")
    notes[-1] += " loss and tokens/s shown are rank 0's own"
    return progress, notes, outer


def _show_members(run: _Run) -> None:
    """Writes down whom a newcomer can ask; its own affair where that fails."""
    elastic = run.trainer.elastic
    if elastic is None or not elastic.is_member or elastic.rank != 0:
        return
    now = elastic.members
    members = [{"name": name, "address": at} for name, at in zip(now.names, now.addresses, strict=True)]
    with contextlib.suppress(OSError):
        write_atomically(run.folder.members, json.dumps({"members": members}, indent=2) + "\n")


def _announce(run: _Run) -> None:
    config, data = run.config, run.data
    run.reporter.run_started(
        RunStarted(
            run_folder=run.folder.path,
            device=data.notes[0],
            model=config.model.path,
            adapter=run.adaptation.description,
            trainable_parameters=run.adaptation.trainable_parameters,
            total_parameters=run.adaptation.total_parameters,
            train_rows=len(data.train.rows),
            valid_rows=len(run.trainer.valid_rows),
            test_rows=len(data.test.rows),
            batch_size=config.training.batch_size,
            total_steps=run.trainer.total_steps,
            first_step=run.trainer.progress.step,
            rank=run.collective.rank,
            world_size=_world_size(run.collective),
            shares=str(config.topology.shares),
            config_yaml=to_yaml(config),
            notes=data.notes[1:],
        )
    )


def _is_scored(config: TrainConfig) -> bool:
    return config.dataset.metric is not None and config.training.metric_rows != 0


def _records(run: _Run) -> list[dict[str, Any]]:
    rows = chosen_rows(len(run.data.test.records), run.config.training.metric_rows, run.config.seed)
    return [run.data.test.records[i] for i in rows]


def _score(run: _Run, when: str) -> Scored | None:
    name, training = run.config.dataset.metric, run.config.training
    if name is None or not _is_scored(run.config):
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
        progress=lambda done, total: run.reporter.phase_progress(PhaseProgress(f"answering, {when}", done, total)),
    )
    step = run.trainer.progress.step
    run.reporter.metric_scored(MetricScored(step, name, "test", when, result.value, len(records), result.seconds))
    return result


def _score_before(run: _Run) -> Mapping[str, Any]:
    """The metric of the untrained model, kept in the run's progress so that a resumed run needn't repeat it."""
    progress = run.trainer.progress
    if not progress.before and progress.step == 0 and (scored := _score(run, "before")):
        progress.before = {"value": scored.value, "answers": scored.answers, "right": scored.right}
    return progress.before


def _score_after(run: _Run, before: Mapping[str, Any], loss: float | None) -> dict[str, float]:
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
    run.reporter.samples_shown(SamplesShown(progress.step, samples))
    return final


def _choose_final_adapter(run: _Run) -> float | None:
    """Puts the best checkpoint's adapter into the model where that is to be exported; returns its validation loss."""
    progress, saver, collective = run.trainer.progress, run.trainer.saver, run.collective
    if run.trainer.has_final_adapter:
        return progress.best_valid_loss
    if run.config.training.export != "best" or progress.best_step in (None, progress.step):
        return progress.valid_loss
    if progress.best_step == 0:
        run.reporter.noted(Noted("no validation was better than before training; the last adapter is kept", "warning"))
        return progress.valid_loss
    stored = b""
    if progress.best_step in saver.store.steps():
        try:
            stored = saver.store.load(int(progress.best_step or 0)).pack()
        except CheckpointError as error:
            run.reporter.noted(Noted(str(error), "warning"))
    holders = [rank for rank, has in enumerate(collective.all_gather(b"1" if stored else b"")) if has]
    if not holders:
        run.reporter.noted(
            Noted(f"the best adapter, of step {progress.best_step}, was not saved; the last one is kept")
        )
        return progress.valid_loss
    restore_adapter(Snapshot.unpack(collective.broadcast(stored, holders[0])), run.loaded.model)
    run.trainer.has_final_adapter = True
    return progress.best_valid_loss


def _save_adapter(run: _Run) -> Path | None:
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


def _end(
    run: _Run, reason: str, started: float, final: Mapping[str, float], detail: str, adapter_folder: Path | None = None
) -> str:
    trainer = run.trainer
    trainer.saves.tell(wait=True)
    trouble = trainer.saver.trouble
    run.reporter.run_ended(
        RunEnded(
            reason=reason,
            steps=trainer.progress.step,
            seconds=time.perf_counter() - started,
            final=final,
            adapter_folder=adapter_folder,
            adapter_sha256=digest(run.loaded.model).hex(),
            detail=detail,
            energy=summarize([*trainer.nodes, *trainer.departed], run.config.thermal, tokens=trainer.tokens),
            warnings=[trouble] if trouble else [],
        )
    )
    return reason
