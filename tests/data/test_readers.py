"""Unreadable files are named with their kind and the command that converts them, and the command works."""

import bz2
import csv
import gzip
import json
import lzma
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from phi3_lightning.config.data import RowOptions
from phi3_lightning.data.conversation import BadRowError, Conversation, PlainText
from phi3_lightning.data.formats import parse_row
from phi3_lightning.data.readers import decode_line, read_rows
from phi3_lightning.data.sources import find_sources
from phi3_lightning.errors import DataError

CASES = Path(__file__).parents[1] / "cases"
CHAT = '{"prompt": "Wo ist die Tür?", "completion": "Über dem Keller."}'
TABLE = "prompt,completion\r\nWo ist die Tür?,Über dem Keller.\r\n"
ROW = {"prompt": "Wo ist die Tür?", "completion": "Über dem Keller."}


def read(path: Path) -> list[Any]:
    return [decode_line(row) if isinstance(row, bytes) else row for _, row in read_rows(path)]


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as error:
        read(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


def cure(message: str) -> Path:
    """Run the command that a message ends with; return the file that it writes."""
    command = re.search(r"(?:gunzip|iconv|python|zstd) .*", message)
    assert command, message
    folder = Path(sys.executable).parent
    subprocess.run(command[0], shell=True, check=True, env=os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"})
    return Path(shlex.split(command[0])[-1])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("name", "text", "encoding", "named"),
    [
        ("chats.csv", TABLE, "utf-16", "UTF-16"),
        ("chats.csv", TABLE.replace(",", "\t"), "utf-16", "UTF-16"),
        ("chats.csv", TABLE, "utf-16-le", "UTF-16LE"),
        ("chats.tsv", TABLE.replace(",", "\t"), "utf-16-be", "UTF-16BE"),
        ("chats.csv", TABLE, "utf-32", "UTF-32"),
        ("chats.csv", TABLE, "cp1252", "CP1252"),
        ("chats.jsonl", CHAT, "utf-16", "UTF-16"),
        ("chats.jsonl", CHAT, "utf-16-le", "UTF-16LE"),
        ("chats.json", f"[\n{CHAT}\n]", "utf-16-be", "UTF-16BE"),
        ("chats.json", f"[\n{CHAT}\n]", "cp1252", "CP1252"),
    ],
)
def test_another_encoding_is_named_with_the_command_that_converts_it(
    tmp_path: Path, name: str, text: str, encoding: str, named: str, packed: bool
) -> None:
    path = tmp_path / f"my chats {name}{'.gz' * packed}"
    path.write_bytes(gzip.compress(text.encode(encoding)) if packed else text.encode(encoding))
    message = refusal(path)
    assert named in message
    if named == "CP1252":
        assert f"{path}:2: not UTF-8 (byte 0xfc)" in message
    assert read(cure(message)) == [ROW]


@pytest.mark.parametrize(("name", "part"), [("f22.b_utf16.csv", "UTF-16"), ("f22.c_cp1252.csv", "CP1252")])
def test_spreadsheet_exports_are_refused_with_a_working_remedy(tmp_path: Path, name: str, part: str) -> None:
    message = refusal(Path(shutil.copy(CASES / name, tmp_path)))
    assert part in message
    assert read(cure(message))[0].keys() == {"prompt", "completion"}


def test_a_line_of_another_encoding_is_one_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_bytes(f"{CHAT}\n".encode() + CHAT.encode("cp1252"))
    (_, good), (number, bad) = read_rows(path)
    assert decode_line(good) == ROW  # type: ignore[arg-type]
    assert number == 2
    with pytest.raises(BadRowError, match=r"not UTF-8: byte 0xfc.*iconv -f CP1252"):
        decode_line(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("suffix", "sign", "named"),
    [
        (".csv", ";", "semicolons"),
        (".csv", "|", "bars"),
        (".csv", "\t", "tabs"),
        (".tsv", ",", "commas"),
        (".tsv", ";", "semi"),
    ],
)
def test_another_separator_is_refused_with_its_remedy(tmp_path: Path, suffix: str, sign: str, named: str) -> None:
    path = tmp_path / f"chats{suffix}"
    path.write_text(f'prompt{sign}completion\r\n"a{sign} ""b"" ";c, d\r\n'.replace(";c", f"{sign}c"), newline="")
    message = refusal(path)
    assert named in message
    mended = path.rename(path.with_suffix(".tsv" if sign == "\t" else ".csv")) if "rename" in message else cure(message)
    expected = "c, d" if sign != "," else "c"
    if sign == ",":  # the last cell has a comma, which is one cell too many where commas separate
        path.with_suffix(".csv").write_text("prompt,completion\na,c\n")
    assert read(mended)[0]["completion"] == expected


def test_a_semicolon_separated_file_is_refused_with_a_working_remedy(tmp_path: Path) -> None:
    message = refusal(Path(shutil.copy(CASES / "f22.a_semicolon.csv", tmp_path)))
    assert "semicolons" in message
    assert read(cure(message)) == [{"prompt": "Wo ist die Lampe?", "completion": "Im Keller."}]


@pytest.mark.parametrize(
    ("text", "place", "named"),
    [
        ("prompt, completion\na,b\n", ":1", "blanks around the name ' completion'"),
        ("prompt,prompt\na,b\n", ":1", "'prompt' twice"),
        ("\nprompt,completion\n", ":1", "blank"),
        ("sep=;\nprompt;completion\n", ":1", "separator"),
        ("prompt,completion\na,b\na\n", ":3", "as many fields"),
        ("prompt,completion\na,b,c\n", ":2", "as many fields"),
        ('prompt,completion\na,b\n"a,b\nc,d\n', ":3", "never closed"),
        ("prompt,completion\ra,b\rc,d\r", ":1", "carriage return"),
        ('prompt,completion\na,"b"c\n', ":2", "expected after"),
        ("prompt,completion\na,b\0\n", "", "neither text"),
    ],
)
def test_a_broken_table_is_one_error_with_its_line(tmp_path: Path, text: str, place: str, named: str) -> None:
    path = tmp_path / "chats.csv"
    path.write_text(text, newline="")
    message = refusal(path)
    assert f"{path}{place}: " in message
    assert named in message


def test_a_long_cell_is_read_and_the_limit_of_the_process_stays(tmp_path: Path) -> None:
    path = tmp_path / "chats.csv"
    path.write_text(f"prompt,completion\n\na,{'b' * 200_000}\nc,d\n")
    limit = csv.field_size_limit()
    rows = read_rows(path)
    number, row = next(rows)
    assert csv.field_size_limit() == limit
    assert (number, len(row["completion"])) == (3, 200_000)  # type: ignore[index]
    assert list(rows) == [(4, {"prompt": "c", "completion": "d"})]
    assert csv.field_size_limit() == limit < 200_000


@pytest.mark.parametrize(
    "text", [",prompt,completion\n0,a,b\n", "\ufeffprompt,completion\r\na,b\r\n", "prompt,completion,,\na,b,,\n"]
)
def test_tables_of_pandas_and_spreadsheets_are_read(tmp_path: Path, text: str) -> None:
    path = tmp_path / "chats.csv"
    path.write_text(text, encoding="utf-8", newline="")
    [row] = read(path)
    assert (row["prompt"], row["completion"]) == ("a", "b")


def write_archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("xl/workbook.xml", "<workbook/>")


NOT_DATA = {
    "book.xlsx": (write_archive, "Excel workbook"),
    "old.csv": (lambda path: path.write_bytes(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"), "old Excel workbook"),
    "chats.jsonl.bz2": (lambda path: path.write_bytes(bz2.compress(CHAT.encode())), "bunzip2"),
    "chats.jsonl.xz": (lambda path: path.write_bytes(lzma.compress(CHAT.encode())), "unxz"),
    "chats.jsonl.zst": (lambda path: path.write_bytes(b"\x28\xb5\x2f\xfd\x04\x00"), "zstd -d"),
    "pointer.parquet": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "page.json": (lambda path: path.write_text("\n<!DOCTYPE html><html>"), "web page"),
    "model.json": (lambda path: path.write_bytes(b"\x80\x04\x95\x00\x01\x02"), "neither text"),
    "named.csv": (lambda path: pa.parquet.write_table(pa.table({"text": ["a"]}), path), "neither text"),
}


@pytest.mark.parametrize("name", NOT_DATA)
def test_files_without_rows_are_refused_before_loading(tmp_path: Path, name: str) -> None:
    write, named = NOT_DATA[name]
    write(tmp_path / name)  # type: ignore[operator]
    assert named in refusal(tmp_path / name)
    with pytest.raises(DataError, match=named):
        find_sources(str(tmp_path / name))


@pytest.mark.parametrize(
    "cell",
    [
        "[{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': \"It's\"}]",
        "[{'role': 'user', 'content': 'Hi'}\n {'role': 'assistant', 'content': 'Ho'}]",  # of numpy
        "array([{'role': 'user', 'content': 'Hi'}], dtype=object)",
    ],
)
@pytest.mark.parametrize("key", ["messages", "conversations", "tools"])
def test_pythons_repr_in_a_cell_is_named(cell: str, key: str) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    with pytest.raises(BadRowError, match=rf"'{key}' is Python's repr.*json\.dumps.*to_json"):
        parse_row({"messages": messages} | {key: cell} if key == "tools" else {key: cell}, RowOptions())


def test_pythons_repr_is_named_in_tables_lines_arrays_and_arguments(tmp_path: Path) -> None:
    [row] = read(CASES / "f22.d_repr.csv")
    with pytest.raises(BadRowError, match=r"'messages' is Python's repr.*ast\.literal_eval"):
        parse_row(row, RowOptions())
    with pytest.raises(BadRowError, match="the line is Python's repr"):
        decode_line(str(row).encode())
    path = tmp_path / "chats.json"
    path.write_text(str([row]))
    assert "Python's repr" in refusal(path)
    call = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{'city': 'Oslo'}"}]}
    with pytest.raises(BadRowError, match=r"arguments is Python's repr"):
        parse_row({"messages": [{"role": "user", "content": "q"}, call]}, RowOptions())


LINES = "First line.\r\nSecond line.\rThird line.\n"
SAME = "First line.\nSecond line.\nThird line.\n"


@pytest.mark.parametrize(
    "row",
    [
        {
            "messages": [
                {"role": "user", "content": LINES},
                {"role": "assistant", "content": [{"type": "text", "text": LINES}]},
            ]
        },
        {"conversations": [{"from": "human", "value": LINES}, {"from": "gpt", "value": LINES}]},
        {"instruction": LINES, "output": LINES},
        {"prompt": LINES, "completion": LINES},
    ],
)
def test_lines_of_contents_end_in_line_feeds(row: dict) -> None:
    parsed = parse_row(row, RowOptions())
    assert isinstance(parsed, Conversation)
    assert [message["content"] for message in parsed.messages] == [SAME, SAME]


def test_lines_of_texts_and_cells_end_in_line_feeds() -> None:
    assert parse_row({"text": LINES}, RowOptions()) == PlainText(SAME)
    parsed = parse_row(read(CASES / "f22.e_crlf_cell.csv")[0], RowOptions())
    assert isinstance(parsed, Conversation)
    assert parsed.messages[1]["content"] == "First line.\nSecond line."


def test_tool_calls_may_be_json_in_a_cell() -> None:
    calls = json.dumps([{"name": "f", "arguments": {"city": "Oslo"}}])
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": calls}]
    parsed = parse_row({"messages": messages}, RowOptions())
    assert isinstance(parsed, Conversation)
    assert parsed.messages[1]["content"] == '<tool_call>\n{"name": "f", "arguments": {"city": "Oslo"}}\n</tool_call>'
