"""Builds a trainer from its parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from macft.checkpoint.saver import CheckpointSaver
from macft.data.formats import Row
from macft.data.order import RowOrder
from macft.parallel.balance import ShareBalancer
from macft.parallel.shares import DataShard
from macft.parallel.stage_balance import StageBalancer
from macft.parallel.stage_places import StagePlaces
from macft.report.events import Reporter
from macft.training.batch_loader import BatchLoader
from macft.training.checkpoint_policy import CheckpointPolicy
from macft.training.coordination import NodeCoordinator
from macft.training.diloco import DiLoCo
from macft.training.gradient import StepGradient
from macft.training.loop import Trainer
from macft.training.node_fit import NodeFit, Refit
from macft.training.optimizer import OptimizerStep, learning_rate
from macft.training.recovery import Recovery
from macft.training.settings import OptimizerConfig, TrainingConfig, steps_for
from macft.training.state import TrainState
from macft.training.stepper import StepContext, make_stepper
from macft.training.stop_request import StopRequest
from macft.training.synchronization import EveryStep, Synchronization
from macft.training.throttle import NoThrottle, Throttle
from macft.training.validation import ValidationResult, validation_loss
from macft.training.validation_policy import ValidationPolicy


def build_trainer(
    config: TrainingConfig,
    optimizer_config: OptimizerConfig,
    state: TrainState,
    compute: StepGradient,
    train_rows: Sequence[Row],
    order: RowOrder,
    saver: CheckpointSaver,
    reporter: Reporter,
    *,
    valid_rows: Sequence[Row] = (),
    balancer: ShareBalancer | None = None,
    throttle: Throttle | None = None,
    stop: StopRequest | None = None,
    places: StagePlaces | None = None,
    stages: StageBalancer | None = None,
    refit: Refit | None = None,
) -> Trainer:
    """Builds the trainer of ``state``; its ranks are those of ``state.reducer.collective``.

    Left out, ``balancer`` gives all ranks equal shares, ``throttle`` never rests, ``stop`` is never requested, every
    rank computes all blocks of its rows, no ``stages`` hand over blocks, and everything fits every node's memory.
    """
    model, collective, stop = state.model, state.reducer.collective, stop or StopRequest()
    total_steps = steps_for(config, order.steps_per_epoch)
    loader = BatchLoader(
        train_rows,
        order,
        config.micro_batch_size,
        shared=compute.execution.shared_prefixes,
        fixed=config.deterministic,
    )
    nodes = NodeCoordinator(
        collective,
        balancer or ShareBalancer("equal", collective.world_size, every=1),
        throttle or NoThrottle(),
        follow_speed=state.outer is None,
        places=places,
        stages=stages,
        fit=NodeFit(refit, compute, loader),
    )
    context = StepContext(
        loader=loader,
        compute=compute,
        update=OptimizerStep(model, state.optimizer, compiled=compute.execution.compiled),
        nodes=nodes,
        stop=stop,
        learning_rate=lambda step: learning_rate(optimizer_config, step, total_steps),
        max_grad_norm=config.max_grad_norm,
        waits_for_numbers=config.deterministic,
    )
    synchronization: Synchronization = EveryStep(state.reducer)
    if state.outer is not None:
        synchronization = DiLoCo(
            model, state.outer, state.reducer, stop, inner_steps=config.inner_steps, total_steps=total_steps
        )

    def validate(shard: DataShard, progress: Callable[[int, int], None]) -> ValidationResult:
        return validation_loss(
            model,
            compute.loss,
            compute.execution,
            valid_rows,
            collective,
            shard=shard,
            progress=progress,
            stopped=lambda: stop.requested,
            fixed=config.deterministic,
        )

    validation = ValidationPolicy(
        state,
        nodes,
        validate if valid_rows else None,
        reporter,
        every=config.eval_every,
        total_steps=total_steps,
        patience=config.patience,
    )
    checkpoints = CheckpointPolicy(state, collective, saver, reporter, every=config.save_every)
    return Trainer(
        state,
        partial(make_stepper, context, synchronization),
        nodes,
        validation,
        checkpoints,
        Recovery(nodes.elastic, state, nodes, checkpoints, reporter, stop) if nodes.elastic is not None else None,
        reporter,
        total_steps=total_steps,
        epoch_of=order.epoch_of,
    )
