"""Models installed in a backend, and what computes their gradients."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from harness.execution import execution_with
from macft.model.adapters.adapt import Adaptation
from macft.model.backends.base import Backend
from macft.model.backends.choose import can_pack, make_backend
from macft.model.execution import Execution
from macft.training.gradients.gradient import GradientComputer
from macft.training.loss import TokenLoss


def settled_memory() -> int:
    """Bytes that MLX's arrays hold once earlier work is done and what nobody refers to is freed; the peak begins here.

    Without this, what an earlier test has left would be freed while a test measures, and count against it.
    """
    mx.synchronize()
    gc.collect()
    mx.reset_peak_memory()
    return int(mx.get_active_memory())


@contextmanager
def gradient_computer(
    model: nn.Module,
    adaptation: Adaptation,
    kernels: str,
    *,
    packing: bool = False,
    seed: int = 0,
    bucket_bytes: int = 4 * 1024 * 1024,
    **fields: Any,
) -> Iterator[GradientComputer]:
    """What computes the gradients of ``model``, installed in its backend; ``fields`` are those of Execution."""
    execution = execution_with(kernels, packing=packing, dropout=adaptation.dropout_keys.in_use, **fields)
    backend = make_backend(execution)
    with backend.installed(model):
        yield GradientComputer(model, backend, execution, adaptation.dropout_keys, seed=seed, bucket_bytes=bucket_bytes)


@contextmanager
def token_loss(model: nn.Module, kernels: str, **fields: Any) -> Iterator[tuple[TokenLoss, Execution]]:
    """The loss of ``model``, installed in its backend, with its execution."""
    execution = execution_with(kernels, **fields)
    backend: Backend = make_backend(execution)
    with backend.installed(model):
        yield TokenLoss(model, backend), execution


def packs(model: nn.Module, kernels: str) -> bool:
    """Whether ``model`` can take packed rows."""
    return can_pack(model, execution_with(kernels, packing=True))


def randomize_adapter(model: nn.Module, *, scale: float = 0.1, seed: int = 5) -> None:
    """Gives all trainable parameters random values: LoRA's B begins as zero, which leaves A without a gradient."""
    from mlx.utils import tree_flatten

    mx.random.seed(seed)
    parameters = tree_flatten(model.trainable_parameters())
    model.load_weights([(name, mx.random.normal(value.shape) * scale) for name, value in parameters], strict=False)
