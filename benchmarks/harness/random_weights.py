"""Models of random weights, for where sizes count and answers don't."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def save_random_model(folder: Path, config: dict[str, Any], bundled_model: Path) -> Path:
    """Writes a random model of ``config`` in bfloat16, with the first tokens of the bundled model's tokenizer."""
    import mlx.core as mx
    from mlx_lm.utils import _get_classes, save_model

    from harness.tiny_model import write_first_tokens
    from macft.training_bench.random_weights import held_as

    kind, arguments = _get_classes(config)
    mx.random.seed(0)
    model = held_as(kind(arguments.from_dict(config)), None)
    folder.mkdir(parents=True)
    save_model(folder, model)  # with the index that mlx-lm's own pipelines need
    (folder / "config.json").write_text(json.dumps(config))
    write_first_tokens(folder, bundled_model, config["vocab_size"])
    return folder
