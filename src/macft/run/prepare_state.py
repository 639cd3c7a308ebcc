"""The state that a run starts from: the same on all ranks, initial or that of the newest checkpoint."""

from __future__ import annotations

import mlx.nn as nn
import mlx.optimizers as optim

from macft.checkpoint.snapshot import Progress, Snapshot
from macft.checkpoint.store import CheckpointStore
from macft.collective.base import Collective
from macft.collective.newest import find_newest
from macft.config.schema import TrainConfig
from macft.report.run_folder import RunFolder
from macft.run.resume import check_steps, no_checkpoint
from macft.training.diloco import OuterOptimizer
from macft.training.gradients.reducer import GradientReducer
from macft.training.settings import TrainingConfig
from macft.training.state import TrainState


def new_state(config: TrainConfig, model: nn.Module, optimizer: optim.Optimizer, collective: Collective) -> TrainState:
    """That of a run's begin, on this rank."""
    reducer = GradientReducer(collective, config.collective.codec, config.collective.powersgd_rank)
    return TrainState(model, optimizer, Progress(), reducer, _outer_optimizer(config.training, model))


def share_state(
    state: TrainState, store: CheckpointStore, folder: RunFolder, *, total_steps: int, resume: bool
) -> list[str]:
    """Gives all ranks the same state: rank 0's initial one, or with ``resume`` that of the newest checkpoint.

    Any rank may hold the newest checkpoint that can be read. Returns lines for the user. A collective call.

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


def diloco_notes(training: TrainingConfig) -> list[str]:
    """What a user of ``training.sync=diloco`` should know of the figures that are shown."""
    if training.sync != "diloco":
        return []
    return [
        f"training.sync=diloco: the nodes meet every {training.inner_steps} steps; between two meetings the loss "
        "and tokens/s shown are rank 0's own"
    ]


def _outer_optimizer(training: TrainingConfig, model: nn.Module) -> OuterOptimizer | None:
    if training.sync != "diloco":
        return None
    return OuterOptimizer(model, learning_rate=training.outer_learning_rate, momentum=training.outer_momentum)
