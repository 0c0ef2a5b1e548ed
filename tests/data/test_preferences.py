"""Rows of preferences in all common shapes, and the error of each fault."""

from collections import Counter
from typing import Any

import pytest

from phi3_lightning.config.data import RowOptions
from phi3_lightning.data.conversation import (
    BadRowError,
    Conversation,
    LabelledConversation,
    Message,
    PreferencePair,
)
from phi3_lightning.data.formats import parse_prompt, parse_row

from .test_formats import CALL, RENDERED

S: Message = {"role": "system", "content": "be kind"}
U: Message = {"role": "user", "content": "hi"}
GOOD: Message = {"role": "assistant", "content": "good"}
BAD: Message = {"role": "assistant", "content": "bad"}
U2: Message = {"role": "user", "content": "and?"}
TEXTS = {"prompt": "hi", "chosen": "good", "rejected": "bad"}
WHOLE = {"chosen": [U, GOOD], "rejected": [U, BAD]}


def pair(row: dict[str, Any], **options: Any) -> PreferencePair:
    parsed = parse_row(row, RowOptions(**options))
    assert isinstance(parsed, PreferencePair)
    return parsed


def labelled(row: dict[str, Any], **options: Any) -> LabelledConversation:
    parsed = parse_row(row, RowOptions(**options))
    assert isinstance(parsed, LabelledConversation)
    return parsed


def unused(row: dict[str, Any], **options: Any) -> dict[str, int]:
    counts: Counter[str] = Counter()
    parse_row(row, RowOptions(**options), counts)
    return dict(counts)


@pytest.mark.parametrize(
    ("row", "options"),
    [
        (TEXTS, {}),
        ({"prompt": [U], "chosen": [GOOD], "rejected": [BAD]}, {}),
        ({"prompt": [U], "chosen": GOOD, "rejected": "bad"}, {}),
        (WHOLE, {}),
        (WHOLE | {"prompt": "hi"}, {}),  # as UltraFeedback
        (WHOLE | {"prompt": [U]}, {}),
        (WHOLE | {"prompt": " hi\n", "messages": [U, GOOD], "score_chosen": 9.0, "score_rejected": 2.0}, {}),
        ({"messages": [U], "chosen": GOOD, "rejected": BAD}, {}),  # as Axolotl
        (
            {
                "conversations": [{"from": "human", "value": "hi"}],
                "chosen": {"from": "gpt", "value": "good"},
                "rejected": {"from": "gpt", "value": "bad"},
            },
            {},
        ),  # as LLaMA-Factory
        ({"instruction": "hi", "input": "", "chosen": "good", "rejected": "bad"}, {}),
        ({"question": "hi", "chosen": "good", "rejected": "bad", "system": ""}, {"columns": {"prompt": "question"}}),
        ({"prompt": "hi", "win": "good", "lose": "bad"}, {"columns": {"chosen": "win", "rejected": "lose"}}),
        (TEXTS | {"completion": None, "messages": None, "label": None}, {}),
        (TEXTS | {"messages": [U, GOOD]}, {"format": "preference"}),
        (
            {
                "prompt": '[{"role": "user", "content": "hi"}]',
                "chosen": '[{"role": "assistant", "content": "good"}]',
                "rejected": "bad",
            },
            {},
        ),  # of a table
        ({"chosen": '[{"from":"human","value":"hi"}, {"from":"gpt","value":"good"}]', "rejected": [U, BAD]}, {}),
    ],
)
def test_one_pair_in_every_shape(row: dict[str, Any], options: dict[str, Any]) -> None:
    both = pair(row, **options)
    assert both == PreferencePair(Conversation([U, GOOD], [False, True]), Conversation([U, BAD], [False, True]))
    assert parse_prompt(row, RowOptions(**options)) == both.prompt == Conversation([U], [False])


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [S, U, GOOD, U2], "chosen": "good", "rejected": "bad"},
        {"system": "be kind", "prompt": [U, GOOD, U2], "chosen": [GOOD], "rejected": BAD},
        {"chosen": [S, U, GOOD, U2, GOOD], "rejected": [S, U, GOOD, U2, BAD]},
        {"system": "be kind", "chosen": [U, GOOD, U2, GOOD], "rejected": [U, GOOD, U2, BAD], "prompt": "and?"},
        {"system": "be kind", "chosen": [U, GOOD, U2, GOOD], "rejected": [U, GOOD, U2, BAD], "prompt": [U, GOOD]},
        {"prompt": [S, U], "chosen": [GOOD, U2, GOOD], "rejected": [GOOD, U2, BAD]},
        {"system": "be kind", "instruction": "and?", "history": [["hi", "good"]], "chosen": "good", "rejected": "bad"},
    ],
)
def test_earlier_answers_are_prompt(row: dict[str, Any]) -> None:
    both = pair(row)
    assert both.chosen == Conversation([S, U, GOOD, U2, GOOD], [False] * 4 + [True])
    assert both.rejected == Conversation([S, U, GOOD, U2, BAD], [False] * 4 + [True])


def test_answers_of_several_turns() -> None:
    row = {"prompt": "hi", "chosen": [GOOD, U2, GOOD], "rejected": [BAD, U2, GOOD, U2, BAD]}
    both = pair(row)
    assert both.chosen.trained == [False, True, False, True]
    assert both.rejected.trained == [False, True, False, True, False, True]
    assert pair(row, train_on="last").rejected.trained == [False] * 5 + [True]
    row["chosen"][0] = GOOD | {"weight": 0}  # type: ignore[index]
    assert pair(row).chosen.trained == [False, False, False, True]


@pytest.mark.parametrize("answer", ['[{"x": 1}]', '{"value": 3}', "[1, 2]", "[{", "{'x': 1}", '"hi"', "[]x"])
def test_answers_that_are_code_stay_texts(answer: str) -> None:
    assert pair(TEXTS | {"chosen": answer}).chosen.messages[1]["content"] == answer


def test_tools_are_those_of_chats() -> None:
    calls = [{"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "one"}, GOOD]
    both = pair({"prompt": "hi", "chosen": calls, "rejected": "bad", "tools": [{"name": "f"}]})
    system, question, call, result, answer = both.chosen.messages
    assert "You may call these functions" in system["content"]
    assert (question, call["content"], result["role"], answer) == (U, RENDERED, "user", GOOD)
    assert both.rejected.messages == [system, U, BAD]
    assert both.chosen.trained == [False, False, True, False, True]
    with pytest.raises(BadRowError, match="tools are refused"):
        pair({"prompt": "hi", "chosen": calls, "rejected": "bad"}, tools="refuse")


def test_neighbours_are_merged_as_in_chats() -> None:
    row = {"prompt": [U, U2], "chosen": "good", "rejected": "bad"}
    with pytest.raises(BadRowError, match="two user turns in a row: in 'chosen'"):
        pair(row)
    assert pair(row, repeated_role="merge").prompt.messages == [{"role": "user", "content": "hi\n\nand?"}]
    assert pair(TEXTS | {"system": "s"}, system="merge_into_user").prompt.messages[0]["content"] == "s\n\nhi"


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        (TEXTS | {"rejected": "good"}, "chosen equals rejected", "remove the row"),
        ({"chosen": [U, GOOD], "rejected": [U, GOOD]}, "chosen equals rejected", "remove the row"),
        (TEXTS | {"rejected": ""}, "empty answer", "'rejected'"),
        (TEXTS | {"rejected": " \n"}, "empty answer", "'rejected'"),
        (TEXTS | {"chosen": None}, "empty answer", "'chosen'"),
        (TEXTS | {"chosen": []}, "empty answer", "'chosen'"),
        ({"chosen": [U, GOOD], "rejected": [U, BAD | {"content": ""}]}, "empty answer", "'rejected'"),
        ({"chosen": [U, GOOD], "rejected": [U2, BAD]}, "prompts differ", "message 1, which is the user's in 'chosen'"),
        ({"chosen": [S, U, GOOD], "rejected": [U, BAD]}, "prompts differ", "message 1, which is the system's"),
        (
            {"chosen": [U, GOOD, U, GOOD], "rejected": [U, GOOD, U2, BAD]},
            "prompts differ",
            "message 3, which is the user's",
        ),
        (WHOLE | {"prompt": "other"}, "prompts differ", "does not contain 'prompt'"),
        (WHOLE | {"prompt": [S, U]}, "prompts differ", "does not contain 'prompt'"),
        ({"chosen": [U, GOOD], "rejected": [U, GOOD, U2, BAD]}, "no answer", "'chosen' ends within"),
        ({"chosen": "good", "rejected": "bad", "question": "hi"}, "no prompt", "'question'.*data.columns"),
        ({"chosen": "Human: hi Assistant: good", "rejected": "Human: hi Assistant: bad"}, "no prompt", "transcript"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "no prompt", "found"),
        ({"prompt": "hi", "chosen": [GOOD, U], "rejected": "bad"}, "last turn", "in 'chosen'"),
        ({"prompt": "hi", "chosen": "good", "rejected": [{"role": "owl", "content": "x"}]}, "unknown role", "'owl'"),
        ({"prompt": "hi", "chosen": 5, "rejected": "bad"}, "content is not text", "'chosen' is a number"),
        ({"prompt": "hi", "chosen": ["good"], "rejected": "bad"}, "not a message", "chosen"),
        ({"prompt": 5, "chosen": "good", "rejected": "bad"}, "content is not text", "'prompt' is a number"),
        ({"prompt": [U, GOOD], "chosen": "good", "rejected": "bad"}, "two assistant turns", "in 'chosen'"),
        ({"prompt": "hi", "chosen": "[{'role': 'assistant'}]", "rejected": "bad"}, "not JSON", "Python's repr"),
        (
            {"input": "hi", "chosen": "good", "rejected": "bad"},
            "a field would be lost",
            "data.columns: {prompt: input}",
        ),
        (TEXTS | {"images": ["a.png"]}, "a field would be lost", "images"),
        (TEXTS | {"weight": 2}, "weight is not 1", "2"),
    ],
)
def test_a_bad_pair_is_named(row: dict[str, Any], reason: str, detail: str) -> None:
    with pytest.raises(BadRowError, match=detail) as caught:
        parse_row(row, RowOptions())
    assert caught.value.reason.startswith(reason)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            TEXTS | {"id": 3, "source": "x", "score_chosen": 9.0, "chosen_model": "m"},
            "source score_chosen chosen_model",
        ),
        (WHOLE | {"prompt": "hi", "messages": [U, GOOD], "prompt_id": "1"}, "messages prompt_id"),
        (WHOLE | {"messages": [U, GOOD]}, "messages"),
        (WHOLE | {"instruction": "hi", "input": "x", "output": "y"}, "instruction input output"),
        (WHOLE | {"conversations": [U], "system": "s"}, "conversations"),
        (TEXTS | {"conversations": [U], "completion": "x", "label": True}, "conversations completion label"),
        (
            {"prompt": "hi", "chosen": GOOD | {"score": 1}, "rejected": [BAD | {"name": "m"}]},
            "chosen[].score rejected[].name",
        ),
    ],
)
def test_what_a_pair_does_not_use_is_counted(row: dict[str, Any], expected: str) -> None:
    assert unused(row) == dict.fromkeys(expected.split(), 1)


CHATS: list[dict[str, Any]] = [
    {"messages": [U, GOOD]},
    {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "good"}]},
    {"prompt": "hi", "completion": "good"},
    {"prompt": [U], "completion": [GOOD]},
    {"instruction": "hi", "output": "good"},
]


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize(("value", "expected"), [(True, True), (False, False), ("true", True), (" False", False)])
def test_a_chat_with_a_label_of_true_or_false_is_judged(chat: dict[str, Any], value: object, expected: bool) -> None:
    row = chat | {"label": value}
    assert labelled(row) == LabelledConversation(Conversation([U, GOOD], [False, True]), expected)
    assert unused(row) == {}
    assert parse_prompt(row, RowOptions()).messages == [U]
    tagged = chat | {"kto_tag": value}
    assert labelled(tagged, columns={"label": "kto_tag"}).preferred is expected


@pytest.mark.parametrize("chat", CHATS)
def test_other_labels_are_those_of_classifiers_unless_the_format_is_named(chat: dict[str, Any]) -> None:
    for value in (0, 1, 3, "spam", 0.5):
        row = chat | {"label": value}
        assert parse_row(row, RowOptions()) == Conversation([U, GOOD], [False, True])
        assert unused(row) == {"label": 1}
    for value, expected in ((0, False), (1, True), (1.0, True), ("0", False), ("1", True), (True, True)):
        assert labelled(chat | {"label": value}, format="kto").preferred is expected
    for value in (3, -1, "spam", 0.5, [1]):
        with pytest.raises(BadRowError, match="label is not true or false"):
            labelled(chat | {"label": value}, format="kto")
    for row in (chat, chat | {"label": None}, chat | {"label": ""}):
        with pytest.raises(BadRowError, match="no label"):
            labelled(row, format="kto")
        assert parse_prompt(row, RowOptions(format="kto")).messages == [U]


def test_a_named_format_of_chats_reads_no_preference() -> None:
    row = {"messages": [U, GOOD], "label": True} | WHOLE
    assert parse_row(row, RowOptions(format="messages")) == Conversation([U, GOOD], [False, True])
    assert unused(row, format="messages") == {"label": 1, "chosen": 1, "rejected": 1}
    assert isinstance(parse_row(row, RowOptions()), PreferencePair)
    with pytest.raises(BadRowError, match="expected 'chosen' and 'rejected'"):
        parse_row({"prompt": "hi", "chosen": "good"}, RowOptions(format="preference"))


def test_what_is_judged_is_the_completion_or_the_last_message() -> None:
    talk = [S, U, BAD, U2, GOOD]
    assert labelled({"messages": talk, "label": True}).conversation.trained == [False] * 4 + [True]
    row = {"prompt": [S, U], "completion": [BAD, U2, GOOD], "label": True}
    assert labelled(row).conversation == Conversation(talk, [False, False, True, False, True])
    assert labelled(row, train_on="last").conversation.trained == [False] * 4 + [True]
    row = {"system": "s", "prompt": [U, GOOD, U2], "completion": "bad", "label": False, "tools": [{"name": "f"}]}
    assert labelled(row).conversation.trained == [False] * 4 + [True]
    assert labelled(row, system="merge_into_user").conversation.trained == [False] * 3 + [True]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "hi", "completion": "", "label": True}, "empty answer"),
        ({"prompt": "hi", "completion": None, "label": True}, "last turn"),
        ({"messages": [U, GOOD | {"content": " "}], "label": True}, "empty answer"),
        ({"messages": [U], "label": True}, "last turn"),
        ({"instruction": "hi", "label": False}, "last turn"),
    ],
)
def test_a_bad_judged_row_is_named(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRowError) as caught:
        parse_row(row, RowOptions())
    assert caught.value.reason.startswith(reason)
