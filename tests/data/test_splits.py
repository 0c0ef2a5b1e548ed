"""Rows of one group stay together, in a fraction that seed and data decide."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phi3_lightning.data.datamodule import ChatDataModule
from phi3_lightning.data.splits import choose_groups
from phi3_lightning.errors import ConfigError, DataError

from .conftest import chat

Data = Callable[..., ChatDataModule]


@pytest.fixture
def data(write: Callable[..., str], tmp_path: Path, tokenizer_folder: str) -> Data:
    def data(rows: list[Any], **options: Any) -> ChatDataModule:
        small = {"train": write(rows), "tokenizer": tokenizer_folder, "max_length": 64, "cache_dir": str(tmp_path)}
        made = ChatDataModule(**(small | options))
        made.prepare_data()
        made.setup()
        return made

    return data


def lines_by_split(made: ChatDataModule, rows: list[Any]) -> dict[str, set[int]]:
    """The line numbers of each split."""
    found = {}
    for split in ("train", "val"):
        places = made.prepared[split].describe(made.plans[split].documents.tolist())  # type: ignore[index]
        found[split] = {int(place.rpartition(":")[2]) - 1 for place in places}
    assert found["train"] | found["val"] == set(range(len(rows)))
    assert not found["train"] & found["val"]
    return found


@pytest.mark.parametrize("name", ["customer", "source file"])
@pytest.mark.parametrize("truncation", ["drop", "split"])
def test_a_group_is_on_one_side(data: Data, name: str, truncation: str) -> None:
    groups = [index % 17 if index % 3 else f"g{index % 5}" for index in range(200)]
    rows = [chat(f"q {index}", "a " * (index % 40)) | {name: group} for index, group in enumerate(groups)]
    options = {
        "group_by": name,
        "val_fraction": 0.2,
        "truncation": truncation,
        "max_length": 128 if truncation == "drop" else 40,
    }
    made = data(rows, seed=0, **options)
    found = lines_by_split(made, rows)
    assert not {groups[row] for row in found["train"]} & {groups[row] for row in found["val"]}
    assert 0.1 < len(found["val"]) / len(rows) <= 0.2
    assert lines_by_split(data(rows, seed=0, **options), rows) == found
    assert lines_by_split(data(rows, seed=5, **options), rows) != found


def test_numbers_and_texts_of_one_value_are_one_group(data: Data) -> None:
    groups = [1, 1.0, "1", 2, 2.0, "2"] * 5
    rows = [chat(f"q {index}") | {"customer": group} for index, group in enumerate(groups)]
    found = lines_by_split(data(rows, group_by="customer", val_fraction=0.5), rows)
    assert Counter(str(groups[row]).removesuffix(".0") for row in found["val"]) in ({"1": 15}, {"2": 15})


@pytest.mark.parametrize("value", [None, "", True, ["a"], float("nan")])
def test_a_row_without_a_group_is_a_bad_row(data: Data, value: object) -> None:
    rows = [chat() | {"customer": 1}, chat() | {"customer": value}, chat()]
    with pytest.raises(DataError, match="2 of 3 rows") as caught:
        data(rows, group_by="customer")
    assert "chats.jsonl:2: no group: data.group_by needs a text or a number in 'customer'" in str(caught.value)


def test_a_table_of_messages_is_grouped_by_a_column_that_a_conversation_shares(data: Data) -> None:
    rows = []
    for ticket in range(30):
        for role in ("user", "assistant"):
            rows.append({"ticket": ticket, "from": role, "body": f"{ticket}", "customer": ticket % 6})
    table = {"conversation_column": "ticket", "role_column": "from", "content_column": "body"}
    made = data(rows, **table, group_by="customer", val_fraction=0.3)
    held_out = made.prepared["val"].origins(made.plans["val"].documents.tolist())
    trained = made.prepared["train"].origins(made.plans["train"].documents.tolist())
    assert not {int(origin.id) % 6 for origin in held_out} & {int(origin.id) % 6 for origin in trained}  # type: ignore[arg-type]
    rows[1]["customer"] = 99
    with pytest.raises(DataError, match=r"chats\.jsonl:1: columns differ"):
        data(rows, **table, group_by="customer")


def test_one_group_cannot_be_divided(data: Data) -> None:
    with pytest.raises(DataError, match=r"data\.group_by: all rows are of one group"):
        data([chat(f"{index}") | {"customer": 1} for index in range(9)], group_by="customer")


@pytest.mark.parametrize(
    "options", [{"val": "x.jsonl"}, {"val_fraction": 0.0}, {"val_fraction": 0.0, "streaming": True}]
)
def test_a_group_column_without_effect_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"data\.group_by: 'customer' only decides"):
        ChatDataModule(train="x.jsonl", group_by="customer", **options)


@pytest.mark.parametrize(
    ("sizes", "size"), [([50, 50], 5), ([90, 5, 5], 10), ([1] * 100, 5), ([60, 40], 5), ([2, 3, 4], 1)]
)
def test_the_share_is_as_large_as_whole_groups_allow(sizes: list[int], size: int) -> None:
    groups = np.repeat(np.arange(len(sizes)), sizes)
    for seed in range(20):
        chosen = choose_groups(groups, size, seed)
        count = int(chosen.sum())
        assert 0 < count < len(groups)
        assert count <= size or count == min(sizes)
        whole = np.bincount(groups[chosen], minlength=len(sizes))
        assert all(part in {0, total} for part, total in zip(whole.tolist(), sizes, strict=True))


def test_json_and_csv_agree(data: Data, tmp_path: Path) -> None:
    rows = [{"prompt": f"q{index}", "completion": "a", "customer": index % 4} for index in range(20)]
    (tmp_path / "rows.csv").write_text(
        "prompt,completion,customer\n" + "".join(",".join(map(str, row.values())) + "\n" for row in rows)
    )
    from_csv = data([], train=str(tmp_path / "rows.csv"), group_by="customer", val_fraction=0.25)
    from_json = data([json.dumps(row) for row in rows], group_by="customer", val_fraction=0.25)
    documents = [made.plans["val"].documents.tolist() for made in (from_csv, from_json)]
    assert sorted(documents[0]) == sorted(documents[1])
