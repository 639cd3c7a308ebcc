"""A stage of a pipeline: its blocks forward and backward for one micro-batch after the other.

Hidden states come from the stage before and go to the one behind, their gradients the other way, in the model's type,
while the next micro-batch is computed. Every rank knows the rows of a step, so masks and other arguments of blocks are
made where they are needed. What is computed, and the order of the sums, are those of
:class:`~macft.training.gradients.staged.StagedGradient`, whose micro-batches are the parts of rows: the loss and each
block's gradient have the same bits however many stages there are. A block's gradient is zero where the block is not
computed, and losses are counted at the last stage only; so the sum over all ranks is that of one that holds the model.
With exact sums (:mod:`macft.training.gradients.exact_sums`) it has the same bits over any number of pipelines, too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate

import mlx.core as mx
import mlx.nn as nn

from macft.collective.array_bytes import array_bytes, array_of
from macft.collective.base import Channels
from macft.data.batch import Batch
from macft.device import fault_points
from macft.model.adapters.dropout import DropoutKeys
from macft.model.backends.base import Backend
from macft.model.blocks.block_weights import BlockWeights
from macft.model.execution import Execution
from macft.parallel.stage_layout import spread
from macft.parallel.stage_places import StagePlace, StagePlaces
from macft.training.batch_layout import DeviceBatch
from macft.training.gradients.buckets import Gradient
from macft.training.gradients.exact_sums import ExactParameters, ExactStepGradient, ExactSums
from macft.training.gradients.gradient import Form, LocalGradient, StepGradient, add
from macft.training.gradients.pipeline_schedule import holding, one_forward_one_backward
from macft.training.gradients.staged import StagedGradient, StagedLoss
from macft.training.gradients.staged_model import StagedModel, Work

_FORWARD, _BACKWARD, _VALIDATION, _BEGIN = range(4)
_ANY = 2**31
"""Micro-batches held by a stage without backward passes: it holds none."""


class _StageRun:
    """One stage at work: ``channels`` are those of ``places`` now."""

    def __init__(
        self,
        staged: StagedModel,
        place: StagePlace,
        channels: Channels,
        first_trained: int,
        execution: Execution,
        *,
        can_keep: bool,
    ):
        self.place = place
        self._staged, self._channels = staged, channels
        self._first_trained = first_trained
        can_keep = can_keep and staged.weights.resident >= set(place.stage.blocks)
        from_end = len(place.stages) - place.number
        self.held, self._keeps = holding(execution, from_end, len(self.trained), can_keep=can_keep)

    @property
    def is_last(self) -> bool:
        """Whether this stage computes the losses."""
        return self.place.after is None

    @property
    def trained(self) -> range:
        """Its blocks that have a backward pass."""
        stage = self.place.stage
        return range(max(stage.first, self._first_trained), stage.end)

    def agree_on_held(self, tag: int) -> int:
        """How many micro-batches it holds at once: no more than the stage before it, which may have less memory.

        A stage that wants another micro-batch forward, while the one before waits for a gradient, would wait for ever.
        """
        before, after = self.place.before, self.place.after
        held = self.held if self.trained else _ANY
        if before is not None:
            held = min(held, int.from_bytes(self._channels.receive(before, tag), "little"))
        if after is not None:
            self._channels.send(after, tag, held.to_bytes(4, "little"))
        return held

    def goes_on(self, tag: int, stopped: Callable[[], bool]) -> bool:
        """Whether there is more to compute: unless the first stage is ``stopped()``, of which it tells the others."""
        before, after = self.place.before, self.place.after
        goes_on = not stopped() if before is None else len(self._channels.receive(before, tag)) > 0
        if after is not None:
            self._channels.send(after, tag, b"on" if goes_on else b"")
        return goes_on

    def forward(self, work: Work, tag: int, *, training: bool) -> None:
        """Its blocks' forward passes; what they make of ``work`` is sent on, or stays at the last stage."""
        staged, stage, place = self._staged, self.place.stage, self.place
        staged.enter(0, work, embed=place.before is None)
        if place.before is not None:
            work.hidden = array_of(self._channels.receive(place.before, tag), work.hidden.shape, work.hidden.dtype)
        for number in stage.blocks:
            has_backward = training and number >= self._first_trained
            if has_backward and not self._keeps:
                work.kept[number] = work.hidden
            with staged.weights.held(number, then=[*range(number + 1, stage.end), *stage.blocks]):
                if has_backward and self._keeps:
                    staged.forward_kept(number, work, to_input=number > self._first_trained)
                else:
                    staged.forward(number, 0, work, training=training)
        if place.after is not None:
            self._channels.send(place.after, tag, array_bytes(work.hidden))
            work.hidden = mx.zeros(work.hidden.shape, work.hidden.dtype)  # never computed: it tells shape and type

    def backward(self, work: Work, tag: int, total: Gradient) -> None:
        """Its blocks' backward passes; their gradients are added to ``total``."""
        staged, stage, place = self._staged, self.place.stage, self.place
        if place.after is not None:
            shape, dtype = work.hidden.shape, work.hidden.dtype
            work.hidden = array_of(self._channels.receive(place.after, tag), shape, dtype)
        for number in reversed(self.trained):
            before = [*range(number - 1, stage.first - 1, -1), *stage.blocks]
            with staged.weights.held(number, then=before):
                to_input = number > self._first_trained
                if self._keeps:
                    gradient = staged.backward_kept(number, work, to_input=to_input)
                else:
                    gradient = staged.backward(number, 0, work, to_input=to_input)
                known = {name: total[name] for name in gradient if name in total}
                total |= add(known, gradient)
                mx.eval(total)
        if place.before is not None and stage.first > self._first_trained:
            self._channels.send(place.before, tag, array_bytes(work.hidden))


class PipelinedLoss:
    """The losses of validation."""

    def __init__(self, staged: StagedModel, places: StagePlaces, settle: Callable[[], _StageRun | None]):
        self._staged, self._places, self._settle = staged, places, settle
        self._alone = StagedLoss(staged)

    def of_batches(
        self, batches: Iterable[Sequence[DeviceBatch]], stopped: Callable[[], bool] = lambda: False
    ) -> Iterator[list[float]]:
        """See :class:`~macft.training.validation.Losses`; the first stage decides. Every rank must call it."""
        run = self._settle()
        if run is None or len(run.place.stages) == 1:
            return self._alone.of_batches(batches, stopped)
        return self._forward(run, batches, stopped)

    def _forward(
        self, run: _StageRun, batches: Iterable[Sequence[DeviceBatch]], stopped: Callable[[], bool]
    ) -> Iterator[list[float]]:
        none = mx.zeros(1, mx.uint32)
        for number, parts in enumerate(batches):
            if not run.goes_on(_tag(number, 0, _BEGIN), stopped):
                return
            losses = []
            for place, part in enumerate(parts):
                work = Work.of(part, none)
                run.forward(work, _tag(number, place, _VALIDATION), training=False)
                if run.is_last:
                    losses.append(self._staged.loss(0, work))
            yield losses


class PipelinedGradient:
    """Computes this rank's stage; see GradientComputer for the interface.

    ``weights`` supplies the blocks, and keeps as many of the stage's in memory as ``execution`` allows. ``places`` says
    which they are; where that changes, the next step goes by it. A pipeline of one stage computes block by block.
    ``exact``: gradients of these parameters are added up exactly, micro-batch by micro-batch; None: they are not.

    Raises:
        RuntimeError: rows are to be packed, and ``model`` is not installed.
    """

    def __init__(
        self,
        model: nn.Module,
        backend: Backend,
        execution: Execution,
        dropout_keys: DropoutKeys,
        weights: BlockWeights,
        places: StagePlaces,
        *,
        seed: int,
        bucket_bytes: int = 4 * 1024 * 1024,
        exact: ExactParameters | None = None,
    ):
        self.execution = execution
        self._exact = exact
        self._is_eager = backend.is_eager
        self._model, self._keys, self._weights, self._places = model, dropout_keys, weights, places
        self._whole = StagedGradient(
            model, backend, execution, dropout_keys, weights, seed=seed, bucket_bytes=bucket_bytes
        )
        self._alone: StepGradient = self._whole if exact is None else ExactStepGradient(self._whole, exact)
        self.loss = PipelinedLoss(self._whole.staged, places, self._settle)

    def adopt(self, execution: Execution) -> None:
        """Takes over what this node has room for: a stage of other blocks."""
        self.execution = execution

    def __call__(
        self,
        step: int,
        batches: Sequence[Batch],
        before_micro_batch: Callable[[], None] = lambda: None,
        *,
        form: Form = "parameters",
    ) -> LocalGradient:
        """Computes ``batches``, the micro-batches of this rank's pipeline in ``step``; there may be none.

        ``before_micro_batch`` is called before each one's forward pass. All is computed when this returns.
        Collective: every rank must call it.
        """
        run = self._settle()
        if run is None or len(run.place.stages) == 1:
            return self._alone(step, batches, before_micro_batch, form=form)
        return self._compute(run, step, batches, before_micro_batch)

    def _compute(
        self, run: _StageRun, step: int, batches: Sequence[Batch], before_micro_batch: Callable[[], None]
    ) -> LocalGradient:
        started = time.perf_counter()
        channels = self._places.channels()
        waited, sent = channels.waited, channels.sending_seconds
        if not self._model.training:
            self._model.train()
        parts = [self._whole.works(step, batch) for batch in batches]
        works = [work for each in parts for work in each]
        first_of_batch = {id(each[0]) for each in parts if each}
        batch_ends = set(accumulate(len(each) for each in parts))
        sums = None if self._exact is None else ExactSums(self._exact)
        total: Gradient = {}
        losses: list[mx.array] = []
        held = run.agree_on_held(_tag(step, 0, _BEGIN))
        for number, is_forward in one_forward_one_backward(held, len(works), backward=bool(run.trained)):
            work = works[number]
            with self._keys.using(work.keys):
                if not is_forward:
                    fault_points.reach("micro_batch")
                    run.backward(work, _tag(step, number, _BACKWARD), total)
                    works[number] = work.finished()
                    if sums is not None and number + 1 in batch_ends:  # they end in their order
                        sums.add(total)
                        total.clear()
                    continue
                if id(work) in first_of_batch:
                    before_micro_batch()
                run.forward(work, _tag(step, number, _FORWARD), training=True)
                if run.is_last:
                    loss, work.hidden = self._whole.staged.loss_and_gradient(0, work)
                    losses.append(loss)
                if not run.trained:
                    works[number] = work.finished()
        targets = sum(work.target_tokens for work in works) if run.is_last else 0
        local = self._whole.result(
            total,
            losses,
            batches,
            targets,
            started,
            is_counted_elsewhere=not run.is_last,
            waited_for_stages=channels.waited - waited,
            sent_to_stages=channels.sending_seconds - sent,
        )
        return local if sums is None else sums.result(local)

    def _settle(self) -> _StageRun | None:
        """This rank's stage, with its parts of the model, and not others, kept in memory. A collective call."""
        channels, place = self._places.channels(), self._places.own
        ends = frozenset[str]() if place is None else place.ends
        if not (ends == self._whole.staged.ends == self._weights.ends):  # others, which answer, use the weights too
            self._whole.staged.have_ends(ends)
        if place is None:
            self._weights.resident = ()
            return None
        blocks = place.stage.blocks
        # Room was found beside the ends that this rank had at first.
        fewer = self._weights.blocks_beside(ends, self.execution.ends)
        capacity = max(0, self.execution.block_capacity - fewer)
        resident = frozenset(spread(blocks, min(len(blocks), capacity)))
        if resident != self._weights.resident:
            self._weights.resident = resident
        # What else there is room for was found for a stage of this many blocks.
        has_room = len(blocks) <= len(self.execution.resident_blocks) and not fewer
        execution = self.execution if has_room else replace(self.execution, activation_capacity=0, border_capacity=0)
        return _StageRun(
            self._whole.staged, place, channels, self._whole.first_trained, execution, can_keep=not self._is_eager
        )


def _tag(step: int, number: int, kind: int) -> int:
    """Of a message: micro-batch ``number`` of ``step``, on its way forward or backward."""
    return step << 26 | number << 2 | kind
