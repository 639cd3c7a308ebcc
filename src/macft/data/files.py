"""Reads the rows of one local file: JSON lines, JSON, CSV or Parquet.

Values come as they are written: a cell of CSV is a text, a number of JSON stays a number.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any, TextIO, TypeVar

from macft.data.formats import FIELDS, Record
from macft.errors import DataError

_Loaded = TypeVar("_Loaded")
Numbered = tuple[Record, int | None]
"""A record and the line where it begins, from 1; None where it isn't known."""
_LONGEST_CELL = 2**31 - 1
_LONGEST_NUMBER = 4300
"""Digits of an integer that Python reads."""
_NO_TEXT = {
    b"\x1f\x8b": "is compressed; unpack it first, with gunzip",
    b"\x28\xb5\x2f\xfd": "is compressed; unpack it first, with unzstd",
    b"\xfd7zXZ": "is compressed; unpack it first, with unxz",
    b"PK\x03\x04": "is a ZIP archive or a spreadsheet; unpack it, or export it as CSV",
    b"\xff\xfe": "is UTF-16 text; save it again as UTF-8",
    b"\xfe\xff": "is UTF-16 text; save it again as UTF-8",
}
"""Beginnings of files that are often named like files of rows, and what to do about each."""
_MARKS = {",": "commas", ";": "semicolons", "\t": "tabs"}
_ONE_A_LINE = 'a row must be a JSON object such as {"text": "..."} on one line'


def read_file(path: Path) -> list[Numbered]:
    """The records of a file, by its suffix; of an unknown suffix as JSON lines.

    Raises:
        DataError: The file can't be read; the message names it, and the line where that is known.
    """
    reader = READERS.get(path.suffix)
    try:
        _check_beginning(path)
        return (reader or _read_jsonl)(path)
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror or error}") from error
    except DataError as error:
        if reader:
            raise
        advice = f"; it was read as JSON lines, because its suffix is none of {', '.join(READERS)}"
        if path.suffix in (".txt", ".md"):
            advice += """; to train on texts, write one {"text": "..."} a line to a .jsonl file"""
        raise DataError(f"{error}{advice}") from error


def _check_beginning(path: Path) -> None:
    with path.open("rb") as file:
        beginning = file.read(8)
    for mark, advice in _NO_TEXT.items():
        if beginning.startswith(mark):
            raise DataError(f"{path} {advice}")


def _parsed(text: bytes) -> Any:
    """The JSON value; of an object with a key twice, Python would keep one in silence."""
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> Record:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the key {twice!r} twice; leave one of them out")
    return found


def _read_jsonl(path: Path) -> list[Numbered]:
    records: list[Numbered] = []
    with path.open("rb") as file:  # bytes: json decodes each line, so an invalid byte is reported with its line
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = _parsed(line)
            except json.JSONDecodeError as error:
                raise DataError(_over_lines(path, number) or _not_json(path, number, error)) from error
            except (ValueError, RecursionError) as error:  # wrong encoding, too many digits or brackets
                raise DataError(f"{path}, line {number}: can't be read: {one_line(error)}") from error
            if isinstance(record, list) and record and all(isinstance(item, dict) for item in record):
                raise DataError(_array(path, number))
            if not isinstance(record, dict):
                raise DataError(f"{path}, line {number}: {_ONE_A_LINE}")
            records.append((record, number))
    return records


def _over_lines(path: Path, first: int) -> str | None:
    """What to say where a value goes over several lines from line ``first``; None if it doesn't."""
    try:
        lines = path.read_text("utf-8-sig").splitlines(keepends=True)
        value, _ = json.JSONDecoder().raw_decode("".join(lines[first - 1 :]).lstrip())
    except (ValueError, RecursionError):
        return None
    if isinstance(value, list):
        return _array(path, first)
    return (
        f"{path}, line {first}: an object over several lines, but a .jsonl file has one row a line; "
        "write it again with `jq -c . FILE`"
    )


def _array(path: Path, number: int) -> str:
    return (
        f"{path}, line {number}: an array of rows, but a .jsonl file has one row a line; rename it to "
        f"{path.with_suffix('.json').name}"
    )


def _not_json(path: Path, number: int, error: json.JSONDecodeError) -> str:
    return f"{path}, line {number}: not JSON ({error.msg} at column {error.colno})"


def _read_json(path: Path) -> list[Numbered]:
    """An array of objects, or one object a line."""
    try:
        whole = _parsed(path.read_bytes())
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return _read_jsonl(path)
        raise DataError(_not_json(path, error.lineno, error)) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} can't be read: {one_line(error)}") from error
    if isinstance(whole, dict) and not whole.keys() & set(FIELDS):
        within = [name for name, value in whole.items() if isinstance(value, list) and value]
        if within and all(isinstance(row, dict) for row in whole[within[0]]):
            raise DataError(
                f"{path}: the rows seem to be in its field `{within[0]}`; the file must be the array of them alone, "
                f"which `jq .{within[0]} FILE` prints"
            )
    rows = whole if isinstance(whole, list) else [whole]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f'{path}, row {number}: a row must be a JSON object such as {{"text": "..."}}')
    return [(row, None) for row in rows]


def _read_csv(path: Path) -> list[Numbered]:
    """Cells as they are written; an empty cell is None."""
    csv.field_size_limit(_LONGEST_CELL)
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            reader = csv.reader(file, strict=True, delimiter=_delimiter(path, file))
        except UnicodeDecodeError as error:
            raise DataError(f"{path} can't be read: {one_line(error)}") from error
        try:
            return list(_csv_rows(path, reader))
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num}: not CSV ({error})") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{path} can't be read: {one_line(error)}") from error


def _delimiter(path: Path, file: TextIO) -> str:
    """What separates the cells: a tab in .tsv; else a comma, or what the header has where it has no comma."""
    if path.suffix == ".tsv":
        return "\t"
    header = file.readline()
    file.seek(0)
    return next((mark for mark in ",;\t" if mark in header), ",")


def _csv_rows(path: Path, reader: Any) -> Iterator[Numbered]:
    header: list[str] = [name.strip() for name in next(reader, [])]
    if twice := {name for name in header if name and header.count(name) > 1}:
        raise DataError(f"{path}: two columns are named {min(twice)}; rename one")
    first = reader.line_num + 1
    for cells in reader:
        if len(cells) > len(header):
            raise DataError(
                f"{path}, line {first}: {len(cells)} cells, but the header names {len(header)} columns; put cells with "
                f"{_MARKS[reader.dialect.delimiter]} in quotation marks"
            )
        if cells:
            # Spreadsheets write columns without a name after the last one.
            yield {name: cell or None for name, cell in zip_longest(header, cells) if name}, first
        first = reader.line_num + 1


def _read_parquet(path: Path) -> list[Numbered]:
    import datasets

    rows = quietly(lambda: datasets.load_dataset("parquet", data_files=str(path), split="train"), str(path))
    return [(dict(row), None) for row in rows]


READERS: dict[str, Callable[[Path], list[Numbered]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".tsv": _read_csv,
}
"""By a file's suffix."""


def quietly(load: Callable[[], _Loaded], what: str) -> _Loaded:
    """Calls ``load``, with progress bars only on a terminal; every failure becomes a DataError of one line."""
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    level = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs what it raises, too
    try:
        return load()
    except Exception as error:  # datasets raises its own errors, pyarrow's, fsspec's and plain ValueErrors
        raise DataError(f"dataset.path: {what} can't be read: {one_line(error)}") from error
    finally:
        datasets.logging.set_verbosity(level)


def one_line(error: BaseException) -> str:
    """The error's message on one line, its name if it has none."""
    if isinstance(error, UnicodeDecodeError):
        return "the file is not UTF-8 text; save it again as UTF-8"
    if isinstance(error, RecursionError):
        return "brackets inside brackets, too many for JSON here; is the file damaged?"
    if "integer string conversion" in str(error):
        return f"a number has more than {_LONGEST_NUMBER:,} digits; write it in quotation marks"
    return " ".join(str(error).split())[:300] or type(error).__name__
