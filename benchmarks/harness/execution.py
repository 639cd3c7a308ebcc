"""How a float32 model is computed where no configuration says so."""

from __future__ import annotations

from typing import Any

from macft.device.mlx_device import on_cpu
from macft.model.execution import Execution


def execution_with(kernels: str, *, packing: bool = False, dropout: bool = False, **fields: Any) -> Execution:
    """How this machine computes a float32 model with ``kernels``; packed rows are short, and share prefixes."""
    return Execution(
        device="cpu" if on_cpu() else "metal",
        kernels=kernels,
        dtype="float32",
        packing=packing,
        shared_prefixes=packing and not dropout,
        pack_tokens=512 if packing and on_cpu() else None,
        **fields,
    )
