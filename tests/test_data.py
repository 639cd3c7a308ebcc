"""Formats and sources: the same tokens as mlx-lm, and clear words for bad files."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlx_lm.tuner.datasets import create_dataset
from mlx_lm.utils import load_tokenizer

from macft.data.formats import prompt_tokens, tokenize
from macft.data.load import LoadedData, read, tokenize_all
from macft.data.settings import DatasetConfig, SourceConfig
from macft.data.sources import read_source
from macft.errors import DataError
from running import environment, write_jsonl


def load(config: DatasetConfig, tokenizer: Any, *, seed: int = 0) -> LoadedData:
    """Reads and tokenises, as a run does."""
    return tokenize_all(read(config, seed=seed), config, tokenizer, need_test=False)


@pytest.fixture(scope="module")
def tokenizer(bundled_model: Path) -> Any:
    """The bundled model's tokenizer, as mlx-lm wraps it."""
    return load_tokenizer(bundled_model)


CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": "4, of course — naïve but true."},
    ]
}
TOOL_CHAT = {
    **CHAT,
    "tools": [
        {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
    ],
}
LONG_CHAT = {
    "messages": [*CHAT["messages"], {"role": "user", "content": "And 3?"}, {"role": "assistant", "content": "5"}]
}
PAIR = {"prompt": "Translate: chat", "completion": "cat\n"}
TEXT = {"text": "Once upon a time.\n\n  Twice."}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("record", [CHAT, TOOL_CHAT, LONG_CHAT, PAIR], ids=["chat", "tools", "turns", "pair"])
def test_tokens_and_mask_are_mlx_lms(tokenizer: Any, record: dict[str, Any], masked: bool) -> None:
    theirs = create_dataset([record], tokenizer, types.SimpleNamespace(mask_prompt=masked))
    tokens, offset = theirs.process(record)
    row = tokenize(record, tokenizer, mask_prompt=masked)
    assert row.tokens.tolist() == list(tokens)
    assert row.prompt_length == offset
    assert row.tokens.dtype == np.int32


def test_text_ends_with_eos_as_in_mlx_lm(tokenizer: Any) -> None:
    theirs = create_dataset([TEXT], tokenizer, types.SimpleNamespace(mask_prompt=False))
    row = tokenize(TEXT, tokenizer, mask_prompt=False)
    assert row.tokens.tolist() == theirs.process(TEXT)[0]
    assert row.tokens[-1] == tokenizer.eos_token_id
    with pytest.raises(DataError, match="text rows have no prompt to mask"):
        tokenize(TEXT, tokenizer, mask_prompt=True)


def test_the_prompt_is_what_masking_hides(tokenizer: Any) -> None:
    row = tokenize(CHAT, tokenizer, mask_prompt=True)
    assert prompt_tokens(CHAT, tokenizer) == row.tokens[: row.prompt_length].tolist()
    assert row.target_tokens == len(row.tokens) - row.prompt_length


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"question": "x"}, "has question"),
        ({"text": 5}, "`text` must be a string, not int"),
        ({"prompt": "x", "completion": None}, "`completion` must be a string, not NoneType"),
        ({"messages": []}, "`messages` must be a list"),
        ({"messages": "hello"}, "`messages` must be a list"),
        ({"messages": [{"content": "x"}]}, "no `role`"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, tokenizer: Any, record: dict[str, Any], words: str) -> None:
    write_jsonl(tmp_path / "train.jsonl", [PAIR, record])
    with pytest.raises(DataError) as error:
        load(DatasetConfig(path=str(tmp_path)), tokenizer)
    assert words in str(error.value)
    assert "train row 2" in str(error.value)


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


def test_a_folder_without_training_rows_is_named(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "valid.jsonl", [PAIR])
    with pytest.raises(DataError, match=r"no train\.jsonl"):
        read_source(SourceConfig(path=str(tmp_path)))


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
    assert read_source(SourceConfig(path=str(path)))["train"] == rows


def test_a_broken_parquet_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match="can't be read") as error:
        read_source(SourceConfig(path=str(tmp_path / "rows.parquet")))
    assert "\n" not in str(error.value)


def test_an_unreachable_hub_fails_fast_with_one_line() -> None:
    code = (
        "from macft.data.sources import read_source\nfrom macft.data.settings import SourceConfig\n"
        "from macft.errors import DataError\n"
        "try:\n    read_source(SourceConfig(path='org/nothing-here'))\nexcept DataError as error:\n    print(error)\n"
    )
    variables = {**environment(), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": "/nonexistent"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.count("\n") == 1
    assert "org/nothing-here" in done.stdout
    assert "local folder or file" in done.stdout


def test_columns_are_renamed_and_missing_ones_named(tmp_path: Path, tokenizer: Any) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"q": "Why?", "a": "Because."}])
    columns = {"prompt": "q", "completion": "a"}
    data = load(DatasetConfig(path=str(tmp_path), columns=columns), tokenizer)
    expected = tokenize({"prompt": "Why?", "completion": "Because."}, tokenizer, mask_prompt=False)
    assert data.train.rows[0].tokens.tolist() == expected.tokens.tolist()
    with pytest.raises(DataError, match=r"no column 'question'; it has a, q"):
        load(DatasetConfig(path=str(tmp_path), columns={"text": "question"}), tokenizer)


def test_cut_and_dropped_rows_are_counted(tmp_path: Path, tokenizer: Any) -> None:
    long = {"prompt": "word " * 50, "completion": "end"}
    some = {"prompt": "hi", "completion": "word " * 60}
    write_jsonl(tmp_path / "train.jsonl", [PAIR, long, some])
    config = DatasetConfig(path=str(tmp_path), mask_prompt=True, max_seq_length=64)
    data = load(config, tokenizer)
    assert [len(row.tokens) for row in data.train.rows] == [len(tokenize(PAIR, tokenizer, mask_prompt=True).tokens), 64]
    assert len(data.train.records) == 2
    assert "train: 2 of 3 rows cut to 64 tokens" in data.notes
    assert any("1 of 3 rows dropped" in note for note in data.notes)


def test_several_sources_stand_one_after_the_other(tmp_path: Path, tokenizer: Any) -> None:
    write_jsonl(tmp_path / "a" / "train.jsonl", [PAIR] * 3)
    write_jsonl(tmp_path / "b" / "train.jsonl", [TEXT] * 2)
    sources = [SourceConfig(path=str(tmp_path / "a")), SourceConfig(path=str(tmp_path / "b"), weight=2.5)]
    data = load(DatasetConfig(sources=sources), tokenizer)
    assert data.train.source_sizes == [3, 2]
    assert data.train.source_weights == [1.0, 2.5]
    assert data.train.records == [PAIR] * 3 + [TEXT] * 2


def test_validation_rows_can_be_split_off(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"text": f"row {i}"} for i in range(20)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    config = DatasetConfig(path=str(tmp_path / "rows.jsonl"), valid_fraction=0.25)
    first, again = (load(config, tokenizer, seed=7) for _ in range(2))
    assert first.valid.records == again.valid.records
    assert len(first.valid.records) == 5
    assert sorted(map(str, first.valid.records + first.train.records)) == sorted(map(str, rows))
