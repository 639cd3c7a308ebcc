"""The backend of an execution."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from macft.model.backends.base import Backend
from macft.model.backends.mlx.backend import MlxBackend
from macft.model.execution import Execution
from macft.model.packing import PackLayout, may_pack, packed


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
