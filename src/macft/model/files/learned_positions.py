"""How long a row can be for a model that has a vector for each position, as GPT-2 has, found without its weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from macft.data.load import Split
from macft.errors import DataError
from macft.model.module_classes import Members, replaced_members

_TOKENS = 8


def check_lengths(folder: Path, splits: Sequence[Split]) -> None:
    """Checks that the model in ``folder`` has a position for each token of the rows.

    MLX reads past the end of a table without an error.

    Raises:
        DataError: a row is too long.
    """
    positions = learned_positions(folder)
    if positions is None:
        return
    for split in splits:
        for row, place in zip(split.rows, split.places, strict=True):
            if len(row.tokens) > positions:
                raise DataError(
                    f"{place}: it has {len(row.tokens)} tokens, and the model has learned {positions} positions; "
                    f"use dataset.max_seq_length={positions}"
                )


def learned_positions(folder: Path) -> int | None:
    """The number of positions that the model in ``folder`` has learned; None if it computes them, or can't be built."""
    from mlx_lm.utils import _get_classes, load_config

    looked_up: list[tuple[int, NDArray[Any]]] = []

    def members(kind: type[nn.Module]) -> Members:
        call = kind.__call__

        def look_up(table: nn.Module, indices: mx.array) -> mx.array:
            looked_up.append((int(table.weight.shape[0]), np.asarray(indices).ravel()))
            rows: mx.array = call(table, indices)
            return rows

        return {"__call__": look_up}

    try:
        model_class, arguments = _get_classes(config := load_config(folder))
        model = model_class(arguments.from_dict(config))
        tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
        with replaced_members(tables, members):
            model(mx.zeros((1, _TOKENS), mx.int32))  # never evaluated: only indices are
    except (Exception, SystemExit):  # what the code of an architecture raises; loading tells the reason
        return None
    # Of tokens that are all the same, what is looked up one after the other are positions.
    sizes = [
        size - int(indices[0])
        for size, indices in looked_up
        if len(indices) == _TOKENS and np.array_equal(np.diff(indices), np.ones(_TOKENS - 1))
    ]
    return min(sizes, default=None)
