"""A node's part of a step: the summed loss and gradient of the rows it was given."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from macft.data.batch import Batch
from macft.device.mlx_device import start
from macft.model.adapters.dropout import DropoutKeys
from macft.model.backends.base import Backend
from macft.model.execution import Execution
from macft.model.joined_parameters import Joined, JoinedParameters
from macft.model.packing import packed, takes_packs
from macft.training.batch_layout import BatchLayout, DeviceBatch, pack_layout
from macft.training.joined_gradient import joined_value_and_grad
from macft.training.loss import TokenLoss
from macft.training.validation import Losses

Gradient = dict[str, mx.array]
"""By parameter name, float32, of the parameters' shapes."""


@dataclass(frozen=True)
class LocalGradient:
    """Sums over this node's rows: the gradient by parameter name, each micro-batch's loss, and counts of tokens.

    ``gradient`` holds float32 arrays of the parameters' shapes, row-contiguous and nobody else's, so that they can be
    summed over the ranks where they lie. They may still be on their way: ``buckets`` lists their names in the order in
    which the backward pass produces them, and each bucket is evaluated by itself. ``losses`` are float32 scalars, in
    nats; ``started`` is the time of ``perf_counter`` at which the computation began.
    """

    gradient: Gradient
    buckets: Sequence[Sequence[str]]
    losses: Sequence[mx.array]
    target_tokens: int
    tokens: int
    started: float
    # Seconds in which nothing was computed because a block's weights were being read; None where none are.
    waited_for_weights: float | None = None
    # Bytes of weights that were read for this step, as they are in memory.
    weights_read: int = 0
    # Where another rank counts the tokens of these rows: it computes the end of the model for them.
    is_counted_elsewhere: bool = False
    # Seconds in which nothing was computed because another stage's hidden states or gradients were awaited, and seconds
    # in which this stage's were being sent, in the background; None where there are no stages.
    waited_for_stages: float | None = None
    sent_to_stages: float | None = None
    # How often a gradient was traced to be compiled so far: once for each shape.
    traces: int = 0

    @property
    def loss_sum(self) -> float:
        """Summed cross-entropy of this node's target tokens, in nats; waits for MLX."""
        return float(sum(float(np.asarray(loss)) for loss in self.losses))


class StepGradient(Protocol):
    """Sums losses and gradients over a node's rows, as ``execution`` says."""

    @property
    def execution(self) -> Execution:
        """How the rows are computed."""
        ...

    @property
    def loss(self) -> Losses:
        """The loss without a gradient, for validation."""
        ...

    def adopt(self, execution: Execution) -> None:
        """Computes as ``execution`` says from the next step on: with other blocks in memory, or other sizes of rows."""
        ...

    def __call__(
        self,
        step: int,
        batches: Sequence[Batch],
        before_micro_batch: Callable[[], None] = lambda: None,
        *,
        joined: bool = False,
    ) -> LocalGradient:
        """Computes ``batches``, this node's micro-batches of ``step``; there may be none.

        ``before_micro_batch`` is called as often as there are micro-batches, when all that came before is computed.
        What the result holds may still be under way, bucket by bucket. ``joined``: nobody needs it parameter by
        parameter, and it may be as in :class:`~macft.model.joined_parameters.JoinedParameters`.
        """
        ...


class GradientComputer:
    """Runs micro-batches forward and backward and adds up their gradients, as ``execution`` says.

    ``model`` must be installed in ``backend`` (:meth:`Backend.installed`) as long as this is used. ``buckets`` lists
    the trainable parameters' names in the order of the backward pass, last layer first, in groups of about
    ``bucket_bytes`` bytes.

    Raises:
        RuntimeError: rows are to be packed, and ``model`` is not installed.
    """

    def __init__(
        self,
        model: nn.Module,
        backend: Backend,
        execution: Execution,
        dropout_keys: DropoutKeys,
        *,
        seed: int,
        bucket_bytes: int = 4 * 1024 * 1024,
    ):
        if execution.packing and not takes_packs(model):
            raise RuntimeError("rows are packed for a model outside of backend.installed(model)")
        self.execution = execution
        self.loss = TokenLoss(model, backend)
        self._model = model
        self._backend = backend
        self._keys = dropout_keys
        self._seed = seed
        self._layout = BatchLayout.from_execution(execution)
        self._shapes = {name: value.shape for name, value in tree_flatten(model.trainable_parameters())}
        self.buckets = buckets_of(self._shapes, bucket_bytes)
        # The loss is looked up with each call, so that callers may wrap it.
        self._value_and_grad = [
            backend.value_and_grad(each, partial(self._loss_in_lane, lane))
            for lane, each in enumerate(self.loss.lanes.models)
        ]
        self._traces = 0
        self._parameters = JoinedParameters.of(model)
        self._joined_value_and_grad = joined_value_and_grad(
            self._parameters, self.loss, backend.types_in_products(model)
        )
        if execution.compiled:
            self._compiled = mx.compile(self._trace, inputs=model.state)

    def adopt(self, execution: Execution) -> None:
        """Takes over other sizes of micro-batches. What is compiled, packed or recomputed stays as it was."""
        self.execution = execution

    def __call__(
        self,
        step: int,
        batches: Sequence[Batch],
        before_micro_batch: Callable[[], None] = lambda: None,
        *,
        joined: bool = False,
    ) -> LocalGradient:
        """Computes ``batches``, this node's micro-batches of ``step``; there may be none.

        ``before_micro_batch`` is called before each micro-batch, when all that came before is computed. All but the
        last pack of rows are computed when this returns. The last one is under way bucket by bucket, so that its first
        gradients can be sent while MLX computes the others; or ``joined``, where the backend is lazy: the gradient is
        one long array for each kind of parameters. Lanes compute their parts of a micro-batch at the same time; the
        sums are made in the order of the parts.
        """
        started = time.perf_counter()
        if not self._model.training:
            self._model.train()
        joined = joined and not self._backend.is_eager
        parameters = self._parameters.get() if joined else {}
        total: Gradient = {}
        losses: list[mx.array] = []
        target_tokens = 0
        for batch in batches:
            if len(self._value_and_grad) > 1:
                parts = list(self._layout.parts(batch))
                total = self._add_side_by_side(total, losses, step, parts, before_micro_batch)
                target_tokens += sum(int(part.weights.sum()) for part in parts)
                continue
            for number, part in enumerate(self._layout.parts(batch)):
                if losses:
                    start([losses[-1], *total.values()])
                if not self._backend.is_eager:  # while the device is at what comes before
                    loss, total = self._add_gradient(total, step, part, parameters)
                mx.synchronize()  # one at a time: activations are freed before the next begin
                if number == 0:
                    before_micro_batch()
                if self._backend.is_eager:
                    loss, total = self._add_gradient(total, step, part, parameters)
                losses.append(loss)
                target_tokens += int(part.weights.sum())
        shapes = {key: value.shape for key, value in parameters.items()} if joined else self._shapes
        total = total or {name: mx.zeros(shape) for name, shape in shapes.items()}
        if joined:
            start([*losses, *total.values()])
        else:
            start(losses)
            for names in self.buckets:
                total |= {name: mx.contiguous(total[name]) for name in names}
                # MLX computes what it is asked for first last, and holds until then all that this needs.
                start([total[name] for name in reversed(names)])
        return LocalGradient(
            gradient=total,
            buckets=self.buckets,
            losses=losses,
            target_tokens=target_tokens,
            tokens=sum(int(batch.lengths.sum()) for batch in batches),
            started=started,
            traces=self._traces,
        )

    def _loss_in_lane(self, lane: int, *inputs: mx.array) -> mx.array:
        return self.loss(*inputs, lane=lane)

    def _add_side_by_side(
        self,
        total: Gradient,
        losses: list[mx.array],
        step: int,
        parts: Sequence[DeviceBatch],
        before_micro_batch: Callable[[], None],
    ) -> Gradient:
        """``total`` with the gradients of ``parts`` added; their losses are appended to ``losses``."""
        if parts:
            mx.synchronize()
            before_micro_batch()

        def compute(lane: int, part: DeviceBatch) -> tuple[mx.array, Gradient]:
            inputs, layout, keys = self._arrays(step, part)
            loss, gradient = self._gradient(lane, layout, keys, *inputs, lengths=part.lengths)
            mx.eval(loss, gradient)
            return loss, gradient

        for loss, gradient in self.loss.lanes.map(compute, parts):
            total = add(total, gradient)
            losses.append(loss)
            start(list(total.values()))
        return total

    def _gradient(
        self,
        lane: int,
        layout: list[mx.array],
        keys: mx.array,
        *inputs: mx.array,
        lengths: Sequence[int] = (),
        parameters: Joined | None = None,
    ) -> tuple[mx.array, Gradient]:
        """The summed loss of a part and its gradient, computed by the model of ``lane``; joined as ``parameters``."""
        with packed(pack_layout(layout, lengths)), self._keys.using(keys):
            if parameters:
                return self._joined_value_and_grad(parameters, *inputs)
            loss, gradient = self._value_and_grad[lane](*inputs)
        return loss, {name: value.astype(mx.float32) for name, value in gradient.items()}

    def _arrays(self, step: int, part: DeviceBatch) -> tuple[list[mx.array], list[mx.array], mx.array]:
        """Inputs of the loss, layout and row keys."""
        row_keys = self._keys.needed_for(self._seed, step, part.row_ids)
        return part.loss_inputs(), [mx.array(values) for values in part.layout], mx.array(row_keys)

    def _add_gradient(
        self, total: Gradient, step: int, part: DeviceBatch, parameters: dict[str, mx.array]
    ) -> tuple[mx.array, Gradient]:
        """The summed loss of ``part``, and the gradients in ``total``, if any, with those of ``part`` added.

        ``parameters``: the joined ones, if gradients are joined.
        """
        inputs, layout, keys = self._arrays(step, part)
        if self.execution.compiled:
            # Nobody else holds the sums so far, so that MLX adds in their memory.
            traces = self._traces
            loss, added = self._compiled(total, parameters, layout, keys, *inputs)
            if parameters and self._traces > traces:
                self._parameters.put_back()
            return loss, added
        return self._sum(total, parameters, layout, keys, *inputs, lengths=part.lengths)

    def _sum(
        self,
        total: Gradient,
        parameters: dict[str, mx.array],
        layout: list[mx.array],
        keys: mx.array,
        *inputs: mx.array,
        lengths: Sequence[int] = (),
    ) -> tuple[mx.array, Gradient]:
        loss, gradient = self._gradient(0, layout, keys, *inputs, lengths=lengths, parameters=parameters)
        return loss, add(total, gradient)

    def _trace(
        self,
        total: Gradient,
        parameters: dict[str, mx.array],
        layout: list[mx.array],
        keys: mx.array,
        *inputs: mx.array,
    ) -> tuple[mx.array, Gradient]:
        """What is compiled for each shape of ``inputs``, with sums so far and without; the model stays as it was."""
        self._traces += 1
        trained = self._model.trainable_parameters()
        try:
            return self._sum(total, parameters, layout, keys, *inputs)
        finally:
            self._model.update(trained)


def add(total: Gradient, gradient: Gradient) -> Gradient:
    """Their sum; an empty ``total`` is zero."""
    return {name: total[name] + value for name, value in gradient.items()} if total else gradient


def buckets_of(shapes: dict[str, tuple[int, ...]], bucket_bytes: int) -> list[list[str]]:
    """Names in the reverse order of the model, in groups of about ``bucket_bytes``."""
    buckets: list[list[str]] = [[]]
    size = 0
    for name in reversed(shapes):
        if size >= bucket_bytes:
            buckets.append([])
            size = 0
        buckets[-1].append(name)
        size += 4 * math.prod(shapes[name])
    return buckets
