"""Models of real sizes with random weights: speed and memory depend on the shape, not on what the weights are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from macft.model.fetch.bundled import ensure_bundled
from macft.planner.known_models import known_models


def config_of(name: str) -> dict[str, Any]:
    """config.json, not quantised, of the bundled SmolLM2-135M or of a model of macft's table, such as Llama-3.2-1B.

    Raises:
        ValueError: the table has no such model, or several.
    """
    if name == "SmolLM2-135M":
        config: dict[str, Any] = json.loads((ensure_bundled() / "config.json").read_text(encoding="utf-8"))
        return config
    (found,) = [known for path, known in known_models().items() if f"/{name}-" in path]
    return {key: value for key, value in found.items() if key != "quantization"}


def random_model(config: Mapping[str, Any], *, bits: int | None = None, dtype: str = "bfloat16") -> Any:
    """A frozen model of the shape that ``config``, a config.json, describes; the same weights each time."""
    # isort: split
    import mlx.core as mx
    from mlx_lm.utils import _get_classes

    mx.random.seed(1)
    model_class, arguments = _get_classes(dict(config))
    return held_as(model_class(arguments.from_dict(dict(config))), bits, dtype)


def held_as(model: Any, bits: int | None, dtype: str = "bfloat16") -> Any:
    """``model``, just made in float32 and not computed yet, in ``dtype`` or in ``bits``, computed and frozen."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_map

    wanted = getattr(mx, dtype)
    model.update(tree_map(lambda value: value.astype(wanted), model.parameters()))
    if bits:
        nn.quantize(model, group_size=64, bits=bits)
    for part in [*model.layers, model]:  # one at a time, for they are made in float32
        mx.eval(part.parameters())
    mx.clear_cache()
    model.freeze()
    return model
