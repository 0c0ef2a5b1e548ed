"""The same rows from every kind of file, folder and pattern."""

import csv
import errno
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from phi3_lightning.data.readers import decode_line
from phi3_lightning.data.sources import HubSource, find_sources
from phi3_lightning.errors import DataError

ROWS = [
    {"prompt": 'hi, "you"\nthere', "completion": "ho\u2028\U0001f600"},
    {"prompt": "a", "completion": "b" * 200_000},
]


def read(given: str | list[str]) -> list[Any]:
    rows = [row for source in find_sources(given) for _, row in source.rows()]
    return [decode_line(row) if isinstance(row, bytes) else row for row in rows]


def lines(path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def array(path: Path) -> None:
    path.write_text(json.dumps(ROWS, indent=1, ensure_ascii=False), encoding="utf-8-sig")


def comma(path: Path, delimiter: str = ",") -> None:
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def tab(path: Path) -> None:
    comma(path, "\t")


def parquet(path: Path) -> None:
    pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), path)


def arrow_file(path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write(table)


def arrow_stream(path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write(table)


KINDS: dict[str, Callable[[Path], None]] = {
    "a.jsonl": lines,
    "a.json": array,
    "lines.json": lines,
    "array.jsonl": array,
    "a.csv": comma,
    "a.tsv": tab,
    "a.parquet": parquet,
    "a.arrow": arrow_file,
    "b.arrow": arrow_stream,
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str, packed: bool) -> None:
    path = tmp_path / name
    KINDS[name](path)
    if packed:
        path = tmp_path / f"{name}.gz"
        path.write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    assert read(str(path)) == ROWS


def test_folders_and_patterns_in_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.jsonl", "a.csv", "deep/c.jsonl.gz"):
        content = "prompt,completion\na.csv,x\n" if name == "a.csv" else json.dumps({"prompt": name}) + "\n"
        (tmp_path / name).write_bytes(gzip.compress(content.encode()) if name.endswith("gz") else content.encode())
    (tmp_path / "notes.md").write_text("no data")
    names = ["a.csv", "b.jsonl", "deep/c.jsonl.gz"]
    assert [row["prompt"] for row in read(str(tmp_path))] == names
    assert [row["prompt"] for row in read(str(tmp_path / "*.*"))] == names[:2]
    assert [row["prompt"] for row in read([str(tmp_path / "b.jsonl"), str(tmp_path / "**/*.gz")])] == names[1:]
    sources = find_sources([str(tmp_path / "b.jsonl"), str(tmp_path)])
    assert [source.item for source in sources] == [0, 1, 1, 1]


def test_a_data_set_saved_by_datasets_is_read(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert read(str(tmp_path / "saved")) == ROWS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"prompt,completion\nx,y\nz\n", ":3: the row does not have as many fields"),
        ("a.csv", b'prompt,completion\n"x,y\n', ":2: in this row a quote"),
        ("a.csv", b"prompt\n\xff\n", ":2: not UTF-8"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 9999, mtime=0)[:60], "cannot be read|not JSON lines"),
        ("a.arrow", b"ARROW1xx", "not Arrow"),
        ("a.parquet", b"PAR1", "not Parquet"),
        ("a.json", b'[{"a": 1},', "not a JSON array"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read(str(tmp_path / name))
    assert name in str(caught.value)


@pytest.mark.parametrize("given", ["*.jsonl", "."])
def test_a_source_without_data_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no data files"):
        find_sources(given)


@pytest.mark.parametrize(
    "given", ["x" * 300, "/tmp/" + "x" * 300 + "/*.jsonl", "~nobody-of-that-name/x.jsonl", "a\0b.jsonl"]
)
def test_a_path_that_cannot_be_looked_up_is_named(given: str) -> None:
    with pytest.raises(DataError) as caught:
        find_sources(given)
    assert str(caught.value).startswith(given)


@pytest.mark.parametrize("split", ["train[:100]", "train[95%:]", "train[-500:]", "train_sft[10:20]", "train_sft"])
def test_a_slice_of_a_hub_split_is_not_taken_for_a_pattern(split: str) -> None:
    [source] = find_sources(f"owner/name:{split}")
    assert source.name() == f"owner/name:{split}"
    assert source.split == split


@pytest.mark.parametrize("option", ["train", "val", "test", "predict"])
def test_a_hub_set_defaults_to_the_split_of_the_option(option: Any) -> None:
    wanted = {"train": "train", "val": "validation", "test": "test", "predict": "train"}
    [source] = find_sources("owner/name", option)
    assert source == HubSource("owner/name", wanted[option])
    assert find_sources("owner/name:other", option) == [HubSource("owner/name", "other")]


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (ConnectionError("no route\nto host"), ["no route to host", "Check the spelling"]),
        (OSError(errno.ENOSPC, "No space left on device"), ["cannot be stored", "No space left", "HF_HOME"]),
        (PermissionError(errno.EACCES, "Permission denied", "/cache"), ["cannot be stored", "/cache", "HF_HOME"]),
    ],
)
def test_errors_of_the_hub_are_reported_in_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception, parts: list[str]
) -> None:
    def load_dataset(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError) as caught:
        HubSource("owner/name", "train").fingerprint()
    assert "\n" not in str(caught.value)
    assert all(part in str(caught.value) for part in parts)


@pytest.mark.parametrize("given", ["chats[12].jsonl", "chats:x[12]", "chats:*.jsonl", "owner/na?e"])
def test_a_pattern_is_not_taken_for_a_hub_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no data files"):
        find_sources(given)


@pytest.mark.parametrize(("split", "rows"), [("train[:1]", ROWS[:1]), ("train[-1:]", ROWS[-1:]), ("train", ROWS)])
def test_a_part_of_a_split_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str, rows: list[dict[str, str]]
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    lines(tmp_path / "set" / "train.jsonl")
    assert [row for _, row in HubSource(str(tmp_path / "set"), split).rows()] == rows
