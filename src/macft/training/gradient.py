"""A node's part of a step: the summed loss and gradient of the rows it was given."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner.trainer import grad_checkpoint

from macft.data.batch import Batch
from macft.device.mlx_device import on_cpu, start, traced
from macft.errors import ConfigError
from macft.model.backends.cpu import eager
from macft.model.dropout import DropoutKeys
from macft.model.packing import enable_packing
from macft.training.batch_layout import BatchLayout, DeviceBatch, laid_out
from macft.training.loss import TokenLoss
from macft.training.settings import compiles


@dataclass(frozen=True)
class LocalGradient:
    """Sums over this node's rows: the gradient by parameter name, each micro-batch's loss, and counts of tokens.

    ``gradient`` holds float32 MLX arrays of the parameters' shapes, row-contiguous and nobody else's, so that they can
    be summed over the ranks where they lie. They may still be on their way: ``buckets`` lists their names in the order
    in which the backward pass produces them, and each bucket is evaluated by itself.
    """

    gradient: dict[str, Any]
    buckets: Sequence[Sequence[str]]
    losses: Sequence[Any]
    target_tokens: int
    tokens: int
    started: float

    @property
    def loss_sum(self) -> float:
        """Summed cross-entropy of this node's target tokens, in nats; waits for MLX."""
        return float(sum(loss.item() for loss in self.losses))


class GradientComputer:
    """Runs micro-batches forward and backward and adds up their gradients.

    ``buckets`` lists the trainable parameters' names in the order of the backward pass, last layer first, in groups of
    about ``bucket_bytes`` bytes. ``packing``, ``compiling`` and ``loss_chunk`` are those of TrainingConfig.

    Raises:
        ConfigError: ``packing`` is "true" and the model can't take packed rows.
    """

    def __init__(
        self,
        model: nn.Module,
        dropout_keys: DropoutKeys,
        *,
        seed: int,
        checkpoint_blocks: bool,
        bucket_bytes: int = 4 * 1024 * 1024,
        packing: str = "auto",
        compiling: str = "auto",
        loss_chunk: int | None = None,
    ):
        self._model = model
        self._keys = dropout_keys
        self._seed = seed
        self.packs = packing.lower() != "false" and enable_packing(model)
        if packing.lower() == "true" and not self.packs:
            raise ConfigError("training.packing: this model's attention can't take packed rows; use auto or false")
        self.compiles = compiles(compiling, cpu=on_cpu())
        self._eager = None if self.compiles else eager.prepare(model, checkpoint_blocks=checkpoint_blocks)
        if checkpoint_blocks and self._eager is None:
            grad_checkpoint(model.layers[0])
        self.loss = TokenLoss(model, chunk=loss_chunk)
        self._shapes = {name: value.shape for name, value in tree_flatten(model.trainable_parameters())}
        self.buckets = _buckets(self._shapes, bucket_bytes)
        self._loss_and_gradient = nn.value_and_grad(model, self._keyed_loss)
        if self.compiles:
            self._compiled = mx.compile(self._traced_part, inputs=model.state)

    def _keyed_loss(self, inputs: Any, positions: Any, targets: Any, weights: Any, keys: Any) -> Any:
        self._keys.value = keys
        return self.loss(inputs, positions, targets, weights)

    @property
    def shares(self) -> bool:
        """Whether rows that begin alike share these tokens: not with dropout, whose masks are each row's own."""
        return self.packs and not self._keys.in_use

    def __call__(
        self,
        step: int,
        batches: Sequence[Batch],
        before_micro_batch: Callable[[], None] = lambda: None,
        *,
        in_buckets: bool = True,
    ) -> LocalGradient:
        """Computes ``batches``, this node's micro-batches of ``step``; there may be none.

        ``before_micro_batch`` is called before each micro-batch, when all that came before is computed. All but the
        last pack of rows are computed when this returns. The last one is under way, ``in_buckets`` bucket by bucket, so
        that its first gradients can be sent while MLX computes the others.
        """
        started = time.perf_counter()
        if not self._model.training:
            self._model.train()
        total: dict[str, Any] = {}
        losses: list[Any] = []
        target_tokens = 0
        for batch in batches:
            for number, part in enumerate(self._parts(batch)):
                if losses:
                    start([losses[-1], *total.values()])
                if self._eager is None:  # its graph is made while the device is at what comes before
                    loss, total = self._with_part(total, step, part)
                mx.synchronize()  # one at a time: activations are freed before the next begin
                if number == 0:
                    before_micro_batch()
                if self._eager is not None:
                    loss, total = self._with_part(total, step, part)
                losses.append(loss)
                target_tokens += int(part.weights.sum())
        total = total or self._zeros()
        if in_buckets:
            start(losses)
            for names in self.buckets:
                total |= {name: mx.contiguous(total[name]) for name in names}
                start([total[name] for name in names])
        else:
            start([*losses, *total.values()])
        return LocalGradient(
            gradient=total,
            buckets=self.buckets,
            losses=losses,
            target_tokens=target_tokens,
            tokens=sum(int(batch.lengths.sum()) for batch in batches),
            started=started,
        )

    def _parts(self, batch: Batch) -> Iterator[DeviceBatch]:
        return BatchLayout(self.packs, self.shares, self.compiles, on_cpu()).parts(batch)

    def _with_part(self, total: dict[str, Any], step: int, part: DeviceBatch) -> tuple[Any, dict[str, Any]]:
        """The summed loss of ``part``, and the gradients in ``total``, if any, with its own added."""
        keys = DropoutKeys.for_rows(self._seed, step, part.row_ids) if self._keys.in_use else np.zeros(1, np.uint32)
        inputs = [mx.array(values) for values in (part.inputs, part.positions, part.targets, part.weights, keys)]
        layout = [mx.array(values) for values in part.layout]
        if self.compiles:
            # Nobody else holds the sums so far, so that MLX adds in their memory.
            return self._compiled(total, layout, *inputs)
        with laid_out(layout, part.lengths), eager.eager(self._eager) if self._eager is not None else nullcontext():
            loss, gradient = self._loss_and_gradient(*inputs)
        if self._eager is not None:  # evaluated while the graph was built, they would hold all of it
            loss, gradient = eager.plain(loss), tree_map(eager.plain, gradient)
        return loss, _added(total, gradient)

    def _traced_part(self, total: dict[str, Any], layout: list[Any], *inputs: Any) -> tuple[Any, dict[str, Any]]:
        """What is compiled for each shape of ``inputs``, with sums so far and without; the model stays as it was."""
        parameters, keys = self._model.trainable_parameters(), self._keys.value
        try:
            with traced(), laid_out(layout):
                loss, gradient = self._loss_and_gradient(*inputs)
                return loss, _added(total, gradient)
        finally:
            self._model.update(parameters)
            self._keys.value = keys

    def _zeros(self) -> dict[str, Any]:
        return {name: mx.zeros(shape) for name, shape in self._shapes.items()}


def _added(total: dict[str, Any], gradient: dict[str, Any]) -> dict[str, Any]:
    """Gradients by parameter name, float32, on top of those of ``total`` where it isn't empty."""
    flat = {name: value.astype(mx.float32) for name, value in tree_flatten(gradient)}
    return {name: total[name] + value for name, value in flat.items()} if total else flat


def _buckets(shapes: dict[str, tuple[int, ...]], bucket_bytes: int) -> list[list[str]]:
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
