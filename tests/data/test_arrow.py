"""Arrow gives each row the keys of all rows; the tokens are still those of JSON lines."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from phi3_lightning.config.data import RowOptions
from phi3_lightning.data.arrow import plain_rows
from phi3_lightning.data.chunk import Job
from phi3_lightning.data.encode import Encoder
from phi3_lightning.data.sources import HubSource, find_sources
from phi3_lightning.data.template import ChatTemplate, load_tokenizer

from .conftest import CASES, chat

TINY = Path(__file__).parents[2] / "src/phi3_lightning/assets/tiny_phi3"
ROWS: list[dict[str, Any]] = [json.loads(line) for line in (CASES / "f06.a.jsonl").read_text().splitlines()]


def write_parquet(rows: list[dict[str, Any]], folder: Path) -> str:
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
    return str(folder / "a.parquet")


def write_ipc(rows: list[dict[str, Any]], folder: Path) -> str:
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(folder / "a.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    return str(folder / "a.arrow")


def save_to_disk(rows: list[dict[str, Any]], folder: Path) -> str:
    datasets.Dataset.from_list(rows).save_to_disk(folder / "saved")
    return str(folder / "saved")


def save_with_json(rows: list[dict[str, Any]], folder: Path) -> str:
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    features = datasets.Features({"messages": datasets.List(datasets.Json()), "tools": datasets.List(datasets.Json())})
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(folder / "json")
    return str(folder / "json")


def tokens(source: Any) -> list[list[int]]:
    encoder = Encoder(ChatTemplate(load_tokenizer(str(TINY))), RowOptions(max_length=1024))
    chunk = encoder.encode(Job(0, list(source.rows())))
    assert not chunk.bad
    assert not chunk.unused
    ends = chunk.lengths.cumsum().tolist()
    return [chunk.input_ids[end - length : end].tolist() for end, length in zip(ends, chunk.lengths, strict=True)]


@pytest.mark.parametrize("write", [write_parquet, write_ipc, save_to_disk, save_with_json])
def test_tables_give_the_tokens_of_json_lines(write: Callable[..., str], tmp_path: Path) -> None:
    [lines] = find_sources(str(CASES / "f06.a.jsonl"))
    [table] = find_sources(write(ROWS, tmp_path))
    expected = tokens(lines)
    assert sum(map(len, expected)) == 544
    assert tokens(table) == expected


def test_the_reported_parquet_file_gives_the_tokens_of_json_lines() -> None:
    [lines], [table] = (find_sources(str(CASES / f"f06.a.{suffix}")) for suffix in ("jsonl", "parquet"))
    assert tokens(table) == tokens(lines)


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_sets_give_the_tokens_of_json_lines(streaming: bool, tmp_path: Path) -> None:
    write_parquet(ROWS, tmp_path)
    [lines] = find_sources(str(CASES / "f06.a.jsonl"))
    assert tokens(HubSource(str(tmp_path), "train", streaming=streaming)) == tokens(lines)


def plain(rows: list[dict[str, Any]], schema: pa.Schema | None = None) -> list[dict[str, Any]]:
    return list(plain_rows(pa.Table.from_pylist(rows, schema=schema).to_batches()))


@pytest.mark.parametrize(
    "rows",
    [
        [{"a": {"x": 1}}, {"a": {"y": {"z": [1, None]}}}, {"a": None}],
        [{"a": [{"x": 1}, {"y": "b"}]}, {"a": []}, {"a": [None, {"x": 2}]}],
        [{"enum": [None, "b"], "n": None, "text": "x"}, {"enum": [], "n": 1, "text": None}],
        [{"call": '{"x": null}'}],
        [chat(), {"messages": [{"role": "user", "content": "x"}]}],
    ],
)
def test_keys_added_by_arrow_are_removed_and_list_elements_kept(rows: list[dict[str, Any]]) -> None:
    assert plain(rows) == rows


def test_nulls_within_json_columns_stay() -> None:
    array = pa.array(['{"x": null, "y": [null]}', None], pa.json_())
    batch = pa.RecordBatch.from_arrays([array], ["arguments"])
    assert list(plain_rows([batch])) == [{"arguments": {"x": None, "y": [None]}}, {"arguments": None}]
