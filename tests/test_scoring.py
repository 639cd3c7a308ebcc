"""What is measured on held-out rows: by several ranks as by one, with what a user's own metric may do; and samples."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.utils import load_tokenizer

from harness.runs import write_jsonl
from helpers.rings import local_listeners, run_ranks
from macft.api.configuration import compose
from macft.collective.base import Collective
from macft.collective.solo import Solo
from macft.data.load import LoadedData, read, tokenize_all
from macft.errors import ConfigError, DataError
from macft.evaluation.answers import Scored, score_answers
from macft.evaluation.exact_match import ExactMatch
from macft.evaluation.metrics import Metric
from macft.evaluation.own_metric import OwnMetric
from macft.evaluation.question import RowQuestion
from macft.evaluation.rouge_l import RougeL
from macft.evaluation.sql_execution import SqlExecution
from macft.run.held_out import choose_held_out

WORDS = ["one two", "two", "three four five", "four", "five six"]


@pytest.fixture(scope="module")
def tokenizer(bundled_model: Path) -> Any:
    return load_tokenizer(bundled_model)


def score(collective: Collective, tokenizer: Any, metrics: dict[str, Metric]) -> Scored:
    """Answers that repeat the last word of what is right."""
    asked = [RowQuestion(tokenizer.encode(text), text, text, {"prompt": "?", "completion": text}) for text in WORDS]

    def answers(
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        progress: Callable[[int], None],  # noqa: ARG001
        stopped: Callable[[], bool],  # noqa: ARG001
    ) -> list[list[int]]:
        return [tokenizer.encode(tokenizer.decode(list(prompt)).split()[-1])[:max_tokens] for prompt in prompts]

    return score_answers(answers, tokenizer, asked, metrics, collective, max_tokens=4, progress=lambda *_: None)


def test_ranks_score_their_shares_and_all_have_the_whole(tokenizer: Any) -> None:
    metrics: dict[str, Metric] = {"rouge_l": RougeL(), "exact_match": ExactMatch()}
    with Solo() as alone:
        expected = score(alone, tokenizer, metrics)
    assert expected.scores["exact_match"] == [False, True, False, True, False]
    assert expected.right == expected.scores["exact_match"]
    assert expected.values["exact_match"] == 0.4
    assert expected.values["rouge_l"] == pytest.approx((2 / 3 + 1 + 1 / 2 + 1 + 2 / 3) / 5)
    for found in run_ranks(local_listeners(3), lambda ring: score(ring, tokenizer, metrics)):
        assert (found.values, found.scores, found.answers) == (expected.values, expected.scores, expected.answers)


def test_a_metric_that_fails_on_one_rank_has_no_value_on_any(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "fails_sometimes.py").write_text(
        "def f(answer, expected):\n    return 1 / len(answer.replace('two', ''))"
    )
    metrics: dict[str, Metric] = {"fails_sometimes.f": OwnMetric("fails_sometimes.f", tmp_path), "rouge_l": RougeL()}
    for found in run_ranks(local_listeners(2), lambda ring: score(ring, tokenizer, metrics)):
        assert found.values.keys() == {"rouge_l"}
        assert "fails_sometimes.f raised ZeroDivisionError" in found.failures["fails_sometimes.f"]

    def without_database(ring: Collective) -> str:
        with pytest.raises(DataError) as error:
            score(ring, tokenizer, {"sql_execution": SqlExecution()})
        ring.barrier()  # the others may not have heard of it yet
        return str(error.value)

    assert all("needs the field `database`" in text for text in run_ranks(local_listeners(2), without_database))


PAIRS = [{"prompt": f"What is {n}?", "completion": f"It is {n}."} for n in range(12)]


def asked_of(folder: Path, tokenizer: Any, *overrides: str) -> tuple[Any, list[str]]:
    """What a run with the rows in ``folder`` would ask, and its notes."""
    config = compose(overrides=[f"dataset={folder}", *overrides])
    data: LoadedData = tokenize_all(read(config.dataset, seed=0), config.dataset, tokenizer, need_test=True)
    asked, notes = choose_held_out(config, data, tokenizer)
    return asked, data.notes + notes


@pytest.mark.parametrize("split", ["test", "valid"])
def test_three_held_out_rows_are_samples_whatever_the_metric(tmp_path: Path, tokenizer: Any, split: str) -> None:
    write_jsonl(tmp_path / "train.jsonl", PAIRS)
    write_jsonl(tmp_path / f"{split}.jsonl", PAIRS[:6])
    for metric in ("null", "perplexity"):
        asked, _ = asked_of(tmp_path, tokenizer, f"dataset.metric={metric}")
        assert (asked.split, len(asked.questions), len(asked.rows)) == (split, 3, 6 * (metric == "perplexity"))
        assert asked.max_tokens == max(len(tokenizer.encode(item.expected)) for item in asked.questions) + 16
    asked, _ = asked_of(tmp_path, tokenizer, "dataset.metric=exact_match", "training.metric_rows=4")
    assert (len(asked.questions), len(asked.rows), asked.max_tokens) == (4, 4, 64)
    assert not asked_of(tmp_path, tokenizer, "report.samples=0")[0].questions


def test_samples_of_texts_and_of_chats_without_an_answer(tmp_path: Path, tokenizer: Any) -> None:
    text = "A text of some words that a model can go on with, if it likes."
    write_jsonl(tmp_path / "train.jsonl", [{"text": text}] * 2)
    write_jsonl(
        tmp_path / "test.jsonl",
        [{"text": text}, {"messages": [{"role": "user", "content": "hi"}]}, {"text": "word " * 900}],
    )
    asked, _ = asked_of(tmp_path, tokenizer)
    first, second = asked.questions
    assert first.text + first.expected == text
    assert (first.text, len(second.prompt), asked.max_tokens) == (text[: len(first.text)], 64, 64)


def test_what_is_not_measured_is_said(tmp_path: Path, tokenizer: Any) -> None:
    write_jsonl(tmp_path / "train.jsonl", PAIRS)
    off = asked_of(tmp_path, tokenizer, "dataset.metric=[rouge_l,perplexity]", "training.metric_rows=0")[1]
    assert "dataset.metric: rouge_l, perplexity is not measured (training.metric_rows=0)" in off
    assert any(note.startswith("report.samples: no answers are shown before and after training") for note in off)
    with pytest.raises(DataError, match=r"training.metric_rows: the dataset has no test or validation rows to score"):
        asked_of(tmp_path, tokenizer, "dataset.metric=rouge_l")
    asked, notes = asked_of(tmp_path, tokenizer, "dataset.metric=rouge_l", "dataset.valid_fraction=0.2")
    assert (asked.split, len(asked.rows)) == ("valid", 2)
    assert "dataset.metric: there are no test rows, so validation rows are scored" in notes


@pytest.mark.parametrize(
    ("metric", "error", "words"),
    [
        ("sql_execution", DataError, "sql_execution needs the field `database`"),
        ("no_such_module.f", ConfigError, "there is no module no_such_module"),
        ("tried_first.nothing", DataError, "tried_first.nothing returned None"),
        ("tried_first.one", ConfigError, "must take (answer, expected)"),
    ],
)
def test_a_metric_is_tried_before_a_model_is_loaded(
    tmp_path: Path, tokenizer: Any, metric: str, error: type[Exception], words: str
) -> None:
    write_jsonl(tmp_path / "train.jsonl", PAIRS)
    write_jsonl(tmp_path / "test.jsonl", PAIRS[:2])
    (tmp_path / "tried_first.py").write_text("def nothing(answer, expected): pass\ndef one(answer): return 1\n")
    where = f"dataset.metric_folder={json.dumps(str(tmp_path))}"
    with pytest.raises(error) as told:
        asked_of(tmp_path, tokenizer, f"dataset.metric={metric}", where)
    assert words in str(told.value)
