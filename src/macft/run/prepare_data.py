"""Prepares a run's data: rows that are read, tokenized and checked, before any weights are loaded."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from macft.collective.matching import Texts
from macft.config.schema import TrainConfig
from macft.data.checks import check_rows
from macft.data.load import LoadedData, fraction_notes, read, rows_to_tokenize, tokenize_all, with_few_test_rows
from macft.data.order import RowOrder
from macft.data.settings import DatasetConfig
from macft.data.template_clock import fix_clock
from macft.model.fetch.resolve import resolve
from macft.model.files.learned_positions import check_lengths
from macft.model.files.vocabulary import vocabulary_of
from macft.model.files.weight_files import check_weight_files
from macft.model.load import load_tokenizer
from macft.report.phase_lines import PhaseLines
from macft.run.contents import contents_of
from macft.run.held_out import HeldOut, choose_held_out, test_rows_needed

_log = logging.getLogger("macft.run")


@dataclass(frozen=True)
class PreparedData:
    """What a run trains on and is scored on.

    Attributes:
        model_folder: The base model, whose weights are not read yet.
        tokenizer: Its tokenizer.
        data: The tokenized rows.
        held_out: The rows that are answered before and after training.
        order: The order of the training rows.
        contents: Digests of what decides the result, by name; all nodes have the same.
        notes: Lines for the user.
    """

    model_folder: Path
    tokenizer: Any
    data: LoadedData
    held_out: HeldOut
    order: RowOrder
    contents: Texts
    notes: list[str]


def prepare_data(config: TrainConfig, phases: PhaseLines) -> PreparedData:
    """Finds the model, and reads, tokenizes and checks the rows.

    Raises:
        DataError: the dataset can't be read, or its rows don't fit.
        ModelError: the model can't be found or fetched.
    """
    begin_phase(phases, f"reading the dataset {_named(config.dataset)}")
    raw = read(config.dataset, seed=config.seed)
    split_notes = fraction_notes(raw, config.dataset)

    begin_phase(phases, f"finding the model {config.model.path}", once=True)  # a download shows a bar
    model_folder = resolve(config.model)
    check_weight_files(model_folder)
    tokenizer = load_tokenizer(config.model, model_folder)
    clock_notes = fix_clock(tokenizer, config.dataset.template_time)

    raw = with_few_test_rows(raw, test_rows_needed(config), config.seed)
    total = rows_to_tokenize(raw, need_test=True)
    begin_phase(phases, "tokenizing", total, unit="rows")
    data = tokenize_all(raw, config.dataset, tokenizer, need_test=True, progress=phases.advance)
    begin_phase(phases, "checking the rows")
    row_notes = check_rows(
        {"train": data.train, "valid": data.valid, "test": data.test},
        tokenizer,
        vocabulary=vocabulary_of(model_folder),
        max_seq_length=config.dataset.max_seq_length,
    )
    check_lengths(model_folder, [data.train, data.valid, data.test])
    held_out, held_out_notes = choose_held_out(config, data, tokenizer)
    order = RowOrder(
        data.train.source_sizes, data.train.source_weights, batch_size=config.training.batch_size, seed=config.seed
    )
    contents = contents_of(config, data, order, model_folder, tokenizer)
    notes = [*clock_notes, *split_notes, *data.notes, *row_notes, *held_out_notes]
    if config.training.batch_size > len(data.train.rows):
        notes.append(
            f"training.batch_size: {config.training.batch_size} is more than the {len(data.train.rows)} training rows, "
            "so that a step has rows several times"
        )
    return PreparedData(model_folder, tokenizer, data, held_out, order, contents, notes)


def begin_phase(phases: PhaseLines, name: str, total: int | None = None, *, unit: str = "", once: bool = False) -> None:
    """A phase begins, for the terminal and the log; see :meth:`~macft.report.phase_lines.PhaseLines.begin`."""
    _log.info("%s%s", name, "" if total is None else f": {total} {unit}")
    phases.begin(name, total, unit=unit, once=once)


def _named(dataset: DatasetConfig) -> str:
    return ", ".join(source.path for source in dataset.all_sources())
