"""A stream gives every row to one reader, repeats without end, and resumes where it stopped."""

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from phi3_lightning.data.datamodule import ChatDataModule
from phi3_lightning.errors import ConfigError, DataError

from .conftest import chat
from .test_datamodule import Recorder, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]
ROWS = 200


@pytest.fixture
def stream(write: Callable[..., str], tokenizer_folder: str, tmp_path: Path) -> Callable[..., ChatDataModule]:
    path = write([chat(f"question {index}", "word " * (index % 20)) for index in range(ROWS)])

    def stream(**options: Any) -> ChatDataModule:
        small = {"train": path, "tokenizer": tokenizer_folder, "max_length": 400, "batch_size": 2, "num_workers": 0}
        small |= {"streaming": True, "val_fraction": 0.0, "cache_dir": str(tmp_path / "cache")}
        return ChatDataModule(**(small | options))

    return stream


def rows(loader: Any, count: int) -> list[int]:
    batches = itertools.islice(iter(loader), count)
    return [row for batch in batches for document in batch["document_ids"] for row in document]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_row_goes_to_one_rank_once_per_pass(
    stream: Callable[..., ChatDataModule], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, packing: bool, ranks: int
) -> None:
    seen = []
    for rank in range(ranks):
        datamodule = stream(packing=packing, batch_size=1)
        datamodule.trainer = trainer(tmp_path, max_steps=1)
        monkeypatch.setattr(Trainer, "distributed_sampler_kwargs", {"num_replicas": ranks, "rank": rank})
        datamodule.prepare_data()
        datamodule.setup("fit")
        first: list[int] = []
        for batch in datamodule.train_dataloader():
            own = [row for document in batch["document_ids"] for row in document]
            if set(own) & set(first):
                break  # the second pass
            first += own
        seen += first
    assert sorted(seen) == list(range(1, ROWS + 1))
    assert datamodule.describe_rows([7])[0].endswith("chats.jsonl:7")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_resumes_where_it_stopped(
    stream: Callable[..., ChatDataModule], tmp_path: Path, num_workers: int
) -> None:
    keep = ModelCheckpoint(tmp_path / "kept", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = Recorder()
    options = {"max_epochs": -1, "enable_checkpointing": True, "callbacks": [keep]}
    trainer(tmp_path, max_steps=17, **options).fit(whole, stream(num_workers=num_workers))
    for step in (1, 6, 9):
        module = Recorder()
        path = tmp_path / "kept" / f"step={step}.ckpt"
        run = trainer(tmp_path, max_steps=17, max_epochs=-1)
        run.fit(module, datamodule=stream(num_workers=num_workers), ckpt_path=path)
        assert module.trained == whole.trained[step:]


def test_workers_leave_the_environment_as_it_is(stream: Callable[..., ChatDataModule], tmp_path: Path) -> None:
    environments = []

    class FromWorkers(Recorder):
        def on_train_batch_end(self, *_: Any) -> None:
            environments.append(os.environ.get("TOKENIZERS_PARALLELISM"))

    datamodule = stream(num_workers=2)
    datamodule.setup()
    datamodule.tokenizer.backend_tokenizer.encode_batch(["word"] * 100)  # this starts threads
    trainer(tmp_path, max_steps=2, max_epochs=-1).fit(FromWorkers(), datamodule)
    assert environments == [None, None]
    assert "TOKENIZERS_PARALLELISM" not in os.environ


def test_passes_have_different_orders(stream: Callable[..., ChatDataModule]) -> None:
    datamodule = stream(packing=False)
    datamodule.prepare_data()
    datamodule.setup()
    seen = rows(datamodule.train_dataloader(), ROWS)
    assert sorted(seen[:ROWS]) == sorted(seen[ROWS:])
    assert seen[:ROWS] != seen[ROWS:]


def test_bad_rows_stop_the_run_or_are_left_out(
    stream: Callable[..., ChatDataModule], write: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    path = write([chat(), "{", chat()], "bad.jsonl")
    for policy in ("raise", "skip"):
        datamodule = stream(train=path, on_bad_row=policy, packing=False)
        datamodule.prepare_data()
        datamodule.setup()
        if policy == "raise":
            with pytest.raises(DataError, match=r"bad\.jsonl:2: not JSON"):
                rows(datamodule.train_dataloader(), 1)
        else:
            assert sorted(rows(datamodule.train_dataloader(), 1)) == [1, 3]
            assert "bad.jsonl:2" in caplog.text


@pytest.mark.parametrize("ranks", [1, 2])
def test_fields_that_are_not_used_are_named_once(
    stream: Callable[..., ChatDataModule],
    write: Callable[..., str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    ranks: int,
) -> None:
    path = write([chat() | {"lang": "de", "source": "x"} for _ in range(200)], "fields.jsonl")
    for rank in range(ranks):
        datamodule = stream(train=path)
        datamodule.trainer = trainer(tmp_path, max_steps=1)
        monkeypatch.setattr(Trainer, "distributed_sampler_kwargs", {"num_replicas": ranks, "rank": rank})
        datamodule.prepare_data()
        datamodule.setup("fit")
        rows(datamodule.train_dataloader(), 20)
    assert caplog.text.count("train: fields that are not used: lang, source") == 1


def test_why_rows_are_dropped_is_logged_once(
    stream: Callable[..., ChatDataModule], write: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    path = write([chat("q", "word " * (300 * (index % 2))) for index in range(100)], "long.jsonl")
    datamodule = stream(train=path)
    datamodule.prepare_data()
    datamodule.setup()
    rows(datamodule.train_dataloader(), 60)
    assert caplog.text.count("train: rows are dropped: longer than max_length 400") == 1


def test_a_hub_set_is_streamed(stream: Callable[..., ChatDataModule], monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, configuration: None, *, streaming: bool, **options: Any) -> Any:
        assert streaming
        return datasets.Dataset.from_list([chat(), chat()]).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    datamodule = stream(train="someone/chats")
    datamodule.prepare_data()
    datamodule.setup()
    assert sorted(rows(datamodule.train_dataloader(), 1)) == [1, 2]


def test_options_unsupported_by_streams_are_refused(stream: Callable[..., ChatDataModule], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.max_steps"):
        trainer(tmp_path).fit(Recorder(), stream())
    with pytest.raises(ConfigError, match=r"trainer\.limit_train_batches: 1 makes epochs"):
        trainer(tmp_path, max_steps=3, max_epochs=-1, limit_train_batches=1).fit(Recorder(), stream())
    with pytest.raises(ConfigError, match=r"data\.val_fraction"):
        stream(val_fraction=0.1)
    with pytest.raises(ConfigError, match=r"data\.mixture"):
        stream(mixture=[1.0])
    datamodule = stream(val=stream().options.train)
    with pytest.raises(ConfigError, match=r"trainer\.val_check_interval"):
        trainer(tmp_path, max_steps=3).fit(Recorder(), datamodule)


def test_a_stream_trains_with_validation_from_files(stream: Callable[..., ChatDataModule], tmp_path: Path) -> None:
    module = Recorder()
    run = trainer(tmp_path, max_steps=4, max_epochs=-1, val_check_interval=2, num_sanity_val_steps=0)
    run.fit(module, stream(val=stream().options.train))
    assert len(module.validated) == 2 * ROWS


def test_fewer_rows_than_readers_is_an_error_not_a_hang(
    stream: Callable[..., ChatDataModule], write: Callable[..., str]
) -> None:
    datamodule = stream(train=write([chat()], "one.jsonl"), num_workers=2)
    datamodule.prepare_data()
    datamodule.setup()
    with pytest.raises(DataError, match="too few rows"):
        rows(datamodule.train_dataloader(), 3)
