"""A node's part of a step: the summed loss and gradient of the rows it was given."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol, get_args

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
from macft.training.gradients.buckets import Buckets, Gradient, buckets_of
from macft.training.gradients.joined import joined_value_and_grad
from macft.training.loss import TokenLoss
from macft.training.validation import Losses

Form = Literal["parameters", "buckets", "joined"]
"""How a gradient is: by parameter, in the pieces of its buckets, or as
:class:`~macft.model.joined_parameters.JoinedParameters` are. What is joined takes a GPU fewer kernels; a backend that
computes layer by layer, or in lanes, may give the parameters' instead of a bucket's pieces."""


@dataclass(frozen=True)
class LocalGradient:
    """Sums over this node's rows: the gradient, each micro-batch's loss, and counts of tokens.

    ``gradient`` holds float32 arrays by parameter name, or joined; they are row-contiguous and nobody else's, so that
    they can be summed over the ranks where they lie. They may still be on their way: ``buckets`` lists what travels
    together in the order in which the backward pass produces it, and each bucket is evaluated by itself. ``losses`` are
    float32 scalars, in nats; ``started`` is the time of ``perf_counter`` at which the computation began.
    """

    gradient: Gradient
    buckets: Buckets
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
        form: Form = "parameters",
    ) -> LocalGradient:
        """Computes ``batches``, this node's micro-batches of ``step``; there may be none.

        ``before_micro_batch`` is called as often as there are micro-batches, when all that came before is computed.
        What the result holds may still be under way, bucket by bucket. ``form``: what the gradient may be like;
        always that by parameter.
        """
        ...


class GradientComputer:
    """Runs micro-batches forward and backward and adds up their gradients, as ``execution`` says.

    ``model`` must be installed in ``backend`` (:meth:`Backend.installed`) as long as this is used. ``buckets`` are of
    about ``bucket_bytes`` bytes.

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
        self.buckets = buckets_of(model, bucket_bytes)
        # The loss is looked up with each call, so that callers may wrap it.
        self._value_and_grad = [
            backend.value_and_grad(each, partial(self._loss_in_lane, lane))
            for lane, each in enumerate(self.loss.lanes.models)
        ]
        self._traces = 0
        self._parameters = JoinedParameters.of(model)
        pieces = {piece.name: piece.names for bucket in self.buckets for piece in bucket}
        types = backend.types_in_products(model)
        self._of_form = {
            form: joined_value_and_grad(self._parameters, self.loss, types, groups)
            for form, groups in (("joined", self._parameters.groups), ("buckets", pieces))
        }
        self._compiled = {
            form: mx.compile(partial(self._trace, form), inputs=model.state)
            for form in (get_args(Form) if execution.compiled else ())
        }

    def adopt(self, execution: Execution) -> None:
        """Takes over other sizes of micro-batches. What is compiled, packed or recomputed stays as it was."""
        self.execution = execution

    def __call__(
        self,
        step: int,
        batches: Sequence[Batch],
        before_micro_batch: Callable[[], None] = lambda: None,
        *,
        form: Form = "parameters",
    ) -> LocalGradient:
        """Computes ``batches``, this node's micro-batches of ``step``; there may be none.

        ``before_micro_batch`` is called before each micro-batch, when all that came before is computed. All but the
        last pack of rows are computed when this returns. The last one is under way bucket by bucket, so that its first
        gradients can be sent while MLX computes the others; or as a whole, where it is joined. Lanes compute their
        parts of a micro-batch at the same time; the sums are made in the order of the parts.
        """
        if not self._model.training:
            self._model.train()
        form = "parameters" if self._backend.is_eager else form
        with self._parameters.unchanged():
            return self._summed(step, batches, before_micro_batch, form)

    def _summed(
        self, step: int, batches: Sequence[Batch], before_micro_batch: Callable[[], None], form: Form
    ) -> LocalGradient:
        started = time.perf_counter()
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
                    loss, total = self._add_gradient(total, step, part, form)
                mx.synchronize()  # one at a time: activations are freed before the next begin
                if number == 0:
                    before_micro_batch()
                if self._backend.is_eager:
                    loss, total = self._add_gradient(total, step, part, form)
                losses.append(loss)
                target_tokens += int(part.weights.sum())
        total = total or {name: mx.zeros(shape) for name, shape in self._shapes_of(form).items()}
        if form == "joined":
            start([*losses, *total.values()])
        else:
            start(losses)
            for bucket in self.buckets:
                names = [name for piece in bucket for name in ([piece.name] if form == "buckets" else piece.names)]
                total |= {name: mx.contiguous(total[name]) for name in names}
                # MLX computes what it is asked for first last, and holds until then all that this needs.
                start([total[name] for name in names])
        return LocalGradient(
            gradient=total,
            buckets=self.buckets,
            losses=losses,
            target_tokens=target_tokens,
            tokens=sum(int(batch.lengths.sum()) for batch in batches),
            started=started,
            traces=self._traces,
        )

    def _shapes_of(self, form: Form) -> Mapping[str, tuple[int, ...]]:
        if form == "joined":
            return {key: value.shape for key, value in self._parameters.get().items()}
        if form == "buckets":
            return {piece.name: piece.shape for bucket in self.buckets for piece in bucket}
        return self._shapes

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
        form: Form = "parameters",
        parameters: Joined | None = None,
    ) -> tuple[mx.array, Gradient]:
        """The summed loss of a part and its gradient, computed by the model of ``lane``.

        ``parameters``: the joined ones, where ``form`` is not that by parameter.
        """
        with packed(pack_layout(layout, lengths)), self._keys.using(keys):
            if form != "parameters":
                return self._of_form[form](parameters, *inputs)
            loss, gradient = self._value_and_grad[lane](*inputs)
        return loss, {name: value.astype(mx.float32) for name, value in gradient.items()}

    def _arrays(self, step: int, part: DeviceBatch) -> tuple[list[mx.array], list[mx.array], mx.array]:
        """Inputs of the loss, layout and row keys."""
        row_keys = self._keys.needed_for(self._seed, step, part.row_ids)
        return part.loss_inputs(), [mx.array(values) for values in part.layout], mx.array(row_keys)

    def _add_gradient(self, total: Gradient, step: int, part: DeviceBatch, form: Form) -> tuple[mx.array, Gradient]:
        """The summed loss of ``part``, and the gradients in ``total``, if any, with those of ``part`` added."""
        inputs, layout, keys = self._arrays(step, part)
        parameters = {} if form == "parameters" else self._parameters.get()
        if self.execution.compiled:
            # Nobody else holds the sums so far, so that MLX adds in their memory.
            added: tuple[mx.array, Gradient] = self._compiled[form](total, parameters, layout, keys, *inputs)
            return added
        return self._sum(form, total, parameters, layout, keys, *inputs, lengths=part.lengths)

    def _sum(
        self,
        form: Form,
        total: Gradient,
        parameters: dict[str, mx.array],
        layout: list[mx.array],
        keys: mx.array,
        *inputs: mx.array,
        lengths: Sequence[int] = (),
    ) -> tuple[mx.array, Gradient]:
        loss, gradient = self._gradient(0, layout, keys, *inputs, lengths=lengths, form=form, parameters=parameters)
        return loss, add(total, gradient)

    def _trace(
        self,
        form: Form,
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
            return self._sum(form, total, parameters, layout, keys, *inputs)
        finally:
            self._model.update(trained)


def add(total: Gradient, gradient: Gradient) -> Gradient:
    """Their sum; an empty ``total`` is zero."""
    return {name: total[name] + value for name, value in gradient.items()} if total else gradient
