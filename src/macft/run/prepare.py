"""Prepares one rank's run: data, plan, model, adapter, state, trainer."""

from __future__ import annotations

import logging
import platform
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from macft.checkpoint.saver import CheckpointSaver
from macft.checkpoint.snapshot import Progress, Snapshot
from macft.checkpoint.store import CheckpointStore
from macft.collective.base import Collective
from macft.collective.elastic import ElasticCollective
from macft.collective.newest import find_newest
from macft.config.execution import with_execution
from macft.config.schema import TrainConfig
from macft.config.validate import to_plain
from macft.config.yaml import to_yaml
from macft.data.load import LoadedData, sample_rows
from macft.device.mlx_device import prepare_device
from macft.errors import CheckpointError
from macft.model.adapters.adapt import Adaptation, adapt
from macft.model.adapters.files import load_adapter_weights
from macft.model.backends.base import Backend
from macft.model.backends.choose import make_backend
from macft.model.load import LoadedModel, load
from macft.model.trials.confirm import confirm
from macft.parallel.balance import ShareBalancer
from macft.parallel.stage_balance import StageBalancer
from macft.parallel.stage_places import StagePlaces
from macft.planner.preflight.decision import Preflight, preflight
from macft.report import fan_out
from macft.report.callbacks import Callbacks
from macft.report.events import Reporter
from macft.report.phase_lines import PhaseLines
from macft.report.run_folder import RunFolder
from macft.report.trackers.registry import require_installed
from macft.run.contents import agree_on_contents, store_contents, told_to_others
from macft.run.held_out import HeldOut
from macft.run.local_paths import with_absolute_paths
from macft.run.prepare_data import begin_phase, prepare_data
from macft.run.resume import check_resume, check_steps, no_checkpoint, notes_of_changes, previous_config
from macft.thermal.throttle import ThermalThrottle
from macft.training.build_trainer import build_trainer
from macft.training.diloco import OuterOptimizer
from macft.training.gradient import StepGradient
from macft.training.gradient_reducer import GradientReducer
from macft.training.loop import Trainer
from macft.training.optimizer import make_optimizer
from macft.training.settings import steps_for
from macft.training.state import TrainState
from macft.training.step_gradient import make_step_gradient
from macft.training.stop_request import StopRequest

log = logging.getLogger("macft.run")


@dataclass
class Run:
    """One rank's run, as its phases share it. ``notes`` are lines for the user."""

    config: TrainConfig
    collective: Collective
    folder: RunFolder
    device: str
    loaded: LoadedModel
    data: LoadedData
    valid_rows: int
    adaptation: Adaptation
    saver: CheckpointSaver
    throttle: ThermalThrottle | None
    reporter: Reporter
    trainer: Trainer
    compute: StepGradient
    held_out: HeldOut
    stop: StopRequest
    backend: Backend
    # Its operations on the model; closing it removes them.
    installed: ExitStack
    notes: list[str]
    # Where the weights are, in one line; empty where that isn't known.
    layout: str

    @property
    def state(self) -> TrainState:
        """Parameters, optimizer and progress."""
        return self.trainer.state

    def close(self) -> None:
        """Ends threads and closes files."""
        self.saver.close()
        if self.throttle is not None:
            self.throttle.close()
        self.reporter.close()
        self.installed.close()


def prepare(
    config: TrainConfig,
    collective: Collective,
    folder: RunFolder,
    phases: PhaseLines,
    *,
    resume: bool,
    stop: StopRequest,
    callbacks: Callbacks | None = None,
) -> Run:
    """Loads everything; afterwards all ranks have the same state.

    Raises:
        MacftError: something is missing or does not fit; in one line.
        MembershipChanged: a node was lost before all were ready.
    """
    # Whatever can go wrong without a model goes wrong before one is fetched and loaded.
    given, before = with_absolute_paths(config), previous_config(folder) if resume else None
    if resume:
        check_resume(folder, config)
    optimizer = make_optimizer(config.optimizer)
    host = host_name(config, collective)
    with told_to_others(collective, host):
        if collective.rank == 0:
            require_installed(config.report.trackers)
        prepared = prepare_data(config, phases)
    data, order, model_folder = prepared.data, prepared.order, prepared.model_folder
    begin_phase(phases, "comparing the rows and the model with the other nodes'")
    contents_notes = agree_on_contents(collective, host, prepared.contents, data.train, folder, resume=resume)

    device = prepare_device()
    begin_phase(phases, "planning memory")
    decision = preflight(
        config, model_folder, data.train.rows, order, collective, world_size=planned_world_size(collective)
    )
    places = StagePlaces(collective, decision.decide, decision.changes)
    places.agree()
    execution = decision.execution
    config = with_execution(decision.config, execution)
    training = config.training

    begin_phase(phases, f"loading the model {config.model.path}")
    log.info("from %s, on %s", model_folder, device)
    loaded = load(config.model, model_folder, execution, prepared.tokenizer)
    execution, revisions = confirm(execution, loaded)
    adaptation = adapt(loaded.model, config.adapter, seed=config.seed, streamed=loaded.streamed)
    if config.adapter.init_from is not None and collective.rank == 0:
        load_adapter_weights(Path(config.adapter.init_from).expanduser(), loaded.model)

    begin_phase(phases, "sharing the state")
    reducer = GradientReducer(collective, config.collective.codec, config.collective.powersgd_rank)
    state = TrainState(loaded.model, optimizer, Progress(), reducer, _outer_optimizer(config, loaded))
    store = CheckpointStore(folder.checkpoints, keep_last=training.keep_last)
    is_newcomer = isinstance(collective, ElasticCollective) and not collective.is_member
    is_main = collective.rank == 0 and not is_newcomer
    has_own_disk = config.topology.kind in ("hosts", "ssh")
    has_own_folder = is_main or has_own_disk or config.topology.join is not None
    if has_own_folder and config.report.overwrite and not resume:
        folder.clear()
    state_notes = share_state(
        state, store, folder, total_steps=steps_for(training, order.steps_per_epoch), resume=resume
    )
    if before is not None:
        state_notes += notes_of_changes(with_absolute_paths(before), given, state.progress.step)
    if state.outer is not None:
        state_notes.append(
            f"training.sync=diloco: the nodes meet every {training.inner_steps} steps; between two meetings the loss "
            "and tokens/s shown are rank 0's own"
        )

    throttle: ThermalThrottle | None = None
    if config.thermal.enabled:
        throttle = ThermalThrottle(config.thermal, rank=collective.rank, stop=lambda: stop.requested)
    saver = CheckpointSaver(store, writers=training.replicas if has_own_disk else 1)
    backend = make_backend(execution)
    installed = ExitStack()
    installed.enter_context(backend.installed(loaded.model))
    compute = make_step_gradient(
        loaded.model,
        backend,
        execution,
        adaptation.dropout_keys,
        loaded.streamed,
        seed=config.seed,
        bucket_bytes=config.collective.bucket_bytes,
        places=places,
        deterministic=training.deterministic,
    )
    world_size = planned_world_size(collective)
    valid_rows = [data.valid.rows[i] for i in sample_rows(len(data.valid.rows), training.eval_rows, config.seed)]
    balancer = ShareBalancer(_shares(config, world_size), world_size, every=config.topology.rebalance_every)
    if has_own_folder or is_newcomer:  # all who prepare after the loss of rank 0 are newcomers; one of them will lead
        _begin(folder, given)
        store_contents(folder, prepared.contents)
    reporter = fan_out.build(
        config.report,
        folder,
        hparams=to_plain(config),
        is_main=is_main,
        first_step=state.progress.step,
        is_newcomer=is_newcomer,
        callbacks=callbacks,
    )
    trainer = build_trainer(
        training,
        config.optimizer,
        state,
        compute,
        data.train.rows,
        order,
        saver,
        reporter,
        valid_rows=valid_rows,
        balancer=balancer,
        throttle=throttle,
        stop=stop,
        places=places,
        stages=_stages(config, decision, world_size),
        refit=decision.refit,
    )
    return Run(
        config=config,
        collective=collective,
        folder=folder,
        device=device,
        loaded=loaded,
        data=data,
        valid_rows=len(valid_rows),
        adaptation=adaptation,
        saver=saver,
        throttle=throttle,
        reporter=reporter,
        trainer=trainer,
        compute=compute,
        held_out=prepared.held_out,
        stop=stop,
        backend=backend,
        installed=installed,
        layout=decision.layout,
        notes=[*loaded.notes, *decision.notes, *revisions, *contents_notes, *prepared.notes, *state_notes],
    )


def _begin(folder: RunFolder, config: TrainConfig) -> None:
    rank_of_process = replace(config.topology, rank=None) if config.topology.kind == "ssh" else config.topology
    try:
        folder.begin(to_yaml(replace(config, topology=rank_of_process)))
    except OSError as error:
        raise CheckpointError(f"{folder.config} can't be written: {error.strerror or error}") from error


def host_name(config: TrainConfig, collective: Collective) -> str:
    """This node's name in messages."""
    if isinstance(collective, ElasticCollective) and collective.is_member:
        return collective.members.names[collective.rank]
    hosts = config.topology.hosts
    return hosts[collective.rank] if len(hosts) == collective.world_size else platform.node()


def planned_world_size(collective: Collective) -> int:
    """How many nodes the run has, as far as a newcomer knows yet."""
    return len(collective.members.ids) if isinstance(collective, ElasticCollective) else collective.world_size


def share_state(
    state: TrainState, store: CheckpointStore, folder: RunFolder, *, total_steps: int, resume: bool
) -> list[str]:
    """Gives all ranks the same state: rank 0's initial one, or with ``resume`` that of the newest checkpoint.

    Any rank may hold the newest checkpoint that can be read. Returns lines for the user. A call of all ranks.

    Raises:
        CheckpointError: the run has checkpoints, and none of them can be read on any node.
        ConfigError: the newest checkpoint is of a later step than ``total_steps``.
    """
    stored, notes = store.newest_valid() if resume else (None, [])
    newest = find_newest(state.reducer.collective, [stored.progress.step, 0] if stored else [0, len(notes)])
    step, unreadable = newest.position
    if not step and unreadable:
        raise no_checkpoint(folder, unreadable, notes)
    check_steps(step, total_steps)
    if newest.source and step:
        notes.append(f"the newest checkpoint that can be used, of step {step}, is on node {newest.source}'s disk")
    elif resume and not step:
        notes.append("no checkpoint was saved before the run stopped; it starts from the beginning")
    payload = newest.share(lambda: (stored or state.capture()).pack())
    state.restore(Snapshot.unpack(payload))
    return notes


def _outer_optimizer(config: TrainConfig, loaded: LoadedModel) -> OuterOptimizer | None:
    training = config.training
    if training.sync != "diloco":
        return None
    rate, momentum = training.outer_learning_rate, training.outer_momentum
    return OuterOptimizer(loaded.model, learning_rate=rate, momentum=momentum)


def _stages(config: TrainConfig, decision: Preflight, world_size: int) -> StageBalancer | None:
    """What watches the stages, where the user has not said how many blocks each has."""
    if decision.changes is None:
        return None
    return StageBalancer(world_size, every=config.topology.rebalance_every)


def _shares(config: TrainConfig, world_size: int) -> str | list[float]:
    """As configured; a newcomer, which gets the others' shares, may come to another number of nodes."""
    shares = config.topology.shares
    return "equal" if isinstance(shares, list) and len(shares) != world_size else shares
