"""A message has a role, content and a training flag, under the names that several tools use."""

from collections import Counter
from typing import Any

import pytest

from phi3_lightning.config.data import RowOptions
from phi3_lightning.data.conversation import BadRowError, Conversation
from phi3_lightning.data.formats import parse_prompt, parse_row
from phi3_lightning.errors import ConfigError

from .conftest import case

U = {"role": "user", "content": "hi"}
A = {"role": "assistant", "content": "ho"}
HUMAN = {"from": "human", "value": "hi"}
GPT = {"from": "gpt", "value": "ho"}
SPOKEN = {"message_keys": {"role": "speaker", "content": "text"}, "role_map": {"client": "user", "agent": "assistant"}}


def parse(row: object, **options: Any) -> Conversation:
    parsed = parse_row(row, RowOptions(**options))
    assert isinstance(parsed, Conversation)
    return parsed


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [HUMAN, GPT]},
        {"conversations": [HUMAN, GPT]},
        {"prompt": [HUMAN], "completion": [GPT]},
        {"prompt": [HUMAN], "completion": "ho"},
        {"instruction": "hi", "output": [GPT]},
        {"messages": [U, GPT]},
        {"messages": [{"role": "user", "value": "hi"}, {"from": "assistant", "content": "ho"}]},
        {"messages": [U | {"from": None, "value": None}, GPT | {"role": None, "content": None}]},  # columns of both
        {"messages": [{"from": "user", "value": "hi"}, {"from": "chatgpt", "value": "ho"}]},
        {"conversations": [HUMAN, {"role": "bot", "value": "ho"}]},
    ],
)
def test_from_and_value_are_read_in_any_list(row: dict[str, Any]) -> None:
    counts: Counter[str] = Counter()
    parsed = parse_row(row, RowOptions(), counts)
    assert parsed == Conversation([U, A], [False, True])
    assert parse_prompt(row, RowOptions()).messages == [U]
    assert not counts


@pytest.mark.parametrize(
    ("name", "options"),
    [("f16.a_from_value.jsonl", {}), ("f16.b_dialogue.jsonl", SPOKEN | {"columns": {"messages": "dialogue"}})],
)
def test_message_keys_map_other_keys(name: str, options: dict[str, Any]) -> None:
    [row] = case(name)
    expected = [{"role": "user", "content": "Left?"}, {"role": "assistant", "content": "Right."}]
    assert parse(row, **options).messages == expected


def test_role_map_wins_over_known_speaker_names() -> None:
    row = {"messages": [{"from": "gpt", "value": "hi"}, {"from": "me", "value": "ho"}]}
    assert parse(row, role_map={"gpt": "user", "me": "assistant"}).messages == [U, A]


def test_function_calls_and_observations_are_known_in_every_list() -> None:
    call = {"from": "function_call", "value": '{"name": "f", "arguments": {}}'}
    result = {"from": "observation", "value": "one"}
    expected = parse({"conversations": [HUMAN, call, result, GPT]})
    assert "<tool_call>" in expected.messages[1]["content"]
    assert "<tool_response>" in expected.messages[2]["content"]
    assert parse({"messages": [HUMAN, call, result, GPT]}) == expected
    assert parse({"prompt": [HUMAN, call, result], "completion": [GPT]}) == expected


def test_message_keys_leave_texts_and_the_system_field_alone() -> None:
    turns = [{"speaker": "client", "text": "hi"}, {"speaker": "agent", "text": "ho"}]
    system = {"role": "system", "content": "s"}
    assert parse({"messages": turns, "system": "s"}, **SPOKEN).messages == [system, U, A]
    assert parse({"prompt": "hi", "completion": "ho"}, **SPOKEN).messages == [U, A]


def test_message_keys_name_reasoning_calls_and_training() -> None:
    keys = {"reasoning_content": "why", "tool_calls": "calls", "train": "learn"}
    answer = {"role": "assistant", "why": "hm", "calls": [{"name": "f", "arguments": {}}], "learn": True}
    row = {"messages": [U, A | {"learn": False}, U, answer, {"role": "tool", "content": "1"}, A]}
    parsed = parse(row, message_keys=keys)
    assert parsed.trained == [False, False, False, True, False, True]
    assert parsed.messages[3]["content"].startswith("<think>\nhm\n</think>\n\n<tool_call>")


def test_fields_replaced_by_message_keys_are_counted_as_unused() -> None:
    counts: Counter[str] = Counter()
    row = {"messages": [{"speaker": "client", "text": "hi", "role": "x"}, {"speaker": "agent", "text": "ho"}]}
    parse_row(row, RowOptions(**SPOKEN), counts)
    assert counts == {"messages[].role": 1}


@pytest.mark.parametrize("turn", [U, {"speaker": "client", "content": "hi"}, {"text": "hi"}, {}])
def test_a_turn_without_a_mapped_key_is_a_bad_row(turn: dict[str, Any]) -> None:
    with pytest.raises(BadRowError, match=r"data.message_keys names '(speaker|text)'.*messages\[0\]"):
        parse({"messages": [turn, A]}, **SPOKEN)


@pytest.mark.parametrize(
    "wrong",
    [
        {"message_keys": {"speaker": "role"}},
        {"message_keys": {"role": "a"}, "conversation_column": "id", "role_column": "a", "content_column": "b"},
    ],
)
def test_mappings_that_cannot_work_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"data.{next(iter(wrong))}"):
        RowOptions(**wrong)


FLAGS = ["train", "training", "trainable", "loss", "loss_mask", "step_loss_mask", "loss_weight", "weight"]


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize(("no", "yes"), [(False, True), (0, 1), (0.0, 1.0)])
def test_flags_of_other_tools_leave_a_turn_untrained(flag: str, no: float, yes: float) -> None:
    row = {"messages": [U, A | {flag: no}, U, A | {flag: yes}, U | {flag: None}, A]}
    assert parse(row).trained == [False, False, False, True, False, True]
    turns = [HUMAN, GPT | {flag: no}, HUMAN, GPT]
    assert parse({"conversations": turns}).trained == [False, False, False, True]


@pytest.mark.parametrize("name", ["f20.a_loss_false.jsonl", "f20.b_weight0.jsonl"])
def test_rows_with_a_wrong_answer_do_not_train_it(name: str) -> None:
    assert parse(case(name)[0]).trained == [False, False, False, True]


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        *(({flag: wrong}, f"{flag} is not 0 or 1") for flag in FLAGS for wrong in (0.5, "false", [0, 1])),
        ({"train": True, "weight": 0}, "flags contradict each other"),
        ({"loss": False, "loss_mask": 1}, "flags contradict each other"),
        ({"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": True}]}, "a part of a message is marked"),
        ({"training_detail": [{"begin_offset": 0}], "train": True}, "a part of a message is marked"),
    ],
)
def test_conflicting_or_invalid_flags_are_a_bad_row(flags: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRowError, match=r"messages\[1\]") as caught:
        parse({"messages": [U, A | flags]})
    assert caught.value.reason == reason


def test_flags_that_agree_are_accepted() -> None:
    assert parse({"messages": [U, A | {"train": False, "weight": 0, "loss": 0.0}, U, A]}).trained == [0, 0, 0, 1]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_has_several_names(key: str) -> None:
    assert parse({"messages": [U, A | {key: "hm"}]}).messages[1]["content"] == "<think>\nhm\n</think>\n\nho"
    with pytest.raises(BadRowError, match="reasoning is not text"):
        parse({"messages": [U, A | {key: [{"text": "hm"}]}]})


@pytest.mark.parametrize(
    "calls",
    [
        [{"name": "f", "arguments": {"x": None}}],
        [{"function": {"name": "f", "arguments": '{"x": null}'}, "type": "function"}],
        [{"name": "f", "parameters": {"x": None}}],
        '[{"name": "f", "arguments": {"x": null}}]',
        ['{"name": "f", "arguments": {"x": null}}'],
    ],
)
def test_a_null_argument_stays_and_calls_may_be_json(calls: Any) -> None:
    text = parse({"messages": [U, {"role": "assistant", "tool_calls": calls}]}).messages[1]["content"]
    assert '{"name": "f", "arguments": {"x": null}}' in text
