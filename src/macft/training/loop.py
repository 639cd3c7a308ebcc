"""The training loop: global batch -> local gradient -> reduce -> update -> report, evaluate, save."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from numpy.typing import NDArray

from macft.checkpoint.saver import CheckpointSaver
from macft.checkpoint.snapshot import Progress, Snapshot, capture, digest, restore, restore_adapter
from macft.collective.base import Collective
from macft.collective.elastic import ElasticCollective, Members
from macft.collective.solo import Solo
from macft.data.batch import Batch, micro_batches
from macft.data.formats import Row
from macft.data.order import RowOrder
from macft.errors import MembershipChanged, NonFiniteLoss, PeerLost, RanksDiverged
from macft.plan.balance import Balance
from macft.plan.node_status import NodeStatus
from macft.plan.shares import assign_rows
from macft.report.events import CheckpointSaved, Evaluated, NodesChanged, Noted, PhaseProgress, Reporter, StepDone
from macft.stop import StopRequest
from macft.training.evaluate import validation_loss
from macft.training.exchange import GradientExchange
from macft.training.gradient import GradientComputer, LocalGradient
from macft.training.optimizer import Update, clip_factor, learning_rate
from macft.training.outer import OuterOptimizer
from macft.training.pace import FullSpeed, Pace
from macft.training.reduce import GlobalGradient, reduce_gradient
from macft.training.regroup import PauseNotice, Position, Seating, newest
from macft.training.remarks import Remarks
from macft.training.settings import OptimizerConfig, TrainingConfig

_EVALUATION_ROWS_AT_ONCE = 8


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
    exchange: GradientExchange | None = None
    outer: OuterOptimizer | None = None
    balance: Balance | None = None
    pace: Pace = field(default_factory=FullSpeed)
    elastic: ElasticCollective | None = None
    nodes: list[NodeStatus] = field(default_factory=list, init=False)
    tokens: int = field(default=0, init=False)
    # Whether the adapter to be exported has taken the last one's place in the model.
    has_final_adapter: bool = field(default=False, init=False)
    _saved_step: int | None = field(default=None, init=False)
    _stop_agreed: bool = field(default=False, init=False)
    _change_agreed: bool = field(default=False, init=False)
    _unsound: str = field(default="", init=False)
    _ended: str = field(default="", init=False)
    _begun: int = field(default=-1, init=False)

    def __post_init__(self) -> None:
        self._apply = Update(self.model, self.optimizer, compiled=self.compute.compiles)
        self._exchange = self.exchange or GradientExchange(self.collective)
        # With DiLoCo a step is each node's own.
        self._exchange_of_step = GradientExchange(Solo()) if self.outer else self._exchange
        self._balance = self.balance or Balance("equal", self.collective.world_size, every=1)
        self._remarks = Remarks(self.collective, self.pace.own_remarks)
        self._saved_step = self.progress.step or None
        self._seating = Seating(self.elastic) if self.elastic is not None else None

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
            started, sent = time.perf_counter(), self.collective.bytes_sent
            self._begun = self.progress.step
            batches = self._my_batches(self.progress.step)
            data_seconds = time.perf_counter() - started
            paced = self.pace.paced(batches)
            local = self.compute(self.progress.step, self._while_together(paced), len(batches))
            result = reduce_gradient(
                self._exchange_of_step,
                local,
                stop=self.stop.requested,
                change=self.elastic is not None and self.elastic.wants_change,
                computed=paced.close,  # the last micro-batch is computed
                status=partial(self._status, local.tokens),
            )
            update_seconds, rate = self._update(result)
            meeting = time.perf_counter()
            met = self.outer is None or self._meet(self.outer, result)
            sync_seconds = time.perf_counter() - meeting
            self._report(result, local, rate, started, data_seconds, update_seconds, sync_seconds, sent)
            if not met:
                continue
            self._rebalance()
            self._evaluate_and_save_when_due()
            if self._stop_agreed and self.progress.step < self.total_steps:
                self._save()
                return "interrupted"
            if self._change_agreed:
                raise MembershipChanged("a node wants to join")
        self._save()
        self.tell_saves(wait=True)
        self._ended = "early_stopped" if self._out_of_patience else "finished"
        return self._ended

    def regroup(self) -> bool:
        """Goes on with the nodes that there are now, from the newest state that one of them has.

        The step that was interrupted is computed anew. Returns False if the end was asked for while this node waited
        for others. Raises CollectiveError if the nodes can't come together, or all others have ended.
        """
        assert self.elastic is not None
        assert self._seating is not None
        started = time.monotonic()
        pause = PauseNotice(self.stop, self.reporter)
        while self._is_let_in(pause):
            try:
                change = self._catch_up(self._seating, self.elastic.members)
            except MembershipChanged:
                continue
            self.reporter.lead(is_main=self.collective.rank == 0, step=self.progress.step)
            self.reporter.nodes_changed(replace(change, seconds=time.monotonic() - started))
            return True
        return False

    def _is_let_in(self, pause: PauseNotice) -> bool:
        assert self.elastic is not None
        try:
            return self.elastic.regroup(pause)
        except PeerLost:  # the others went on and have ended: what is to be told of the run, they have told
            self.reporter.lead(is_main=False, step=self.progress.step)
            raise

    def _catch_up(self, seating: Seating, members: Members) -> NodesChanged:
        progress = self.progress
        evaluated = -1 if progress.evaluated_step is None else progress.evaluated_step
        ended = bool(self._ended) + self.has_final_adapter
        position = Position(seating.generation, bool(progress.before), progress.step, evaluated, ended)
        told, is_behind = newest(self.collective, position, partial(self._describe, seating, members))
        if is_behind:
            snapshot = Snapshot.unpack(told["state"])
            self.progress = snapshot.progress
            if self.progress.step:
                restore(snapshot, self.model, self.optimizer)
            else:
                restore_adapter(snapshot, self.model)
        self._ended, self.has_final_adapter, self._saved_step = told["ended"], told["has_final_adapter"], None
        self._stop_agreed = self._change_agreed = False
        self._balance = Balance.reseated(told["balance"], told["old_ranks"])
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

    def _describe(self, seating: Seating, members: Members, is_needed: bool) -> dict[str, Any]:
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

    def _while_together(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Computes nothing more for a step that can't be finished."""
        for batch in batches:
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

    def _my_batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of the step's global batch."""
        ids = self.order.rows(step)
        tokens = [self.train_rows[i].tokens for i in ids]
        places = assign_rows(tokens, self.collective.world_size, self._balance.shares, shared=self.compute.shares)
        mine: NDArray[np.int64] = ids[places[self.collective.rank]]
        return micro_batches([self.train_rows[i] for i in mine], mine, self.config.micro_batch_size)

    def _status(self, tokens: int, seconds: float) -> NodeStatus:
        return replace(self.pace.status(tokens, seconds), remarks=self._remarks.collect())

    def _update(self, result: GlobalGradient) -> tuple[float, float]:
        """Applies the global gradient, or nothing at all where it isn't finite; returns (seconds, learning rate)."""
        started = time.perf_counter()
        if not result.finite:
            found = f"step {self.progress.step + 1}: the loss is {result.loss} and the gradient norm {result.norm}"
            if not self.outer:
                raise self._not_finite(found)
            self._unsound = self._unsound or found  # this node's own affair until the nodes meet
        rate = learning_rate(self.optimizer_config, self.progress.step, self.total_steps)
        if not self._unsound and (result.target_tokens or not self.outer):
            clip = clip_factor(result.norm, self.config.max_grad_norm)
            self._apply(result.gradient, rate, result.factor * clip)
        self._stop_agreed, self._change_agreed = result.stop_requested, result.change_requested
        self.progress.step += 1
        self.progress.target_tokens += result.target_tokens
        return time.perf_counter() - started, rate

    def _not_finite(self, found: str) -> NonFiniteLoss:
        return NonFiniteLoss(
            f"{found}; no update was made and {self._last_checkpoint()}. A lower optimizer.learning_rate or a smaller "
            "adapter.scale usually helps"
        )

    def _meet(self, outer: OuterOptimizer, result: GlobalGradient) -> bool:
        """With DiLoCo, whether the nodes have met after this step; they then have one adapter again."""
        outer.target_tokens += result.target_tokens
        if self.progress.step % self.config.inner_steps and self.progress.step < self.total_steps:
            return False
        for rank, found in enumerate(self.collective.all_gather(self._unsound.encode())):
            if found:
                raise self._not_finite(f"rank {rank}, {found.decode()}")
        own = outer.target_tokens
        self.progress.target_tokens += outer.step(self.model, self._exchange) - own
        told = [float(self.stop.requested), *result.nodes[0].numbers()]
        answers = [np.frombuffer(answer) for answer in self.collective.all_gather(np.array(told).tobytes())]
        self._stop_agreed = any(answer[0] for answer in answers)
        self.nodes = [NodeStatus.of_numbers(answer[1:].tolist()) for answer in answers]
        return True

    def _report(
        self,
        result: GlobalGradient,
        local: LocalGradient,
        rate: float,
        started: float,
        data_seconds: float,
        update_seconds: float,
        sync_seconds: float,
        sent: int,
    ) -> None:
        seconds = time.perf_counter() - started
        self.progress.seconds += seconds
        self.tokens += result.tokens
        if not self.outer:
            self.nodes = result.nodes
        parts = {"data": data_seconds, **result.seconds, "update": update_seconds}
        if self.outer:
            parts["sync"] = sync_seconds
        if note := self._exchange.observe(seconds, result.seconds["all_reduce"]):
            self.reporter.noted(Noted(note))
        self.reporter.step_done(
            StepDone(
                step=self.progress.step,
                total_steps=self.total_steps,
                epoch=self.order.epoch_of(self.progress.step),
                loss=result.loss,
                learning_rate=rate,
                grad_norm=result.norm,
                target_tokens=result.target_tokens,
                tokens=result.tokens,
                node_tokens=local.tokens,
                seconds=seconds,
                parts=parts,
                bytes_sent=self.collective.bytes_sent - sent,
                residual_norm=self._exchange.residual_norm,
                peak_memory=mx.get_peak_memory(),
                active_memory=mx.get_active_memory(),
                nodes=result.nodes,
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
            self.reporter.noted(Noted(line))

    def _evaluate_and_save_when_due(self) -> None:
        self.tell_saves()
        step, config = self.progress.step, self.config
        is_due = config.eval_every and (step == self.total_steps or step % config.eval_every == 0)
        if is_due and self.valid_rows and self.progress.evaluated_step != step:
            self._evaluate()
        is_best = step == self.progress.best_step
        if step > 0 and (is_best or (config.save_every and step % config.save_every == 0)):
            self._save()

    def _evaluate(self) -> None:
        """Validates and keeps account of the best loss."""
        with self.pace.working():
            result = validation_loss(
                self.model,
                self.compute.loss,
                self.valid_rows,
                self.collective,
                rows_at_once=self.config.micro_batch_size or _EVALUATION_ROWS_AT_ONCE,
                shares=self._balance.shares,
                progress=lambda done, total: self.reporter.phase_progress(PhaseProgress("validation", done, total)),
                packs=self.compute.packs,
            )
        progress = self.progress
        progress.valid_loss, progress.evaluated_step = result.loss, progress.step
        if progress.first_valid_loss is None:
            progress.first_valid_loss = result.loss
        is_best = progress.best_valid_loss is None or result.loss < progress.best_valid_loss
        if is_best:
            progress.best_valid_loss, progress.best_step, progress.stale_evaluations = result.loss, progress.step, 0
        else:
            progress.stale_evaluations += 1
        self.reporter.evaluated(Evaluated(progress.step, result.loss, result.target_tokens, result.seconds, is_best))

    def _save(self) -> None:
        """Has a checkpoint written, after all ranks have shown that they hold the same adapter."""
        if self._saved_step == self.progress.step:
            return
        started = time.perf_counter()
        self._require_equal_ranks()
        self._saved_step = self.progress.step
        codec = self._exchange.capture()
        outer = self.outer.capture(self.optimizer, self._exchange) if self.outer else []
        if self.collective.rank < self.saver.writers:
            snapshot = capture(self.model, self.optimizer, self.progress, codec=codec, outer=outer)
            self.saver.begin(snapshot, since=started)

    def tell_saves(self, *, wait: bool = False) -> None:
        """Reports the checkpoints that have been written, or could not be, since the last call."""
        if wait:
            self.saver.wait()
        for save in self.saver.news():
            if save.error:
                self.reporter.noted(Noted(f"{save.error}; training goes on", "warning"))
            else:
                self.reporter.checkpoint_saved(
                    CheckpointSaved(save.step, save.path, save.is_best, save.seconds, save.waited)
                )

    def _require_equal_ranks(self) -> None:
        digests = self.collective.all_gather(digest(self.model)) if self.collective.world_size > 1 else []
        different = [rank for rank, value in enumerate(digests) if value != digests[0]]
        if different:
            raise RanksDiverged(
                f"step {self.progress.step}: rank {different[0]} holds another adapter than rank 0; "
                f"{self._last_checkpoint()}. Do all nodes run the same versions of macft and MLX?"
            )

    def _last_checkpoint(self) -> str:
        self.saver.wait()
        store = self.saver.store
        steps = store.steps() if self.collective.rank < self.saver.writers else []
        return f"the last good checkpoint is {store.path(steps[0])}" if steps else "no checkpoint was saved yet"
