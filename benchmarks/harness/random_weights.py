"""Models of real sizes with random weights."""

from __future__ import annotations

from typing import Any


def in_bfloat16(model: Any, bits: int | None) -> Any:
    """``model``, just made in float32 and not computed yet, in bfloat16 or in ``bits``, computed and frozen."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_map

    model.update(tree_map(lambda value: value.astype(mx.bfloat16), model.parameters()))
    if bits:
        nn.quantize(model, group_size=64, bits=bits)
    for part in [*model.layers, model]:  # one at a time, for they are made in float32
        mx.eval(part.parameters())
    mx.clear_cache()
    model.freeze()
    return model
