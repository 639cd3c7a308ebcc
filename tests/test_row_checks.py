"""Rows are checked before a model's weights load: what would train wrongly, and what may be meant."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import macft
from harness.runs import train, write_jsonl
from harness.tiny_model import TINY_CONFIG
from macft import evaluate
from macft.data.checks import check_rows, ignored_columns
from macft.data.load import read, tokenize_all
from macft.data.settings import DatasetConfig, SourceConfig
from macft.errors import DataError
from macft.model.files.vocabulary import vocabulary_of
from macft.model.load import load_tokenizer
from macft.model.settings import ModelConfig
from macft.report.phase_lines import PhaseLines
from macft.run.prepare_data import prepare_data

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_END = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
WITH_TOOLS = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITHOUT_CALLS = WITH_TOOLS.replace("m.tool_calls or []", "[]")
PAIR = {"prompt": "Two plus two?", "completion": "Four, of course."}
TOOL = {"type": "function", "function": {"name": "rain", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "rain", "arguments": {"city": "Oslo"}}}


def chat(answer: dict[str, Any], **fields: Any) -> dict[str, Any]:
    question = {"role": "user", "content": "Rain in Oslo?"}
    return {"messages": [question, {"role": "assistant", **answer}], **fields}


def tokenizer_with(folder: Path, template: str) -> Any:
    tokenizer = load_tokenizer(ModelConfig(), folder)
    tokenizer._tokenizer.chat_template = template
    return tokenizer


def notes_of(
    tokenizer: Any,
    *sources: Path,
    mask_prompt: bool = True,
    max_seq_length: int = 2048,
    vocabulary: int | None = None,
) -> list[str]:
    """What the checks say of the rows in ``sources``, as a run calls them."""
    dataset = DatasetConfig(
        sources=[SourceConfig(path=str(source)) for source in sources],
        mask_prompt=mask_prompt,
        max_seq_length=max_seq_length,
    )
    data = tokenize_all(read(dataset, seed=0), dataset, tokenizer, need_test=True)
    splits = {"train": data.train, "valid": data.valid, "test": data.test}
    return check_rows(splits, tokenizer, vocabulary=vocabulary, max_seq_length=max_seq_length)


def written(folder: Path, rows: Sequence[dict[str, Any]], split: str = "train") -> Path:
    write_jsonl(folder / f"{split}.jsonl", rows)
    return folder


def test_good_rows_say_nothing(tmp_path: Path, tiny_model_folder: Path) -> None:
    source = written(tmp_path, [PAIR, chat({"content": "No."}), {"prompt": "x", "completion": "y", "empty": None}])
    assert notes_of(tokenizer_with(tiny_model_folder, CHATML), source, vocabulary=4096) == []
    texts = written(tmp_path / "texts", [{"text": "Once upon a time."}])
    assert notes_of(tokenizer_with(tiny_model_folder, NO_END), texts, mask_prompt=False) == []


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_a_token_beyond_the_embedding_is_named(tmp_path: Path, tiny_model_folder: Path, split: str) -> None:
    tokenizer = tokenizer_with(tiny_model_folder, CHATML)
    texts = {token: tokenizer.decode([token]) for token in range(4095, 3000, -1)}
    highest, word = next((token, text) for token, text in texts.items() if tokenizer.encode(text) == [token])
    rows = [PAIR, {"prompt": "Two?", "completion": word}, {"prompt": f"{word}?", "completion": word}]
    source = written(written(tmp_path, [PAIR]), rows, split)
    assert notes_of(tokenizer, source, vocabulary=highest + 1) == []
    with pytest.raises(DataError) as error:
        notes_of(tokenizer, source, vocabulary=highest)
    assert str(error.value).startswith(
        f"{source}, {split} row 2: token {highest} ({word!r}) is beyond the model's vocabulary of {highest}; "
        "2 of 3 rows have such tokens; "
    )


def test_rows_that_do_not_end_are_counted_but_not_those_that_were_cut(tmp_path: Path, tiny_model_folder: Path) -> None:
    tokenizer = tokenizer_with(tiny_model_folder, NO_END)
    long = {"prompt": "Long?", "completion": "word " * 40}
    source = written(tmp_path, [long, PAIR, PAIR, long])
    (note,) = notes_of(tokenizer, source, max_seq_length=24)
    assert note == (
        "train: 2 of 4 rows do not end with a token that ends an answer ('<|im_end|>'), so the tuned model will not "
        "stop by itself (first: row 2)"
    )


def test_an_end_that_is_no_target_does_not_count(tmp_path: Path, tiny_model_folder: Path) -> None:
    closed_prompt = (
        "{{ messages[0].content }}<|im_end|>{% if messages | length > 1 %}{{ messages[1].content }}{% endif %}"
    )
    source = written(tmp_path, [{"prompt": "Two?", "completion": "2"}])
    tokenizer = tokenizer_with(tiny_model_folder, closed_prompt)
    (note,) = notes_of(tokenizer, source)
    assert "1 of 1 rows do not end with a token that ends an answer" in note


def test_empty_answers_are_told_where_the_whole_row_is_the_target(tmp_path: Path, tiny_model_folder: Path) -> None:
    tokenizer = tokenizer_with(tiny_model_folder, WITH_TOOLS)
    rows = [PAIR, PAIR | {"completion": " "}, chat({"content": None}), chat({"content": None, "tool_calls": [CALL]})]
    source = written(tmp_path, rows)
    assert notes_of(tokenizer, source, mask_prompt=False) == ["train: 2 of 4 rows have an empty answer (first: row 2)"]
    assert notes_of(tokenizer, source) == [
        "train: 2 of 4 rows have only the end of an answer as their target (first: row 2)"
    ]


def test_texts_of_damaged_files_are_told(tmp_path: Path, tiny_model_folder: Path) -> None:
    rows = [PAIR, PAIR | {"completion": "4\x002"}, {"text": "caf\ufffd"}, PAIR | {"prompt": "\x00?"}]
    notes = notes_of(tokenizer_with(tiny_model_folder, CHATML), written(tmp_path, rows), mask_prompt=False)
    assert notes[0] == "train: 2 of 4 rows have NUL characters; is the file damaged? (first: row 2)"
    assert "1 of 4 rows have the character U+FFFD" in notes[1]


def test_an_answer_that_the_template_leaves_out_is_an_error_if_all_are(tmp_path: Path, tiny_model_folder: Path) -> None:
    tokenizer = tokenizer_with(tiny_model_folder, WITHOUT_CALLS)
    call = chat({"content": None, "tool_calls": [CALL]})
    mixed = written(tmp_path / "mixed", [chat({"content": "No."}), call])
    empty, calls = notes_of(tokenizer, mixed)
    assert empty == "train: 1 of 2 rows have only the end of an answer as their target (first: row 2)"
    assert calls == "train: 1 of 2 rows have tool calls, which the model's chat template leaves out (first: row 2)"
    source = written(tmp_path / "calls", [call, call])
    with pytest.raises(
        DataError, match=r"calls, train row 1: the target is only '<\|im_end\|>\\n', and no row has more"
    ):
        notes_of(tokenizer, source)
    assert notes_of(tokenizer_with(tiny_model_folder, WITH_TOOLS), source) == []
    valid = written(written(tmp_path / "valid", [PAIR]), [call], "valid")
    assert "valid: 1 of 1 rows have only the end of an answer as their target (first: row 1)" in notes_of(
        tokenizer, valid
    )


def test_a_template_without_tools_is_told(tmp_path: Path, tiny_model_folder: Path) -> None:
    rows = [PAIR, chat({"content": "No."}, tools=[TOOL]), chat({"content": "Yes."}, tools=[])]
    source = written(tmp_path, rows)
    assert notes_of(tokenizer_with(tiny_model_folder, WITH_TOOLS), source) == []
    assert notes_of(tokenizer_with(tiny_model_folder, CHATML), source) == [
        "train: 1 of 3 rows have tools, which the model's chat template leaves out (first: row 2)"
    ]


def test_tool_calls_are_found_in_every_format(tmp_path: Path, tiny_model_folder: Path) -> None:
    asked, called = (
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": "Well.", "tool_calls": [CALL]},
    )
    function_call = {"from": "function_call", "value": '{"name": "rain", "arguments": {}}'}
    rows: list[dict[str, Any]] = [
        {"messages": json.dumps([asked, called])},
        {"prompt": [asked], "completion": [called]},
        {"conversations": [{"from": "human", "value": "Rain?"}, function_call, {"from": "gpt", "value": "Yes."}]},
    ]
    for number, row in enumerate(rows):
        source = written(tmp_path / str(number), [row])
        assert notes_of(tokenizer_with(tiny_model_folder, WITHOUT_CALLS), source) == [
            "train: 1 of 1 rows have tool calls, which the model's chat template leaves out (first: row 1)"
        ]
        assert notes_of(tokenizer_with(tiny_model_folder, WITH_TOOLS), source) == []


def test_keys_of_messages_that_the_template_leaves_out_are_told(tmp_path: Path, tiny_model_folder: Path) -> None:
    thought = chat({"content": "Yes.", "reasoning_content": "Clouds.", "weight": 0, "name": "Ada"})
    source = written(tmp_path, [PAIR, thought])
    with_reasoning = CHATML.replace("{{ m.content }}", "{{ m.reasoning_content or '' }}{{ m.content }}")
    reasoning, weight = (
        f"train: 1 of 2 rows have messages with `{name}`, which the model's chat template leaves out (first: row 2)"
        for name in ("reasoning_content", "weight")
    )
    assert notes_of(tokenizer_with(tiny_model_folder, CHATML), source) == [reasoning, weight]
    assert notes_of(tokenizer_with(tiny_model_folder, with_reasoning), source) == [weight]


def test_columns_that_no_format_reads_are_named_once(tmp_path: Path, tiny_model_folder: Path) -> None:
    source = written(tmp_path, [{**PAIR, "id": 1}, {**PAIR, "messages": [], "topic": "sums", "nothing": None}])
    written(source, [{**PAIR, "id": 2, "hard": True, "c": 1, "d": 2}], "valid")
    tokenizer = tokenizer_with(tiny_model_folder, CHATML)
    assert notes_of(tokenizer, source) == [
        f"{source}: columns that are not trained on: id, messages, topic, hard, c and 1 more"
    ]
    assert ignored_columns([{"text": "x", "tools": []}, {"instruction": "x", "output": "y", "input": ""}]) == ["tools"]


def test_of_several_sources_the_source_is_named(tmp_path: Path, tiny_model_folder: Path) -> None:
    tokenizer = tokenizer_with(tiny_model_folder, WITH_TOOLS.replace("<|im_end|>", "{{ '<|im_end|>' if tools }}"))
    first = written(tmp_path / "first", [chat({"content": "No."}, tools=[TOOL])])
    second = written(tmp_path / "second", [chat({"content": "No."}, tools=[TOOL]), PAIR, PAIR])
    (note,) = notes_of(tokenizer, first, second)
    assert note.startswith(f"{second}, train: 2 of 3 rows do not end with")
    assert note.endswith("(first: row 2)")


TEXT_PART = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "intermediate_size": 8,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "vocab_size": 77,
}
GPT2 = {"n_ctx": 512, "n_embd": 8, "n_head": 2, "n_layer": 1, "n_positions": 512, "layer_norm_epsilon": 1e-5}


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        (TINY_CONFIG, 4096),
        # Its positions have an embedding, too, and a larger one.
        ({"model_type": "gpt2", **GPT2, "vocab_size": 99, "num_key_value_heads": 2}, 99),
        # The size lies in the part that describes the text model ...
        ({"model_type": "qwen3_vl", "text_config": {"model_type": "qwen3_vl_text", **TEXT_PART}}, 77),
        # ... which mlx-lm's class replaces by the one outside.
        ({"model_type": "gemma3", "vocab_size": 88, "text_config": {"model_type": "gemma3_text", **TEXT_PART}}, 88),
        ({"model_type": "of-tomorrow", "vocab_size": 5}, None),
    ],
    ids=["llama", "gpt2", "qwen3_vl", "gemma3", "unknown"],
)
def test_the_vocabulary_is_that_of_the_embedding(tmp_path: Path, config: dict[str, Any], tokens: int | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert vocabulary_of(tmp_path) == tokens


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    """A model with fewer embeddings than its tokenizer has tokens, whose weights don't fit: they are not loaded."""
    folder = tmp_path_factory.mktemp("small") / "model"
    shutil.copytree(tiny_model_folder, folder)
    (folder / "config.json").write_text(json.dumps({**TINY_CONFIG, "vocab_size": 260}))
    return folder


def test_a_batch_of_more_rows_than_there_are_is_told(tmp_path: Path, tiny_model_folder: Path) -> None:
    source = written(tmp_path / "rows", [PAIR, PAIR, PAIR])
    overrides = [f"model={tiny_model_folder}", f"dataset={source}", "report.samples=0"]
    told = {}
    for batch_size in (3, 4):
        config = macft.compose(overrides=[*overrides, f"training.batch_size={batch_size}"])
        told[batch_size] = prepare_data(config, PhaseLines(lambda _: None)).notes
    more = "training.batch_size: 4 is more than the 3 training rows, so that a step has rows several times"
    assert [line for line in told[4] if line not in told[3]] == [more]


def test_an_evaluation_stops_before_the_weights_load(tmp_path: Path, small_model: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": {"rank": 8, "scale": 1}})
    )
    (adapter / "adapters.safetensors").write_bytes(b"not an adapter")
    source = written(tmp_path / "rows", [PAIR])
    with pytest.raises(DataError, match=r"rows, train row 1: token \d+ .* is beyond the model's vocabulary of 260"):
        evaluate.main(["--model", str(small_model), "--adapter-path", str(adapter), "--dataset", str(source)])


@pytest.mark.slow
def test_a_run_stops_before_the_weights_load(tmp_path: Path, small_model: Path) -> None:
    source = written(tmp_path / "rows", [PAIR])
    done = train(f"model={small_model}", f"dataset={source}", "topology=local", "report.console=false", cwd=tmp_path)
    assert done.status == 1
    assert done.errors.count("\n") == 1
    assert f"error: {source}, train row 1: token " in done.errors
    assert "is beyond the model's vocabulary of 260; 1 of 1 rows have such tokens" in done.errors
