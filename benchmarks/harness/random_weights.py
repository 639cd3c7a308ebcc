"""Models of real sizes with random weights."""

from __future__ import annotations

import json
from pathlib import Path
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


def save_random_model(folder: Path, config: dict[str, Any], bundled_model: Path) -> Path:
    """Writes a random model of ``config`` in bfloat16, with the first tokens of the bundled model's tokenizer."""
    import mlx.core as mx
    from mlx_lm.utils import _get_classes, save_model

    from harness.tiny_model import write_first_tokens

    kind, arguments = _get_classes(config)
    mx.random.seed(0)
    model = in_bfloat16(kind(arguments.from_dict(config)), None)
    folder.mkdir(parents=True)
    save_model(folder, model)  # with the index that mlx-lm's own pipelines need
    (folder / "config.json").write_text(json.dumps(config))
    write_first_tokens(folder, bundled_model, config["vocab_size"])
    return folder
