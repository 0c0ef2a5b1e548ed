"""Rows are read again as their files have them, whatever became of them on the way to tokens."""

import csv
import json
from pathlib import Path

import pytest

import phi3_lightning
from phi3_lightning import ChatDataModule
from phi3_lightning.errors import DataError

TINY = Path(phi3_lightning.__file__).parent / "assets" / "tiny_phi3"
ROWS = [{"prompt": f"Say {i}", "completion": "word " * (i % 3 + 1), "difficulty": i} for i in range(9)]


def prepared(tmp_path, **options) -> ChatDataModule:
    small = {"tokenizer": str(TINY), "max_length": 64, "num_workers": 0, "cache_dir": str(tmp_path / "cache")}
    data = ChatDataModule(**small | options)
    data.setup("fit")
    return data


def write(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_held_out_rows_of_several_files_have_all_their_fields(tmp_path):
    blank = tmp_path / "a.jsonl"
    blank.write_text("\n" + "".join(json.dumps(row) + "\n\n" for row in ROWS[:4]))
    data = prepared(tmp_path, train=[str(blank), write(tmp_path / "b.jsonl", ROWS[4:])], val_fraction=0.5)
    ids = data.plans["val"].documents.tolist()
    assert 2 <= len(ids) < len(ROWS)
    assert data.rows("validate", ids[::-1]) == [ROWS[index] for index in ids[::-1]]


def test_a_row_that_was_split_is_the_row_of_all_its_documents(tmp_path):
    row = {"text": "word " * 200, "topic": "words"}
    path = write(tmp_path / "a.jsonl", [row])
    data = prepared(tmp_path, train=path, val=path, truncation="split")
    ids = data.plans["val"].documents.tolist()
    assert len(ids) > 1
    assert data.rows("validate", ids) == [row] * len(ids)


def test_a_conversation_of_a_table_is_one_row(tmp_path):
    path = tmp_path / "tickets.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["ticket", "role", "text"])
        for ticket in ("A", "B"):
            writer.writerows([[ticket, "user", f"Where is {ticket}?"], [ticket, "assistant", f"{ticket} is here."]])
    columns = {"conversation_column": "ticket", "role_column": "role", "content_column": "text"}
    data = prepared(tmp_path, train=str(path), val=str(path), **columns)
    [row] = data.rows("validate", [1])
    assert row["id"] == "B"
    assert [message["content"] for message in row["messages"]] == ["Where is B?", "B is here."]


def test_a_row_that_is_gone_is_an_error_with_its_place(tmp_path):
    path = write(tmp_path / "a.jsonl", ROWS)
    data = prepared(tmp_path, train=path, val=path)
    write(tmp_path / "a.jsonl", ROWS[:3])
    with pytest.raises(DataError, match=r"a.jsonl:8: the row is gone since the data were prepared"):
        data.rows("validate", [1, 7])
