"""The backend of an execution."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from macft.device import blas
from macft.model.backends.base import Backend
from macft.model.backends.mlx.backend import MlxBackend
from macft.model.execution import Execution
from macft.model.packing import PackLayout, may_pack, packed

_PACK_TOKENS_ON_CPU = 512
"""Tokens in a pack of several rows on a CPU, where longer packs are no faster and take more memory."""


def make_backend(execution: Execution) -> Backend:
    """The backend that ``execution.kernels`` names.

    Raises:
        ConfigError: it is "cpu", and model, device or machine are not what those kernels are for.
    """
    if execution.kernels != "cpu":
        return MlxBackend(execution)
    from macft.model.backends.cpu.backend import CpuBackend  # other machines never import it

    return CpuBackend(execution)


def can_pack(model: nn.Module, execution: Execution) -> bool:
    """Whether packed rows can be given to the loaded ``model``.

    They can where its architecture allows it, and where a trial pack of two rows, with the tokens they have in common
    once, gives the logits of the rows one by one. Other models (sliding windows, state spaces, learned positions) are
    padded instead. ``execution`` must have ``packing``.
    """
    if not may_pack(model):
        return False
    first, second = mx.array([[1, 2, 3, 4, 5]]), mx.array([[1, 2, 6, 7, 8, 9, 10]])
    layout = PackLayout(
        paths=mx.array([[0, 1, 2, 3, 4, 0, 0], [0, 1, 5, 6, 7, 8, 9]]),
        owners=mx.array([0] * 5 + [1] * 5),
        depths=mx.array([0, 1, 2, 3, 4, 2, 3, 4, 5, 6]),
        lengths=(5, 7),
    )
    was_training = model.training
    model.eval()
    try:
        with make_backend(execution).installed(model):
            alone = mx.concatenate([model(first), model(second)[:, 2:]], axis=1)
            with packed(layout):
                together = model(mx.concatenate([first, second[:, 2:]], axis=1))
            return alone.shape == together.shape and bool(mx.allclose(alone, together, rtol=1e-2, atol=1e-2).item())
    except (TypeError, ValueError, AttributeError, RuntimeError):
        return False
    finally:
        model.train(was_training)


def execution_of(
    model: nn.Module,
    *,
    kernels: str = "auto",
    packs: bool = True,
    dropout: bool = False,
    compiled: bool = False,
    recompute: str = "none",
    loss_chunk: int | None = None,
    micro_batch_size: int | None = None,
) -> Execution:
    """How this machine computes the loaded ``model``.

    ``packs``: rows are packed where the model can take them; with ``dropout`` common beginnings are not shared.
    ``kernels`` "auto" is the CPU's for a float32 model on a CPU, uncompiled.
    """
    on_gpu = "metal" if mx.metal.is_available() else "cuda"
    device = "cpu" if mx.default_device() == mx.cpu else on_gpu
    sizes: Counter[mx.Dtype] = Counter()
    for _, value in tree_flatten(model.parameters()):
        if mx.issubdtype(value.dtype, mx.floating):
            sizes[value.dtype] += value.size
    quantized = [module for module in model.modules() if "scales" in module]
    execution = Execution(
        device=device,
        kernels="mlx",
        dtype=str(sizes.most_common(1)[0][0]).removeprefix("mlx.core."),
        bits=quantized[0].bits if quantized else None,
        packing=packs,
        shared_prefixes=packs and not dropout,
        pack_tokens=_PACK_TOKENS_ON_CPU if packs and device == "cpu" else None,
        compiled=compiled,
        recompute=recompute,
        loss_chunk=loss_chunk,
        micro_batch_size=micro_batch_size,
        evaluation_rows=micro_batch_size or Execution.evaluation_rows,
    )
    if packs and not can_pack(model, execution):
        execution = replace(execution, packing=False, shared_prefixes=False, pack_tokens=None)
    suits_cpu = device == "cpu" and execution.dtype == "float32" and not quantized and not compiled
    if kernels == "cpu" or (kernels == "auto" and suits_cpu and blas.library() is not None):
        execution = replace(execution, kernels="cpu", lanes=blas.available_cores())
    return execution
