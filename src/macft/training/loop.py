"""The training loop: global batch -> local gradient -> reduce -> update -> report, evaluate, save."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from macft.checkpoint.saver import CheckpointSaver
from macft.checkpoint.snapshot import Progress, Snapshot, capture, restore, restore_adapter
from macft.collective.base import Collective
from macft.collective.elastic import ElasticCollective, MembershipView
from macft.collective.solo import Solo
from macft.data.batch import Batch
from macft.data.formats import Row
from macft.data.order import RowOrder
from macft.errors import MembershipChanged, NonFiniteLoss, PeerLost
from macft.parallel.balance import ShareBalancer
from macft.parallel.node_status import NodeStatus
from macft.parallel.shares import DataShard
from macft.report.events import Evaluated, NodesChanged, Noted, PhaseProgress, Reporter, StepDone
from macft.training.batch_loader import BatchLoader
from macft.training.checkpoint_policy import CheckpointPolicy
from macft.training.diloco import OuterOptimizer
from macft.training.gradient import GradientComputer
from macft.training.gradient_reducer import GradientReducer
from macft.training.node_messages import NodeMessages
from macft.training.optimizer import OptimizerStep, clip_factor, learning_rate
from macft.training.queued_step import StepQueue
from macft.training.recovery import MemberTracker, PauseNotice, Position, sync_to_newest
from macft.training.reduce import GlobalGradient, StepMetrics, reduce_gradient
from macft.training.settings import OptimizerConfig, TrainingConfig
from macft.training.stop import StopRequest
from macft.training.throttle import NoThrottle, Throttle
from macft.training.validation import validation_loss


@dataclass
class Trainer:
    """One rank's training run. All ranks take the same decisions, because all decide on reduced values."""

    model: nn.Module
    optimizer: optim.Optimizer
    compute: GradientComputer
    collective: Collective
    train_rows: list[Row]
    valid_rows: list[Row]
    order: RowOrder
    total_steps: int
    config: TrainingConfig
    optimizer_config: OptimizerConfig
    saver: CheckpointSaver
    reporter: Reporter
    progress: Progress
    stop: StopRequest
    exchange: GradientReducer | None = None
    outer: OuterOptimizer | None = None
    balance: ShareBalancer | None = None
    pace: Throttle = field(default_factory=NoThrottle)
    elastic: ElasticCollective | None = None
    nodes: list[NodeStatus] = field(default_factory=list, init=False)
    tokens: int = field(default=0, init=False)
    # Whether the adapter to be exported has taken the last one's place in the model.
    has_final_adapter: bool = field(default=False, init=False)
    _stop_agreed: bool = field(default=False, init=False)
    _change_agreed: bool = field(default=False, init=False)
    _unsound: str = field(default="", init=False)
    _ended: str = field(default="", init=False)
    _begun: int = field(default=-1, init=False)

    def __post_init__(self) -> None:
        self._apply = OptimizerStep(self.model, self.optimizer, compiled=self.compute.execution.compiled)
        self._lone = StepQueue(self._apply, self._status)
        self._feed = BatchLoader(
            self.train_rows, self.order, self.config.micro_batch_size, shared=self.compute.execution.shared_prefixes
        )
        self._exchange = self.exchange or GradientReducer(self.collective)
        # With DiLoCo a step is each node's own.
        self._exchange_of_step = GradientReducer(Solo()) if self.outer else self._exchange
        self._balance = self.balance or ShareBalancer("equal", self.collective.world_size, every=1)
        self._remarks = NodeMessages(self.collective, self.pace.own_remarks)
        self.saves = CheckpointPolicy(
            self.model,
            self.optimizer,
            self.collective,
            self._exchange,
            self.outer,
            self.saver,
            self.reporter,
            self.progress.step or None,
        )
        self._seating = MemberTracker(self.elastic) if self.elastic is not None else None

    def train(self) -> str:
        """Trains to the last step; returns why it ended: finished, early_stopped or interrupted.

        Raises:
            NonFiniteLoss: loss or gradient of a step is NaN or infinite; no update was made with it.
            RanksDiverged: the ranks no longer hold the same adapter.
            MembershipChanged: a peer is gone, silent or wants to join; call :meth:`regroup`, then this again.
            CollectiveError: a peer is gone or silent.
        """
        if self._ended:
            return self._ended
        self._evaluate_and_save_when_due()
        while self.progress.step < self.total_steps and not self._out_of_patience:
            if not (self._train_alone() if self._is_alone else self._train_together()):
                continue
            self._evaluate_and_save_when_due()
            if self._stop_agreed and self.progress.step < self.total_steps:
                self.saves.save(self.progress)
                return "interrupted"
            if self._change_agreed:
                raise MembershipChanged("a node wants to join")
        self.saves.save(self.progress)
        self.saves.tell(wait=True)
        self._ended = "early_stopped" if self._out_of_patience else "finished"
        return self._ended

    def _train_together(self) -> bool:
        """One step; returns whether all nodes have one adapter after it, as they always do without DiLoCo."""
        started, sent = time.perf_counter(), self.collective.bytes_sent
        step = self._begun = self.progress.step
        batches = self._feed.batches(step, self._seat)
        data_seconds = time.perf_counter() - started
        paced = self.pace.paced(batches)
        local = self.compute(step, batches, partial(next, self._turns(paced)))
        self._feed.prepare(step + 1, self._seat)  # while MLX computes
        result = reduce_gradient(
            self._exchange_of_step,
            local,
            stop=self.stop.requested,
            change=self._wants_change,
            computed=paced.close,  # the last micro-batch is computed
            status=partial(self._status, local.tokens),
        )
        update_seconds, rate = self._update(result)
        meeting = time.perf_counter()
        met = self.outer is None or self._meet(self.outer, result.metrics)
        parts = {"data": data_seconds, **result.metrics.seconds, "update": update_seconds}
        if self.outer:
            parts["sync"] = time.perf_counter() - meeting
        seconds = time.perf_counter() - started
        self._report(self.progress.step, result.metrics, local.tokens, rate, seconds, parts, sent)
        if met:
            self._rebalance()
        return met

    @property
    def _is_alone(self) -> bool:
        """Whether steps can be queued, since no other node's numbers are needed."""
        return self.collective.world_size == 1 and self.outer is None and self.compute.execution.compiled

    def _train_alone(self) -> bool:
        """Begins a step, and reports the one before meanwhile; returns whether something has to be done after it.

        If so, it is computed and reported as well.
        """
        step = self._begun = self.progress.step
        batches = self._feed.batches(step, self._seat)
        paced = self.pace.paced(batches)
        local = self.compute(step, batches, partial(next, self._turns(paced)), in_buckets=False)
        self._report_lone_step()
        rate = learning_rate(self.optimizer_config, step, self.total_steps)
        self._lone.queue(step + 1, local, paced, rate, self.config.max_grad_norm)
        self._stop_agreed, self._change_agreed = self.stop.requested, self._wants_change
        self.progress.step += 1
        self.progress.target_tokens += local.target_tokens
        if not (self._stop_agreed or self._change_agreed or self._is_due(self.progress.step)):
            return False
        self._report_lone_step()
        return True

    def _report_lone_step(self) -> None:
        if (done := self._lone.take()) is None:
            return
        metrics = done.metrics
        if not metrics.finite:
            self.progress.step = done.step - 1
            raise self._not_finite(_found(done.step, metrics))
        sent = self.collective.bytes_sent
        self._report(done.step, metrics, metrics.tokens, done.learning_rate, done.seconds, dict(metrics.seconds), sent)
        self._rebalance()
        self.saves.tell()

    def regroup(self) -> bool:
        """Goes on with the nodes that there are now, from the newest state that one of them has.

        The step that was interrupted is computed anew. Returns False if the end was asked for while this node waited
        for others. Raises CollectiveError if the nodes can't come together, or all others have ended.
        """
        assert self.elastic is not None
        assert self._seating is not None
        started = time.monotonic()
        self._report_lone_step()
        pause = PauseNotice(self.stop, self.reporter)
        while self._is_let_in(pause):
            try:
                change = self._catch_up(self._seating, self.elastic.members)
            except MembershipChanged:
                continue
            self.reporter.lead(is_main=self.collective.rank == 0, step=self.progress.step)
            self.reporter.handle(replace(change, seconds=time.monotonic() - started))
            return True
        return False

    def _is_let_in(self, pause: PauseNotice) -> bool:
        assert self.elastic is not None
        try:
            return self.elastic.regroup(pause)
        except PeerLost:  # the others went on and have ended: what is to be told of the run, they have told
            self.reporter.lead(is_main=False, step=self.progress.step)
            raise

    def _catch_up(self, seating: MemberTracker, members: MembershipView) -> NodesChanged:
        progress = self.progress
        evaluated = -1 if progress.evaluated_step is None else progress.evaluated_step
        ended = bool(self._ended) + self.has_final_adapter
        position = Position(seating.generation, bool(progress.before), progress.step, evaluated, ended)
        told, is_behind = sync_to_newest(self.collective, position, partial(self._describe, seating, members))
        if is_behind:
            snapshot = Snapshot.unpack(told["state"])
            self.progress = snapshot.progress
            if self.progress.step:
                restore(snapshot, self.model, self.optimizer)
            else:
                restore_adapter(snapshot, self.model)
        self.saves.saved_step = None
        self._ended, self.has_final_adapter = told["ended"], told["has_final_adapter"]
        self._stop_agreed = self._change_agreed = False
        self._balance = ShareBalancer.reseated(told["balance"], told["old_ranks"])
        self._exchange.start_anew(told["codec"], is_open=told["codec_is_open"])
        left, joined = seating.move(members, self.nodes)
        self.nodes = []
        return NodesChanged(
            step=self.progress.step,
            generation=members.generation,
            names=list(members.names),
            left=left,
            joined=joined,
            shares=list(self._balance.shares),
            recomputed=self._begun == self.progress.step,
        )

    def _describe(self, seating: MemberTracker, members: MembershipView, is_needed: bool) -> dict[str, Any]:
        """What all must have alike; the state itself only where somebody needs it."""
        codec, is_open = self._exchange.agreed()
        return {
            "state": capture(self.model, self.optimizer, self.progress).pack() if is_needed else b"",
            "ended": self._ended,
            "has_final_adapter": self.has_final_adapter,
            "balance": self._balance.plain(),
            "old_ranks": seating.old_ranks(members),
            "codec": codec,
            "codec_is_open": is_open,
        }

    def _turns(self, paced: Iterable[Batch]) -> Iterator[Batch]:
        """When each micro-batch may be computed; none more for a step that can't be finished."""
        self._lone.begin()
        for batch in paced:
            if self.elastic is not None:
                self.elastic.check()
            yield batch

    @property
    def departed(self) -> list[NodeStatus]:
        """The last statuses of nodes that are gone."""
        return list(self._seating.departed.values()) if self._seating is not None else []

    @property
    def _out_of_patience(self) -> bool:
        return 0 < self.config.patience <= self.progress.stale_evaluations

    @property
    def _seat(self) -> DataShard:
        return DataShard(self.collective.rank, self.collective.world_size, tuple(self._balance.shares))

    @property
    def _wants_change(self) -> bool:
        return self.elastic is not None and self.elastic.wants_change

    def _status(self, tokens: int, seconds: float) -> NodeStatus:
        return replace(self.pace.status(tokens, seconds), remarks=self._remarks.collect())

    def _update(self, result: GlobalGradient) -> tuple[float, float]:
        """Applies the global gradient, or nothing at all where it isn't finite; returns (seconds, learning rate)."""
        started, metrics = time.perf_counter(), result.metrics
        if not metrics.finite:
            found = _found(self.progress.step + 1, metrics)
            if not self.outer:
                raise self._not_finite(found)
            self._unsound = self._unsound or found  # this node's own affair until the nodes meet
        rate = learning_rate(self.optimizer_config, self.progress.step, self.total_steps)
        if not self._unsound and (metrics.target_tokens or not self.outer):
            clip = clip_factor(metrics.norm, self.config.max_grad_norm)
            self._apply(result.gradient, rate, result.factor * clip)
        self._stop_agreed, self._change_agreed = result.stop_requested, result.change_requested
        self.progress.step += 1
        self.progress.target_tokens += metrics.target_tokens
        return time.perf_counter() - started, rate

    def _not_finite(self, found: str) -> NonFiniteLoss:
        return NonFiniteLoss(
            f"{found}; no update was made and {self.saves.last()}. A lower optimizer.learning_rate or a smaller "
            "adapter.scale usually helps"
        )

    def _meet(self, outer: OuterOptimizer, metrics: StepMetrics) -> bool:
        """With DiLoCo, whether the nodes have met after this step; they then have one adapter again."""
        outer.target_tokens += metrics.target_tokens
        if self.progress.step % self.config.inner_steps and self.progress.step < self.total_steps:
            return False
        for rank, found in enumerate(self.collective.all_gather(self._unsound.encode())):
            if found:
                raise self._not_finite(f"rank {rank}, {found.decode()}")
        own = outer.target_tokens
        self.progress.target_tokens += outer.step(self.model, self._exchange) - own
        told = [float(self.stop.requested), *metrics.nodes[0].numbers()]
        answers = [np.frombuffer(answer) for answer in self.collective.all_gather(np.array(told).tobytes())]
        self._stop_agreed = any(answer[0] for answer in answers)
        self.nodes = [NodeStatus.of_numbers(answer[1:].tolist()) for answer in answers]
        return True

    def _report(
        self,
        step: int,
        metrics: StepMetrics,
        node_tokens: int,
        rate: float,
        seconds: float,
        parts: Mapping[str, float],
        sent: int,
    ) -> None:
        self.progress.seconds += seconds
        self.tokens += metrics.tokens
        if not self.outer:
            self.nodes = metrics.nodes
        if note := self._exchange.observe(seconds, parts["all_reduce"]):
            self.reporter.handle(Noted(note))
        self.reporter.handle(
            StepDone(
                step=step,
                total_steps=self.total_steps,
                epoch=self.order.epoch_of(step),
                loss=metrics.loss,
                learning_rate=rate,
                grad_norm=metrics.norm,
                target_tokens=metrics.target_tokens,
                tokens=metrics.tokens,
                node_tokens=node_tokens,
                seconds=seconds,
                parts=parts,
                bytes_sent=self.collective.bytes_sent - sent,
                residual_norm=self._exchange.residual_norm,
                peak_memory=mx.get_peak_memory(),
                active_memory=mx.get_active_memory(),
                nodes=metrics.nodes,
                shares=list(self._balance.shares),
                generation=0 if self._seating is None else self._seating.generation,
            )
        )

    def _rebalance(self) -> None:
        """Shares of the next steps, the same on every rank, out of what all nodes have told with this one."""
        if not self.outer:  # with it, shares that follow the speed would change what is learnt
            self._balance.observe(self.nodes)
        about_all = self.pace.remarks(self.nodes, self._balance.shares)
        for line in [*self._remarks.exchange(self.nodes), *about_all]:
            self.reporter.handle(Noted(line))

    def _evaluate_and_save_when_due(self) -> None:
        self.saves.tell()
        step = self.progress.step
        if self._is_validated(step) and self.progress.evaluated_step != step:
            self._evaluate()
        if step > 0 and (step == self.progress.best_step or self._is_saved(step)):
            self.saves.save(self.progress)

    def _is_due(self, step: int) -> bool:
        """Whether anything is to be done after update ``step`` before the next one."""
        return step == self.total_steps or self._is_validated(step) or self._is_saved(step)

    def _is_validated(self, step: int) -> bool:
        every = self.config.eval_every
        return bool(every and self.valid_rows) and (step == self.total_steps or step % every == 0)

    def _is_saved(self, step: int) -> bool:
        return bool(self.config.save_every) and step % self.config.save_every == 0

    def _evaluate(self) -> None:
        """Validates and keeps account of the best loss."""
        with self.pace.working():
            result = validation_loss(
                self.model,
                self.compute.loss,
                self.compute.execution,
                self.valid_rows,
                self.collective,
                seat=self._seat,
                progress=lambda done, total: self.reporter.handle(PhaseProgress("validation", done, total)),
            )
        is_best = self.progress.take_validation(result.loss)
        self.reporter.handle(Evaluated(self.progress.step, result.loss, result.target_tokens, result.seconds, is_best))


def _found(step: int, metrics: StepMetrics) -> str:
    return f"step {step}: the loss is {metrics.loss} and the gradient norm {metrics.norm}"
