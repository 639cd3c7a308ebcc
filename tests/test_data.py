"""A configured dataset: columns, splits, cut rows, and the name of each row that is wrong."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.utils import load_tokenizer

from harness.runs import write_jsonl
from helpers.records import CHAT, LONG_CHAT, PAIR, TEXT
from macft.data.load import LoadedData, fraction_notes, read, tokenize_all, with_few_test_rows
from macft.data.settings import DatasetConfig, SourceConfig, problems
from macft.data.tokenize import tokenize
from macft.errors import DataError


def load(config: DatasetConfig, tokenizer: Any, *, seed: int = 0) -> LoadedData:
    """Reads and tokenises, as a run does."""
    return tokenize_all(read(config, seed=seed), config, tokenizer, need_test=False)


@pytest.fixture(scope="module")
def tokenizer(bundled_model: Path) -> Any:
    """The bundled model's tokenizer, as mlx-lm wraps it."""
    return load_tokenizer(bundled_model)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"question": "x"}, "has question"),
        ({"text": 5}, "`text` must be a string, not int: 5"),
        ({"prompt": "x", "completion": 1.5}, "`completion` must be a string, not float: 1.5"),
        ({"prompt": "x", "completion": None}, "but has prompt (completion: empty)"),
        ({"text": None}, "but has none (text: empty)"),
        ({"conversations": [{"from": "human"}, {"value": "x"}]}, "`conversations`, message 2: it has no `role`"),
        ({"messages": []}, "`messages` must be a list"),
        ({"messages": "hello"}, "`messages` must be a list"),
        ({"messages": [{"content": "x"}]}, "`messages`, message 1: it has no `role`"),
        ({"instruction": "x", "output": 3}, "`output` must be a string, not int: 3"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, tokenizer: Any, record: dict[str, Any], words: str) -> None:
    write_jsonl(tmp_path / "train.jsonl", [PAIR, record])
    with pytest.raises(DataError) as error:
        load(DatasetConfig(path=str(tmp_path)), tokenizer)
    assert words in str(error.value)
    assert "train row 2" in str(error.value)


def test_columns_are_renamed_and_missing_ones_named(tmp_path: Path, tokenizer: Any) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"q": "Why?", "a": "Because."}])
    columns = {"prompt": "q", "completion": "a"}
    data = load(DatasetConfig(path=str(tmp_path), columns=columns), tokenizer)
    expected = tokenize({"prompt": "Why?", "completion": "Because."}, tokenizer, mask_prompt=False)
    assert data.train.rows[0].tokens.tolist() == expected.tokens.tolist()
    with pytest.raises(DataError, match=r"no column 'question'; it has a, q"):
        load(DatasetConfig(path=str(tmp_path), columns={"text": "question"}), tokenizer)


def test_columns_of_other_names_are_told_before_a_model_is_looked_for(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"question": "Why?", "answer": "Because."}])
    with pytest.raises(DataError, match=r"train row 1: it needs .*'dataset.columns={prompt: question, "):
        read(DatasetConfig(path=str(tmp_path)), seed=0)
    with pytest.raises(DataError, match=r"dataset.columns: .*train row 1 has no column 'q'; it has answer, question"):
        read(DatasetConfig(path=str(tmp_path), columns={"prompt": "q", "completion": "a"}), seed=0)


def test_cut_and_dropped_rows_are_counted(tmp_path: Path, tokenizer: Any) -> None:
    long = {"prompt": "word " * 50, "completion": "end"}
    some = {"prompt": "hi", "completion": "word " * 60}
    write_jsonl(tmp_path / "train.jsonl", [PAIR, long, some])
    config = DatasetConfig(path=str(tmp_path), mask_prompt=True, max_seq_length=64)
    data = load(config, tokenizer)
    assert [len(row.tokens) for row in data.train.rows] == [len(tokenize(PAIR, tokenizer, mask_prompt=True).tokens), 64]
    assert len(data.train.records) == 2
    assert "train: 2 of 3 rows cut to 64 tokens (first: row 2)" in data.notes
    assert "train: 1 of 3 rows dropped, no target token was left in them (first: row 2)" in data.notes


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
    config = DatasetConfig(path=str(tmp_path), valid_fraction=0.5)
    data = load(config, tokenizer)
    assert len(data.train.rows) == 10
    assert data.valid.records == [TEXT]
    assert fraction_notes(read(config, seed=0), config) == [
        f"dataset.valid_fraction: no effect on {tmp_path}, which has validation rows of its own"
    ]


def ids(path: Path, seed: int = 0, **settings: float) -> tuple[list[int], list[int], list[int]]:
    """Which rows of a file are in the training, validation and test split."""
    [(_, raw)] = read(DatasetConfig(path=str(path), **settings), seed=seed)  # type: ignore[arg-type]
    train, valid, test = ([row.record["id"] for row in raw[name]] for name in ("train", "valid", "test"))
    return train, valid, test


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 40),
    fractions=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)).filter(lambda pair: sum(pair) < 1),
    seed=st.integers(0, 2**32),
)
def test_splitting_off_loses_no_row_and_uses_none_twice(
    tmp_path_factory: pytest.TempPathFactory, count: int, fractions: tuple[float, float], seed: int
) -> None:
    path = tmp_path_factory.mktemp("split") / "rows.jsonl"
    write_jsonl(path, [{**PAIR, "id": i} for i in range(count)])
    cut = {"valid_fraction": fractions[0], "test_fraction": fractions[1]}
    train, valid, test = ids(path, seed, **cut)
    assert sorted(train + valid + test) == list(range(count))
    assert train
    for split in (train, valid, test):
        assert split == sorted(split)
    assert bool(valid) is (fractions[0] > 0 and count > 1)
    assert bool(test) is (fractions[1] > 0 and count > 1 + len(valid))
    assert ids(path, seed, **cut) == (train, valid, test)
    # The validation rows are those that there are without test rows.
    assert ids(path, seed, valid_fraction=fractions[0], test_fraction=0.0)[1] == valid


def test_some_rows_are_held_out_where_nothing_is_said(tmp_path: Path) -> None:
    def sizes(count: int, **settings: float) -> list[int]:
        path = tmp_path / f"{count}.jsonl"
        write_jsonl(path, [{**PAIR, "id": i} for i in range(count)])
        return [len(split) for split in ids(path, **settings)]

    assert sizes(99) == [99, 0, 0]
    assert sizes(100) == [95, 0, 5]
    assert sizes(5000) == [4968, 0, 32]
    assert sizes(100, test_fraction=0.0) == [100, 0, 0]
    assert sizes(100, valid_fraction=0.1) == [90, 10, 0]
    assert sizes(100, valid_fraction=0.1, test_fraction=0.2) == [70, 10, 20]
    config = DatasetConfig(path=str(tmp_path / "100.jsonl"))
    (note,) = fraction_notes(read(config, seed=0), config)
    assert "5 of 100 training rows are held out" in note
    few = with_few_test_rows(read(config, seed=0), 3, seed=0)
    assert [len(few[0][1][name]) for name in ("train", "test")] == [95, 3]


def test_a_test_file_wins_over_the_fraction(tmp_path: Path, tokenizer: Any) -> None:
    write_jsonl(tmp_path / "train.jsonl", [PAIR] * 10)
    write_jsonl(tmp_path / "test.jsonl", [PAIR] * 2)
    config = DatasetConfig(path=str(tmp_path), test_fraction=0.5)
    data = tokenize_all(read(config, seed=0), config, tokenizer, need_test=True)
    assert (len(data.train.rows), len(data.test.rows)) == (10, 2)
    assert f"dataset.test_fraction: no effect on {tmp_path}, which has test rows of its own" in fraction_notes(
        read(config, seed=0), config
    )


@pytest.mark.parametrize(
    ("fractions", "words"),
    [
        ({"test_fraction": 1.0}, "dataset.test_fraction: 1.0 is not in [0, 1), or null"),
        ({"test_fraction": -0.1}, "dataset.test_fraction: -0.1 is not in [0, 1), or null"),
        ({"test_fraction": math.nan}, "dataset.test_fraction: nan is not in [0, 1), or null"),
        ({"test_fraction": 0.5, "valid_fraction": 0.5}, "dataset.test_fraction: 0.5 and dataset.valid_fraction (0.5)"),
    ],
)
def test_fractions_that_leave_nothing_to_train_on_are_refused(fractions: dict[str, float], words: str) -> None:
    [problem] = problems(DatasetConfig(path="x", **fractions))  # type: ignore[arg-type]
    assert problem.startswith(words)


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


@pytest.mark.parametrize("row", ['{"text": "\\ud83d"}', '{"prompt": "a \\ud83d", "completion": "b"}'])
def test_half_a_surrogate_pair_is_blamed_on_its_row(tmp_path: Path, tokenizer: Any, row: str) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "fine"}\n' + row + "\n")
    with pytest.raises(DataError, match=r"train row 2: .* refuses .*: it has '\\ud83d', half of a surrogate pair"):
        load(DatasetConfig(path=str(tmp_path)), tokenizer)


def test_an_answer_without_a_prompt_can_not_be_masked(tmp_path: Path, tokenizer: Any) -> None:
    write_jsonl(tmp_path / "train.jsonl", [CHAT, {"messages": CHAT["messages"][-1:]}])
    with pytest.raises(DataError, match="train row 2: the answer is its first message"):
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
    assert [note for note in data.notes if "cut" in note] == [
        f"{paths[1]}, train: 1 of 1 rows cut to 16 tokens (first: row 1)"
    ]


@pytest.mark.parametrize("options", [{"name": "x"}, {"valid_split": "train[:5%]"}, {"columns": {"text": "body"}}])
def test_options_that_several_sources_would_ignore_are_problems(options: dict[str, Any]) -> None:
    [found] = problems(DatasetConfig(sources=[SourceConfig(path="a")], **options))
    assert found.startswith(f"dataset.{next(iter(options))}: has no effect when dataset.sources is given")


def test_each_kept_row_knows_where_it_was_read(tmp_path: Path, tokenizer: Any) -> None:
    """Its place in the file: with blank lines, with dropped rows, and with rows taken from the training rows."""
    text = "\n".join(["", *(f'{{"text": "{"x" if n % 4 else ""}"}}\n' for n in range(1, 9))])
    (tmp_path / "train.jsonl").write_text(text)
    data = load(DatasetConfig(path=str(tmp_path)), tokenizer)
    assert [place.row for place in data.train.places] == [1, 2, 3, 5, 6, 7]
    assert str(data.train.places[1]) == f"{tmp_path}, train row 2 (line 4)"
    assert "train: 2 of 8 rows dropped, no target token was left in them (first: row 4 (line 8))" in data.notes
    halved = load(DatasetConfig(path=str(tmp_path), valid_fraction=0.5), tokenizer)
    places = halved.train.places + halved.valid.places
    assert {place.split for place in places} == {"train"}
    assert sorted(place.row for place in places) == [1, 2, 3, 5, 6, 7]
    sliced = DatasetConfig(path=str(tmp_path), train_split="train[:4]", valid_split="train[4:]")
    assert str(load(sliced, tokenizer).valid.places[0]) == f"{tmp_path}, train row 5 (line 10)"


def test_a_wrong_row_is_named_as_in_its_file(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n\n{"text": "b"}\n\n{"text": 3}\n')
    config = DatasetConfig(path=str(tmp_path), train_split="train[1:]")
    with pytest.raises(DataError, match=r", train row 3 \(line 5\): `text` must be a string"):
        load(config, tokenizer)


def test_text_rows_can_not_be_masked_and_the_row_is_named(tmp_path: Path, tokenizer: Any) -> None:
    write_jsonl(tmp_path / "train.jsonl", [CHAT, TEXT])
    with pytest.raises(
        DataError, match=r"train row 2: text rows have no prompt to mask; set dataset\.mask_prompt=false"
    ):
        load(DatasetConfig(path=str(tmp_path), mask_prompt=True), tokenizer)


@pytest.mark.parametrize("masked", [False, True])
def test_a_chat_that_ends_with_the_user_is_not_trained_on_the_users_words(
    tmp_path: Path, tokenizer: Any, masked: bool
) -> None:
    goes_on = {"messages": [*CHAT["messages"], {"role": "user", "content": "Thanks!"}]}
    write_jsonl(tmp_path / "train.jsonl", [CHAT, goes_on])
    data = load(DatasetConfig(path=str(tmp_path), mask_prompt=masked), tokenizer)
    plain, longer = data.train.rows
    assert (longer.tokens.tolist() == plain.tokens.tolist()) is masked
    assert longer.prompt_length == plain.prompt_length
    note = "train: 1 of 2 rows go on after the assistant's last message; dataset.mask_prompt leaves the rest out"
    assert (f"{note} (first: row 2)" in data.notes) is masked


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"prompt": "Two?", "chosen": "2", "rejected": "3"}, "completion"),
        ({"chosen": CHAT["messages"], "rejected": CHAT["messages"]}, "messages"),
        ({"chosen": "Two? 2", "rejected": "Two? 3"}, "text"),
    ],
)
def test_a_row_of_preferences_is_told_how_its_chosen_answer_is_trained_on(
    tmp_path: Path, tokenizer: Any, row: dict[str, Any], columns: str
) -> None:
    write_jsonl(tmp_path / "train.jsonl", [row])
    words = rf"no training on preferences; 'dataset\.columns={{{columns}: chosen}}' trains"
    with pytest.raises(DataError, match=words):
        load(DatasetConfig(path=str(tmp_path)), tokenizer)
    chosen = load(DatasetConfig(path=str(tmp_path), columns={columns: "chosen"}), tokenizer)
    assert chosen.train.rows[0].target_tokens > 0


def test_a_chat_without_an_answer_can_not_be_masked(tmp_path: Path, tokenizer: Any) -> None:
    write_jsonl(tmp_path / "train.jsonl", [CHAT, {"messages": CHAT["messages"][:2]}])
    with pytest.raises(
        DataError,
        match=r"train row 2: no message is the assistant's.*; the roles are .*, user; dataset\.mask_prompt needs",
    ):
        load(DatasetConfig(path=str(tmp_path), mask_prompt=True), tokenizer)


def test_other_names_of_roles_are_told(tmp_path: Path, tokenizer: Any) -> None:
    turns = [("human", "What is 2 + 2?"), ("gpt", "4")]
    usual = [{"role": role, "content": text} for role, (_, text) in zip(("user", "assistant"), turns, strict=True)]
    other = [{"role": role, "content": text} for role, text in turns]
    write_jsonl(tmp_path / "train.jsonl", [{"messages": usual}, {"messages": other}])
    data = load(DatasetConfig(path=str(tmp_path), mask_prompt=True), tokenizer)
    first, second = data.train.rows
    assert first.tokens.tolist() == second.tokens.tolist()
    assert (
        "train: 1 of 2 rows have roles named gpt, human, read as user, assistant or tool (first: row 2)" in data.notes
    )


def test_cells_of_csv_train_as_the_same_texts_in_jsonl(tmp_path: Path, tokenizer: Any) -> None:
    cells = [
        "1",
        "1.0",
        "01",
        "NA",
        "None",
        "null",
        "NaN",
        "true",
        "2024-01-01",
        " padded ",
        'said "yes", twice\nand more',
    ]
    rows = [{"prompt": f"{cell}?", "completion": cell} for cell in cells]
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(rows)
    write_jsonl(tmp_path / "rows.jsonl", rows)
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=1))
    found = [
        load(DatasetConfig(path=str(tmp_path / f"rows.{suffix}"), mask_prompt=True), tokenizer).train
        for suffix in ("csv", "jsonl", "json")
    ]
    assert found[0].records == found[1].records == found[2].records == rows
    assert [row.tokens.tolist() for row in found[0].rows] == [row.tokens.tolist() for row in found[1].rows]


def test_an_empty_cell_is_an_absent_field(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "rows.csv").write_text("instruction,input,output\nAdd.,1 and 2,3\nSay hi.,,hi\n")
    data = load(DatasetConfig(path=str(tmp_path / "rows.csv")), tokenizer)
    pairs = [{"prompt": "Add.\n\n1 and 2", "completion": "3"}, {"prompt": "Say hi.", "completion": "hi"}]
    expected = [tokenize(pair, tokenizer, mask_prompt=False) for pair in pairs]
    assert [row.tokens.tolist() for row in data.train.rows] == [row.tokens.tolist() for row in expected]
    (tmp_path / "rows.csv").write_text("prompt,completion\na,b\nc,\n")
    with pytest.raises(DataError, match=r"train row 2 \(line 3\): .* but has prompt \(completion: empty\)"):
        load(DatasetConfig(path=str(tmp_path / "rows.csv")), tokenizer)


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_a_number_in_json_stays_what_it_is(tmp_path: Path, tokenizer: Any, suffix: str) -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": 1}, {"prompt": "a", "completion": 1.5}]
    path = tmp_path / f"rows.{suffix}"
    path.write_text(json.dumps(rows) if suffix == "json" else "".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"train row 2: `completion` must be a string, not int: 1$"):
        load(DatasetConfig(path=str(path)), tokenizer)
