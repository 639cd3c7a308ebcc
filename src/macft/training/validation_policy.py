"""When the model is validated, and when training stops early because of it."""

from __future__ import annotations

from collections.abc import Callable

from macft.device import fault_points
from macft.parallel.shares import DataShard
from macft.report.events import Evaluated, PhaseProgress, Reporter
from macft.training.coordination import NodeCoordinator
from macft.training.state import TrainState
from macft.training.validation import ValidationResult

Validate = Callable[[DataShard, Callable[[int, int], None]], ValidationResult]
"""Validates the rows of a shard; the second argument is called with (done, total) of them."""


class ValidationPolicy:
    """Validation every ``every`` steps (0: never), before the first and after the last one.

    ``patience``: training stops after this many validations in a row without a lower loss; 0: it does not.
    """

    def __init__(
        self,
        state: TrainState,
        nodes: NodeCoordinator,
        validate: Validate | None,
        reporter: Reporter,
        *,
        every: int,
        total_steps: int,
        patience: int,
    ):
        self._state, self._nodes, self._validate, self._reporter = state, nodes, validate, reporter
        self._every, self._total_steps, self._patience = every, total_steps, patience

    @property
    def should_stop_early(self) -> bool:
        """Whether the loss has not fallen for too long."""
        return 0 < self._patience <= self._state.progress.stale_evaluations

    def is_due(self, step: int) -> bool:
        """Whether the model is validated after update ``step`` (from 1; 0 is before training)."""
        wanted = self._every > 0 and self._validate is not None
        return wanted and (step == self._total_steps or step % self._every == 0)

    def validate_if_due(self) -> None:
        """Validates if it is time to and was not done yet, and records the best loss.

        Collective: every rank must call it.

        Raises:
            Stopped: a stop was requested during the validation, which is then made after a resume.
        """
        progress = self._state.progress
        if self._validate is None or not self.is_due(progress.step) or progress.evaluated_step == progress.step:
            return
        fault_points.reach("validation")
        with self._nodes.working():
            result = self._validate(self._nodes.shard, self._show_progress)
        is_best = progress.take_validation(result.loss)
        self._reporter.handle(Evaluated(progress.step, result.loss, result.target_tokens, result.seconds, is_best))

    def _show_progress(self, done: int, total: int) -> None:
        self._reporter.handle(PhaseProgress("validation", done, total))
