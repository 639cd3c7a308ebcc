"""Reads and tokenises a configured dataset."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from macft.data.formats import Record, Row, Tokenizer, rename_columns, tokenize
from macft.data.settings import DatasetConfig, SourceConfig
from macft.data.sources import SPLITS, read_source
from macft.errors import DataError

Sources = list[tuple[SourceConfig, dict[str, list[Record]]]]
"""Each source with its raw records by split."""


@dataclass
class Split:
    """Tokenised rows and the raw records they were made from, in the order of the sources.

    ``source_sizes`` and ``source_weights`` hold one value for each source that has rows.
    """

    rows: list[Row] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    source_sizes: list[int] = field(default_factory=list)
    source_weights: list[float] = field(default_factory=list)


@dataclass
class LoadedData:
    """All splits; ``notes`` are lines for the user, for instance about rows that were cut."""

    train: Split
    valid: Split
    test: Split
    notes: list[str]


def read(config: DatasetConfig, *, seed: int) -> Sources:
    """Each source with its raw records by split. Needs no model, so a missing file is reported before a model loads.

    Raises:
        DataError: A source is missing, can't be read or has no training rows.
    """
    sources = []
    for source in config.all_sources():
        raw = read_source(source)
        if not raw["valid"] and config.valid_fraction:
            raw["train"], raw["valid"] = _split_off(raw["train"], config.valid_fraction, seed)
        if not raw["train"]:
            raise DataError(f"dataset.path: {source.path} has no training rows")
        sources.append((source, raw))
    return sources


def tokenize_all(
    sources: Sources,
    config: DatasetConfig,
    tokenizer: Tokenizer,
    *,
    need_test: bool,
) -> LoadedData:
    """Tokenises what :func:`read` returned; the test split only if ``need_test``.

    Raises:
        DataError: A row is in none of the formats; the message names the split, the row and the field.
    """
    data = LoadedData(Split(), Split(), Split(), [])
    for name in SPLITS if need_test else SPLITS[:2]:
        split, notes = tokenize_split(sources, config, tokenizer, name)
        setattr(data, name, split)
        data.notes += notes
    if not data.train.rows:
        raise DataError("dataset.max_seq_length: no training row has a target left after cutting; raise it")
    if not data.valid.rows:
        data.notes.append(
            "no validation rows, so there is no validation (dataset.valid_fraction takes some from the training rows)"
        )
    return data


def tokenize_split(sources: Sources, config: DatasetConfig, tokenizer: Tokenizer, name: str) -> tuple[Split, list[str]]:
    """Tokenises one split of what :func:`read` returned; returns it with lines for the user.

    Raises:
        DataError: A row is in none of the formats; the message names the split, the row and the field.
    """
    split, notes = Split(), []
    for source, raw in sources:
        before = len(split.rows)
        cut, dropped = _add(split, raw[name], f"{source.path}, {name} row", dict(source.columns), config, tokenizer)
        where = f"{source.path}, {name}" if len(sources) > 1 else name
        if cut:
            notes.append(f"{where}: {cut} of {len(raw[name])} rows cut to {config.max_seq_length} tokens")
        if dropped:
            notes.append(f"{where}: {dropped} of {len(raw[name])} rows dropped, no target token was left in them")
        if len(split.rows) > before:
            split.source_sizes.append(len(split.rows) - before)
            split.source_weights.append(source.weight)
    return split, notes


def sample_rows(count: int, wanted: int, seed: int) -> list[int]:
    """``wanted`` sorted row numbers below ``count``, the same ones for the same seed; all of them for -1."""
    if wanted < 0 or wanted >= count:
        return list(range(count))
    return sorted(int(i) for i in np.random.default_rng(seed).permutation(count)[:wanted])


def _add(
    split: Split,
    records: list[Record],
    where: str,
    columns: dict[str, str],
    config: DatasetConfig,
    tokenizer: Tokenizer,
) -> tuple[int, int]:
    """Appends the rows of one source to ``split``; returns how many were cut and how many dropped."""
    cut = dropped = 0
    for number, raw in enumerate(records, 1):
        try:
            record = rename_columns(raw, columns) if columns else raw
        except KeyError as error:
            have = ", ".join(sorted(raw))
            raise DataError(f"dataset.columns: {where} {number} has no column {error}; it has {have}") from error
        try:
            row = tokenize(record, tokenizer, mask_prompt=config.mask_prompt)
        except DataError as error:
            text = str(error)
            raise DataError(text if text.startswith("dataset.") else f"{where} {number}: {text}") from error
        if len(row.tokens) > config.max_seq_length:
            cut += 1
            row = Row(row.tokens[: config.max_seq_length], row.prompt_length)
        if row.target_tokens == 0:
            dropped += 1
            continue
        split.rows.append(row)
        split.records.append(record)
    return cut, dropped


def _split_off(records: list[Record], fraction: float, seed: int) -> tuple[list[Record], list[Record]]:
    """``records`` in training and validation rows, chosen by ``seed``; both keep their order."""
    count = min(len(records) - 1, max(1, round(len(records) * fraction)))
    chosen = set(np.random.default_rng(seed).permutation(len(records))[:count].tolist())
    return (
        [record for i, record in enumerate(records) if i not in chosen],
        [record for i, record in enumerate(records) if i in chosen],
    )
