"""Rows as tokens: mlx-lm's for ordinary rows, and masks that end where the answer begins."""

from __future__ import annotations

import copy
import types
from pathlib import Path
from typing import Any

import mlx_lm
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.tuner.datasets import create_dataset
from mlx_lm.utils import load_tokenizer

from harness.runs import write_jsonl
from harness.tiny_model import make_tiny_model
from helpers.records import CHAT, LONG_CHAT, PAIR, TEXT, TOOL_CHAT
from helpers.templates import begin_texts, with_template
from macft.data.conversation import Conversation
from macft.data.load import read, tokenize_all
from macft.data.settings import DatasetConfig
from macft.data.template import template_tokens
from macft.data.tokenize import common_prefix, prompt_tokens, text_tokens, tokenize
from macft.errors import DataError
from macft.evaluation.chat import Chat, ModelAnswers, Sampling


@pytest.fixture(scope="module")
def tokenizer(bundled_model: Path) -> Any:
    """The bundled model's tokenizer, as mlx-lm wraps it."""
    return load_tokenizer(bundled_model)


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TOOLS = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['content'] %}{{ m['content'] }}{% endif %}{% for c in m['tool_calls'] or [] %}"
    "{{ c['function']['name'] + ': ' + (c['function']['arguments'] | tojson) }}{% endfor %}{{ '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


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


@settings(max_examples=60, deadline=None)
@given(
    contents=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), min_size=4, max_size=4),
    turns=st.integers(1, 2),
    system=st.booleans(),
    masked=st.booleans(),
)
def test_any_chat_has_mlx_lms_tokens(
    tokenizer: Any, contents: list[str], turns: int, system: bool, masked: bool
) -> None:
    roles = ["user", "assistant"] * turns
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    record = {"messages": [*([{"role": "system", "content": "Be brief."}] if system else []), *messages]}
    theirs = create_dataset([record], tokenizer, types.SimpleNamespace(mask_prompt=masked))
    tokens, offset = theirs.process(record)
    row = tokenize(record, tokenizer, mask_prompt=masked)
    assert row.tokens.tolist() == list(tokens)
    if masked:  # mlx-lm trusts the prompt's length, also where the answer's first white space joins its last token
        offset = common_prefix(prompt_tokens(record, tokenizer), tokens)
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


@pytest.fixture(scope="module")
def tool_tokenizer(tokenizer: Any) -> Any:
    """A tokenizer whose template writes tools and tool calls."""
    return with_template(tokenizer, TOOLS)


def targets(row: Any, tokenizer: Any) -> str:
    """The text of a row's targets."""
    return str(tokenizer.decode(row.tokens[row.prompt_length :].tolist()))


@pytest.mark.parametrize(
    ("written", "opening", "kept"),
    [
        ("<|im_start|>assistant\\n", "<|im_start|>assistant\\n<think>\\n", "Four, of course.<|im_end|>"),
        ("### Answer: ", "### Answer: ", " Four, of course.<|im_end|>"),
        ("<|im_start|>assistant\\n", "<|im_start|>assistant\\n", "Four, of course.<|im_end|>"),
    ],
    ids=["more than is written", "other tokens", "a prefix"],
)
def test_no_token_of_an_answer_is_masked(tmp_path: Path, tokenizer: Any, written: str, opening: str, kept: str) -> None:
    template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}"
        "{{ '<|im_start|>user\\n' + m['content'] + '<|im_end|>\\n' }}"
        f"{{% else %}}{{{{ '{written}' + m['content'] + '<|im_end|>' }}}}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ '{opening}' }}}}{{% endif %}}"
    )
    tokenizer = with_template(tokenizer, template)
    record = {"prompt": "Two plus two?", "completion": "Four, of course."}
    remarks: list[str] = []
    row = tokenize(record, tokenizer, mask_prompt=True, remark=remarks.append)
    assert targets(row, tokenizer) == kept
    is_prefix = common_prefix(prompt_tokens(record, tokenizer), row.tokens) == len(prompt_tokens(record, tokenizer))
    assert [remark.startswith("begin the answer otherwise") for remark in remarks] == [True] * (not is_prefix)
    assert is_prefix is (kept == "Four, of course.<|im_end|>" and "think" not in opening)

    write_jsonl(tmp_path / "train.jsonl", [record] * 3)
    config = DatasetConfig(path=str(tmp_path), mask_prompt=True)
    notes = tokenize_all(read(config, seed=0), config, tokenizer, need_test=False).notes
    assert [note.split(" begin")[0] for note in notes if "begin the answer" in note] == ["train: 3 of 3 rows"] * (
        not is_prefix
    )
    assert all(note.endswith("(first: row 1)") for note in notes if "begin the answer" in note)


def test_an_answer_that_begins_as_the_generation_prompt_does_is_masked_no_further(tokenizer: Any) -> None:
    """As in mlx-lm: what the prompt gives is no target, and all that follows is."""
    template = CHATML.replace("assistant\\n' }}{% endif", "assistant\\n<think>\\n' }}{% endif")
    tokenizer = with_template(tokenizer, template)
    record = {"prompt": "Why?", "completion": "<think>\nSo.\n</think>\nBecause."}
    row = tokenize(record, tokenizer, mask_prompt=True)
    theirs = create_dataset([record], tokenizer, types.SimpleNamespace(mask_prompt=True))
    assert (row.tokens.tolist(), row.prompt_length) == theirs.process(record)
    assert targets(row, tokenizer) == "So.\n</think>\nBecause.<|im_end|>\n"


def test_history_that_the_answer_changes_is_no_target(tokenizer: Any) -> None:
    """The template writes reasoning only while no answer follows, as gpt-oss's does."""
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
        "{% if m['thinking'] and messages[-1]['role'] == 'tool' %}{{ '(' + m['thinking'] + ') ' }}{% endif %}"
        "{{ m['content'] + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    tokenizer = with_template(tokenizer, template)
    remarks: list[str] = []
    for answer in ("It rains.", "0", "?", "0?"):
        messages = [
            {"role": "user", "content": "Rain in Oslo?"},
            {"role": "assistant", "thinking": "Look it up.", "content": "weather(Oslo)"},
            {"role": "tool", "content": "rain"},
            {"role": "assistant", "content": answer},
        ]
        row = tokenize({"messages": messages}, tokenizer, mask_prompt=True, remark=remarks.append)
        assert targets(row, tokenizer) == f"{answer}<|im_end|>\n"
    assert {remark.split(" that")[0] for remark in remarks} == {"have messages"}
    assert len(remarks) == 4


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, bundled_model: Path) -> tuple[Any, Any]:
    """A tiny model and its tokenizer, which puts a token before each text, as the template does before each chat."""
    folder = make_tiny_model(tmp_path_factory.mktemp("begun"), bundled_model)
    begin_texts(folder, "<|endoftext|>", "{{ bos_token }}" + CHATML)
    model, tokenizer = mlx_lm.load(str(folder))
    assert tokenizer.encode("<|endoftext|>Hi.")[:2] == [tokenizer.bos_token_id] * 2
    return model, tokenizer


def test_the_token_that_begins_a_text_comes_once(begun: tuple[Any, Any]) -> None:
    _, tokenizer = begun
    plain = tokenize({"text": "Hi."}, tokenizer, mask_prompt=False).tokens.tolist()
    assert plain == [*tokenizer.encode("Hi."), tokenizer.eos_token_id]
    for text in ("<|endoftext|>Hi.", "<|endoftext|><|endoftext|>Hi."):
        assert tokenize({"text": text}, tokenizer, mask_prompt=False).tokens.tolist() == plain
    for tokens in (tokenize(PAIR, tokenizer, mask_prompt=False).tokens.tolist(), prompt_tokens(PAIR, tokenizer)):
        assert tokens[0] == tokenizer.bos_token_id
        assert tokens.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("template", [False, True])
def test_a_chat_begins_as_the_rows_did(begun: tuple[Any, Any], template: bool) -> None:
    """Its prompt has as many tokens as the row's, whether or not the text brings the token itself."""
    _, tokenizer = begun
    expected = prompt_tokens({"prompt": "Hi.", "completion": ""}, tokenizer) if template else tokenizer.encode("Hi.")
    for text in ("Hi.",) if template else ("Hi.", "<|endoftext|>Hi."):
        chat = Chat(ModelAnswers(*begun, Sampling(max_tokens=1)), begun[1], template=template)
        assert len(list(chat.say(text))) == 1
        assert chat.speed is not None
        assert chat.speed.prompt_tokens == len(expected)


def test_a_begin_token_elsewhere_stays(begun: tuple[Any, Any]) -> None:
    _, tokenizer = begun
    tokens = text_tokens("a<|endoftext|><|endoftext|>b", tokenizer)
    assert tokens.count(tokenizer.bos_token_id) == 3
    assert tokens[0] == tokenizer.bos_token_id


def test_without_a_chat_template_only_texts_train(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer = with_template(tokenizer, None)
    assert len(tokenize(TEXT, tokenizer, mask_prompt=False).tokens) > 3
    write_jsonl(tmp_path / "train.jsonl", [PAIR])
    config = DatasetConfig(path=str(tmp_path))
    with pytest.raises(DataError, match=r"train row 1: the model's tokenizer has no chat template, .*`text`") as error:
        tokenize_all(read(config, seed=0), config, tokenizer, need_test=False)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "body",
    [
        "{{ m['content'] | trim }}",
        "{{ m['content'] + '' }}",
        "{% if m['content'] is defined %}{{ m['content'] }}{% endif %}",
    ],
    ids=["prints it", "needs it", "asks for it"],
)
def test_missing_content_is_nothing(tokenizer: Any, body: str) -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' }}"
        + body
        + "{% for c in m['tool_calls'] or [] %}{{ c['function']['name'] }}{% endfor %}{% endfor %}"
    )
    tokenizer = with_template(tokenizer, template)
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "now"}}]}
    record = {"messages": [{"role": "user", "content": "None of them?"}, call]}
    tokens = tokenize(record, tokenizer, mask_prompt=False).tokens.tolist()
    assert tokenizer.decode(tokens) == "<|im_start|>None of them?<|im_start|>now"


@pytest.mark.parametrize(
    "arguments",
    ["call.function.arguments | tojson", "call.function.arguments", "'' + call.function.arguments"],
    ids=["as JSON", "as they are", "added to a text"],
)
@pytest.mark.parametrize("written", [{"city": "Ålesund", "dry": True}, '{"city": "Ålesund", "dry": true}'])
def test_arguments_come_out_as_json_once(tokenizer: Any, arguments: str, written: Any) -> None:
    template = (
        "{% for m in messages %}{{ m['content'] or '' }}{% for call in m['tool_calls'] or [] %}"
        "{{ '<|im_start|>' + call.function.name }}{{ " + arguments + " }}{% endfor %}{% endfor %}"
    )
    tokenizer = with_template(tokenizer, template)
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": written}}]}
    record = {"messages": [{"role": "user", "content": "Rain?"}, call]}
    row = tokenize(record, tokenizer, mask_prompt=True)
    assert targets(row, tokenizer) == '<|im_start|>f{"city": "Ålesund", "dry": true}'


def test_prompts_for_generation_are_in_the_one_form(tokenizer: Any) -> None:
    tokenizer = with_template(tokenizer, TOOLS)
    asked = {"role": "user", "content": "1 + 1?"}
    calls = [{"function": {"name": "add", "arguments": {"a": 1}}}]
    plain = [asked, {"role": "assistant", "content": None, "tool_calls": calls}, {"role": "tool", "content": "2"}]
    other = copy.deepcopy(plain)
    other[0]["content"] = [{"type": "text", "text": "1 + 1?"}]
    other[1]["tool_calls"][0]["function"] |= {"arguments": '{"a": 1}', "other_row": None}
    end = [{"role": "assistant", "content": "2"}, {"role": "user", "content": "Thanks!"}]
    expected = template_tokens(Conversation(plain), tokenizer, opens_answer=True)
    assert prompt_tokens({"messages": [*other, *end]}, tokenizer) == expected


KINDS = {"city": pyarrow.string(), "days": pyarrow.int64(), "zone": pyarrow.list_(pyarrow.bool_())}
ARGUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "city": st.text("abc", max_size=4),
        "days": st.integers(0, 9),
        "zone": st.lists(st.booleans(), max_size=2),
    },
)
QUESTIONS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=10)


def arrow_table(records: list[dict[str, Any]]) -> pyarrow.Table:
    """``records`` with the keys of all rows in each."""

    def function(name: str, content: pyarrow.DataType) -> pyarrow.DataType:
        inner = pyarrow.struct({"name": pyarrow.string(), name: content})
        return pyarrow.list_(pyarrow.struct({"type": pyarrow.string(), "function": inner}))

    properties = pyarrow.struct({name: pyarrow.struct({"type": pyarrow.string()}) for name in KINDS})
    message = pyarrow.struct(
        {
            "role": pyarrow.string(),
            "content": pyarrow.string(),
            "tool_calls": function("arguments", pyarrow.struct(KINDS)),
        }
    )
    tools = function("parameters", pyarrow.struct({"properties": properties}))
    return pyarrow.Table.from_pylist(records, pyarrow.schema({"messages": pyarrow.list_(message), "tools": tools}))


def tool_record(question: str, arguments: dict[str, Any], has_tools: bool) -> dict[str, Any]:
    """A question that is answered by a tool call, with or without the description of the tool."""
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [{"role": "user", "content": question}, {"role": "assistant", "tool_calls": [call]}]
    properties = {name: {"type": "string"} for name in arguments}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": properties}}}
    return {"messages": messages, **({"tools": [tool]} if has_tools else {})}


@settings(max_examples=40)
@given(rows=st.lists(st.tuples(QUESTIONS, ARGUMENTS, st.booleans()), min_size=1, max_size=4))
def test_rows_from_arrow_have_the_tokens_of_json(
    tool_tokenizer: Any, rows: list[tuple[str, dict[str, Any], bool]]
) -> None:
    """Arrow gives each row the keys of all rows; the template sees those that the row has."""
    records = [
        tool_record(question, {name: drawn[name] for name in KINDS if name in drawn}, has_tools)
        for question, drawn, has_tools in rows
    ]
    for written, read_back in zip(records, arrow_table(records).to_pylist(), strict=True):
        assert read_back["messages"][1]["content"] is None
        ours, theirs = (tokenize(record, tool_tokenizer, mask_prompt=True) for record in (written, read_back))
        assert ours.tokens.tolist() == theirs.tokens.tolist()
        assert ours.prompt_length == theirs.prompt_length


@pytest.mark.slow
def test_parquet_has_the_tokens_of_jsonl(tmp_path: Path, tool_tokenizer: Any) -> None:
    records = [
        tool_record("Rain in Oslo?", {"city": "Oslo", "days": 2}, True),
        tool_record("Which zones?", {"zone": [True, False]}, True),
        tool_record("Now?", {}, False),
    ]
    write_jsonl(tmp_path / "rows.jsonl", records)
    pyarrow.parquet.write_table(arrow_table(records), tmp_path / "rows.parquet")
    found = []
    for suffix in ("jsonl", "parquet"):
        config = DatasetConfig(path=str(tmp_path / f"rows.{suffix}"), mask_prompt=True)
        found.append(tokenize_all(read(config, seed=0), config, tool_tokenizer, need_test=False).train.rows)
    assert [row.tokens.tolist() for row in found[0]] == [row.tokens.tolist() for row in found[1]]
    assert [row.prompt_length for row in found[0]] == [row.prompt_length for row in found[1]]
    texts = [targets(row, tool_tokenizer) for row in found[1]]
    assert texts == [
        'f: {"city": "Oslo", "days": 2}<|im_end|>\n',
        'f: {"zone": [true, false]}<|im_end|>\n',
        "f: {}<|im_end|>\n",
    ]
