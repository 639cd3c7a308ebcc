"""The one form of a conversation: however a row writes it, the same messages and tools come out."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from macft.data.conversation import Conversation, conversation, drop_nulls
from macft.data.formats import FIELDS, parse
from macft.errors import DataError
from macft.evaluation.exact_match import ExactMatch
from macft.evaluation.record import expected_text, question_text

NAMES = st.text("abcdefgh_", min_size=1, max_size=6)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
VALUES = st.recursive(
    st.booleans() | st.integers(-9, 9) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)
ARGUMENTS = st.dictionaries(NAMES, VALUES, max_size=3)
CALLS = st.fixed_dictionaries(
    {"type": st.just("function"), "function": st.fixed_dictionaries({"name": NAMES, "arguments": ARGUMENTS})}
)
TOOL = st.fixed_dictionaries(
    {"type": st.just("function"), "function": st.fixed_dictionaries({"name": NAMES, "parameters": ARGUMENTS})}
)
TOOLS = st.lists(TOOL, max_size=2)
PLAIN = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "tool"]), "content": TEXTS})
ANSWERS = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": st.none() | TEXTS, "tool_calls": st.lists(CALLS, max_size=2)}
)
MESSAGES = st.lists(PLAIN | ANSWERS, min_size=1, max_size=5)


def formed(messages: Any, tools: Any = None) -> Conversation:
    """The one form, by way of a record."""
    found = parse({"messages": messages, "tools": tools})
    assert isinstance(found, Conversation)
    return found


@given(MESSAGES, TOOLS)
def test_what_is_in_the_form_stays_as_it_is(messages: list[Any], tools: list[Any]) -> None:
    before = copy.deepcopy((messages, tools))
    once = formed(messages, tools)
    assert formed(once.messages, once.tools) == once
    assert (messages, tools) == before


@given(MESSAGES)
def test_content_in_parts_is_their_text(messages: list[Any]) -> None:
    parted = [
        {**message, "content": [{"type": "text", "text": text[:3]}, {"type": "text", "text": text[3:]}]}
        if (text := message["content"]) is not None
        else message
        for message in messages
    ]
    assert formed(parted) == formed(messages)


@given(MESSAGES, TOOLS, st.booleans())
def test_strings_of_json_are_what_they_hold(messages: list[Any], tools: list[Any], whole: bool) -> None:
    encoded = copy.deepcopy(messages)
    for call in (call for message in encoded for call in message.get("tool_calls", [])):
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    expected = formed(messages, tools)
    assert formed(json.dumps(encoded) if whole else encoded, json.dumps(tools)) == expected
    assert formed(encoded, [json.dumps(tool) for tool in tools]) == expected


@given(MESSAGES, TOOLS)
def test_nulls_of_other_rows_are_dropped(messages: list[Any], tools: list[Any]) -> None:
    def with_nulls(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: with_nulls(item) for name, item in value.items()} | {"other_row": None}
        return [with_nulls(item) for item in value] if isinstance(value, list) else value

    assert formed(with_nulls(messages), with_nulls(tools)) == formed(messages, tools)


def test_nulls_that_were_meant_stay() -> None:
    """In a list, and in arguments written as JSON, where Arrow can't have put them."""
    call = {"function": {"name": "find", "arguments": '{"limit": null, "among": [null, 1]}'}}
    [message] = formed([{"role": "assistant", "tool_calls": [call]}]).messages
    assert message["tool_calls"][0]["function"]["arguments"] == {"limit": None, "among": [None, 1]}
    assert drop_nulls({"a": [None, {"b": None}], "c": None}) == {"a": [None, {}]}


@pytest.mark.parametrize(
    ("message", "form"),
    [
        ({"role": "user"}, {"role": "user", "content": ""}),
        ({"role": "assistant", "content": None, "tool_calls": []}, {"role": "assistant", "content": ""}),
        (
            {"role": "tool", "content": "3", "name": "add"},
            {"role": "tool", "content": "3", "name": "add"},
        ),
        ({"from": "human", "value": "hi"}, {"role": "user", "content": "hi"}),
        ({"from": "gpt", "value": "ho", "weight": 1}, {"role": "assistant", "content": "ho", "weight": 1}),
        ({"from": "observation", "value": "3"}, {"role": "tool", "content": "3"}),
        ({"role": "developer", "content": "x"}, {"role": "developer", "content": "x"}),
        ({"role": "function", "name": "add", "content": "3"}, {"role": "tool", "content": "3", "name": "add"}),
        (
            {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a": 1}'}},
            {
                "role": "assistant",
                "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}],
            },
        ),
        (
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            {
                "role": "assistant",
                "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}],
            },
        ),
        (
            {"role": "assistant", "tool_calls": [{"name": "now"}, {"name": "add", "arguments": '{"a": 1}'}]},
            {
                "role": "assistant",
                "tool_calls": [{"name": "now", "arguments": {}}, {"name": "add", "arguments": {"a": 1}}],
            },
        ),
    ],
)
def test_a_message_has_one_form(message: dict[str, Any], form: dict[str, Any]) -> None:
    assert list(conversation([message], None, "`messages`").messages) == [form]


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, "has the type image_url; only parts"),
        ({"role": "user", "content": ["hello"]}, "has the type str; only parts"),
        ({"role": "user", "content": [{"type": "a\nb"}]}, "has the type a b; only parts"),
        ({"role": "user", "content": [{"type": "text"}]}, "has no `text`"),
        ({"role": "user", "content": 5}, "`content` must be a string or a list of text parts, not int"),
        ({"role": 5, "content": "x"}, "`role` must be a string, not int"),
        ({"role": "assistant", "tool_calls": "add"}, "`tool_calls` must be a list of objects"),
        ({"role": "assistant", "tool_calls": [{"function": "add"}]}, "the `function` of a tool call must be an object"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": "{a: 1}"}}]},
            "the arguments of the call of add are a string that is not JSON",
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": "[1]"}}]},
            "the arguments of the call of add must be an object, not list",
        ),
        ({"from": "function_call", "value": "add(1)"}, "the content of a function call must be JSON"),
        ({"from": "function_call", "value": "[]"}, "the content of a function call must be an object"),
    ],
)
def test_a_message_that_has_no_form_is_named(message: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError) as error:
        formed([{"role": "user", "content": "x"}, message])
    assert str(error.value).startswith("`messages`, message 2: ")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("tools", ["not JSON", "3", {"type": "function"}, ["add"]])
def test_tools_that_are_no_list_of_objects_are_refused(tools: Any) -> None:
    with pytest.raises(DataError, match="`tools` must be a list of objects"):
        formed([{"role": "user", "content": "x"}], tools)


@pytest.mark.parametrize("tools", [None, [], "[]", ""])
def test_no_tools_are_none(tools: Any) -> None:
    assert formed([{"role": "user", "content": "x"}], tools).tools is None


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "a", "completion": "b"},
        {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
        {"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "text": None},
        {"messages": '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]'},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"instruction": "a", "input": "", "output": "b"},
        {"instruction": "a", "output": "b", "text": None, "prompt": None},
    ],
)
def test_every_format_comes_to_one_form(record: dict[str, Any]) -> None:
    assert parse(record) == Conversation([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])


WORDS = st.sampled_from(
    ["role", "content", "from", "value", "type", "text", "tool_calls", "function", "arguments", "name", "user", "gpt"]
)
ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | WORDS
    | st.sampled_from(["function_call", "{}", "[{}]", '"x"', ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(FIELDS), ANYTHING, max_size=4))
def test_a_row_is_in_the_form_or_refused_in_one_line(record: dict[str, Any]) -> None:
    message, found = "", None
    try:
        found = parse(record)
    except DataError as error:
        message = str(error)
    assert "\n" not in message
    if isinstance(found, Conversation):
        assert found.messages
        assert all(isinstance(message["role"], str) for message in found.messages)
        assert all(isinstance(message.get("content", ""), str) for message in found.messages)
        assert all("content" in message or message["tool_calls"] for message in found.messages)
        assert formed(found.messages, found.tools).messages == found.messages


def test_messages_nested_without_end_are_refused() -> None:
    value: Any = "x"
    for _ in range(100_000):
        value = [value]
    with pytest.raises(DataError, match="nested too deeply"):
        formed([{"role": "user", "content": "x", "extra": value}])


def test_formats_of_mlx_lm_come_first() -> None:
    alpaca = {"instruction": "a", "input": "b", "output": "c"}
    assert parse({**alpaca, "text": "d"}) == "d"
    assert parse({"conversations": [], "instruction": "a", "prompt": "x", "completion": "y"}) == parse(
        {"prompt": "x", "completion": "y"}
    )


@pytest.mark.parametrize(
    "record",
    [
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
        {"instruction": "a", "output": "b", "system": "s"},
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "a"},
                {"from": "gpt", "value": "b"},
            ]
        },
    ],
    ids=["sharegpt", "alpaca", "message"],
)
def test_a_system_prompt_comes_first(record: dict[str, Any]) -> None:
    found = parse(record)
    assert isinstance(found, Conversation)
    assert [message["content"] for message in found.messages] == ["s", "a", "b"]
    assert found.messages[0]["role"] == "system"


def test_question_and_answer_are_found_in_every_way_to_write_them() -> None:
    """Parts, other roles, and a conversation that goes on after the answer."""
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Two plus "}, {"type": "text", "text": "two?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Four."}]},
        {"role": "user", "content": "Thanks!"},
    ]
    sharegpt = [{"from": "human", "value": "Two plus two?"}, {"from": "gpt", "value": "Four."}]
    for row in ({"messages": messages}, {"conversations": sharegpt}):
        assert question_text(row) == "Two plus two?"
        assert expected_text(row) == "Four."
        assert ExactMatch().score(" Four.\n", expected_text(row), row)
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "now"}}]}
    assert expected_text({"messages": [messages[0], call]}) == ""
    with pytest.raises(DataError, match="no message is the assistant's"):
        expected_text({"messages": messages[:1]})
