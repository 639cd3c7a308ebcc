"""The backend of an execution."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from macft.model.backends.base import Backend
from macft.model.backends.mlx.backend import MlxBackend
from macft.model.execution import Execution
from macft.model.packing import PackLayout, packed
from macft.model.trials.packable import ignores_positions, may_pack

# What rounding makes of logits; a row that sees its neighbour, or a wrong position, differs by more.
_TOLERANCE = {mx.float32: 1e-2, mx.bfloat16: 1e-1, mx.float16: 1e-1}


def make_backend(execution: Execution) -> Backend:
    """The backend that ``execution.kernels`` names.

    Raises:
        ConfigError: it is "cpu", and model, device or machine are not what those kernels are for.
    """
    if execution.kernels != "cpu":
        return MlxBackend(execution)
    from macft.model.backends.cpu.backend import CpuBackend  # other machines never import it

    return CpuBackend(execution)


def can_pack(
    model: nn.Module,
    execution: Execution,
    *,
    traced: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> bool:
    """Whether packed rows can be given to the loaded ``model``.

    They can where its architecture allows it at any length and any position (:mod:`macft.model.trials.packable`), and
    where a trial pack of two rows, with the tokens they have in common once, gives the logits of the rows one by one.
    Other models (state spaces, learned positions, attention in chunks) are padded instead. ``execution`` must have
    ``packing``. ``traced`` makes a context in which the model is followed without values.
    """
    was_training = model.training
    model.eval()
    try:
        with traced():
            may = may_pack(model)
        return may and ignores_positions(model) and _packs_as_row_by_row(model, execution)
    finally:
        model.train(was_training)


def _packs_as_row_by_row(model: nn.Module, execution: Execution) -> bool:
    first, second = mx.array([[1, 2, 3, 4, 5]]), mx.array([[1, 2, 6, 7, 8, 9, 10]])
    layout = PackLayout(
        paths=mx.array([[0, 1, 2, 3, 4, 0, 0], [0, 1, 5, 6, 7, 8, 9]]),
        owners=mx.array([0] * 5 + [1] * 5),
        depths=mx.array([0, 1, 2, 3, 4, 2, 3, 4, 5, 6]),
        lengths=(5, 7),
    )
    try:
        with make_backend(execution).installed(model):
            alone = mx.concatenate([model(first), model(second)[:, 2:]], axis=1)
            with packed(layout):
                together = model(mx.concatenate([first, second[:, 2:]], axis=1))
            return alone.shape == together.shape and _greatest_difference(alone, together) < _TOLERANCE[alone.dtype]
    except Exception:  # the code of an architecture may raise anything
        return False


def _greatest_difference(one: mx.array, other: mx.array) -> float:
    """Of logits (rows, tokens, V): how long their difference is at any token, relative to how far logits spread."""
    one, other = (
        value.astype(mx.float32) - value.astype(mx.float32).mean(axis=-1, keepdims=True) for value in (one, other)
    )
    differences: mx.array = mx.linalg.norm(one - other, axis=-1) / mx.linalg.norm(one, axis=-1)
    return float(np.asarray(differences).max())
