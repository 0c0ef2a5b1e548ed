"""Tables of one message per row become conversations, or errors that name column, values and remedy."""

import datetime as dt
import pickle
import re
import shlex
import uuid
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from phi3_lightning.config.data import RowOptions
from phi3_lightning.data.chunk import Job
from phi3_lightning.data.conversation import BadRowError
from phi3_lightning.data.encode import Encoder
from phi3_lightning.data.readers import read_rows
from phi3_lightning.data.tables import group_messages
from phi3_lightning.data.template import ChatTemplate
from phi3_lightning.errors import ConfigError, DataError

CASES = Path(__file__).parents[1] / "cases"
CUSTOMERS = {"customer": "user", "agent": "assistant"}
COLUMNS = {"conversation_column": "id", "role_column": "who", "content_column": "text", "order_column": "when"}
TABLE = COLUMNS | {"role_map": CUSTOMERS}


def collect(rows: list[Any], **options: Any) -> tuple[dict[int, Any], dict[int, str]]:
    """Conversations and faults by row number."""
    return split_faults(list(group_messages(enumerate(rows, start=1), RowOptions(**(TABLE | options)), "chats.csv")))


def split_faults(gathered: list[Any]) -> tuple[dict[int, Any], dict[int, str]]:
    chats = {number: row for number, row in gathered if not isinstance(row, BadRowError)}
    return chats, {number: str(row) for number, row in gathered if isinstance(row, BadRowError)}


def contents_of(chat: Any) -> str:
    return "".join(message["content"] for message in chat["messages"])


def message(id: object = 7, when: object = 1, text: object = "x", who: object = "customer", **more: Any) -> dict:
    return {"id": id, "who": who, "text": text, "when": when, **more}


def test_messages_are_gathered_by_conversation() -> None:
    table = [message(2, "9", "c"), message(1, "10", "b", "agent"), message(1, "9", "a"), b"broken", ["a list"]]
    chats, faults = collect(table)
    assert chats == {
        1: {"id": 2, "messages": [{"role": "customer", "content": "c"}]},
        2: {"id": 1, "messages": [{"role": "customer", "content": "a"}, {"role": "agent", "content": "b"}]},
    }
    assert faults.keys() == {4, 5}
    assert "not JSON" in faults[4]
    assert "not an object" in faults[5]


@pytest.mark.parametrize(
    "empty",
    ["", " ", None, float("nan"), "nan", "None", "NULL", "<NA>", "N/A", True, False, 7.5, [7], {}, b"", float("inf")],
)
def test_rows_without_a_conversation_id_are_bad_rows(empty: object) -> None:
    chats, faults = collect([message(empty, 1), message(empty, 2), message(7, 3)])
    assert list(chats) == [3]
    assert faults.keys() == {1, 2}
    assert all("data.conversation_column" in fault and repr(empty) in fault for fault in faults.values())


@pytest.mark.parametrize(
    "same", [(1, 1.0), (1.0, Decimal(1)), ("a", "a"), (0, 0.0), (b"a", b"a"), (uuid.UUID(int=3), uuid.UUID(int=3))]
)
def test_whole_floats_equal_integer_ids(same: tuple[object, object]) -> None:
    chats, faults = collect([message(same[0], 1, "a"), message(same[1], 2, "b")])
    assert [contents_of(chat) for chat in chats.values()] == ["ab"]
    assert not faults


@pytest.mark.parametrize("rounded", [float(2**53), 1.2e18, "1.23457E+17", "1,23457E+17"])
def test_rounded_ids_are_bad_rows(rounded: object) -> None:
    _, faults = collect([message(rounded)])
    assert "no conversation id" in faults[1]


@pytest.mark.parametrize("name", ["f18.a_blank_ids.csv", "f18.d_null_ids.jsonl", "f18.c_float_ids.parquet"])
def test_reported_files_without_conversation_ids_are_refused(name: str) -> None:
    chats, faults = split_faults(list(group_messages(read_rows(CASES / name), RowOptions(**TABLE), name)))
    bad = {"f18.a_blank_ids.csv": {2, 3, 4, 5}, "f18.d_null_ids.jsonl": {1, 2}, "f18.c_float_ids.parquet": {3}}
    assert faults.keys() == bad[name]
    assert [len(chat["messages"]) for chat in chats.values()] == [2] * (2 if "float" in name else 1)


DAY = dt.datetime(2024, 9, 2, 9, 5)
ORDERS = [
    (3, 1, 2),
    ("10", "9", "9.5"),
    (3.0, Decimal(1), 2),
    ("12345678901234567892", "12345678901234567890", "12345678901234567891"),  # equal as floats
    ("2026-01-03", "2026-01-01", "2026-01-02"),
    ("2024-09-02T10:00:00Z", "2024-09-02T11:30:00+02:00", "2024-09-02 09:45:00 UTC"),
    ("20240903T0900", "2024-09-02T09:00", "2024-09-02 10:00:00.5"),
    (DAY + dt.timedelta(days=2), DAY, DAY.date() + dt.timedelta(days=1)),
]


@pytest.mark.parametrize("orders", ORDERS)
def test_numbers_and_iso_times_order_messages(orders: tuple[object, ...]) -> None:
    chats, faults = collect([message(7, order, text) for order, text in zip(orders, "cab", strict=True)])
    assert not faults
    assert contents_of(chats[1]) == "abc"


def test_messages_of_equal_or_no_order_stay_as_in_the_file() -> None:
    table = [message(7, order, text) for order, text in ((2, "c"), (1, "a"), (1, "b"))]
    assert contents_of(collect(table)[0][1]) == "abc"
    assert contents_of(collect(table, order_column=None)[0][1]) == "cab"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("9/2/2024 9:05 AM", "10/1/2024 8:00 AM"),
        ("02.09.2024 09:05", "01.10.2024 08:00"),
        ("09:05", "10:00"),
        ("first", "second"),
        (True, False),
    ],
)
def test_an_unusable_order_column_is_one_error(first: object, second: object) -> None:
    with pytest.raises(DataError) as error:
        collect([message(1, first), message(2, second)])
    assert all(
        part in str(error.value) for part in ("chats.csv", "data.order_column", repr(first), repr(second), "ISO 8601")
    )


def test_american_dates_are_refused_as_an_order() -> None:
    with pytest.raises(DataError, match=r"data\.order_column.*'9/2/2024 9:05 AM' and '10/1/2024 8:00 AM'"):
        list(group_messages(read_rows(CASES / "f18.b_us_dates.csv"), RowOptions(**TABLE), "table"))


@pytest.mark.parametrize(
    ("first", "second"),
    [(1, None), ("1", ""), (1.0, float("nan")), (1, "2024-09-02"), ("2024-09-02T09:05", "2024-09-02T09:05Z"), (1, "x")],
)
def test_a_conversation_with_mixed_kinds_of_order_is_refused(first: object, second: object) -> None:
    chats, faults = collect([message(7, first), message(7, second), message(8)])
    assert list(chats) == [3]
    assert all(part in faults[1] for part in ("conversation 7", "data.order_column", repr(first), repr(second)))


@pytest.mark.parametrize("option", ["conversation_column", "role_column", "content_column", "order_column"])
def test_a_missing_column_is_one_error(option: str) -> None:
    with pytest.raises(DataError, match=rf"chats\.csv: data\.{option} names 'nobody'.*'id', 'who', 'text', 'when'"):
        collect([message(), message(8)], **{option: "nobody"})
    with pytest.raises(DataError, match=r"data\.columns\.tools names 'nobody'"):
        collect([message()], columns={"tools": "nobody"})


@pytest.mark.parametrize("lacking", [{"id": 7, "text": "x", "when": 2}, message(who=None), message(who="")])
def test_a_message_without_a_role_is_named_by_its_row(lacking: dict) -> None:
    chats, faults = collect([message(), lacking, message(8)])
    assert list(chats) == [3]
    assert "row 2 has nothing in 'who' (data.role_column)" in faults[1]


def test_a_missing_field_is_not_taken_from_another_column() -> None:
    lacking = {"id": 7, "who": "agent", "when": 2, "content": "of something else", "role": "admin"}
    chats, _ = collect([message(), lacking])
    assert chats[1]["messages"][1] == {"role": "agent"}
    assert (chats[1]["content"], chats[1]["role"]) == ("of something else", "admin")  # where nothing reads them


def test_other_columns_become_fields_of_message_or_conversation() -> None:
    calls = [{"name": "f", "arguments": {}}]
    table = [
        message(7, 1, "a", system="Be kind.", tools="", weight=None),
        message(7, 2, "b", system="Be kind.", tools="[]", weight=0, tool_calls=calls, note=float("nan")),
    ]
    chats, _ = collect(table)
    assert chats[1] == {
        "id": 7,
        "messages": [
            {"role": "customer", "content": "a"},
            {"role": "customer", "content": "b", "weight": 0, "tool_calls": calls},
        ],
        "system": "Be kind.",
        "tools": "[]",
    }
    chats, _ = collect([message(7, 1, functions=[]), message(8, 1, functions=None)], columns={"tools": "functions"})
    assert [chat["functions"] for chat in chats.values()] == [[], None]


@pytest.mark.parametrize("column", ["system", "tools"])
def test_fields_of_a_conversation_may_not_change_within_it(column: str) -> None:
    _, faults = collect([message(7, 1, **{column: "one"}), message(7, 2, **{column: "two"})])
    assert all(part in faults[1] for part in (column, "'one'", "'two'"))


@pytest.mark.parametrize(
    "row",
    [
        {"id": None, "text": "trained whole"},
        {"id": None, "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"id": None, "prompt": "q", "completion": "a", "input_ids": [1, 2], "labels": [1, 2]},
    ],
)
def test_no_row_of_a_table_is_read_as_another_format(row: dict, tokenizer: Any) -> None:
    options = RowOptions(**TABLE)
    table = [row, message(7, 1, "q"), message(7, 2, "a", "agent", prompt="p", input_ids=[1], labels=[1])]
    chunk = Encoder(ChatTemplate(tokenizer), options).encode(
        Job(0, list(group_messages(enumerate(table), options, "table")))
    )
    assert [number for number, _ in chunk.bad] == [0]
    assert chunk.rows.tolist() == [1]
    assert tokenizer.decode(chunk.input_ids.tolist()) == "<|user|> q<|end|><|assistant|> a<|end|><|endoftext|>"


def test_table_options_with_another_format_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.format: 'text'.*data\.conversation_column"):
        RowOptions(**TABLE, format="text")
    assert RowOptions(**TABLE, format="messages").format == "messages"


def test_bad_row_errors_can_be_pickled() -> None:
    fault = pickle.loads(pickle.dumps(BadRowError("no order", "why")))
    assert (fault.reason, str(fault)) == ("no order", "no order: why")


def test_a_table_of_unknown_speakers_is_one_error_with_a_mapping_to_paste() -> None:
    table = [message(number, turn, who=who) for number in (1, 2) for turn, who in enumerate(["Jo's", "desk", "desk"])]
    with pytest.raises(DataError) as refused:
        collect(table, role_map=None)
    [option] = re.findall(r"--data\.role_map (.*)", str(refused.value))
    assert shlex.split(option) == ['{"Jo\'s": "user", "desk": "assistant"}']
    assert "'desk' (4), \"Jo's\" (2)" in str(refused.value)
    assert len(collect([*table, message(3, 0, who="user")], role_map=None)[0]) == 3  # a bad row each, not a bad table
