"""All that a run needs, made ready on one node: data, plan, model, adapter, state and trainer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import mlx.optimizers as optim

from macft.checkpoint.saver import CheckpointSaver
from macft.checkpoint.snapshot import Progress, Snapshot, capture, restore, restore_adapter
from macft.checkpoint.store import CheckpointStore
from macft.collective.base import Collective
from macft.collective.elastic import ElasticCollective
from macft.config.execution import requires_packing, with_execution
from macft.config.schema import TrainConfig
from macft.config.validate import to_plain
from macft.data.load import LoadedData, chosen_rows, read, tokenize_all
from macft.data.order import RowOrder
from macft.device.mlx_device import prepare_device
from macft.model.adapt import Adaptation, adapt
from macft.model.adapter_files import load_adapter_weights
from macft.model.confirm import confirm
from macft.model.load import LoadedModel, load, load_tokenizer
from macft.model.resolve import resolve
from macft.parallel.balance import ShareBalancer
from macft.planner.preflight import preflight
from macft.report import fan_out
from macft.report.events import Reporter
from macft.report.run_folder import RunFolder
from macft.thermal.throttle import ThermalThrottle
from macft.training.diloco import OuterOptimizer
from macft.training.gradient import GradientComputer
from macft.training.gradient_reducer import GradientReducer
from macft.training.loop import Trainer
from macft.training.optimizer import make_optimizer
from macft.training.settings import TrainingConfig, steps_for
from macft.training.stop import StopRequest
from macft.training.throttle import NoThrottle


@dataclass
class Run:
    """One node's run, as its phases share it."""

    config: TrainConfig
    collective: Collective
    folder: RunFolder
    loaded: LoadedModel
    data: LoadedData
    adaptation: Adaptation
    optimizer: optim.Optimizer
    trainer: Trainer
    reporter: Reporter
    guard: ThermalThrottle | None


def prepare(config: TrainConfig, collective: Collective, folder: RunFolder, *, resume: bool, stop: StopRequest) -> Run:
    """Everything loaded, and the same state on every rank.

    Raises:
        MacftError: something is missing or doesn't fit; in one line.
        MembershipChanged: a node was lost before all were ready.
    """
    # Whatever can go wrong without a model goes wrong before one is fetched and loaded.
    optimizer = make_optimizer(config.optimizer)
    raw = read(config.dataset, seed=config.seed)
    model_folder = resolve(config.model)
    tokenizer = load_tokenizer(config.model, model_folder)
    data = tokenize_all(raw, config.dataset, tokenizer, need_test=is_scored(config))
    order = RowOrder(
        data.train.source_sizes, data.train.source_weights, batch_size=config.training.batch_size, seed=config.seed
    )
    device = prepare_device()
    elastic = collective if isinstance(collective, ElasticCollective) else None
    is_newcomer = elastic is not None and not elastic.is_member
    world_size = planned_world_size(collective)
    execution, plan_notes = preflight(config, model_folder, data.train.rows, order, collective, world_size=world_size)
    config = with_execution(config, execution)
    loaded = load(config.model, model_folder, execution, tokenizer)
    execution, revisions = confirm(execution, loaded, packing_required=requires_packing(config))
    adaptation = adapt(loaded.model, config.adapter, seed=config.seed)
    if config.adapter.init_from is not None and collective.rank == 0:
        load_adapter_weights(Path(config.adapter.init_from).expanduser(), loaded.model)
    compute = GradientComputer(
        loaded.model,
        adaptation.dropout_keys,
        seed=config.seed,
        checkpoint_blocks=execution.recompute == "blocks",
        bucket_bytes=config.collective.bucket_bytes,
        packing=str(execution.packing),
        compiling=str(execution.compiled),
        loss_chunk=execution.loss_chunk,
    )
    store = CheckpointStore(folder.checkpoints, keep_last=config.training.keep_last)
    has_own_disk = config.topology.kind in ("hosts", "ssh")
    saver = CheckpointSaver(store, writers=config.training.replicas if has_own_disk else 1)
    exchange = GradientReducer(collective, config.collective.codec, config.collective.powersgd_rank)
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
    guard: ThermalThrottle | None = None
    if config.thermal.enabled:
        guard = ThermalThrottle(config.thermal, rank=collective.rank, stop=lambda: stop.requested)
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
        balance=ShareBalancer(_shares(config, world_size), world_size, every=config.topology.rebalance_every),
        pace=guard or NoThrottle(),
        elastic=elastic,
    )
    run = Run(config, collective, folder, loaded, data, adaptation, optimizer, trainer, reporter, guard)
    run.data.notes[:0] = [device, *loaded.notes, *plan_notes, *revisions]
    run.data.notes += notes
    return run


def planned_world_size(collective: Collective) -> int:
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
    exchange: GradientReducer,
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


def is_scored(config: TrainConfig) -> bool:
    """Whether the dataset's metric is to be taken before and after training."""
    return config.dataset.metric is not None and config.training.metric_rows != 0
