"""Each form of row has a defined result: a conversation, or an error that names what was found."""

import shlex
from typing import Any

import pytest

from phi3_lightning.config.data import RowOptions
from phi3_lightning.data.conversation import BadRowError, Conversation, PlainText, TokenizedDocument
from phi3_lightning.data.formats import parse_prompt, parse_row, suggest_table
from phi3_lightning.errors import ConfigError

U = {"role": "user", "content": "hi"}
A = {"role": "assistant", "content": "ho"}


def parse(row: object, **options: Any) -> Conversation:
    parsed = parse_row(row, RowOptions(**options))
    assert isinstance(parsed, Conversation)
    return parsed


def messages(*items: Any) -> dict[str, Any]:
    return {"messages": list(items)}


@pytest.mark.parametrize(
    "row",
    [
        messages(U, A),
        messages(U, A) | {"id": 7, "extra": {"deep": [1]}},
        {"prompt": "hi", "completion": "ho"},
        {"prompt": [U], "completion": [A]},
        messages({"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}, A),
        messages(U | {"name": "Ann"}, A),
    ],
)
def test_every_format_gives_the_same_chat(row: dict[str, Any]) -> None:
    conversation = parse(row)
    assert conversation.messages == [U, A]
    assert conversation.trained == [False, True]


def test_developer_is_openais_name_for_system() -> None:
    row = messages({"role": "developer", "content": "be kind"}, U, A)
    assert parse(row).messages[0]["role"] == "system"


def test_an_empty_answer_stays_a_turn() -> None:
    assert parse(messages(U, {"role": "assistant", "content": ""})).messages[1]["content"] == ""


@pytest.mark.parametrize(
    ("row", "reason", "found"),
    [
        (5, "not an object", "a number"),
        (None, "not an object", "null"),
        ([U, A], "not an object", "a list"),
        ({}, "unknown format", "nothing"),
        ({"question": "?", "reply": "!"}, "unknown format", "'question'"),
        (messages(), "no messages", "empty"),
        ({"messages": None}, "not a list", "null"),
        ({"messages": "hi"}, "not JSON", "'messages'"),
        (messages(U, "ho"), "not a message", r"messages\[1\]"),
        (messages({"role": "User", "content": "hi"}, A), "unknown role", "'User'"),
        (messages({"role": "human", "content": "hi"}, A), "unknown role", "'human'"),
        (messages({"role": ["user"], "content": "hi"}, A), "unknown role", r"\['user'\]"),
        (messages({"content": "hi"}, A), "unknown role", "None"),
        (messages(U, {"role": "assistant"}), "no content", r"messages\[1\]"),
        (messages(U, {"role": "assistant", "content": None}), "content is not text", "null"),
        (messages(U, {"role": "assistant", "tool_calls": [{}]}), "not a tool call", "names no function"),
        (messages(U, {"role": "assistant", "tool_calls": 5}), "not a tool call", "a number"),
        (messages(U, A) | {"tools": 5}, "tools are not a list", "a number"),
        (messages(U, A | {"weight": 0.5}), "weight is not 0 or 1", "0.5"),
        ({"conversations": [{"from": "Human", "value": "hi"}]}, "unknown role", "'Human'"),
        ({"conversations": [{"from": "function_call", "value": "{"}]}, "not JSON", "function_call"),
        ({"instruction": "hi", "output": "ho", "history": [["a"]]}, "not a message", "pair"),
        ({"instruction": 5, "output": "ho"}, "content is not text", "'instruction' is a number"),
        ({"text": None}, "content is not text", "null"),
        ({"input_ids": [1], "labels": [1, 2]}, "not tokens", "one length"),
        ({"input_ids": [1.5], "labels": [1.5]}, "not tokens", "token ids"),
        ({"input_ids": [-1], "labels": [-100]}, "not tokens", "token ids"),
        ({"input_ids": [1, 2], "labels": [2, -100]}, "labels differ", "not the next one"),
        (messages(U, {"role": "system", "content": "s"}, U, A), "two user turns", r"messages\[2\]"),
        (messages(U, {"role": "assistant", "content": 5}), "content is not text", "a number"),
        (messages(U, {"role": "assistant", "content": True}), "content is not text", "a boolean"),
        (messages({"role": "user", "content": [{"type": "image_url"}]}, A), "content is not text", "'image_url'"),
        (messages({"role": "user", "content": ["hi"]}, A), "content is not text", "a string"),
        (messages(U, {"role": "assistant", "content": "\ud800"}), "lone surrogate", "character 0"),
        (messages(U, U, A), "two user turns", r"messages\[1\]"),
        (messages(U, A, A), "two assistant turns", r"messages\[2\]"),
        (messages(A, U, A), "assistant speaks first", r"messages\[0\]"),
        (messages(U, A, U), "last turn", "remove it"),
        (messages(U), "last turn", "remove it"),
        (messages({"role": "system", "content": "s"}), "last turn", "remove it"),
        ({"prompt": "hi"}, "last turn", "remove it"),
        ({"prompt": "hi", "completion": None}, "last turn", "remove it"),
        ({"prompt": None, "completion": "ho"}, "content is not text", "'prompt' is null"),
        ({"prompt": "hi", "completion": 5}, "content is not text", "'completion' is a number"),
    ],
)
def test_rows_that_cannot_be_trained_are_named(row: object, reason: str, found: str) -> None:
    with pytest.raises(BadRowError, match=found) as caught:
        parse(row)
    assert caught.value.reason.startswith(reason)


@pytest.mark.parametrize("row", [messages(U), messages(U, A), {"prompt": "hi"}, {"prompt": "hi", "completion": "ho"}])
def test_a_prompt_ends_before_the_answer(row: dict[str, Any]) -> None:
    assert parse_prompt(row, RowOptions()).messages == [U]


def test_a_prompt_keeps_the_earlier_answers() -> None:
    assert parse_prompt(messages(U, A, U, A), RowOptions()).messages == [U, A, U]


@pytest.mark.parametrize("row", [messages(A), messages({"role": "system", "content": "s"}), messages(U, A, A)])
def test_a_prompt_without_a_question_is_named(row: dict[str, Any]) -> None:
    with pytest.raises(BadRowError):
        parse_prompt(row, RowOptions())


SHAREGPT = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}


@pytest.mark.parametrize(
    ("row", "options"),
    [
        (SHAREGPT, {}),
        (SHAREGPT | {"system": ""}, {}),
        ({"conversations": [U, A]}, {}),
        ({"instruction": "hi", "input": "", "output": "ho"}, {}),
        ({"instruction": "", "input": "hi", "output": "ho"}, {}),
        ({"question": "hi", "reply": "ho"}, {"columns": {"prompt": "question", "completion": "reply"}}),
        ({"messages": '[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]'}, {}),
        ({"text": "x", "prompt": "hi", "completion": "ho"}, {}),
        ({"messages": None, "text": None, "prompt": "hi", "completion": "ho"}, {}),
        (messages(U | {"weight": None, "train": None}, A | {"tool_calls": None, "train": None, "weight": 1}), {}),
        (messages({"role": "user", "content": [{"type": "text", "text": None, "value": "hi"}]}, A), {}),
        (
            messages({"role": "customer", "content": "hi"}, {"role": "agent", "content": "ho"}),
            {"role_map": {"customer": "user", "agent": "assistant"}},
        ),
        (messages({"role": "user", "content": [{"type": "text", "value": "hi"}]}, A), {}),
    ],
)
def test_options_map_other_formats_to_the_same_chat(row: dict[str, Any], options: dict[str, Any]) -> None:
    assert parse(row, **options).messages == [U, A]


def test_alpaca_with_all_its_fields() -> None:
    row = {"system": "s", "history": [["q", "a"]], "instruction": "do", "input": "this", "output": "done", "id": 1}
    assert [message["content"] for message in parse(row).messages] == ["s", "q", "a", "do\n\nthis", "done"]


def test_plain_texts_and_ready_tokens_are_read() -> None:
    assert parse_row({"text": "words"}, RowOptions()) == PlainText("words")
    tokens = parse_row({"input_ids": [4, 5, 6, 7], "labels": [-100, 5, -100, 7]}, RowOptions())
    assert tokens == TokenizedDocument([4, 5, 6, 7], [(1, 2), (3, 4)])
    with pytest.raises(BadRowError, match="not a chat"):
        parse_prompt({"text": "words"}, RowOptions())


def test_a_named_format_is_taken_even_where_another_fits() -> None:
    assert parse_row({"text": "x", "prompt": "hi"}, RowOptions(format="text")) == PlainText("x")
    with pytest.raises(BadRowError, match="'conversations'"):
        parse_row(messages(U, A), RowOptions(format="sharegpt"))


def test_a_table_of_messages_is_suggested_from_its_columns() -> None:
    row = {"ticket_id": 1, "sender": "agent", "body": "hi", "created_at": "2026"}
    expected = (
        "--data.conversation_column ticket_id --data.role_column sender --data.content_column body "
        "--data.order_column created_at"
    )
    with pytest.raises(BadRowError, match=expected):
        parse(row)


CALL = {"name": "f", "arguments": {"x": 1}}
TOOL_ROW = messages(
    U,
    {
        "role": "assistant",
        "content": None,
        "reasoning_content": "hm",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}, CALL],
    },
    {"role": "tool", "content": "one"},
    {"role": "tool", "content": "two"},
    A,
) | {"tools": [{"name": "f"}]}
RENDERED = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'


def test_tool_calls_become_text_by_the_documented_convention() -> None:
    system, question, call, result, answer = parse(TOOL_ROW).messages
    assert system["role"] == "system"
    assert '{"name": "f"}' in system["content"]
    assert question == U
    assert call == {"role": "assistant", "content": f"<think>\nhm\n</think>\n\n{RENDERED}\n{RENDERED}"}
    results = "<tool_response>\none\n</tool_response>\n<tool_response>\ntwo\n</tool_response>"
    assert result == {"role": "user", "content": results}
    assert answer == A


def test_sharegpt_tools_are_the_same_convention() -> None:
    value = '{"name": "f", "arguments": {"x": 1}}'
    items = [("human", "hi"), ("function_call", value), ("observation", "one"), ("gpt", "ho")]
    row = {"conversations": [{"from": role, "value": text} for role, text in items], "tools": "[]"}
    assert [message["content"] for message in parse(row).messages] == [
        "hi",
        RENDERED,
        "<tool_response>\none\n</tool_response>",
        "ho",
    ]


def test_tools_can_be_dropped_or_refused() -> None:
    assert parse(TOOL_ROW, tools="drop").messages == [U, A]
    with pytest.raises(BadRowError, match="tools are refused"):
        parse(TOOL_ROW, tools="refuse")
    assert parse(messages(U, A), tools="refuse").messages == [U, A]


def test_repeated_roles_can_be_merged() -> None:
    merged = parse(messages(U, U, A, A), repeated_role="merge").messages
    assert [message["content"] for message in merged] == ["hi\n\nhi", "ho\n\nho"]
    with pytest.raises(BadRowError, match="weight"):
        parse(messages(U, A, A | {"weight": 0}), repeated_role="merge")


def test_system_messages_can_be_merged_into_the_user_or_refused() -> None:
    row = messages({"role": "system", "content": "s"}, U, A)
    assert parse(row, system="merge_into_user").messages == [{"role": "user", "content": "s\n\nhi"}, A]
    with pytest.raises(BadRowError, match="system messages are refused"):
        parse(row, system="refuse")


@pytest.mark.parametrize(
    ("train_on", "trained"),
    [("assistant", [0, 0, 1, 0, 1]), ("last", [0, 0, 0, 0, 1]), ("all", [1, 1, 1, 1, 1])],
)
def test_train_on_chooses_the_trained_turns(train_on: str, trained: list[int]) -> None:
    row = messages({"role": "system", "content": "s"}, U, A, U, A)
    assert parse(row, train_on=train_on).trained == [bool(flag) for flag in trained]


@pytest.mark.parametrize("flag", [{"weight": 0}, {"train": False}])
def test_a_message_can_be_left_untrained(flag: dict[str, Any]) -> None:
    assert parse(messages(U, A | flag, U, A | {"weight": 1})).trained == [False, False, False, True]


@pytest.mark.parametrize(
    ("wrong", "key"),
    [
        ({"role_map": {"agent": "Assistant"}}, "data.role_map"),
        ({"columns": {"question": "q"}}, "data.columns"),
        ({"conversation_column": "id"}, "data.role_column"),
        ({"order_column": "time"}, "data.conversation_column"),
    ],
)
def test_options_that_cannot_work_are_named(wrong: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        RowOptions(**wrong)


def test_the_suggested_options_of_a_table_can_be_pasted() -> None:
    hint = suggest_table(["Ticket ID", "Sent at", "Sentiment", "From", "Message text"])
    assert shlex.split(hint.partition("Try ")[2]) == [
        "--data.conversation_column", "Ticket ID", "--data.role_column", "From",
        "--data.content_column", "Message text", "--data.order_column", "Sent at",
    ]  # fmt: skip
