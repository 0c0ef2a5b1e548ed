"""Two real processes that start together from an empty cache: every row once, and neither hangs."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from phi3_lightning.batch import Batch, PromptBatch
from phi3_lightning.data.datamodule import ChatDataModule

from .conftest import chat
from .test_datamodule import Recorder, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed"),
]


class FileRecorder(Recorder):
    """Appends the rows of each rank to a file of its own."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def record(self, stage: str, rows: list[int]) -> None:
        with (self.folder / f"{stage}-{self.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(rows) + "\n")

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        self.record(f"train{self.current_epoch}", [row for rows in batch["document_ids"] for row in rows])
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.record("val", [row for rows in batch["document_ids"] for row in rows])

    def predict_step(self, batch: PromptBatch) -> list[int]:
        self.record("predict", batch["document_ids"])
        return batch["document_ids"]


def test_two_processes_share_every_row_once(write: Callable[..., str], tokenizer_folder: str, tmp_path: Path) -> None:
    path = write([chat(f"question {index}", "word " * index) for index in range(23)])
    datamodule = ChatDataModule(
        train=path,
        predict=path,
        tokenizer=tokenizer_folder,
        max_length=128,
        packing=False,
        batch_size=3,
        val_fraction=0.2,
        num_workers=0,
        cache_dir=str(tmp_path / "cache"),
    )
    options = {"devices": 2, "strategy": "ddp_fork", "num_sanity_val_steps": 0}
    trainer(tmp_path, max_epochs=2, **options).fit(FileRecorder(tmp_path), datamodule)
    trainer(tmp_path, **options).predict(FileRecorder(tmp_path), datamodule=datamodule, return_predictions=False)

    def seen(stage: str) -> list[int]:
        ranks = [(tmp_path / f"{stage}-{rank}.jsonl").read_text().splitlines() for rank in (0, 1)]
        assert len(ranks[0]) == len(ranks[1])  # with unequal numbers of batches one rank would wait for the other
        return sorted(row for lines in ranks for line in lines for row in json.loads(line))

    assert seen("train0") == seen("train1")
    assert sorted(seen("train0") + seen("val")[::2]) == list(range(23))
    assert seen("val")[::2] == seen("val")[1::2]  # validated after both epochs
    assert seen("predict") == list(range(23))
    assert len(list((tmp_path / "cache" / "phi3_lightning").iterdir())) == 2
