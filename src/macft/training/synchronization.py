"""When the nodes have the same adapter, and what they agree on then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from macft.errors import NonFiniteLoss
from macft.parallel.node_status import NodeStatus
from macft.training.gradients.reduce import ReducedGradient, StepMetrics
from macft.training.gradients.reducer import GradientReducer


@dataclass(frozen=True)
class Agreement:
    """What holds after a step.

    ``is_synced``: all nodes have the same adapter and these values; else they are this rank's own. ``stop`` and
    ``change``: some rank wants the run to end, or to let a node join. ``target_tokens`` are those to be added to the
    run's count. ``statuses``: every rank's status, by rank; empty while the ranks are not in step.
    """

    is_synced: bool
    stop: bool
    change: bool
    target_tokens: int
    statuses: Sequence[NodeStatus] = ()


class Synchronization(Protocol):
    """How the nodes stay together; see :class:`EveryStep` and :class:`~macft.training.diloco.DiLoCo`."""

    has_rounds: bool
    """Whether nodes synchronize only after some steps."""

    @property
    def reducer(self) -> GradientReducer:
        """What sums the gradients of a step."""
        ...

    def accepts(self, step: int, metrics: StepMetrics) -> bool:
        """Whether the update after ``step`` (from 0) is to be made.

        Raises:
            NonFiniteLoss: it must not be made, and the run can't go on.
        """
        ...

    def after_update(self, step: int, reduced: ReducedGradient) -> Agreement:
        """Called on every rank after ``step`` (from 0)."""
        ...


class EveryStep:
    """Gradients are summed over all nodes in every step, so that all nodes always have the same adapter."""

    has_rounds = False

    def __init__(self, reducer: GradientReducer):
        self._reducer = reducer

    @property
    def reducer(self) -> GradientReducer:
        """Sums over all nodes."""
        return self._reducer

    def accepts(self, step: int, metrics: StepMetrics) -> bool:
        """True; a step that is not finite raises NonFiniteLoss, on all ranks."""
        if not metrics.is_finite:
            raise NonFiniteLoss(f"{metrics.describe_not_finite(step + 1)}; no update was made", updates=step)
        return True

    def after_update(self, step: int, reduced: ReducedGradient) -> Agreement:  # noqa: ARG002
        """What travelled along with the gradient."""
        metrics = reduced.metrics
        return Agreement(
            is_synced=True,
            stop=reduced.wants_stop,
            change=reduced.wants_change,
            target_tokens=metrics.target_tokens,
            statuses=metrics.nodes,
        )
