"""Reads and tokenises a configured dataset."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count

import numpy as np

from macft.data.formats import Place, RawRow, Record, Row, parse, rename_columns
from macft.data.settings import DatasetConfig, SourceConfig
from macft.data.sources import SPLITS, read_source
from macft.data.template import Tokenizer
from macft.data.tokenize import tokenize
from macft.errors import DataError

Sources = list[tuple[SourceConfig, dict[str, list[RawRow]]]]
"""Each source with its raw rows by split."""
_HELD_OUT, _MOST_HELD_OUT, _FEWEST_TO_HOLD_OUT_OF = 0.05, 32, 100
"""What is held out of a dataset that has neither validation nor test rows, where the user doesn't say."""


@dataclass
class Split:
    """Tokenised rows, the records they were made from and where those were read, in the order of the sources.

    ``rows``, ``records`` and ``places`` are of one length; rows without a target are in none of them. ``source_sizes``
    and ``source_weights`` hold one value for each source that has rows.
    """

    rows: list[Row] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
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
    """Each source with its raw rows by split.

    Needs no model, so a missing file, or columns with other names, are reported before a model is fetched.

    Raises:
        DataError: A source is missing, can't be read or has no training rows, or the first has none of the formats.
    """
    sources = []
    for source in config.all_sources():
        raw = read_source(source)
        _hold_out(raw, config, seed)
        if not raw["train"]:
            raise DataError(f"dataset.path: {source.path} has no training rows")
        read_record, place = raw["train"][0]
        record = _renamed(read_record, place, source.columns)
        with _named_place(place):
            parse(record)
        sources.append((source, raw))
    return sources


def tokenize_all(
    sources: Sources,
    config: DatasetConfig,
    tokenizer: Tokenizer,
    *,
    need_test: bool,
    progress: Callable[[int], None] | None = None,
) -> LoadedData:
    """Tokenises what :func:`read` returned; the test split only if ``need_test``.

    ``progress`` is called with the number of rows done, of those that :func:`rows_to_tokenize` counts.

    Raises:
        DataError: A row is in none of the formats; the message names the split, the row and the field.
    """
    data = LoadedData(Split(), Split(), Split(), [])
    counted = partial(next, count(1))
    row_done = None if progress is None else lambda: progress(counted())
    for name in _splits(need_test=need_test):
        split, notes = tokenize_split(sources, config, tokenizer, name, row_done=row_done)
        setattr(data, name, split)
        data.notes += notes
    if not data.train.rows:
        raise DataError(
            "dataset.max_seq_length: no training row has a target left after cutting; raise it, unless they are empty"
        )
    if not data.valid.rows:
        data.notes.append(
            "no validation rows, so there is no validation (dataset.valid_fraction takes some from the training rows)"
        )
    return data


def with_few_test_rows(sources: Sources, count: int, seed: int) -> Sources:
    """``sources`` with ``count`` of their test rows, the same ones for the same ``seed``."""
    total = sum(len(raw["test"]) for _, raw in sources)
    chosen, start, fewer = set(sample_rows(total, count, seed)), 0, []
    for source, raw in sources:
        rows = [row for number, row in enumerate(raw["test"], start) if number in chosen]
        start += len(raw["test"])
        fewer.append((source, {**raw, "test": rows}))
    return fewer


def rows_to_tokenize(sources: Sources, *, need_test: bool) -> int:
    """How many rows :func:`tokenize_all` tokenises."""
    return sum(len(raw[name]) for _, raw in sources for name in _splits(need_test=need_test))


def _splits(*, need_test: bool) -> tuple[str, ...]:
    return SPLITS if need_test else SPLITS[:2]


def tokenize_split(
    sources: Sources,
    config: DatasetConfig,
    tokenizer: Tokenizer,
    name: str,
    *,
    row_done: Callable[[], None] | None = None,
) -> tuple[Split, list[str]]:
    """Tokenises one split of what :func:`read` returned; returns it with lines for the user.

    ``row_done`` is called after each row.

    Raises:
        DataError: A row is in none of the formats; the message names the split, the row and the field.
    """
    split, notes = Split(), []
    for source, raw in sources:
        before = len(split.rows)
        remarks = Remarks()
        _add(split, raw[name], dict(source.columns), config, tokenizer, remarks, row_done)
        where = f"{source.path}, {name}" if len(sources) > 1 else name
        notes += remarks.lines(where, len(raw[name]))
        if len(split.rows) > before:
            split.source_sizes.append(len(split.rows) - before)
            split.source_weights.append(source.weight)
    return split, notes


class Remarks:
    """Lines about rows, each told once: to how many rows it applies, and to which one first."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, Place]] = {}

    def add(self, line: str, place: Place) -> None:
        """``line`` applies to the row at ``place``."""
        count, first = self._found.get(line, (0, place))
        self._found[line] = (count + 1, first)

    def lines(self, where: str, total: int) -> list[str]:
        """One line for each remark, in the order in which they were found; ``total`` rows were looked at."""
        return [
            f"{where}: {count} of {total} rows {line} (first: {first.in_split})"
            for line, (count, first) in self._found.items()
        ]


def sample_rows(count: int, wanted: int, seed: int) -> list[int]:
    """``wanted`` sorted row numbers below ``count``, the same ones for the same seed; all of them for -1."""
    if wanted < 0 or wanted >= count:
        return list(range(count))
    return sorted(int(i) for i in np.random.default_rng(seed).permutation(count)[:wanted])


def _add(
    split: Split,
    raw: list[RawRow],
    columns: Mapping[str, str],
    config: DatasetConfig,
    tokenizer: Tokenizer,
    remarks: Remarks,
    row_done: Callable[[], None] | None,
) -> None:
    """Appends the rows of one source to ``split``."""
    for read_record, place in raw:
        record = _renamed(read_record, place, columns)
        with _named_place(place):
            row = tokenize(record, tokenizer, mask_prompt=config.mask_prompt, remark=partial(remarks.add, place=place))
        if row_done is not None:
            row_done()
        if len(row.tokens) > config.max_seq_length:
            remarks.add(f"cut to {config.max_seq_length} tokens", place)
            row = Row(row.tokens[: config.max_seq_length], row.prompt_length)
        if row.target_tokens == 0:
            remarks.add("dropped, no target token was left in them", place)
            continue
        split.rows.append(row)
        split.records.append(record)
        split.places.append(place)


def _renamed(record: Record, place: Place, columns: Mapping[str, str]) -> Record:
    try:
        return rename_columns(record, columns) if columns else record
    except KeyError as error:
        have = ", ".join(sorted(record))
        raise DataError(f"dataset.columns: {place} has no column {error}; it has {have}") from error


@contextmanager
def _named_place(place: Place) -> Iterator[None]:
    """Puts the row's place before the message of a DataError."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{place}: {error}") from error


def _hold_out(raw: dict[str, list[RawRow]], config: DatasetConfig, seed: int) -> None:
    """Moves training rows to the validation and test splits that the source lacks, chosen by ``seed``.

    One permutation decides, so that no row is in two splits. All splits keep their order; one row stays at least.
    """
    rows = raw["train"]
    valid = 0 if raw["valid"] else _share(len(rows), config.valid_fraction, most=len(rows) - 1)
    test = 0
    if not raw["test"] and config.test_fraction is not None:
        test = _share(len(rows), config.test_fraction, most=len(rows) - 1 - valid)
    elif not raw["test"] and not raw["valid"] and not valid and len(rows) >= _FEWEST_TO_HOLD_OUT_OF:
        test = _share(len(rows), _HELD_OUT, most=_MOST_HELD_OUT)
    if not (valid or test):
        return
    order = np.random.default_rng(seed).permutation(len(rows))
    for name, chosen in (("valid", order[:valid]), ("test", order[valid : valid + test])):
        if len(chosen):
            raw[name] = [rows[i] for i in sorted(chosen.tolist())]
    raw["train"] = [rows[i] for i in sorted(order[valid + test :].tolist())]


def _share(count: int, fraction: float, *, most: int) -> int:
    """``fraction`` of ``count`` rows: at least one, at most ``most``; none of a fraction of 0."""
    return max(0, min(most, max(1, round(count * fraction)))) if fraction else 0


def fraction_notes(sources: Sources, config: DatasetConfig) -> list[str]:
    """What a user should know about the splits: what was held out by itself, and fractions without an effect.

    ``sources`` are as :func:`read` has returned them, with all their rows.
    """
    notes = []
    for source, raw in sources:
        for split in ("valid", "test"):
            rows, fraction, key = raw[split], getattr(config, f"{split}_fraction"), f"dataset.{split}_fraction"
            was_cut = bool(rows) and _was_cut(source, raw, split)
            if was_cut and fraction is None:
                total = len(raw["train"]) + len(rows)
                notes.append(
                    f"{source.path}: {len(rows)} of {total:,} training rows are held out for samples and metrics "
                    f"({key}=0 trains on all)"
                )
            elif rows and fraction and not was_cut:
                words = "validation" if split == "valid" else split
                notes.append(f"{key}: no effect on {source.path}, which has {words} rows of its own")
    return notes


def _was_cut(source: SourceConfig, raw: Mapping[str, list[RawRow]], split: str) -> bool:
    """Whether the rows of ``split`` stand in the training split of the source."""
    is_named = getattr(source, f"{split}_split") is not None
    return not is_named and raw[split][0].place.split == raw["train"][0].place.split
