"""Pairs and labels are the same from JSON lines, a JSON array, CSV and Parquet."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from phi3_lightning.config.data import RowOptions
from phi3_lightning.data.encode import Encoder
from phi3_lightning.data.prepare import prepare
from phi3_lightning.data.sources import find_sources
from phi3_lightning.data.template import ChatTemplate

U = {"role": "user", "content": "a question"}
ANSWERS = [{"role": "assistant", "content": text} for text in ("the answer", "word")]
PAIRS = [
    {"prompt": "a question", "chosen": "the answer", "rejected": "word"},
    {"prompt": "", "chosen": [U, ANSWERS[0]], "rejected": [U, ANSWERS[1]]},
]
WHOLE = [PAIRS[1] | {"messages": [U, ANSWERS[0]], "score": 9.5}] * 2
SHAREGPT = [
    {
        "conversations": [{"from": "human", "value": "a question"}],
        "chosen": {"from": "gpt", "value": "the answer"},
        "rejected": {"from": "gpt", "value": "word", "note": None},
    }
]
LABELS = [{"prompt": "a question", "completion": text, "label": text == "word"} for text in ("the answer", "word")]


def write(rows: list[dict[str, Any]], folder: Path) -> dict[str, str]:
    paths = {name: folder / f"rows.{name}" for name in ("jsonl", "json", "csv", "parquet")}
    paths["jsonl"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths["json"].write_text(json.dumps(rows))
    with paths["csv"].open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(
            {key: json.dumps(value) if isinstance(value, list | dict) else value for key, value in row.items()}
            for row in rows
        )
    if len({type(row.get("chosen")) for row in rows}) == 1:  # a column has one type
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), paths["parquet"])
    return {name: str(path) for name, path in paths.items() if path.exists()}


@pytest.mark.parametrize("rows", [PAIRS, WHOLE, SHAREGPT, LABELS], ids=["pairs", "whole", "sharegpt", "labels"])
def test_every_file_gives_the_same(rows: list[dict[str, Any]], tokenizer: Any, tmp_path: Path) -> None:
    encoder = Encoder(ChatTemplate(tokenizer), RowOptions(max_length=256))
    texts = {}
    for name, path in write(rows, tmp_path).items():
        prepared = prepare(find_sources(path), encoder, on_bad_row="raise", cache_dir=str(tmp_path))
        documents = prepared.documents(list(range(len(rows))))
        sides = [side for document in documents for side in document.sides()]
        texts[name] = [(side.input_ids.tolist(), side.spans.tolist(), side[3:]) for side in sides]
    assert len(texts) >= 3
    assert all(each == texts["jsonl"] for each in texts.values())
    assert len(texts["jsonl"]) == (len(rows) if rows is LABELS else 2 * len(rows))
