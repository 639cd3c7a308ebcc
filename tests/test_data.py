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
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.tuner.datasets import create_dataset
from mlx_lm.utils import load_tokenizer

from harness.runs import environment, write_jsonl
from macft.data.load import LoadedData, read, tokenize_all
from macft.data.settings import DatasetConfig, SourceConfig, problems
from macft.data.sources import read_source
from macft.data.tokenize import prompt_tokens, tokenize
from macft.errors import DataError


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
@pytest.mark.parametrize(
    "record",
    [CHAT, TOOL_CHAT, LONG_CHAT, PAIR, {**TEXT, **CHAT, **PAIR}],
    ids=["chat", "tools", "turns", "pair", "fields of all formats"],
)
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
    assert read_source(SourceConfig(path=str(path)))["train"] == rows


def test_a_broken_parquet_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match="can't be read") as error:
        read_source(SourceConfig(path=str(tmp_path / "rows.parquet")))
    assert "\n" not in str(error.value)


@pytest.mark.slow
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


@settings(max_examples=60, deadline=None)
@given(
    contents=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), min_size=2, max_size=5),
    system=st.booleans(),
    masked=st.booleans(),
)
def test_any_chat_has_mlx_lms_tokens(tokenizer: Any, contents: list[str], system: bool, masked: bool) -> None:
    roles = ["system", "user", "assistant", "user", "assistant"][0 if system else 1 :]
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    record = {"messages": messages}
    theirs = create_dataset([record], tokenizer, types.SimpleNamespace(mask_prompt=masked))
    tokens, offset = theirs.process(record)
    row = tokenize(record, tokenizer, mask_prompt=masked)
    assert row.tokens.tolist() == list(tokens)
    assert row.prompt_length == offset


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_has_mlx_lms_tokens(tokenizer: Any, text: str) -> None:
    record = {"text": text + "."}  # mlx-lm looks at the last token, so that it fails on an empty text
    theirs = create_dataset([record], tokenizer, types.SimpleNamespace(mask_prompt=False))
    assert tokenize(record, tokenizer, mask_prompt=False).tokens.tolist() == theirs.process(record)[0]


def test_an_empty_text_is_the_end_token_and_has_no_target(tokenizer: Any) -> None:
    row = tokenize({"text": ""}, tokenizer, mask_prompt=False)
    assert row.tokens.tolist() == [tokenizer.eos_token_id]
    assert row.target_tokens == 0


@pytest.mark.parametrize("suffix", ["json", "parquet"])
def test_chats_survive_the_datasets_library(tmp_path: Path, tokenizer: Any, suffix: str) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / f"train.{suffix}"
    if suffix == "json":
        path.write_text(json.dumps([CHAT, LONG_CHAT]))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([CHAT, LONG_CHAT]), path)
    data = load(DatasetConfig(path=str(tmp_path), mask_prompt=True), tokenizer)
    expected = [tokenize(record, tokenizer, mask_prompt=True) for record in (CHAT, LONG_CHAT)]
    assert [row.tokens.tolist() for row in data.train.rows] == [row.tokens.tolist() for row in expected]
    assert [row.prompt_length for row in data.train.rows] == [row.prompt_length for row in expected]


def test_a_folder_has_three_splits(tmp_path: Path) -> None:
    splits = {"train": [PAIR, TEXT], "valid": [CHAT], "test": [TOOL_CHAT]}
    for name, rows in splits.items():
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    assert read_source(SourceConfig(path=str(tmp_path))) == splits


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


def test_renaming_frees_the_old_name_and_keeps_the_rest(tmp_path: Path, tokenizer: Any) -> None:
    # Here the dataset's `prompt` is the answer: swapped names must not meet.
    write_jsonl(tmp_path / "train.jsonl", [{"prompt": "Because.", "completion": "Why?", "id": 7}])
    columns = {"prompt": "completion", "completion": "prompt"}
    data = load(DatasetConfig(path=str(tmp_path), columns=columns), tokenizer)
    assert data.train.records == [{"prompt": "Why?", "completion": "Because.", "id": 7}]


def test_each_source_has_columns_of_its_own(tmp_path: Path, tokenizer: Any) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"body": "one"}])
    write_jsonl(tmp_path / "b.jsonl", [{"text": "two"}])
    sources = [
        SourceConfig(path=str(tmp_path / "a.jsonl"), columns={"text": "body"}),
        SourceConfig(path=str(tmp_path / "b.jsonl")),
    ]
    data = load(DatasetConfig(sources=sources), tokenizer)
    assert data.train.records == [{"text": "one"}, {"text": "two"}]


def test_cutting_keeps_the_first_tokens(tmp_path: Path, tokenizer: Any) -> None:
    write_jsonl(tmp_path / "train.jsonl", [LONG_CHAT])
    whole = tokenize(LONG_CHAT, tokenizer, mask_prompt=False).tokens
    for size in (len(whole) - 1, len(whole), len(whole) + 1):
        data = load(DatasetConfig(path=str(tmp_path), max_seq_length=size), tokenizer)
        assert data.train.rows[0].tokens.tolist() == whole[:size].tolist()
        assert any("cut" in note for note in data.notes) is (size < len(whole))


def test_no_target_left_in_any_row_is_an_error(tmp_path: Path, tokenizer: Any) -> None:
    write_jsonl(tmp_path / "train.jsonl", [PAIR])
    with pytest.raises(DataError, match=r"dataset\.max_seq_length: no training row has a target left"):
        load(DatasetConfig(path=str(tmp_path), mask_prompt=True, max_seq_length=4), tokenizer)


def test_only_missing_validation_rows_are_split_off(tmp_path: Path, tokenizer: Any) -> None:
    write_jsonl(tmp_path / "train.jsonl", [PAIR] * 10)
    without = load(DatasetConfig(path=str(tmp_path)), tokenizer)
    assert any("no validation rows" in note for note in without.notes)
    write_jsonl(tmp_path / "valid.jsonl", [TEXT])
    data = load(DatasetConfig(path=str(tmp_path), valid_fraction=0.5), tokenizer)
    assert len(data.train.rows) == 10
    assert data.valid.records == [TEXT]
    assert data.notes == []


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 40), fraction=st.floats(0, 0.999), seed=st.integers(0, 2**32))
def test_splitting_off_loses_no_row(
    tmp_path_factory: pytest.TempPathFactory, count: int, fraction: float, seed: int
) -> None:
    path = tmp_path_factory.mktemp("split") / "rows.jsonl"
    write_jsonl(path, [{"id": i} for i in range(count)])
    [(_, raw)] = read(DatasetConfig(path=str(path), valid_fraction=fraction), seed=seed)
    train, valid = [[row["id"] for row in raw[name]] for name in ("train", "valid")]
    assert sorted(train + valid) == list(range(count))
    assert train
    assert train == sorted(train)
    assert valid == sorted(valid)
    assert bool(valid) is (fraction > 0 and count > 1)


def test_the_test_split_is_tokenised_only_if_needed(tmp_path: Path, tokenizer: Any) -> None:
    write_jsonl(tmp_path / "train.jsonl", [PAIR])
    write_jsonl(tmp_path / "test.jsonl", [PAIR, {"nonsense": 1}])
    config = DatasetConfig(path=str(tmp_path))
    sources = read(config, seed=0)
    assert tokenize_all(sources, config, tokenizer, need_test=False).test.rows == []
    with pytest.raises(DataError, match="test row 2"):
        tokenize_all(sources, config, tokenizer, need_test=True)


def test_a_good_configuration_has_no_problems() -> None:
    assert problems(DatasetConfig(path="data", columns={"prompt": "q"}, valid_fraction=0.1)) == []
    assert problems(DatasetConfig(sources=[SourceConfig(path="a"), SourceConfig(path="b", weight=0.5)])) == []


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (DatasetConfig(), "dataset.path: name what to train on"),
        (DatasetConfig(path="a", sources=[SourceConfig(path="b")]), "give one of them, not both"),
        (DatasetConfig(sources=[SourceConfig(path="a"), SourceConfig()]), "dataset.sources[1].path: "),
        (DatasetConfig(sources=[SourceConfig(path="a", weight=0.0)]), "dataset.sources[0].weight: 0.0 must be greater"),
        (DatasetConfig(sources=[SourceConfig(path="a", weight=float("nan"))]), "dataset.sources[0].weight: nan"),
        (
            DatasetConfig(path="a", columns={"promt": "q"}),
            "dataset.columns.promt: no such field; did you mean 'prompt'",
        ),
        (DatasetConfig(path="a", columns={"zzz": "q"}), "the fields are prompt, completion, tools, messages, text"),
        (DatasetConfig(path="a", max_seq_length=1), "dataset.max_seq_length: 1 must be 2 or more"),
        (DatasetConfig(path="a", valid_fraction=1.0), "dataset.valid_fraction: 1.0 is not in [0, 1)"),
        (DatasetConfig(path="a", valid_fraction=float("nan")), "dataset.valid_fraction: nan"),
    ],
)
def test_each_problem_is_one_line(config: DatasetConfig, line: str) -> None:
    [found] = problems(config)
    assert line in found
    assert "\n" not in found


def test_all_problems_are_told_at_once() -> None:
    assert len(problems(DatasetConfig(path="a", max_seq_length=0, valid_fraction=-1, columns={"x": "y"}))) == 3


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
        print(*(f"{split}: {rows[0]['text']} to {rows[-1]['text']}" for split, rows in found.items()), sep="; ")
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
        [sys.executable, "-c", HUB_CACHE_CODE], env=variables, capture_output=True, text=True, timeout=60, check=True
    )
    by_name, sliced, wrong = done.stdout.splitlines()
    assert by_name == "train: train-0 to train-9; valid: validation-0 to validation-9; test: test-0 to test-9"
    assert sliced == "train: train-0 to train-7; valid: train-8 to train-9; test: test-0 to test-9"
    assert wrong.startswith("dataset.path: pairs can't be read")
    assert "trian" in wrong


def test_local_rows_can_be_sliced_as_those_of_the_hub(tmp_path: Path) -> None:
    rows = [{"text": f"row {i}"} for i in range(10)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    found = read_source(
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
    "line",
    [b'{"text": "caf\xe9"}', b'{"n": ' + b"1" * 5000 + b"}", b'{"n": ' + b"[" * 200_000],
    ids=["latin-1", "digits", "brackets"],
)
def test_a_line_json_chokes_on_is_named(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: can't be read"):
        read_source(SourceConfig(path=str(tmp_path / "rows.jsonl")))


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "two"}\r\n')
    assert read_source(SourceConfig(path=str(tmp_path / "rows.jsonl")))["train"] == [{"text": "one"}, {"text": "two"}]


def test_half_a_surrogate_pair_is_blamed_on_its_row(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "fine"}\n{"text": "\\ud83d"}\n')
    with pytest.raises(DataError, match="train row 2: the tokenizer refuses `text`"):
        load(DatasetConfig(path=str(tmp_path)), tokenizer)


def test_an_answer_without_a_prompt_can_not_be_masked(tmp_path: Path, tokenizer: Any) -> None:
    write_jsonl(tmp_path / "train.jsonl", [CHAT, {"messages": CHAT["messages"][-1:]}])
    with pytest.raises(DataError, match="train row 2: `messages` has only one message"):
        load(DatasetConfig(path=str(tmp_path), mask_prompt=True), tokenizer)
    assert len(load(DatasetConfig(path=str(tmp_path)), tokenizer).train.rows) == 2


def test_a_column_missing_from_one_row_names_the_row(tmp_path: Path, tokenizer: Any) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"body": "one"}, {"title": "two"}])
    with pytest.raises(DataError, match=r"train row 2 has no column 'body'; it has title"):
        load(DatasetConfig(path=str(tmp_path), columns={"text": "body"}), tokenizer)


def test_notes_on_several_sources_say_which(tmp_path: Path, tokenizer: Any) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": "short"}])
    write_jsonl(tmp_path / "b.jsonl", [{"text": "word " * 60}])
    paths = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
    data = load(DatasetConfig(sources=[SourceConfig(path=path) for path in paths], max_seq_length=16), tokenizer)
    assert [note for note in data.notes if "cut" in note] == [f"{paths[1]}, train: 1 of 1 rows cut to 16 tokens"]


@pytest.mark.parametrize("options", [{"name": "x"}, {"valid_split": "train[:5%]"}, {"columns": {"text": "body"}}])
def test_options_that_several_sources_would_ignore_are_problems(options: dict[str, Any]) -> None:
    [found] = problems(DatasetConfig(sources=[SourceConfig(path="a")], **options))
    assert found.startswith(f"dataset.{next(iter(options))}: has no effect when dataset.sources is given")
