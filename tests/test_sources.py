"""Sources: files of every kind, the Hub's cache, and clear words for what can't be read."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from harness.runs import environment, write_jsonl
from macft.data.formats import parse
from macft.data.settings import SourceConfig
from macft.data.sources import SPLITS, read_source
from macft.errors import DataError

PAIR = {"prompt": "Translate: chat", "completion": "cat\n"}
TEXT = {"text": "Once upon a time.\n\n  Twice."}


def records(source: SourceConfig) -> dict[str, list[Any]]:
    """The records of each split."""
    return {split: [row.record for row in rows] for split, rows in read_source(source).items()}


def test_broken_json_names_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "fine"}\n\n{"text": oops}\n')
    with pytest.raises(DataError, match=r"train\.jsonl, line 3: not JSON"):
        read_source(SourceConfig(path=str(tmp_path)))


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("./nowhere", "does not exist"),
        ("/no/such/file.jsonl", "does not exist"),
        ("rows.parquet", "does not exist"),
        ("builtin:sqll", "there is builtin:sql"),
    ],
)
def test_a_missing_source_is_named(path: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        read_source(SourceConfig(path=path))


@pytest.mark.parametrize(("name", "words"), [("train.jsonl", "is a link to nothing"), ("train.csv", "is no file")])
def test_a_name_of_rows_without_a_file_is_told(tmp_path: Path, name: str, words: str) -> None:
    if name == "train.csv":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).symlink_to("nowhere")
    with pytest.raises(DataError, match=rf"{re.escape(name)} {words}; put the file with the training rows there$"):
        read_source(SourceConfig(path=str(tmp_path)))


def test_a_folder_without_training_rows_is_named(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "valid.jsonl", [PAIR])
    with pytest.raises(DataError, match=r"no train\.jsonl .* with rows in it; it has valid\.jsonl$"):
        read_source(SourceConfig(path=str(tmp_path)))


def test_validation_rows_may_have_the_hubs_name(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [PAIR])
    write_jsonl(tmp_path / "validation.jsonl", [TEXT])
    assert records(SourceConfig(path=str(tmp_path))) == {"train": [PAIR], "valid": [TEXT], "test": []}
    write_jsonl(tmp_path / "valid.jsonl", [TEXT])
    with pytest.raises(DataError, match=r"has both valid\.jsonl and validation\.jsonl; keep one"):
        read_source(SourceConfig(path=str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "rows.csv",
            b"prompt;completion\na;b;c\n",
            r"line 2: 3 cells, but the header names 2 columns; put cells",
        ),
        ("rows.tsv", b"prompt\tcompletion\na\tb\tc\n", r"line 2: 3 cells, but the header .*; put cells with tabs in"),
        ("rows.txt", b"a text\n", r"""to train on texts, write one \{"text": "..."\} a line to a .jsonl file"""),
        (
            "rows.csv",
            b"prompt,completion\n\xe0,\xe9\n",
            r"rows\.csv can't be read: the file is not UTF-8 text; save it",
        ),
        (
            "rows.jsonl",
            '{"text": "one"}\n'.encode("utf-16"),
            r"rows\.jsonl is UTF-16 text; save it again as UTF-8$",
        ),
        ("rows.jsonl", gzip.compress(b'{"text": "a"}\n'), r"rows\.jsonl is compressed; unpack it first, with gunzip$"),
        ("rows.jsonl.gz", gzip.compress(b'{"text": "a"}\n'), r"jsonl\.gz is compressed; unpack it first, with gunzip"),
        ("rows.csv", b"PK\x03\x04...", r"rows\.csv is a ZIP archive or a spreadsheet; unpack it, or export it as CSV$"),
        (
            "rows.json",
            b'{"data": [{"text": "a"}]}',
            r"the rows seem to be in its field `data`; .* `jq \.data FILE` prints$",
        ),
        ("rows.jsonl", b'{"text": "a", "text": "b"}\n', r"line 1: .* has the key 'text' twice; leave one of them out$"),
        ("rows.json", b'[{"messages": [{"role": "user", "role": "assistant"}]}]', r"has the key 'role' twice"),
    ],
    ids=["semicolons", "tsv", "txt", "latin-1", "utf-16", "gzip", "gz", "zip", "field", "twice", "twice inside"],
)
def test_a_file_of_another_kind_is_told_what_it_should_be(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_source(SourceConfig(path=str(tmp_path / name)))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.csv", "prompt;completion\nq;a, b\n"),
        ("rows.csv", "prompt\tcompletion\nq\ta, b\n"),
        ("rows.tsv", "prompt\tcompletion\nq\ta, b\n"),
        ("rows.csv", 'prompt,completion\nq,"a, b"\n'),
        ("rows.csv", ' prompt , completion\nq,"a, b"\n'),
    ],
    ids=["semicolons", "tabs", "tsv", "commas", "spaces"],
)
def test_cells_are_separated_by_what_the_header_has(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    [row] = read_source(SourceConfig(path=str(tmp_path / name)))["train"]
    assert row.record == {"prompt": "q", "completion": "a, b"}


@pytest.mark.parametrize(
    ("columns", "advice"),
    [
        ("question answer topic", "'dataset.columns={prompt: question, completion: answer}'"),
        ("Context Query Response", "'dataset.columns={prompt: Query, completion: Response}'"),
        ("body id", "'dataset.columns={text: body}'"),
        ("left right", "'dataset.columns={prompt: COLUMN, completion: COLUMN}'"),
        ("prompt chosen rejected", "'dataset.columns={completion: chosen}' trains on the chosen answers"),
    ],
)
def test_columns_of_other_names_are_guessed(columns: str, advice: str) -> None:
    with pytest.raises(DataError) as error:
        parse(dict.fromkeys(columns.split(), "x"))
    assert str(error.value).endswith(advice)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_local_files_of_every_kind(tmp_path: Path, suffix: str) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / f"rows.{suffix}"
    rows = [{"prompt": f"p{i}", "completion": f"c, {i}"} for i in range(3)]
    if suffix == "jsonl":
        write_jsonl(path, rows)
    elif suffix == "json":
        path.write_text(json.dumps(rows))
    elif suffix == "csv":
        path.write_text("prompt,completion\n" + "".join(f'{row["prompt"]},"{row["completion"]}"\n' for row in rows))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert records(SourceConfig(path=str(path)))["train"] == rows


def test_a_broken_parquet_file_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match="can't be read") as error:
        read_source(SourceConfig(path=str(tmp_path / "rows.parquet")))
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")  # datasets logs what it raises


def test_an_empty_field_is_not_a_column_of_another_name() -> None:
    with pytest.raises(
        DataError, match=r"has prompt \(completion: empty\); write something there, or leave the row out$"
    ):
        parse({"prompt": "x", "completion": None})


@pytest.mark.slow
def test_an_unreachable_hub_fails_fast_with_one_line(tmp_path: Path) -> None:
    code = (
        "from macft.data.sources import read_source\nfrom macft.data.settings import SourceConfig\n"
        "from macft.errors import DataError\n"
        "try:\n    read_source(SourceConfig(path='org/nothing-here'))\nexcept DataError as error:\n    print(error)\n"
    )
    variables = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment() | variables,
        capture_output=True,
        text=True,
        timeout=180,
        check=True,
    )
    assert done.stdout.count("\n") == 1
    assert "org/nothing-here" in done.stdout
    assert "local folder or file" in done.stdout


def test_a_folder_has_three_splits(tmp_path: Path) -> None:
    splits = {"train": [PAIR, TEXT], "valid": [TEXT], "test": [PAIR]}
    for name, rows in splits.items():
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    assert records(SourceConfig(path=str(tmp_path))) == splits


def test_two_files_for_one_split_are_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [PAIR])
    (tmp_path / "train.csv").write_text("prompt,completion\na,b\n")
    with pytest.raises(DataError, match=r"both train\.jsonl and train\.csv"):
        read_source(SourceConfig(path=str(tmp_path)))


@pytest.mark.parametrize("line", ["[1, 2]", '"text"', "null", "3"])
def test_a_line_that_is_no_object_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "rows.jsonl").write_text(f'{{"text": "fine"}}\n{line}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: a row must be a JSON object"):
        read_source(SourceConfig(path=str(tmp_path / "rows.jsonl")))


def test_a_file_that_is_no_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl.* can't be read"):
        read_source(SourceConfig(path=str(tmp_path / "rows.jsonl")))


HUB_CACHE_CODE = """
from macft.data.settings import SourceConfig
from macft.data.sources import read_source
from macft.errors import DataError

for options in ({}, {"train_split": "train[:80%]", "valid_split": "train[80%:]"}, {"train_split": "trian"}):
    try:
        found = read_source(SourceConfig(path="pairs", **options))
    except DataError as error:
        print(error)
    else:
        texts = {split: [row.record["text"] for row in rows] for split, rows in found.items()}
        print(*(f"{split}: {rows[0]} to {rows[-1]}" for split, rows in texts.items()), sep="; ")
"""


@pytest.mark.slow
def test_a_hub_dataset_that_was_prepared_before_needs_no_hub(tmp_path: Path) -> None:
    """Its splits are found by name, as mlx-lm does; slices are taken; a split that isn't there is named."""
    from datasets.packaged_modules.json.json import Json

    files = {}
    for split in ("train", "validation", "test"):
        write_jsonl(tmp_path / f"{split}.jsonl", [{"text": f"{split}-{i}"} for i in range(10)])
        files[split] = str(tmp_path / f"{split}.jsonl")
    cache = tmp_path / "datasets"
    Json(
        cache_dir=str(cache), dataset_name="pairs", config_name="default", hash="0", data_files=files
    ).download_and_prepare()
    # Local files add their hash to the name of the configuration; files of the hub don't.
    [prepared] = (cache / "pairs").iterdir()
    prepared.rename(prepared.with_name("default"))

    variables = {**environment(), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", HUB_CACHE_CODE], env=variables, capture_output=True, text=True, timeout=180, check=True
    )
    by_name, sliced, wrong = done.stdout.splitlines()
    assert by_name == "train: train-0 to train-9; valid: validation-0 to validation-9; test: test-0 to test-9"
    assert sliced == "train: train-0 to train-7; valid: train-8 to train-9; test: test-0 to test-9"
    assert wrong.startswith("dataset.path: pairs can't be read")
    assert "trian" in wrong


def test_local_rows_can_be_sliced_as_those_of_the_hub(tmp_path: Path) -> None:
    rows = [{"text": f"row {i}"} for i in range(10)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    found = records(
        SourceConfig(path=str(tmp_path / "rows.jsonl"), train_split="train[:70%]", valid_split="train[-2:]")
    )
    assert found == {"train": rows[:7], "valid": rows[-2:], "test": []}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"train_split": "train[:7"}, r"dataset\.train_split: train\[:7 can't be taken from local rows"),
        ({"valid_split": "validation"}, r"dataset\.valid_split: validation can't be .*Should be one of \['train'\]"),
        ({"test_split": "train[:200%]"}, r"dataset\.test_split: train\[:200%\] can't be"),
        ({"name": "main"}, r"dataset\.name: .* is local and has no subset main"),
    ],
)
def test_a_split_that_local_rows_lack_is_named(tmp_path: Path, options: dict[str, str], words: str) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [TEXT] * 3)
    with pytest.raises(DataError, match=words):
        read_source(SourceConfig(path=str(tmp_path / "rows.jsonl"), **options))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text": "caf\xe9"}', "the file is not UTF-8 text"),
        (b'{"n": ' + b"1" * 5000 + b"}", "a number has more than 4,300 digits"),
        (b'{"n": ' + b"[" * 200_000, "brackets inside brackets"),
    ],
    ids=["latin-1", "digits", "brackets"],
)
def test_a_line_json_chokes_on_is_named(tmp_path: Path, line: bytes, words: str) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(DataError, match=rf"rows\.jsonl, line 2: can't be read: {words}"):
        read_source(SourceConfig(path=str(tmp_path / "rows.jsonl")))


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "two"}\r\n')
    assert records(SourceConfig(path=str(tmp_path / "rows.jsonl")))["train"] == [{"text": "one"}, {"text": "two"}]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[\n  {"text": "a"},\n  {"text": "b"}\n]\n', r"line 1: an array of rows, .*rename it to rows\.json$"),
        ('[{"text": "a"}, {"text": "b"}]\n', r"line 1: an array of rows, .*rename it to rows\.json$"),
        ('{"text": "a"}\n{\n  "text": "b"\n}\n', r"line 2: an object over several lines, .*`jq -c \. FILE`$"),
        ('{"text": "a"}\n{\n  "text": "b"\n', r"line 2: not JSON"),
    ],
    ids=["pretty array", "array", "pretty object", "cut short"],
)
def test_jsonl_that_is_other_json_says_what_to_do(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(DataError, match=rf"rows\.jsonl, {words}"):
        read_source(SourceConfig(path=str(tmp_path / "rows.jsonl")))


@pytest.mark.parametrize(
    "text",
    ['[{"n": 1, "x": null},\n {"n": 1.5}]', '{"n": 1, "x": null}\n\n{"n": 1.5}\n'],
    ids=["array", "one a line"],
)
def test_json_is_read_as_it_is_written(tmp_path: Path, text: str) -> None:
    (tmp_path / "rows.json").write_text(text)
    first, second = records(SourceConfig(path=str(tmp_path / "rows.json")))["train"]
    assert first == {"n": 1, "x": None}
    assert isinstance(first["n"], int)
    assert second == {"n": 1.5}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.json", b'[{"text": "a"},\n {"text": oops}]', r"rows\.json, line 2: not JSON"),
        ("rows.json", b'[{"text": "a"}, "b"]', r"rows\.json, row 2: a row must be a JSON object"),
        ("rows.json", b'{"text": "caf\xe9"}', r"rows\.json can't be read"),
        ("rows.json", b'{"text": "a"}\n{"text": oops}', r"rows\.json, line 2: not JSON"),
        ("rows.csv", b"prompt,completion\na,b\nc,d,e\n", r"rows\.csv, line 3: 3 cells, .* 2 columns"),
        ("rows.csv", b"prompt,prompt\na,b\n", r"two columns are named prompt; rename one"),
        ("rows.csv", b"prompt,completion\ncaf\xe9,b\n", r"rows\.csv can't be read"),
        ("rows.csv", b'prompt,completion\n"a,b\n', r"rows\.csv, line 2: not CSV"),
    ],
)
def test_a_file_that_is_wrong_is_one_line(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words) as error:
        read_source(SourceConfig(path=str(tmp_path / name)))
    assert "\n" not in str(error.value)


def test_rows_know_their_lines(tmp_path: Path) -> None:
    """Blank lines, the header, and cells of several lines count."""
    (tmp_path / "train.jsonl").write_text('\n{"text": "a"}\n\n{"text": "b"}\n')
    (tmp_path / "valid.csv").write_text('\ufefftext,n\n"one\ntwo",1\n\nthree,2\n')
    (tmp_path / "test.json").write_text('[{"text": "a"}]')
    places = {
        split: [row.place for row in rows] for split, rows in read_source(SourceConfig(path=str(tmp_path))).items()
    }
    assert {split: [(place.row, place.line) for place in places[split]] for split in SPLITS} == {
        "train": [(1, 2), (2, 4)],
        "valid": [(1, 2), (2, 5)],
        "test": [(1, None)],
    }
    assert str(places["valid"][1]) == f"{tmp_path}, valid row 2 (line 5)"
    assert str(places["test"][0]) == f"{tmp_path}, test row 1"


def test_rows_of_csv_may_be_shorter_than_the_header(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("prompt,completion,,\na,b,,\nc\n")
    found = records(SourceConfig(path=str(tmp_path / "rows.csv")))["train"]
    assert found == [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": None}]


def test_a_long_cell_is_read(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text\n" + "x" * 200_000 + "\n")
    assert records(SourceConfig(path=str(tmp_path / "rows.csv")))["train"] == [{"text": "x" * 200_000}]
