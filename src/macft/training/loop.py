"""The training loop: make a step, report it, validate and save when it is time to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import mlx.core as mx

from macft.device import fault_points
from macft.errors import MembershipChanged, NonFiniteLoss
from macft.parallel.node_status import NodeStatus
from macft.report.events import Noted, Reporter, StepDone
from macft.training.checkpoint_policy import CheckpointPolicy
from macft.training.coordination import NodeCoordinator
from macft.training.recovery import Recovery
from macft.training.state import TrainState
from macft.training.stepper import Stepper, StepResult
from macft.training.stop_request import Stopped
from macft.training.validation_policy import ValidationPolicy

_IF_DIVERGED = ". A lower optimizer.learning_rate or a smaller adapter.scale usually helps"
_IF_NEVER_FINITE = (
    ". No step was before it: the model's weights, or those of adapter.init_from, may be damaged, or need "
    "model.precision=float32"
)


class Trainer:
    """One rank's training run. All ranks take the same decisions, because all decide on reduced values.

    Args:
        make_stepper: Called whenever the nodes have changed, because only a single node can queue its steps.
        recovery: For an elastic run. None: a lost node ends the run.
        epoch_of: The epoch that a step, from 1, belongs to.
    """

    def __init__(
        self,
        state: TrainState,
        make_stepper: Callable[[], Stepper],
        nodes: NodeCoordinator,
        validation: ValidationPolicy,
        checkpoints: CheckpointPolicy,
        recovery: Recovery | None,
        reporter: Reporter,
        *,
        total_steps: int,
        epoch_of: Callable[[int], float],
    ):
        self.state, self.nodes, self.checkpoints, self.recovery = state, nodes, checkpoints, recovery
        self.total_steps = total_steps
        self.tokens = self.target_tokens = 0
        """Tokens of all nodes since this start."""
        self._make_stepper, self._stepper = make_stepper, make_stepper()
        self._validation, self._reporter, self._epoch_of = validation, reporter, epoch_of

    def train(self) -> str:
        """Trains to the last step; returns why it ended: finished, early_stopped or interrupted.

        The last state is saved. Once training has ended on any rank, a call after :meth:`regroup` returns the same.

        Raises:
            NonFiniteLoss: loss or gradient of a step is NaN or infinite; no update was made with it.
            RanksDiverged: the ranks no longer hold the same adapter.
            MembershipChanged: a peer is gone, silent or wants to join; call :meth:`regroup`, then this again.
            CollectiveError: a peer is gone or silent.
        """
        state, progress = self.state, self.state.progress
        if not state.ended:
            try:
                state.ended = self._train()
            except Stopped:
                state.ended = "interrupted"
        if not state.has_final_adapter and progress.step:
            self.checkpoints.save()
        self.checkpoints.report(wait=True)
        return state.ended

    def _train(self) -> str:
        progress = self.state.progress
        if self.recovery is not None:
            self.recovery.wait_for_memory()
        self._validate_and_save()
        while progress.step < self.total_steps and not self._validation.should_stop_early:
            self.state.begun_step = progress.step
            self._reach_fault_points()
            with self._explaining_non_finite():
                result, agreement = self._stepper.step(progress.step, self.nodes.shard)
                progress.step += 1
                progress.target_tokens += agreement.target_tokens
                self._report(result)
                must_flush = agreement.stop or agreement.change
                if not agreement.is_synced or not (must_flush or self._is_due(progress.step)):
                    continue
                self._report(self._stepper.flush())
            if agreement.stop and progress.step < self.total_steps:
                return "interrupted"  # a validation that is due is made after a resume
            self._validate_and_save()
            if agreement.change:
                raise MembershipChanged("a node wants to join")
        return "early_stopped" if self._validation.should_stop_early else "finished"

    def regroup(self) -> bool:
        """Forms a new ring with the nodes that can be reached; see :meth:`Recovery.regroup`."""
        assert self.recovery is not None
        with self._explaining_non_finite():
            self._report(self._stepper.flush())
        self.nodes.step_computed()  # the interrupted step: this node is idle now
        is_together = self.recovery.regroup()
        self._stepper = self._make_stepper()
        return is_together

    @property
    def statuses(self) -> list[NodeStatus]:
        """The last statuses of all nodes that took part, those that are gone included."""
        return [*self.nodes.statuses, *(self.recovery.departed if self.recovery else [])]

    def _reach_fault_points(self) -> None:
        if self.state.progress.step == 0:
            fault_points.reach("first_step")
        if self.state.progress.step == self.total_steps - 1:
            fault_points.reach("last_step")

    def _is_due(self, step: int) -> bool:
        return step == self.total_steps or self._validation.is_due(step) or self.checkpoints.is_due(step)

    def _validate_and_save(self) -> None:
        self.checkpoints.report()
        self._validation.validate_if_due()
        self.checkpoints.save_if_due()

    def _report(self, result: StepResult | None) -> None:
        """Reports a step; then the nodes set the shares of the next ones. Collective: every rank must call it."""
        if result is None:
            return
        state, nodes, metrics = self.state, self.nodes, result.metrics
        state.progress.seconds += result.seconds
        self.tokens += metrics.tokens
        self.target_tokens += metrics.target_tokens
        if note := state.reducer.observe(result.seconds, result.phase_seconds["all_reduce"]):
            self._reporter.handle(Noted(note))
        self._reporter.handle(
            StepDone(
                step=result.step,
                total_steps=self.total_steps,
                epoch=self._epoch_of(result.step),
                loss=metrics.loss,
                learning_rate=result.learning_rate,
                grad_norm=metrics.norm,
                target_tokens=metrics.target_tokens,
                tokens=metrics.tokens,
                node_tokens=result.node_tokens,
                seconds=result.seconds,
                parts=result.phase_seconds,
                bytes_sent=result.bytes_sent,
                residual_norm=state.reducer.residual_norm,
                peak_memory=mx.get_peak_memory(),
                active_memory=mx.get_active_memory(),
                nodes=metrics.nodes,
                shares=list(nodes.balancer.shares),
                generation=self.recovery.generation if self.recovery else 0,
                blocks=nodes.blocks,
                traces=result.traces,
            )
        )
        if result.statuses:
            nodes.statuses = list(result.statuses)
            for line in nodes.end_step():
                self._reporter.handle(Noted(line))
            if moved := nodes.hand_over(result.step):
                self._reporter.handle(moved)
        self.checkpoints.report()

    @contextmanager
    def _explaining_non_finite(self) -> Iterator[None]:
        """Sets the progress back to the last update made; adds the newest checkpoint to the error, and advice."""
        try:
            yield
        except NonFiniteLoss as error:
            self.state.progress.step = error.updates
            advice = _IF_DIVERGED if error.updates else _IF_NEVER_FINITE
            raise NonFiniteLoss(f"{error} and {self.checkpoints.last()}{advice}", error.updates) from error
