"""Each shape of row has a defined answer: a conversation, or an error that says what was found."""

from typing import Any

import pytest

from phi3_lightning.data.formats import BadRowError, parse_conversation, parse_prompt

U = {"role": "user", "content": "hi"}
A = {"role": "assistant", "content": "ho"}


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
def test_the_same_chat_in_every_format(row: dict[str, Any]) -> None:
    conversation = parse_conversation(row)
    assert conversation.messages == [U, A]
    assert conversation.trained == [False, True]


def test_developer_is_openais_name_for_system() -> None:
    row = messages({"role": "developer", "content": "be kind"}, U, A)
    assert parse_conversation(row).messages[0]["role"] == "system"


def test_an_empty_answer_stays_a_turn() -> None:
    assert parse_conversation(messages(U, {"role": "assistant", "content": ""})).messages[1]["content"] == ""


@pytest.mark.parametrize(
    ("row", "reason", "found"),
    [
        (5, "not an object", "a number"),
        (None, "not an object", "null"),
        ([U, A], "not an object", "a list"),
        ({}, "unknown format", "nothing"),
        ({"question": "?", "reply": "!"}, "unknown format", "'question'"),
        (messages(), "no messages", "empty"),
        ({"messages": None}, "no list of messages", "null"),
        ({"messages": "hi"}, "no list of messages", "a string"),
        (messages(U, "ho"), "not a message", r"messages\[1\]"),
        (messages({"role": "User", "content": "hi"}, A), "unknown role", "'User'"),
        (messages({"role": "human", "content": "hi"}, A), "unknown role", "'human'"),
        (messages({"role": ["user"], "content": "hi"}, A), "unknown role", r"\['user'\]"),
        (messages({"content": "hi"}, A), "unknown role", "None"),
        (messages(U, {"role": "assistant"}), "no content", r"messages\[1\]"),
        (
            messages(U, {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}),
            "content is not text",
            "null",
        ),
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
        ({"prompt": "hi", "completion": None}, "no list of messages", "'completion' is null"),
    ],
)
def test_what_cannot_be_trained_is_named(row: object, reason: str, found: str) -> None:
    with pytest.raises(BadRowError, match=found) as caught:
        parse_conversation(row)
    assert caught.value.reason.startswith(reason)


@pytest.mark.parametrize("row", [messages(U), messages(U, A), {"prompt": "hi"}, {"prompt": "hi", "completion": "ho"}])
def test_a_prompt_ends_before_the_answer(row: dict[str, Any]) -> None:
    assert parse_prompt(row).messages == [U]


def test_a_prompt_keeps_the_earlier_answers() -> None:
    assert parse_prompt(messages(U, A, U, A)).messages == [U, A, U]


@pytest.mark.parametrize("row", [messages(A), messages({"role": "system", "content": "s"}), messages(U, A, A)])
def test_a_prompt_without_a_question_is_named(row: dict[str, Any]) -> None:
    with pytest.raises(BadRowError):
        parse_prompt(row)
