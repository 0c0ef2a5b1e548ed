"""Training, validation and test data have rows of one kind, which is known before anything is tokenised."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.conftest import chat
from phi3_lightning import ChatDataModule
from phi3_lightning.data import datamodule as module
from phi3_lightning.errors import ConfigError

Write = Callable[..., str]
ROWS: dict[str, Any] = {
    "a chat": chat(),
    "a pair of chosen and rejected": {"prompt": "a question", "chosen": "the answer", "rejected": "the"},
    "an answer with a label": chat() | {"label": False},
}


@pytest.fixture
def data(tokenizer_folder: str, tmp_path: Path) -> Callable[..., ChatDataModule]:
    def data(**options: Any) -> ChatDataModule:
        own = {"tokenizer": tokenizer_folder, "max_length": 120, "num_workers": 0, "cache_dir": str(tmp_path / "cache")}
        return ChatDataModule(**own | options)

    return data


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize(("name", "other"), list(itertools.permutations(ROWS, 2)))
def test_splits_of_two_kinds_are_refused_before_they_are_tokenised(
    data: Callable[..., ChatDataModule], write: Write, tmp_path: Path, split: str, name: str, other: str
) -> None:
    files = {"train": write([ROWS[name]], "train.jsonl"), split: write([ROWS[other]], "other.jsonl")}
    told = rf"data.{split}: .*other.jsonl:1 is {other}, and .*train.jsonl:1 in data.train is {name}; .*data.format"
    with pytest.raises(ConfigError, match=told):
        data(**files).prepare_data()
    assert not (tmp_path / "cache").exists()


def test_the_first_row_that_can_be_used_counts(data: Callable[..., ChatDataModule], write: Write) -> None:
    bad = {"prompt": "a question", "chosen": "x", "rejected": "x"}
    train = write([bad, "{", "5", chat(), chat()], "train.jsonl")
    found = data(train=train, val=write([chat()], "val.jsonl"), on_bad_row="skip")
    found.prepare_data()
    assert found.first_rows() == {"train": ("chat", f"{train}:4"), "val": ("chat", f"{Path(train).parent}/val.jsonl:1")}
    assert data(train=write([bad], "bad.jsonl"), predict=train, val_fraction=0.0).first_rows() == {}


def test_data_of_the_hub_are_compared_once_they_are_tokenised(
    data: Callable[..., ChatDataModule], write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "first_row", lambda *_: None)  # as of a set that is downloaded later
    found = data(train=write([chat()], "train.jsonl"), val=write([ROWS["an answer with a label"]], "val.jsonl"))
    found.prepare_data()
    with pytest.raises(ConfigError, match=r"data.val: .*val.jsonl:1 is an answer with a label, .*data.train is a chat"):
        found.setup("fit")


def test_chosen_answers_are_trained_as_chats_by_naming_their_column(
    data: Callable[..., ChatDataModule], write: Write
) -> None:
    rows = [ROWS["a pair of chosen and rejected"]] * 2
    found = data(train=write(rows), columns={"completion": "chosen"}, val_fraction=0.0)
    assert [kind for kind, _ in found.first_rows().values()] == ["chat"]
    whole = [{"chosen": chat()["messages"], "rejected": chat(answer="the")["messages"]}] * 2
    found = data(train=write(whole), columns={"messages": "chosen"}, val_fraction=0.0)
    assert [kind for kind, _ in found.first_rows().values()] == ["chat"]
    found.prepare_data()
    found.setup("fit")
    assert found.statistics["train"].unused == {"rejected": 2}
