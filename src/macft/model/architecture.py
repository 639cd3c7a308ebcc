"""Where the code of a model's layers looks up the functions it calls."""

from __future__ import annotations

import sys
from typing import Any

import mlx.nn as nn


def namespaces_with(model: nn.Module, function: str) -> list[dict[str, Any]]:
    """The modules' namespaces in which classes of ``model``'s layers are written and that have this ``function``.

    There may be several: mlx-lm writes one architecture with layers of another.
    """
    names = sorted({type(layer).__module__ for layer in model.modules()})
    return [space for space in (vars(sys.modules[name]) for name in names) if function in space]
