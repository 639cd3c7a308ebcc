"""What training changes, in one place."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.nn as nn
import mlx.optimizers as optim

from macft.checkpoint.snapshot import Progress, Snapshot, capture, restore, restore_adapter
from macft.training.diloco import OuterOptimizer
from macft.training.gradients.reducer import GradientReducer


@dataclass
class TrainState:
    """Parameters, optimizer and progress, which all ranks have alike at the end of a step, and each rank's own part.

    A rank's own part is the error memory of its gradient codec (in ``reducer``) and, with DiLoCo, the ``outer``
    optimizer with the inner one beside it.
    """

    model: nn.Module
    optimizer: optim.Optimizer
    progress: Progress
    reducer: GradientReducer
    outer: OuterOptimizer | None = None
    # The step that was begun last, from 0: the one that is computed again after a node was lost.
    begun_step: int = -1
    # Why training ended: "finished", "early_stopped" or "interrupted"; empty while it goes on.
    ended: str = ""
    # Whether the adapter to be exported has replaced the last one in the model.
    has_final_adapter: bool = False
    # Whether this rank knows that the run's results are on a disk.
    is_kept: bool = False

    def capture(self) -> Snapshot:
        """What all ranks have alike. Any rank can call it by itself."""
        return capture(self.model, self.optimizer, self.progress)

    def capture_all_ranks(self, *, is_writer: bool) -> Snapshot | None:
        """The same with every rank's own part; None where this rank is no writer.

        Collective: every rank must call it.
        """
        codec = self.reducer.capture()
        outer = self.outer.capture(self.optimizer, self.reducer) if self.outer else []
        return capture(self.model, self.optimizer, self.progress, codec=codec, outer=outer) if is_writer else None

    def restore(self, snapshot: Snapshot) -> None:
        """Takes over a snapshot of either kind, bit for bit; each rank takes its own part.

        Raises:
            CheckpointError: the snapshot holds another adapter than the model.
        """
        if snapshot.progress.step == 0:  # initial values: there is no optimizer state yet
            restore_adapter(snapshot, self.model)
            self.progress = snapshot.progress
        else:
            self.progress = restore(snapshot, self.model, self.optimizer)
        if snapshot.codec:
            self.reducer.restore(snapshot.codec)
        if self.outer is not None:
            self.outer.restart(self.model)
            if snapshot.outer:
                self.outer.restore(snapshot.outer, self.model, self.optimizer, self.reducer.collective.rank)
