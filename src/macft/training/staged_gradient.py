"""A node's part of a step, block by block: all of its rows through a block before the next one is begun.

Hidden states are kept at the borders of blocks, and the backward pass computes each block again from its input, as with
``training.recompute=blocks``. So a block's weights are needed twice a step, for the time of one block each. What is
computed, and the order of the sums, are those of :class:`~macft.training.gradient.GradientComputer`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from macft.data.batch import Batch
from macft.model.backends.base import Backend
from macft.model.block_weights import BlockWeights
from macft.model.dropout import DropoutKeys
from macft.model.execution import Execution
from macft.model.head import split_head
from macft.model.packing import PackLayout, packed, takes_packs
from macft.model.parameter_refs import ParameterRefs
from macft.model.stages import CutModel, Entry
from macft.training.batch_layout import BatchLayout, DeviceBatch
from macft.training.gradient import Gradient, LocalGradient, add, buckets_of

VALIDATION_TOKENS = 16_384
"""Most tokens whose hidden states validation holds at once."""


@dataclass
class _Work:
    """A part of the node's rows on its way through the blocks; ``hidden`` is the newest block's result."""

    part: DeviceBatch
    arrays: list[mx.array]
    layout: PackLayout | None
    keys: mx.array
    entry: Entry | None = None
    hidden: mx.array = field(default_factory=lambda: mx.zeros(()))
    # By block number, the inputs that the backward pass needs.
    kept: dict[int, mx.array] = field(default_factory=dict)

    @classmethod
    def of(cls, part: DeviceBatch, keys: mx.array) -> _Work:
        return cls(part, part.loss_inputs(), part.pack_layout(), keys)


class StagedModel:
    """The blocks ``weights`` supplies, executed for parts of rows, and the loss of what they compute.

    ``model`` must be installed in ``backend``. Each of the backend's lanes has a model of its own.
    """

    def __init__(self, model: nn.Module, backend: Backend, weights: BlockWeights):
        self.lanes = backend.lanes(model)
        self.weights = weights
        self._model, self._backend = model, backend
        self._cuts: list[CutModel] = []
        self._losses = []
        for each in self.lanes.models:
            weights.follow(each)
            with CutModel(each).skipped():
                parts = split_head(each)
            self._cuts.append(CutModel(each, parts[0] if parts else None))
            self._losses.append(backend.cross_entropy(parts[1] if parts else None))
        self._refs = [[ParameterRefs(block) for block in cut.blocks] for cut in self._cuts]
        names = {id(module): name for name, module in model.named_modules()}
        self.prefixes = [names[id(block)] for block in self._cuts[0].blocks]

    @property
    def count(self) -> int:
        """Number of blocks."""
        return len(self._refs[0])

    def parameters_of(self, number: int) -> list[str]:
        """Names in the model of the trained parameters of block ``number``."""
        return [f"{self.prefixes[number]}.{name}" for name in self._refs[0][number].names]

    def enter(self, lane: int, work: _Work) -> _Work:
        """Computes what is before the blocks."""
        with packed(work.layout):
            work.entry = self._cuts[lane].enter(work.arrays[0])
            mx.eval(work.entry.arrays)
        work.hidden = work.entry.hidden
        return work

    def forward(self, number: int, lane: int, work: _Work, *, training: bool) -> _Work:
        """Computes block ``number``."""
        assert work.entry is not None
        cut, arguments = self._cuts[lane], work.entry.arguments[number]
        with packed(work.layout):

            def block(hidden: mx.array) -> mx.array:
                return cut.block(number, hidden, arguments)

            work.hidden = self._backend.value(block, work.hidden) if training else block(work.hidden)
            mx.eval(work.hidden)
        return work

    def loss(self, lane: int, work: _Work) -> float:
        """The summed loss of what the last block has computed, in nats, without a gradient."""
        inputs, positions, targets, weights = work.arrays
        with packed(work.layout):
            hidden = self._cuts[lane].leave(inputs, work.hidden)
            hidden = hidden.reshape(-1, hidden.shape[-1])[positions]
            return float(np.asarray(self._losses[lane](hidden, targets, weights, with_gradient=False)))

    def loss_and_gradient(self, lane: int, work: _Work) -> tuple[mx.array, mx.array]:
        """The summed loss, and its gradient by what the last block has computed."""
        inputs, positions, targets, weights = work.arrays

        def loss(hidden: mx.array) -> mx.array:
            hidden = self._cuts[lane].leave(inputs, hidden)
            hidden = hidden.reshape(-1, hidden.shape[-1])[positions]
            return self._losses[lane](hidden, targets, weights, with_gradient=True)

        with packed(work.layout):
            value, (gradient,) = self._backend.vjp(loss, [work.hidden], mx.array(1.0))
            mx.eval(value, gradient)
        return value, gradient

    def backward(self, number: int, lane: int, work: _Work, *, to_input: bool) -> Gradient:
        """Computes block ``number`` again, and the gradient by its parameters and, ``to_input``, by its input.

        ``work.hidden`` is the gradient by the block's result, and becomes that by its input.
        """
        assert work.entry is not None
        cut, arguments, refs = self._cuts[lane], work.entry.arguments[number], self._refs[lane][number]
        hidden, trained = work.kept.pop(number), refs.get()

        def block(hidden: mx.array, *values: mx.array) -> mx.array:
            refs.put(values)
            return cut.block(number, hidden, arguments)

        def by_parameters(*values: mx.array) -> mx.array:
            return block(hidden, *values)

        function, inputs = (block, [hidden, *trained]) if to_input else (by_parameters, trained)
        try:
            with packed(work.layout):
                _, gradients = self._backend.vjp(function, inputs, work.hidden)
                mx.eval(gradients)
        finally:
            refs.put(trained)
        work.hidden = gradients[0] if to_input else hidden
        found = zip(self.parameters_of(number), gradients[to_input:], strict=True)
        return {name: gradient.astype(mx.float32) for name, gradient in found}


class StagedLoss:
    """The losses of validation; see :meth:`~macft.training.loss.TokenLoss.of_batches`."""

    def __init__(self, staged: StagedModel):
        self._staged = staged

    def of_batches(self, batches: Iterable[Sequence[DeviceBatch]]) -> Iterator[list[float]]:
        """See :meth:`~macft.training.loss.TokenLoss.of_batches`."""
        waiting: list[Sequence[DeviceBatch]] = []
        for parts in batches:
            waiting.append(parts)
            if sum(part.inputs.size for each in waiting for part in each) >= VALIDATION_TOKENS:
                yield from self._compute(waiting)
                waiting = []
        if waiting:
            yield from self._compute(waiting)

    def _compute(self, batches: Sequence[Sequence[DeviceBatch]]) -> Iterator[list[float]]:
        staged, none = self._staged, mx.zeros(1, mx.uint32)
        works = [_Work.of(part, none) for parts in batches for part in parts]
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
        self.buckets = buckets_of(self._shapes, bucket_bytes)
        trained = [number for number in range(self.staged.count) if self.staged.parameters_of(number)]
        self._first = min(trained, default=self.staged.count)

    def __call__(
        self,
        step: int,
        batches: Sequence[Batch],
        before_micro_batch: Callable[[], None] = lambda: None,
        *,
        in_buckets: bool = True,
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
        works = [self._work(step, part) for batch in batches for part in self._layout.parts(batch)]
        if works:
            rests = _Rests(before_micro_batch, len(batches), 2 * self.staged.count - self._first)
            self._forward(works, rests)
            losses = self._losses(works)
            self._backward(works, total, rests)
        total = {name: total[name] if name in total else mx.zeros(shape) for name, shape in self._shapes.items()}
        if in_buckets:
            total = {name: mx.contiguous(value) for name, value in total.items()}
        mx.eval(total)
        waited, read = self.staged.weights.take_figures()
        return LocalGradient(
            gradient=total,
            buckets=self.buckets,
            losses=losses,
            target_tokens=sum(int(work.part.weights.sum()) for work in works),
            tokens=sum(int(batch.lengths.sum()) for batch in batches),
            started=started,
            waited_for_weights=waited,
            weights_read=read,
        )

    def _work(self, step: int, part: DeviceBatch) -> _Work:
        return _Work.of(part, mx.array(self._keys.needed_for(self._seed, step, part.row_ids)))

    def _forward(self, works: Sequence[_Work], rests: _Rests) -> None:
        staged, count = self.staged, self.staged.count
        backwards = range(count - 1, self._first - 1, -1)

        def compute(number: int, lane: int, work: _Work) -> _Work:
            if number >= self._first:
                work.kept[number] = work.hidden
            with self._keys.using(work.keys):
                return staged.forward(number, lane, work, training=True)

        _all(staged.lanes.map(staged.enter, works))
        for number in range(count):
            rests.before_block()
            with staged.weights.held(number, then=[*range(number + 1, count), *backwards]):
                _all(staged.lanes.map(partial(compute, number), works))

    def _losses(self, works: Sequence[_Work]) -> list[mx.array]:
        losses = []
        found = self.staged.lanes.map(self.staged.loss_and_gradient, works)
        for work, (loss, gradient) in zip(works, found, strict=True):
            losses.append(loss)
            work.hidden = gradient
        return losses

    def _backward(self, works: Sequence[_Work], total: Gradient, rests: _Rests) -> None:
        staged = self.staged

        def compute(number: int, lane: int, work: _Work) -> Gradient:
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
