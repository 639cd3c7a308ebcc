"""One training step in this process: macft's, with MLX's operations, and mlx_lm's own, with the same adapter and rows.

with step_side("cheap", model, AdapterConfig(), compiled=False) as side:
    side.step(batch)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from macft.data.batch import Batch
from macft.device.kind import Device
from macft.model.adapters.adapt import adapt
from macft.model.adapters.dropout import DropoutKeys
from macft.model.adapters.settings import AdapterConfig
from macft.model.backends.choose import make_backend
from macft.model.execution import Execution, resolve
from macft.model.load import weight_format_of
from macft.model.settings import ModelConfig
from macft.training.gradients.gradient import GradientComputer
from macft.training.optimizer import OptimizerStep

# isort: split
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.trainer import default_loss
from mlx_lm.tuner.utils import linear_to_lora_layers

SIDES = ("mlx_lm", "none", "cheap", "blocks")
"""mlx_lm's step, and macft's with each ``training.recompute``."""


class StepSide:
    """A way to train ``model``, which has its adapter."""

    def __init__(self, model: nn.Module):
        self.model, self.traces = model, 0
        self.optimizer = optim.Adam(1e-4, bias_correction=True)

    def lazy(self, batch: Batch) -> tuple[mx.array, dict[str, mx.array]]:
        """Loss and gradient of a step, not computed yet; the last one's update is."""
        raise NotImplementedError

    def step(self, batch: Batch) -> None:
        """A step as it is trained; the device is idle afterwards."""
        raise NotImplementedError

    def update(self, gradient: dict[str, mx.array]) -> None:
        """The update by ``gradient``."""
        self.optimizer.update(self.model, tree_unflatten(list(gradient.items())))
        mx.eval(self.model.trainable_parameters(), self.optimizer.state)


class MlxLmStep(StepSide):
    """The step of ``mlx_lm.tuner.trainer.train``."""

    def __init__(self, model: nn.Module, *, compiled: bool):
        super().__init__(model)
        value_and_grad = nn.value_and_grad(model, default_loss)
        state = [model.state, self.optimizer.state, mx.random.state]

        def step(tokens: mx.array, lengths: mx.array) -> tuple[mx.array, mx.array]:
            self.traces += 1
            (loss, count), gradient = value_and_grad(model, tokens, lengths)
            self.optimizer.update(model, gradient)
            return loss, count

        model.train()
        self.optimizer.init(model.trainable_parameters())
        self._state, self._value_and_grad = state, value_and_grad
        self._step: Callable[..., Any] = mx.compile(step, inputs=state, outputs=state) if compiled else step

    def lazy(self, batch: Batch) -> tuple[mx.array, dict[str, mx.array]]:
        (loss, _), gradient = self._value_and_grad(self.model, *_as_mlx_lm(batch))
        return loss, dict(tree_flatten(gradient))

    def step(self, batch: Batch) -> None:
        mx.eval(self._step(*_as_mlx_lm(batch)), self._state)
        mx.synchronize()


def _as_mlx_lm(batch: Batch) -> tuple[mx.array, mx.array]:
    """Tokens and lengths, padded to one more than a multiple of 32 tokens, as mlx_lm's are."""
    rows, width = len(batch.lengths), int(batch.lengths.max())
    tokens = np.zeros((rows, 1 + -(-width // 32) * 32), np.int32)
    tokens[:, :width] = batch.tokens[:, :width]
    return mx.array(tokens), mx.array(np.stack([batch.prompt_lengths, batch.lengths], axis=1))


class MacftStep(StepSide):
    """macft's gradient and update; ``model`` is installed in ``backend``."""

    def __init__(self, model: nn.Module, execution: Execution, backend: Any, keys: DropoutKeys):
        super().__init__(model)
        self._is_queued = execution.compiled  # as macft.training.stepper chooses for one node
        self._compute = compute = GradientComputer(model, backend, execution, keys, seed=0)
        self._update = OptimizerStep(model, self.optimizer, compiled=execution.compiled)
        loss = compute.loss

        def counted(*inputs: Any, **named: Any) -> Any:
            self.traces += 1
            return loss(*inputs, **named)

        compute.loss = counted  # type: ignore[assignment]

    def lazy(self, batch: Batch) -> tuple[mx.array, dict[str, mx.array]]:
        compute = self._compute
        (part,) = compute._layout.parts(batch)
        inputs, layout, keys = compute._arrays(0, part)
        return compute._gradient(0, layout, keys, *inputs, lengths=part.lengths)

    def step(self, batch: Batch) -> None:
        local = self._compute(0, [batch], form="joined" if self._is_queued else "parameters")
        if self._is_queued:
            total = sum(local.losses, mx.array(0.0))
            mx.eval(self._update.queue(local.gradient, 1e-4, total, local.target_tokens, 1.0))
        else:
            self._update(local.gradient, 1e-4, 1.0 / local.target_tokens)
        mx.synchronize()


@contextmanager
def step_side(
    name: str, model: nn.Module, adapter: AdapterConfig, *, compiled: bool, packed: bool = False, **fields: Any
) -> Iterator[StepSide]:
    """The side ``name`` of SIDES, with an adapter in ``model``, which is frozen.

    ``packed``: macft's rows are packed, not padded. ``fields`` are others of macft's Execution.
    """
    if name == "mlx_lm":
        blocks = len(model.layers) if adapter.num_layers < 0 else adapter.num_layers
        config = {"rank": adapter.rank, "scale": adapter.scale, "dropout": adapter.dropout}
        linear_to_lora_layers(model, blocks, config, use_dora=adapter.type == "dora")
        mx.eval(model.parameters())
        yield MlxLmStep(model, compiled=compiled)
        return
    adaptation = adapt(model, adapter, seed=0)
    execution = resolve(
        ModelConfig(precision="checkpoint", quantization="keep"),
        weight_format_of(model),
        Device.default(),
        packing="true" if packed else "false",
        compile=str(compiled).lower(),
        kernels="mlx",
    )
    execution = replace(execution.with_batch(None, name), **{"pack_tokens": None, **fields})
    backend = make_backend(execution)
    with backend.installed(model):
        yield MacftStep(model, execution, backend, adaptation.dropout_keys)
