"""How many tokens a model has embeddings for, without its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.nn as nn

from macft.errors import ModelError


def vocabulary_of(folder: Path) -> int | None:
    """The number of tokens that the model in ``folder`` has embeddings for; None if mlx-lm can't build it.

    The model is built by mlx-lm's class from config.json; its arrays are never evaluated. An embedding of positions or
    of a part of the layers is told apart by ``vocab_size``, which may be nested. Where that is no embedding's size, the
    largest one counts.

    Raises:
        ModelError: config.json can't be read.
    """
    from mlx_lm.utils import _get_classes, load_config

    try:
        config = load_config(folder)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / 'config.json'} can't be read: {error}") from error
    try:
        model_class, arguments = _get_classes(config)
        modules = model_class(arguments.from_dict(config)).modules()
    # What a class of mlx-lm, or of the model's own code, raises for settings it can't use, or ends the program where a
    # package is missing; loading tells the reason.
    except (Exception, SystemExit):
        return None
    sizes = {int(module.weight.shape[0]) for module in modules if isinstance(module, nn.Embedding)}
    return max(sizes & _named(config, "vocab_size") or sizes, default=None)


def _named(config: dict[str, Any], key: str) -> set[int]:
    """The numbers called ``key`` in ``config``, at any depth."""
    found = {value for name, value in config.items() if name == key and isinstance(value, int)}
    return found.union(*(_named(value, key) for value in config.values() if isinstance(value, dict)))
