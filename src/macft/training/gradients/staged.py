"""A node's part of a step, block by block: all of its rows through a block before the next one is begun.

Hidden states are kept at the borders of blocks, and the backward pass computes each block again from its input, as with
``training.recompute=blocks``. So a block's weights are needed twice a step, for the time of one block each. What is
computed, and the order of the sums, are those of :class:`~macft.training.gradient.GradientComputer`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from macft.data.batch import Batch
from macft.model.adapters.dropout import DropoutKeys
from macft.model.backends.base import Backend
from macft.model.blocks.block_weights import BlockWeights
from macft.model.execution import Execution
from macft.model.packing import takes_packs
from macft.training.batch_layout import BatchLayout, DeviceBatch
from macft.training.gradients.buckets import Gradient, buckets_of
from macft.training.gradients.gradient import Form, LocalGradient, add
from macft.training.gradients.staged_model import StagedModel, Work

VALIDATION_TOKENS = 16_384
"""Most tokens whose hidden states validation holds at once."""


class StagedLoss:
    """The losses of validation."""

    def __init__(self, staged: StagedModel):
        self._staged = staged

    def of_batches(
        self, batches: Iterable[Sequence[DeviceBatch]], stopped: Callable[[], bool] = lambda: False
    ) -> Iterator[list[float]]:
        """See :class:`~macft.training.validation.Losses`."""
        waiting: list[Sequence[DeviceBatch]] = []
        for parts in batches:
            if stopped():
                return
            waiting.append(parts)
            if sum(part.inputs.size for each in waiting for part in each) >= VALIDATION_TOKENS:
                yield from self._compute(waiting)
                waiting = []
        if waiting:
            yield from self._compute(waiting)

    def _compute(self, batches: Sequence[Sequence[DeviceBatch]]) -> Iterator[list[float]]:
        staged, none = self._staged, mx.zeros(1, mx.uint32)
        works = [Work.of(part, none) for parts in batches for part in parts]
        _all(staged.lanes.map(staged.enter, works))
        for number in range(staged.count):
            with staged.weights.held(number, then=[*range(number + 1, staged.count), *range(staged.count)]):
                _all(staged.lanes.map(partial(staged.forward, number, training=False), works))
        losses = list(staged.lanes.map(staged.loss, works))
        for parts in batches:
            yield [losses.pop(0) for _ in parts]


class StagedGradient:
    """Runs micro-batches forward and backward block by block; see GradientComputer for the interface.

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
        *,
        seed: int,
        bucket_bytes: int = 4 * 1024 * 1024,
    ):
        if execution.packing and not takes_packs(model):
            raise RuntimeError("rows are packed for a model outside of backend.installed(model)")
        self.execution = execution
        self.staged = StagedModel(model, backend, weights)
        self.loss = StagedLoss(self.staged)
        self._model, self._keys, self._seed = model, dropout_keys, seed
        self._layout = BatchLayout.from_execution(execution)
        self._shapes = {name: value.shape for name, value in tree_flatten(model.trainable_parameters())}
        self.buckets = buckets_of(model, bucket_bytes)
        trained = [number for number in range(self.staged.count) if self.staged.parameters_of(number)]
        self._first = min(trained, default=self.staged.count)

    def adopt(self, execution: Execution) -> None:
        """Takes over other resident blocks and other sizes of micro-batches."""
        self.execution = execution
        self.staged.weights.resident = execution.resident_blocks

    def __call__(
        self,
        step: int,
        batches: Sequence[Batch],
        before_micro_batch: Callable[[], None] = lambda: None,
        *,
        form: Form = "parameters",  # noqa: ARG002
    ) -> LocalGradient:
        """Computes ``batches``, this node's micro-batches of ``step``; there may be none.

        ``before_micro_batch`` is called as often as there are micro-batches, before equal parts of the work: no
        micro-batch is computed by itself here. All is computed when this returns.
        """
        started = time.perf_counter()
        if not self._model.training:
            self._model.train()
        total: Gradient = {}
        losses: list[mx.array] = []
        works = [work for batch in batches for work in self.works(step, batch)]
        if works:
            rests = _Rests(before_micro_batch, len(batches), 2 * self.staged.count - self._first)
            self._forward(works, rests)
            losses = self._losses(works)
            self._backward(works, total, rests)
        return self.result(total, losses, batches, sum(work.target_tokens for work in works), started)

    @property
    def first_trained(self) -> int:
        """The first block that has a backward pass."""
        return self._first

    def works(self, step: int, batch: Batch) -> list[Work]:
        """The parts of a micro-batch of ``step``, which are computed one by one."""
        return [self._work(step, part) for part in self._layout.parts(batch)]

    def result(
        self,
        total: Gradient,
        losses: Sequence[mx.array],
        batches: Sequence[Batch],
        target_tokens: int,
        started: float,
        **of_stages: Any,
    ) -> LocalGradient:
        """What :meth:`__call__` returns; parameters that ``total`` lacks have a gradient of zero.

        ``of_stages``: the fields of LocalGradient that only a stage of a pipeline has.
        """
        gradient = {name: total[name] if name in total else mx.zeros(shape) for name, shape in self._shapes.items()}
        gradient = {name: mx.contiguous(value) for name, value in gradient.items()}
        mx.eval(gradient)
        waited, read = self.staged.weights.take_figures()
        return LocalGradient(
            gradient=gradient,
            buckets=self.buckets,
            losses=losses,
            target_tokens=target_tokens,
            tokens=sum(int(batch.lengths.sum()) for batch in batches),
            started=started,
            waited_for_weights=waited,
            weights_read=read,
            **of_stages,
        )

    def _work(self, step: int, part: DeviceBatch) -> Work:
        return Work.of(part, mx.array(self._keys.needed_for(self._seed, step, part.row_ids)))

    def _forward(self, works: Sequence[Work], rests: _Rests) -> None:
        staged, count = self.staged, self.staged.count
        backwards = range(count - 1, self._first - 1, -1)

        def compute(number: int, lane: int, work: Work) -> Work:
            if number >= self._first:
                work.kept[number] = work.hidden
            with self._keys.using(work.keys):
                return staged.forward(number, lane, work, training=True)

        _all(staged.lanes.map(staged.enter, works))
        for number in range(count):
            rests.before_block()
            with staged.weights.held(number, then=[*range(number + 1, count), *backwards]):
                _all(staged.lanes.map(partial(compute, number), works))

    def _losses(self, works: Sequence[Work]) -> list[mx.array]:
        losses = []
        found = self.staged.lanes.map(self.staged.loss_and_gradient, works)
        for work, (loss, gradient) in zip(works, found, strict=True):
            losses.append(loss)
            work.hidden = gradient
        return losses

    def _backward(self, works: Sequence[Work], total: Gradient, rests: _Rests) -> None:
        staged = self.staged

        def compute(number: int, lane: int, work: Work) -> Gradient:
            with self._keys.using(work.keys):
                return staged.backward(number, lane, work, to_input=number > self._first)

        for number in range(staged.count - 1, self._first - 1, -1):
            rests.before_block()
            own: Gradient = {}
            following = [*range(number - 1, self._first - 1, -1), *range(staged.count)]
            with staged.weights.held(number, then=following):
                for gradient in staged.lanes.map(partial(compute, number), works):
                    own = add(own, gradient)
                    mx.eval(own)
            total.update(own)


class _Rests:
    """Calls ``rest`` ``count`` times, evenly spread over the computation of ``blocks`` blocks."""

    def __init__(self, rest: Callable[[], None], count: int, blocks: int):
        self._rest, self._count, self._blocks = rest, count, blocks
        self._rested = self._computed = 0

    def before_block(self) -> None:
        """Rests as often as is due before the next block; all before it are computed."""
        due = -(-self._count * (self._computed + 1) // self._blocks)
        while self._rested < min(due, self._count):
            self._rested += 1
            self._rest()
        self._computed += 1


def _all(results: Iterable[object]) -> None:
    """Waits for all of them."""
    for _ in results:
        pass
