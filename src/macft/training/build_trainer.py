"""Builds a trainer from its parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
from macft.training.gradients.gradient import StepGradient
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
from macft.training.validation_policy import Validate, ValidationPolicy


@dataclass(frozen=True)
class TrainingRows:
    """The rows of a run: ``train`` in ``order``, and ``valid``, whose loss is measured from time to time."""

    train: Sequence[Row]
    order: RowOrder
    valid: Sequence[Row] = ()


@dataclass(frozen=True)
class NodeSetup:
    """What this node does among the others.

    Left out, ``balancer`` gives all ranks equal shares, ``throttle`` never rests, ``stop`` is never requested, every
    rank computes all blocks of its rows, no ``stages`` hand over blocks, and everything fits every node's memory.
    """

    balancer: ShareBalancer | None = None
    throttle: Throttle | None = None
    stop: StopRequest = field(default_factory=StopRequest)
    places: StagePlaces | None = None
    stages: StageBalancer | None = None
    refit: Refit | None = None


def build_trainer(
    config: TrainingConfig,
    optimizer_config: OptimizerConfig,
    state: TrainState,
    compute: StepGradient,
    rows: TrainingRows,
    saver: CheckpointSaver,
    reporter: Reporter,
    node: NodeSetup | None = None,
) -> Trainer:
    """Builds the trainer of ``state``; its ranks are those of ``state.reducer.collective``."""
    node = node or NodeSetup()
    collective, stop = state.reducer.collective, node.stop
    total_steps = steps_for(config, rows.order.steps_per_epoch)
    loader = BatchLoader(
        rows.train,
        rows.order,
        config.micro_batch_size,
        shared=compute.execution.shared_prefixes,
        fixed=config.deterministic,
    )
    nodes = NodeCoordinator(
        collective,
        node.balancer or ShareBalancer("equal", collective.world_size, every=1),
        node.throttle or NoThrottle(),
        follow_speed=state.outer is None,
        places=node.places,
        stages=node.stages,
        fit=NodeFit(node.refit, compute, loader),
    )
    context = StepContext(
        loader=loader,
        compute=compute,
        update=OptimizerStep(state.model, state.optimizer, compiled=compute.execution.compiled),
        nodes=nodes,
        stop=stop,
        learning_rate=lambda step: learning_rate(optimizer_config, step, total_steps),
        max_grad_norm=config.max_grad_norm,
        waits_for_numbers=config.deterministic,
    )
    validation = ValidationPolicy(
        state,
        nodes,
        _validate(config, state, compute, rows.valid, stop) if rows.valid else None,
        reporter,
        every=config.eval_every,
        total_steps=total_steps,
        patience=config.patience,
    )
    checkpoints = CheckpointPolicy(state, collective, saver, reporter, every=config.save_every)
    return Trainer(
        state,
        partial(make_stepper, context, _synchronization(config, state, stop, total_steps)),
        nodes,
        validation,
        checkpoints,
        Recovery(nodes.elastic, state, nodes, checkpoints, reporter, stop) if nodes.elastic is not None else None,
        reporter,
        total_steps=total_steps,
        epoch_of=rows.order.epoch_of,
    )


def _synchronization(config: TrainingConfig, state: TrainState, stop: StopRequest, total_steps: int) -> Synchronization:
    """When the nodes have the same adapter: after each step, or with DiLoCo after some."""
    if state.outer is None:
        return EveryStep(state.reducer)
    return DiLoCo(
        state.model, state.outer, state.reducer, stop, inner_steps=config.inner_steps, total_steps=total_steps
    )


def _validate(
    config: TrainingConfig, state: TrainState, compute: StepGradient, rows: Sequence[Row], stop: StopRequest
) -> Validate:
    """The loss of this rank's part of ``rows``."""

    def validate(shard: DataShard, progress: Callable[[int, int], None]) -> ValidationResult:
        return validation_loss(
            state.model,
            compute.loss,
            compute.execution,
            rows,
            state.reducer.collective,
            shard=shard,
            progress=progress,
            stopped=lambda: stop.requested,
            fixed=config.deterministic,
        )

    return validate
