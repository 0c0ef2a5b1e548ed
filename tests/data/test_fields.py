"""Each field of a row is used, counted by name, or makes it a bad row; none vanishes."""

from collections import Counter
from typing import Any

import pytest

from phi3_lightning.config.data import RowOptions
from phi3_lightning.data.conversation import BadRowError, Conversation, PlainText
from phi3_lightning.data.fields import name_unused
from phi3_lightning.data.formats import parse_prompt, parse_row
from phi3_lightning.errors import ConfigError

from .conftest import case

U = {"role": "user", "content": "hi"}
A = {"role": "assistant", "content": "ho"}
S = {"role": "system", "content": "be kind"}
TOOL = {"name": "f", "parameters": {}}
CHATS: dict[str, dict[str, Any]] = {
    "messages": {"messages": [U, A]},
    "sharegpt": {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
    "alpaca": {"instruction": "hi", "output": "ho"},
    "prompt_completion": {"prompt": "hi", "completion": "ho"},
    "lists": {"prompt": [U], "completion": [A]},
}
OTHERS: dict[str, dict[str, Any]] = {
    "text": {"text": "hi ho"},
    "tokens": {"input_ids": [1, 2], "labels": [-100, 2]},
}


def parse(row: object, **options: Any) -> Conversation:
    parsed = parse_row(row, RowOptions(**options))
    assert isinstance(parsed, Conversation)
    return parsed


def unused(row: object, **options: Any) -> dict[str, int]:
    counts: Counter[str] = Counter()
    parse_row(row, RowOptions(**options), counts)
    return dict(counts)


@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
@pytest.mark.parametrize("name", ["system", "system_prompt"])
def test_a_system_field_is_the_system_turn_of_every_chat(chat: dict[str, Any], name: str) -> None:
    row = chat | {name: "be kind"}
    assert parse(row).messages == [S, U, A]
    assert parse_prompt(row, RowOptions()).messages == [S, U]
    assert unused(row) == {}
    assert parse(chat | {"persona": "be kind"}, columns={"system": "persona"}).messages == [S, U, A]


@pytest.mark.parametrize("name", ["f02.a_messages.jsonl", "f02.b_prompt.jsonl"])
def test_rows_with_a_system_field_keep_it(name: str) -> None:
    [row] = case(name)
    system = {"role": "system", "content": "Answer only in French."}
    assert parse(row).messages == [
        system,
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Salut"},
    ]


@pytest.mark.parametrize(
    ("row", "options"),
    [
        (case("f02.c_both.jsonl")[0], {}),
        ({"system": "x", "messages": [{"role": "developer", "content": "y"}, U, A]}, {}),
        ({"system": "x", "messages": [U, S, A]}, {}),
        ({"system": "x", "prompt": [S, U], "completion": "ho"}, {}),
        ({"system_prompt": "x", "conversations": [{"from": "system", "value": "y"}, U, A]}, {}),
        ({"system": "x", "messages": [{"role": "boss", "content": "y"}, U, A]}, {"role_map": {"boss": "system"}}),
    ],
)
def test_two_system_messages_are_a_bad_row(row: dict[str, Any], options: dict[str, Any]) -> None:
    for parser in (parse_row, parse_prompt):
        with pytest.raises(BadRowError, match="two system messages"):
            parser(row, RowOptions(**options))


def test_a_system_field_equal_to_the_system_message_is_accepted() -> None:
    assert parse({"system": "be kind", "messages": [S, U, A]}).messages == [S, U, A]


@pytest.mark.parametrize(
    "fields",
    [
        {"system": "a", "system_prompt": "b"},
        {"tools": [TOOL], "functions": [{"name": "g"}]},
        {"messages": [U, A | {"reasoning_content": "a", "thinking": "b"}]},
        {"messages": [{"role": "user", "content": "a", "value": "b"}, A]},
    ],
)
def test_two_fields_for_one_thing_are_a_bad_row(fields: dict[str, Any]) -> None:
    with pytest.raises(BadRowError, match="two fields for one thing"):
        parse(CHATS["messages"] | fields)


@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
@pytest.mark.parametrize("name", ["tools", "functions"])
def test_tools_are_used_by_every_chat(chat: dict[str, Any], name: str) -> None:
    system, *_ = parse(chat | {name: [TOOL]}).messages
    assert '{"name": "f", "parameters": {}}' in system["content"]
    assert unused(chat | {name: [TOOL]}) == {}


@pytest.mark.parametrize(
    ("row", "options", "found"),
    [
        *((row | {name: "x"}, {}, name) for row in OTHERS.values() for name in ("system", "system_prompt", "tools")),
        ({"text": "x", "history": [["a", "b"]]}, {}, "history"),
        (CHATS["prompt_completion"] | {"input": "x"}, {}, "instruction: ..., output: ..."),
        (CHATS["messages"] | {"input": "x"}, {}, "'input'"),
        (CHATS["messages"] | {"history": [["a", "b"]]}, {}, "'history'"),
        (CHATS["sharegpt"] | {"history": [["a", "b"]]}, {}, "'history'"),
        (
            {"instruction": "hi", "input": "x", "response": "ho"},
            {"columns": {"prompt": "instruction", "completion": "response"}},
            "'input'",
        ),
        *((CHATS["messages"] | {name: ["a.png"]}, {}, name) for name in ("images", "videos", "audios")),
        (CHATS["messages"] | {"weight": 0.5}, {}, "weight"),
        (CHATS["alpaca"] | {"weight": 0}, {}, "weight"),
        (OTHERS["text"] | {"weight": "2"}, {}, "weight"),
    ],
)
def test_a_field_that_would_be_lost_is_a_bad_row(row: dict[str, Any], options: dict[str, Any], found: str) -> None:
    with pytest.raises(BadRowError, match=found):
        parse_row(row, RowOptions(**options))


def test_the_weight_of_a_prompt_is_ignored() -> None:
    assert parse_prompt(CHATS["messages"] | {"weight": 0.5}, RowOptions()).messages == [U]


@pytest.mark.parametrize("row", [*CHATS.values(), *OTHERS.values()])
def test_empty_fields_count_as_absent(row: dict[str, Any]) -> None:
    plain = parse_row(row, RowOptions())
    names = ["system", "tools", "functions", "input", "history", "images", "note", "messages", "conversations", "text"]
    for empty in (None, "", [], {}, "[]"):
        full = {name: empty for name in names if name not in row} | row
        assert parse_row(full, RowOptions()) == plain
        assert unused(full) == {}
    assert unused(row | {"weight": 1}) == {}


@pytest.mark.parametrize(
    ("row", "options", "expected"),
    [
        (CHATS["messages"] | {"prompt": "hi", "prompt_id": "1"}, {}, {"prompt", "prompt_id"}),  # as UltraChat
        (CHATS["messages"] | {"text": "<|user|>hi", "id": 0, "good": False}, {}, {"text", "good"}),
        (CHATS["messages"] | CHATS["alpaca"] | {"input": "x"}, {}, {"instruction", "output", "input"}),
        (CHATS["alpaca"] | {"text": "Below is an instruction"}, {}, {"text"}),
        (CHATS["sharegpt"] | {"title": None, "source": "x", "system_prompt": None}, {}, {"source"}),  # as OpenHermes
        (CHATS["prompt_completion"] | {"attention_mask": [1], "input_ids": [4]}, {}, {"attention_mask", "input_ids"}),
        (CHATS["messages"] | {"system": "s", "text": "x"}, {"format": "text"}, {"messages", "system"}),
        (
            {"instruction": "hi", "context": "c", "response": "ho"},  # as Dolly
            {"columns": {"prompt": "instruction", "completion": "response"}},
            {"context"},
        ),
        ({"prompt": "own", "question": "hi", "completion": "ho"}, {"columns": {"prompt": "question"}}, {"prompt"}),
        (
            {"messages": [U | {"name": "Ann", "id": ""}, A | {"draft": False}]},
            {},
            {"messages[].name", "messages[].draft"},
        ),
        ({"conversations": [*CHATS["sharegpt"]["conversations"][:1], A | {"rank": 0}]}, {}, {"conversations[].rank"}),
        (
            {"messages": [U | {"content": [{"type": "text", "text": "hi", "cache_control": {"a": 1}}]}, A]},
            {},
            {"messages[].content[].cache_control"},
        ),
        (
            {"messages": [U, {"role": "assistant", "tool_calls": [{"id": "1", "name": "f", "arguments": {}}]}]},
            {},
            {"messages[].tool_calls[].id"},
        ),
    ],
)
def test_unused_metadata_fields_are_counted(row: dict[str, Any], options: dict[str, Any], expected: set[str]) -> None:
    assert unused(row, **options) == dict.fromkeys(expected, 1)


def test_a_row_counts_a_field_once_and_a_bad_row_counts_none() -> None:
    counts: Counter[str] = Counter()
    row = {"messages": [U | {"name": "Ann"}, A | {"name": "Bob"}], "id": 1, "source": "x"}
    for _ in range(3):
        parse_row(row, RowOptions(), counts)
        parse_prompt(row, RowOptions(), counts)
        with pytest.raises(BadRowError):
            parse_row(row | {"system": 5}, RowOptions(), counts)
    assert counts == {"messages[].name": 6, "source": 6}  # the id identifies the row


def test_unused_fields_are_named_with_their_rows() -> None:
    assert name_unused({}) == ""
    assert name_unused({"id": 1}) == "id (1 row)"
    assert name_unused({"source": 85, "id": 86}) == "id (86 rows), source (85)"
    many = {f"x{index:02}": 2 for index in range(23)}
    assert name_unused(many).startswith("x00 (2 rows), x01 (2), ")
    assert name_unused(many).endswith("x19 (2) and 3 more")


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"turns": [U, A], "body": "x"}, {"messages": "turns", "text": "body"}),
        ({"turns": [U, A], "body": ""}, {"messages": "turns", "input": "body"}),
        ({"q": "hi", "a": "ho", "i": "x"}, {"prompt": "q", "completion": "a", "input": "i"}),
    ],
)
def test_a_column_that_is_named_and_not_used_is_a_bad_row(row: dict[str, Any], columns: dict[str, str]) -> None:
    with pytest.raises(BadRowError, match=r"column is not used: data.columns names '(body|i)'"):
        parse(row, columns=columns)


@pytest.mark.parametrize(("form", "name"), [("messages", "input"), ("text", "system"), ("prompt_completion", "output")])
def test_a_column_that_a_named_format_does_not_have_is_refused(form: Any, name: str) -> None:
    with pytest.raises(ConfigError, match=f"data.columns: '{name}' is not a field of data.format {form}"):
        RowOptions(format=form, columns={name: "x"})


@pytest.mark.parametrize(
    "row",
    [
        case("f19.a.jsonl")[0],
        {"instruction": "Translate", "input": "Hallo", "output": None},
        {"instruction": "Translate", "input": "Hallo", "output": ""},
        {"instruction": "Translate", "input": "Hallo", "output": "Hello", "text": "x"},
        {"instruction": "", "input": "Translate\n\nHallo"},
        {"instruction": None, "input": "Translate\n\nHallo"},
        {"prompt": "Translate\n\nHallo", "completion": None},
        {"prompt": "Translate\n\nHallo", "text": ""},
    ],
)
def test_a_prompt_needs_no_answer_and_keeps_its_input(row: dict[str, Any]) -> None:
    assert parse_prompt(row, RowOptions()).messages == [{"role": "user", "content": "Translate\n\nHallo"}]


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        (case("f19.a.jsonl")[0], "output"),
        ({"instruction": "hi", "response": "ho"}, "output"),
        ({"prompt": "hi", "response": "ho"}, "completion"),
        ({"prompt": [U], "answer": "ho"}, "completion"),
    ],
)
def test_a_missing_answer_is_refused_and_its_column_named(row: dict[str, Any], answer: str) -> None:
    with pytest.raises(BadRowError, match=f"no '{answer}' answers it, found .*data.columns"):
        parse(row)


def test_a_named_format_is_read_where_the_row_has_others_too() -> None:
    row = CHATS["messages"] | {"text": "hi ho"}
    assert parse_row(row, RowOptions(format="text")) == PlainText("hi ho")
    assert parse(row).messages == [U, A]
