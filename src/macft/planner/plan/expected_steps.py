"""The steps that a planned run would make, from its dataset, though its model may not be on this machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from macft.config.schema import TrainConfig
from macft.data.load import read, rows_to_tokenize, tokenize_all
from macft.data.order import RowOrder
from macft.data.template_clock import fix_clock
from macft.errors import DataError, MacftError, ModelError
from macft.model.fetch.bundled import ensure_bundled
from macft.model.load import load_tokenizer
from macft.planner.workload import StepRows, assumed_steps, steps_of
from macft.training.settings import steps_for

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with what is done, and how many of how many rows; 0 of 0 where there is no count."""


def expected_steps(
    config: TrainConfig, folder: Path | None, notes: list[str], tell: Progress
) -> tuple[list[StepRows], int]:
    """The run's batches and its number of updates; rows of the longest length where they can't be tokenised here.

    ``folder``: the model's, None if it isn't on this machine. ``notes`` gets lines on what had to be assumed.

    Raises:
        DataError: the dataset can't be read.
    """
    batch_size, longest = config.training.batch_size, config.dataset.max_seq_length
    tell("reading the dataset", 0, 0)
    raw = read(config.dataset, seed=config.seed)
    sizes = [len(splits["train"]) for _, splits in raw]
    order = RowOrder(sizes, [source.weight for source, _ in raw], batch_size=batch_size, seed=config.seed)
    folder = folder or _any_tokenizer(config, notes)
    try:
        if folder is None:
            raise ModelError("no tokenizer")
        tokenizer = load_tokenizer(config.model, folder)
        fix_clock(tokenizer, config.dataset.template_time)
        total = rows_to_tokenize(raw, need_test=False)
        data = tokenize_all(
            raw, config.dataset, tokenizer, need_test=False, progress=lambda done: tell("tokenizing", done, total)
        )
    except DataError:
        raise
    except (MacftError, json.JSONDecodeError) as error:
        notes.append(f"all rows are taken to have {longest} tokens (dataset.max_seq_length): {error}")
        return assumed_steps(batch_size, longest), steps_for(config.training, order.steps_per_epoch)
    order = RowOrder(data.train.source_sizes, data.train.source_weights, batch_size=batch_size, seed=config.seed)
    steps = steps_for(config.training, order.steps_per_epoch)
    return steps_of(data.train.rows, order, steps), steps


def _any_tokenizer(config: TrainConfig, notes: list[str]) -> Path | None:
    """The bundled model's folder, whose tokenizer stands in for that of a model that isn't here."""
    try:
        folder = ensure_bundled()
    except ModelError:
        return None
    notes.append(f"rows are counted in tokens of SmolLM2, as {config.model.path} is not on this machine")
    return folder
