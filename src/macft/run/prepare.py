"""Prepares one rank's run: data, plan, model, adapter, state, trainer."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from macft.checkpoint.saver import CheckpointSaver
from macft.checkpoint.store import CheckpointStore
from macft.collective.base import Collective
from macft.config.execution import with_execution
from macft.config.schema import TrainConfig
from macft.config.validate import to_plain
from macft.config.yaml import to_yaml
from macft.data.load import LoadedData, sample_rows
from macft.device.mlx_device import prepare_device
from macft.errors import CheckpointError
from macft.parallel.balance import ShareBalancer
from macft.parallel.stage_balance import StageBalancer
from macft.parallel.stage_places import StagePlaces
from macft.planner.preflight.decision import Preflight, preflight
from macft.report.events import Reporter
from macft.report.phase_lines import PhaseLines
from macft.report.run_folder import RunFolder
from macft.report.sinks import fan_out
from macft.report.sinks.callbacks import Callbacks
from macft.report.trackers.registry import require_installed
from macft.run.contents import agree_on_contents, store_contents, told_to_others
from macft.run.held_out import HeldOut
from macft.run.local_paths import with_absolute_paths
from macft.run.prepare_data import PreparedData, begin_phase, prepare_data
from macft.run.prepare_model import Computation, PreparedModel, prepare_computation, prepare_model
from macft.run.prepare_state import diloco_notes, new_state, share_state
from macft.run.resume import check_resume, notes_of_changes, previous_config
from macft.run.role import Role, host_name, planned_world_size
from macft.thermal.throttle import ThermalThrottle
from macft.training.build_trainer import NodeSetup, TrainingRows, build_trainer
from macft.training.loop import Trainer
from macft.training.optimizer import make_optimizer
from macft.training.settings import steps_for
from macft.training.state import TrainState
from macft.training.stop_request import StopRequest

log = logging.getLogger("macft.run")


@dataclass
class Run:
    """One rank's run, as its phases share it. ``notes`` are lines for the user."""

    config: TrainConfig
    collective: Collective
    folder: RunFolder
    device: str
    model: PreparedModel
    data: LoadedData
    valid_rows: int
    saver: CheckpointSaver
    throttle: ThermalThrottle | None
    reporter: Reporter
    trainer: Trainer
    computation: Computation
    held_out: HeldOut
    stop: StopRequest
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
        self.computation.installed.close()


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
    role = Role.of(config, collective)
    prepared, contents_notes = _agreed_data(config, collective, folder, phases, resume=resume)
    data, order = prepared.data, prepared.order

    device = prepare_device()
    begin_phase(phases, "planning memory")
    decision = preflight(
        config, prepared.model_folder, data.train.rows, order, collective, world_size=planned_world_size(collective)
    )
    places = StagePlaces(collective, decision.decide, decision.changes)
    places.agree()
    config = with_execution(decision.config, decision.execution)
    training = config.training

    is_first = collective.rank == 0
    model = prepare_model(config, prepared, decision.execution, phases, device=device, reads_adapter=is_first)

    begin_phase(phases, "sharing the state" if collective.world_size > 1 else "preparing the first step")
    state = new_state(config, model.loaded.model, optimizer, collective)
    store = CheckpointStore(folder.checkpoints, keep_last=training.keep_last)
    if role.has_own_folder and config.report.overwrite and not resume:
        folder.clear()
    total_steps = steps_for(training, order.steps_per_epoch)
    state_notes = share_state(state, store, folder, total_steps=total_steps, resume=resume)
    if before is not None:
        state_notes += notes_of_changes(with_absolute_paths(before), given, state.progress.step)
    state_notes += diloco_notes(training)

    throttle = _throttle(config, collective, stop)
    saver = CheckpointSaver(store, writers=training.replicas if role.has_own_disk else 1)
    computation = prepare_computation(config, model, places)
    if role.has_own_folder or role.is_newcomer:  # those who prepare after the loss of rank 0; one of them will lead
        _begin(folder, given)
        store_contents(folder, prepared.contents)
    reporter = fan_out.build(
        config.report,
        folder,
        hparams=to_plain(config),
        is_main=role.is_main,
        first_step=state.progress.step,
        is_newcomer=role.is_newcomer,
        callbacks=callbacks,
    )
    valid_rows = [data.valid.rows[i] for i in sample_rows(len(data.valid.rows), training.eval_rows, config.seed)]
    trainer = build_trainer(
        training,
        config.optimizer,
        state,
        computation.gradient,
        TrainingRows(data.train.rows, order, valid_rows),
        saver,
        reporter,
        _node_setup(config, decision, collective, places, throttle, stop),
    )
    return Run(
        config=config,
        collective=collective,
        folder=folder,
        device=device,
        model=model,
        data=data,
        valid_rows=len(valid_rows),
        saver=saver,
        throttle=throttle,
        reporter=reporter,
        trainer=trainer,
        computation=computation,
        held_out=prepared.held_out,
        stop=stop,
        layout=decision.layout,
        notes=[
            *model.loaded.notes,
            *decision.notes,
            *model.notes,
            *contents_notes,
            *prepared.notes,
            *state_notes,
        ],
    )


def _agreed_data(
    config: TrainConfig, collective: Collective, folder: RunFolder, phases: PhaseLines, *, resume: bool
) -> tuple[PreparedData, list[str]]:
    """What the run trains on, and lines for the user, once all nodes have shown that they have the same."""
    host = host_name(config, collective)
    with told_to_others(collective, host):
        if collective.rank == 0:
            require_installed(config.report.trackers)
        prepared = prepare_data(config, phases)
    begin_phase(phases, "comparing the rows and the model with the other nodes'")
    notes = agree_on_contents(collective, host, prepared.contents, prepared.data.train, folder, resume=resume)
    return prepared, notes


def _begin(folder: RunFolder, config: TrainConfig) -> None:
    rank_of_process = replace(config.topology, rank=None) if config.topology.kind == "ssh" else config.topology
    try:
        folder.begin(to_yaml(replace(config, topology=rank_of_process)))
    except OSError as error:
        raise CheckpointError(f"{folder.config} can't be written: {error.strerror or error}") from error


def _throttle(config: TrainConfig, collective: Collective, stop: StopRequest) -> ThermalThrottle | None:
    if not config.thermal.enabled:
        return None
    return ThermalThrottle(config.thermal, rank=collective.rank, stop=lambda: stop.requested)


def _node_setup(
    config: TrainConfig,
    decision: Preflight,
    collective: Collective,
    places: StagePlaces,
    throttle: ThermalThrottle | None,
    stop: StopRequest,
) -> NodeSetup:
    """What this node does among the others; stages are watched where the user has not set their blocks."""
    world_size, every = planned_world_size(collective), config.topology.rebalance_every
    return NodeSetup(
        balancer=ShareBalancer(_shares(config, world_size), world_size, every=every),
        throttle=throttle,
        stop=stop,
        places=places,
        stages=None if decision.changes is None else StageBalancer(world_size, every=every),
        refit=decision.refit,
    )


def _shares(config: TrainConfig, world_size: int) -> str | list[float]:
    """As configured; a newcomer, which gets the others' shares, may come to another number of nodes."""
    shares = config.topology.shares
    return "equal" if isinstance(shares, list) and len(shares) != world_size else shares
