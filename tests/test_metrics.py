"""Metrics: what counts as a right answer, and that a hostile answer is no more than a wrong one."""

from __future__ import annotations

import itertools
import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tokenizer_utils import load as load_tokenizer

from harness.runs import events, write_jsonl
from helpers.runs_here import train_here
from macft.data.settings import DatasetConfig
from macft.errors import ConfigError, DataError
from macft.evaluation.answer_form import AnswerForm
from macft.evaluation.exact_match import ExactMatch
from macft.evaluation.metrics import METRICS, answer_metrics, check_metrics
from macft.evaluation.own_metric import OwnMetric
from macft.evaluation.record import expected_text, question_text, with_answer
from macft.evaluation.rouge_l import RougeL
from macft.evaluation.sql_execution import SqlExecution, first_query, same_rows

DATABASE = """
CREATE TABLE pets (id INTEGER, name TEXT, kind TEXT, weight REAL);
INSERT INTO pets VALUES (1, 'Rex', 'dog', 0.1), (2, 'Tom', 'cat', 0.2), (3, 'Ada', 'dog', 0.7), (4, 'Bo', NULL, 1e9);
"""
RIGHT = "SELECT name FROM pets WHERE kind = 'dog'"


class Judge:
    """SQL execution of rows with their own answer."""

    def __init__(self) -> None:
        self._metric = SqlExecution()

    def score(self, row: Mapping[str, Any], answer: str) -> bool:
        return self._metric.score(answer, expected_text(row), row)


SQL = Judge()


def record(query: str = RIGHT) -> dict[str, Any]:
    """A test row over the pets whose right answer is ``query``."""
    return {"prompt": "?", "completion": query, "database": DATABASE}


@pytest.mark.parametrize(
    ("expected", "answer", "right"),
    [
        ("SELECT id FROM pets", "SELECT id FROM pets ORDER BY id DESC", True),
        ("SELECT id FROM pets ORDER BY id", "SELECT id FROM pets ORDER BY id DESC", False),
        ("SELECT id FROM pets order  by id", "SELECT id FROM pets ORDER BY id DESC", False),
        ("SELECT id FROM pets ORDER BY id", "SELECT id FROM pets ORDER BY name", False),
        ("SELECT id FROM pets ORDER BY id", "SELECT id FROM pets ORDER BY -id DESC", True),
        ("SELECT SUM(weight) FROM pets WHERE id < 3", "SELECT 0.3", True),
        ("SELECT 0.3", "SELECT 0.30001", False),
        ("SELECT weight FROM pets WHERE id = 4", "SELECT 1000000000", True),
        ("SELECT weight FROM pets WHERE id = 4", "SELECT 1000010000", False),
        ("SELECT kind FROM pets WHERE id = 4", "SELECT NULL", True),
        ("SELECT kind FROM pets WHERE id = 4", "SELECT ''", False),
        ("SELECT kind FROM pets WHERE id = 4", "SELECT 0", False),
        ("SELECT name FROM pets WHERE id = 1", "SELECT 'rex'", False),
        ("SELECT name FROM pets WHERE id = 1", "SELECT x'526578'", False),
        ("SELECT kind FROM pets", "SELECT DISTINCT kind FROM pets", False),
        ("SELECT id, name FROM pets", "SELECT name, id FROM pets", False),
        ("SELECT id FROM pets WHERE id > 9", "SELECT name FROM pets WHERE id > 9", True),
    ],
)
def test_results_are_compared_not_queries(expected: str, answer: str, right: bool) -> None:
    assert SQL.score(record(expected), answer) is right


@pytest.mark.parametrize(
    "answer",
    [
        RIGHT,
        f"{RIGHT};",
        f"  \n{RIGHT.lower().replace('name', 'NAME')}\n",
        f"```sql\n{RIGHT}\n```",
        f"```\n{RIGHT};\n```\nThis returns the dogs.",
        f"Answer: {RIGHT}",
        f"SQLite query:\n\n{RIGHT}\n\nIt picks all dogs; select is a keyword.",
        f"{RIGHT}; DROP TABLE pets; SELECT 1",
        "SELECT name\nFROM pets\n  WHERE kind = 'dog'",
        f"with d as ({RIGHT}) select * from d",
    ],
)
def test_the_first_query_is_found_in_what_surrounds_it(answer: str) -> None:
    assert SQL.score(record(), answer)
    assert not SQL.score(record("SELECT id FROM pets"), answer)


@pytest.mark.parametrize(
    "answer",
    [
        "DELETE FROM pets",
        "DROP TABLE pets",
        "UPDATE pets SET name = 'x'",
        "INSERT INTO pets VALUES (9, 'x', 'dog', 1)",
        "INSERT INTO pets SELECT * FROM pets",
        "WITH d AS (SELECT 1) DELETE FROM pets",
        "WITH d AS (SELECT 9) INSERT INTO pets (id) SELECT * FROM d",
        "CREATE TABLE t AS SELECT name FROM pets",
        "PRAGMA query_only = 0",
        "SELECT * FROM pragma_table_info('pets')",
        "VACUUM",
        "BEGIN",
        "",
        ";",
        "SELECT",
        "I don't know.",
        "SELECT \ud800 FROM pets",
        "SELECT name\0 FROM pets",
        "SELECT CAST(x'ff' AS TEXT)",
        "SELECT " * 3000,
        "SELECT " + "(" * 3000,
    ],
)
def test_anything_but_reading_is_wrong_and_changes_nothing(answer: str) -> None:
    judge = Judge()
    row = record("SELECT id, name FROM pets")
    assert judge.score(row, answer) is False
    # A new judge has seen nothing of the answer: both must still know the same pets.
    for each in (judge, Judge()):
        assert each.score(row, "SELECT 1, 'Rex' UNION SELECT 2, 'Tom' UNION SELECT 3, 'Ada' UNION SELECT 4, 'Bo'")


@pytest.mark.parametrize(
    "statement", ["ATTACH DATABASE '{}' AS other", "VACUUM INTO '{}'", "SELECT writefile('{}', 1)"]
)
def test_no_answer_writes_a_file(tmp_path: Path, statement: str) -> None:
    assert not SQL.score(record(), statement.format(tmp_path / "written.db"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "query",
    [
        "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c) SELECT MAX(n) FROM c",
        "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c) SELECT name FROM c, pets WHERE n < 0",
        "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT 1 FROM c) SELECT n FROM c ORDER BY n",
    ],
)
def test_endless_queries_end_and_are_wrong(query: str) -> None:
    assert SQL.score(record(), query) is False
    assert SQL.score(record(), RIGHT)


COUNTING = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c LIMIT {})"
WIDE = ", ".join(["printf('%90000d', n)"] * 50)
DOUBLING = ", ".join(f"t{i} AS (SELECT a.x FROM t{i - 1} a, t{i - 1} b)" for i in range(1, 60))
GREEDY = {
    "wide rows": f"{COUNTING.format(1000)} SELECT {WIDE} FROM c",
    "printf": "SELECT printf('%1000000000d', 1)",
    "zeroblob": "SELECT zeroblob(1000000000)",
    "randomblob": f"{COUNTING.format(100_000)} SELECT hex(randomblob(40000)) FROM c",
    "replace": "SELECT replace(printf('%90000d', 1), ' ', printf('%90000d', 1))",
    "group_concat": f"{COUNTING.format(100_000)} SELECT group_concat(printf('%90000d', n)) FROM c",
    "sorter": f"{COUNTING.format(100_000)} SELECT printf('%90000d', n) x FROM c ORDER BY x",
    "distinct": f"{COUNTING.format(100_000)} SELECT COUNT(DISTINCT printf('%90000d', n)) FROM c",
    "instr": f"{COUNTING.format(100_000)} SELECT SUM(instr(printf('%90000d', n), printf('%45000d', n) || 'x')) FROM c",
    "like": f"{COUNTING.format(100_000)} SELECT SUM(printf('%90000d', n) LIKE '{'% ' * 400}x') FROM c",
    "cross join": "SELECT COUNT(*) FROM " + ", ".join(f"pets p{i}" for i in range(60)),
    "doubling": f"WITH t0 AS (SELECT 1 x), {DOUBLING} SELECT COUNT(*) FROM t59",
}
JUDGE = """
import resource, sys
from macft.evaluation.rouge_l import RougeL
from macft.evaluation.sql_execution import SqlExecution
right, query = "SELECT name FROM pets", sys.argv[2]
row = {"prompt": "?", "completion": right, "database": sys.argv[1]}
judge = SqlExecution()
assert judge.score(right, right, row)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
scored = judge.score(query, right, row)
unit = 1 if sys.platform == "darwin" else 1024
print(scored, judge.score(right, right, row), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit)
"""


@pytest.mark.slow
@pytest.mark.parametrize("query", GREEDY.values(), ids=GREEDY.keys())
def test_greedy_queries_are_wrong_within_the_limits(query: str) -> None:
    # The generous time-out is what is tested: without limits these run for hours.
    done = subprocess.run(
        [sys.executable, "-c", JUDGE, DATABASE, query], capture_output=True, text=True, timeout=120, check=True
    )
    scored, alive, taken = done.stdout.split()
    assert (scored, alive) == ("False", "True")
    assert int(taken) < 600 * 2**20


def test_rows_after_the_first_thousand_are_compared() -> None:
    expected = f"{COUNTING.format(3000)} SELECT n FROM c"
    assert SQL.score(record(expected), expected)
    assert not SQL.score(record(expected), f"{COUNTING.format(3000)} SELECT n + (n > 2500) FROM c")
    assert not SQL.score(record(expected), f"{COUNTING.format(3001)} SELECT n FROM c")


@pytest.mark.parametrize(
    ("expected", "ordered"),
    [
        ("SELECT id FROM pets ORDER BY id", True),
        ("WITH d AS (SELECT id FROM pets) SELECT id FROM d order\n by id", True),
        ("SELECT id FROM (SELECT id FROM pets ORDER BY id)", False),
        ("SELECT id FROM pets WHERE id IN (SELECT id FROM pets ORDER BY weight LIMIT 4)", False),
        ("SELECT id FROM pets WHERE name <> 'order by' -- order by", False),
        ("SELECT id FROM pets WHERE name <> ')' ORDER BY id", True),
    ],
)
def test_only_the_outermost_order_by_makes_the_order_count(expected: str, ordered: bool) -> None:
    assert SQL.score(record(expected), "SELECT id FROM pets ORDER BY id")
    assert SQL.score(record(expected), "SELECT id FROM pets ORDER BY id DESC") is not ordered


@pytest.mark.parametrize(
    "answer",
    [
        "SELECT name\n\nFROM pets\n\nWHERE kind = 'dog'",
        "SELECT name FROM pets WHERE kind = 'dog'\n\nWhere kind is dog, the name is taken.",
        "SELECT name FROM pets WHERE id IN (\n\nSELECT id FROM pets WHERE kind = 'dog'\n\n)",
        "WITH d AS (SELECT * FROM pets WHERE kind = 'dog')\n\nSELECT name FROM d\n\nSELECT 1",
        "SELECT name FROM pets WHERE id = 1\n\nunion\n\nselect name from pets where id = 3",
    ],
)
def test_a_blank_line_ends_a_query_only_before_something_else(answer: str) -> None:
    assert SQL.score(record(), answer)


QUERY_PIECES = st.sampled_from(
    "SELECT WITH RECURSIVE FROM WHERE pets name kind id weight * ( ) , ; ' \" = < 1 0.5 'dog' AND OR NOT NULL "
    "UNION ALL ORDER BY LIMIT COUNT(*) MAX(id) JOIN ON AS c ATTACH DELETE ``` -- /* x'ff' randomblob(9) 9e999".split()
)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(answer=st.text(st.characters(), max_size=80) | st.lists(QUERY_PIECES, max_size=14).map(" ".join))
def test_any_text_is_judged(answer: str) -> None:
    assert SQL.score(record(), answer) in (True, False)
    assert SQL.score(record(), RIGHT) is True


VALUES = st.none() | st.integers(-(2**63), 2**63 - 1) | st.text(max_size=4) | st.binary(max_size=3)
ROWS = st.integers(1, 3).flatmap(lambda width: st.lists(st.tuples(*[VALUES] * width), max_size=8))


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(rows=ROWS, seed=st.integers(0, 99))
def test_order_counts_only_where_it_is_asked_for(rows: list[tuple[Any, ...]], seed: int) -> None:
    shuffled = random.Random(seed).sample(rows, len(rows))
    assert same_rows(rows, rows, ordered=True)
    assert same_rows(rows, shuffled, ordered=False)
    assert same_rows(rows, [*rows, rows[0]] if rows else [(1,)], ordered=False) is False


@settings(max_examples=200, deadline=None)
@given(value=st.floats(1e-3, 1e12), error=st.floats(-0.9e-6, 0.9e-6))
def test_floats_may_differ_by_a_millionth(value: float, error: float) -> None:
    assert same_rows([(value,)], [(value * (1 + error),)], ordered=True)
    assert not same_rows([(value,)], [(value * (1 + 3e-6),)], ordered=True)


@settings(max_examples=100, deadline=None)
@given(before=st.text(alphabet="abc :\n`", max_size=20), after=st.text(alphabet="abc; \n`'\"", max_size=20))
def test_first_query_stops_at_the_semicolon(before: str, after: str) -> None:
    assert first_query(f"{before}\n{RIGHT};{after}") == RIGHT


@pytest.mark.parametrize("database", [None, 5, ["CREATE TABLE t (x)"]])
def test_a_missing_database_is_named(database: Any) -> None:
    with pytest.raises(DataError, match="sql_execution needs the field `database`"):
        SQL.score({"prompt": "?", "completion": RIGHT, "database": database}, RIGHT)
    with pytest.raises(DataError, match="sql_execution needs the field `database`"):
        SQL.score({"prompt": "?", "completion": RIGHT}, RIGHT)


def test_rows_that_cannot_be_judged_are_data_errors() -> None:
    with pytest.raises(DataError, match="the expected query of a test row fails: SELECT nope"):
        SQL.score(record("SELECT nope FROM pets"), RIGHT)
    with pytest.raises(DataError, match="`database` script fails"):
        SQL.score({**record(), "database": "CREATE TABLE t ("}, RIGHT)
    with pytest.raises(DataError, match="a test row is a text, without a right answer"):
        SQL.score({"text": "hello", "database": DATABASE}, RIGHT)


def test_question_and_answer_of_both_formats() -> None:
    chat = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]}
    pair = {"prompt": "Who?", "completion": "Me."}
    assert [expected_text(row) for row in (chat, pair)] == ["Me.", "Me."]
    assert [question_text(row) for row in (chat, pair, {"text": "x"})] == ["Who?", "Who?", ""]


@settings(max_examples=100, deadline=None)
@given(words=st.lists(st.text("abcXYZ.,", min_size=1, max_size=5), min_size=1, max_size=6))
def test_exact_match_sees_words_only(words: list[str]) -> None:
    expected = " ".join(words)
    judge = ExactMatch()
    assert judge.score("\n" + "\t ".join(words) + " ", expected, {})
    assert not judge.score(" ".join([*words, "more"]), expected, {})
    assert not judge.score(expected.swapcase(), expected, {}) or not any(word.isalpha() for word in words)


def test_metrics_are_found_by_name() -> None:
    config = DatasetConfig(path="x", metric=[*METRICS, "perplexity"])
    assert {name: type(found) for name, found in answer_metrics(config).items()} == METRICS
    assert answer_metrics(DatasetConfig(path="x", metric="perplexity")) == {}


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("exactmatch", "no metric 'exactmatch'; did you mean 'exact_match'?"),
        ("sql_exec", "no metric 'sql_exec'; did you mean 'sql_execution'?"),
        ("bleu", "no metric 'bleu'; there are exact_match, rouge_l, sql_execution, perplexity, or my_module.my_metric"),
        ("my-module.metric", "no metric 'my-module.metric'"),
        (["rouge_l", "rouge_l"], "rouge_l is given twice"),
    ],
)
def test_an_unknown_metric_names_the_nearest(name: str | list[str], hint: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"dataset.metric: {hint}")):
        check_metrics(DatasetConfig(path="x", metric=name))


@pytest.mark.parametrize(
    ("answer", "expected", "value"),
    [
        # Lin (2004), section 3.1: two answers with the same words, of which one has them in order.
        ("police kill the gunman", "police killed the gunman", 3 / 4),
        ("the gunman kill police", "police killed the gunman", 2 / 4),
        ("the gunman police killed", "police killed the gunman", 2 / 4),
        # The tests of rouge-score 0.1.2: rouge_scorer_test.py, testRougeL and its README.
        ("testing one two", "testing", 2 * (1 / 3) / (1 + 1 / 3)),
        ("The quick brown dog jumps on the log.", "The quick brown fox jumps over the lazy dog", 10 / 17),
        ("Same, same!", "same same", 1.0),
        ("nothing", "else", 0.0),
        ("", "", 0.0),
        ("今天天气好", "今天 天气很好", 2 * 5 / 11),
        ("Zürich", "zürich.", 1.0),
    ],
)
def test_rouge_l_has_the_values_of_its_papers_and_packages(answer: str, expected: str, value: float) -> None:
    assert RougeL().score(answer, expected, {}) == pytest.approx(value)


@settings(max_examples=100, deadline=None)
@given(left=st.lists(st.sampled_from("abc"), max_size=7), right=st.lists(st.sampled_from("abc"), max_size=7))
def test_rouge_l_finds_the_longest_common_subsequence(left: list[str], right: list[str]) -> None:
    def subsequences(words: list[str]) -> set[tuple[str, ...]]:
        return {each for size in range(len(words) + 1) for each in itertools.combinations(words, size)}

    longest = max(map(len, subsequences(left) & subsequences(right)))
    expected = 2 * longest / (len(left) + len(right)) if longest else 0.0
    assert RougeL().score(" ".join(left), " ".join(right), {}) == pytest.approx(expected)


OWN = """
import math
import numpy as np
def length(answer, expected): return len(answer)
def labelled(answer, expected, row): return row["label"] == "x" and answer == expected
def scalar(answer, expected): return np.float32(0.5)
def nothing(answer, expected): return None
def nan(answer, expected): return math.nan
def text(answer, expected): return "0.5"
def raising(answer, expected, row): return row["no such column"]
def few(answer): return 1.0
number = 7
"""


@pytest.fixture
def own(tmp_path: Path) -> Callable[[str], OwnMetric]:
    name = f"own_metrics_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(OWN)
    return lambda function: OwnMetric(f"{name}.{function}", tmp_path)


def test_a_function_of_ones_own_scores(own: Callable[[str], OwnMetric]) -> None:
    row = {"prompt": "?", "completion": "abc", "label": "x"}
    assert own("length").score("abcd", "abc", row) == 4.0
    assert own("scalar").score("", "", row) == 0.5
    assert own("labelled").score("abc", "abc", row) is True
    assert own("labelled").score("abcd", "abc", row) is False


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("nothing", "returned None; it must return a finite number, or True or False, for the answer 'abc'"),
        ("nan", "returned nan; it must return a finite number"),
        ("text", "returned '0.5' (str); it must return a finite number"),
        ("raising", "raised KeyError: 'no such column', "),
    ],
)
def test_what_is_no_score_is_one_line(own: Callable[[str], OwnMetric], function: str, words: str) -> None:
    with pytest.raises(DataError, match=re.escape(words)) as error:
        own(function).score("abc", "abc", {"prompt": "?"})
    assert f".{function} " in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("few", "(answer) must take (answer, expected) or (answer, expected, row)"),
        ("number", "number is no function"),
        ("missing", "missing does not exist; the module is "),
    ],
)
def test_what_is_no_metric_is_one_line(own: Callable[[str], OwnMetric], function: str, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        own(function)


def test_a_module_that_cannot_be_imported_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no module not_there for not_there\.f, neither in .* nor installed"):
        OwnMetric("not_there.f", tmp_path)
    (tmp_path / "needs_more_xyz.py").write_text("import not_installed_xyz\n")
    (tmp_path / "broken_xyz.py").write_text("def f(:\n")
    with pytest.raises(ConfigError, match="importing needs_more_xyz raised ModuleNotFoundError: No module named"):
        OwnMetric("needs_more_xyz.f", tmp_path)
    with pytest.raises(ConfigError, match="importing broken_xyz raised SyntaxError"):
        OwnMetric("broken_xyz.f", tmp_path)


THINK = ("<think>", "</think>")
CHANNEL = ("<|channel>thought", "<channel|>")


@pytest.mark.parametrize(
    ("marks", "text", "answer"),
    [
        ([THINK], "  Four. \n", "Four."),
        ([THINK], "<think>\n\n</think>\n\nFour.", "Four."),
        ([THINK], "<think>Two and two\nmake four.</think>Four.", "Four."),
        ([THINK], "Two and two make four.</think>\n\nFour.", "Four."),  # the prompt began the block
        ([THINK], "hm</think><think>hm</think> Four. <think></think>", "Four."),
        ([THINK, CHANNEL], "<|channel>thought\nhm<channel|>Four.", "Four."),
        ([THINK, CHANNEL], "<think></think><|channel>thought\nhm<channel|>Four.", "Four."),
        ([THINK], "<|channel>thought\nhm<channel|>Four.", "<|channel>thought\nhm<channel|>Four."),
        ([THINK], "<think></think>", ""),
        ([THINK], "<think>Two and two", None),
        ([THINK], "<think>hm</think>Four. <think>or five", None),
        ([THINK, CHANNEL], "<|channel>thought\nTwo and two", None),
        ([THINK], "", ""),
    ],
)
def test_thinking_is_no_part_of_an_answer(marks: list[tuple[str, str]], text: str, answer: str | None) -> None:
    assert AnswerForm(tuple(marks)).answer(text) == answer


def test_a_text_that_begins_in_a_block_of_the_prompt() -> None:
    form = AnswerForm()
    assert form.opens_thinking("<|assistant|><think>\n")
    assert not form.opens_thinking("what is <think> for?<|assistant|>")
    assert form.answer("hm", is_thinking=True) is None
    assert form.answer("hm</think>Four.", is_thinking=True) == "Four."


TURN = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
ASSISTANT = "{{ '<|im_start|>assistant\nOPENING' + m['content'] + 'CLOSING<|im_end|>\n' }}"
TEMPLATE = (
    f"{{% for m in messages %}}{{% if m['role'] == 'assistant' %}}{ASSISTANT}{{% else %}}{TURN}{{% endif %}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FOUR = {"prompt": "Two plus two?", "completion": "Four, of course."}


def decorated(folder: Path, source: Path, opening: str, closing: str, added: tuple[str, ...] = ()) -> Path:
    """A copy of the model ``source`` whose template writes ``opening`` and ``closing`` around an answer."""
    shutil.copytree(source, folder)
    template = TEMPLATE.replace("OPENING", opening).replace("CLOSING", closing)
    (folder / "chat_template.jinja").write_text(template)
    content = json.loads((folder / "tokenizer.json").read_text())
    first = len(content["model"]["vocab"])
    content["added_tokens"] += [
        {"id": first + i, "content": token, "special": False}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for i, token in enumerate(added)
    ]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def form_of(folder: Path) -> AnswerForm:
    tokenizer: TokenizerWrapper = load_tokenizer(folder, eos_token_ids=[2])
    return AnswerForm.of(tokenizer, FOUR)


def test_what_the_template_writes_around_an_answer(tmp_path: Path, tiny_model_folder: Path) -> None:
    channels = decorated(
        tmp_path / "channels",
        tiny_model_folder,
        "<|channel|>final<|message|>",
        "<|done|>",
        ("<|channel|>", "<|message|>", "<|done|>"),
    )
    form = form_of(channels)
    assert (form.opening, form.closing) == ("<|channel|>final<|message|>", "<|done|>")
    thought = "<|channel|>analysis<|message|>hm<|done|>"
    assert form.answer(f"{thought}<|channel|>final<|message|>Four.<|done|>") == "Four."
    assert form.answer("Four.") == "Four."
    # Words that are no tokens of their own may stand in an answer too.
    words = form_of(decorated(tmp_path / "words", tiny_model_folder, "<think></think>Answer: ", ""))
    assert words.opening == "Answer:"
    assert words.answer("<think>hm</think>Answer: is it Answer: B?") == "is it Answer: B?"
    longcat = ("<longcat_think>", "</longcat_think>")
    marked = form_of(decorated(tmp_path / "longcat", tiny_model_folder, "<longcat_think></longcat_think>", "", longcat))
    assert (marked.opening, marked.closing) == ("", "")
    assert marked.answer("<longcat_think>hm</longcat_think>Four.") == "Four."
    plain = form_of(tiny_model_folder)
    assert (plain.opening, plain.closing) == ("", "")


def test_a_row_with_another_answer_keeps_what_a_metric_reads() -> None:
    row = with_answer(record(), "SELECT 1")
    assert (expected_text(row), question_text(row), row["database"]) == ("SELECT 1", "?", DATABASE)
    assert not SQL.score(row, RIGHT)
    assert SQL.score(row, "SELECT 1")


@pytest.mark.slow
@pytest.mark.parametrize(
    "opening", ["<think>\\n\\n</think>\\n\\n", "<|channel|>final<|message|>"], ids=["thinking", "channel"]
)
def test_learned_answers_are_right_whatever_the_template_writes_around_them(
    tmp_path: Path, tiny_model_folder: Path, opening: str
) -> None:
    model = decorated(tmp_path / "model", tiny_model_folder, opening, "")
    thoughtful = {"prompt": "Capital of Peru?", "completion": "<think>Peru...</think>Lima"}
    for name in ("train", "test"):
        write_jsonl(tmp_path / "data" / f"{name}.jsonl", [FOUR, thoughtful])
    run = train_here(
        f"model={model}",
        f"dataset={tmp_path / 'data'}",
        "dataset.metric=exact_match",
        "dataset.mask_prompt=true",
        "adapter.type=full",
        "optimizer.learning_rate=3e-3",
        "training.metric_rows=2",
        "training.metric_max_tokens=40",
        "training.steps=40",
        "training.eval_every=0",
        folder=tmp_path / "run",
    )
    assert [event["value"] for event in events(run, "metric_scored")] == [0.0, 1.0]
    (shown,) = events(run, "samples_shown")
    assert {(sample["expected"], sample["after"]) for sample in shown["samples"]} == {
        ("Four, of course.", "Four, of course."),
        ("Lima", "Lima"),
    }
