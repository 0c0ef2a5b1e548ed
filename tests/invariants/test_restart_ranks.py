"""A restart on another number of ranks goes on with the rows that are left, each once; real processes."""

import json
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from phi3_lightning import ChatDataModule, Phi3LoRAModule
from phi3_lightning.callbacks import RunCheckpoint
from phi3_lightning.checkpoint.io import read_checkpoint
from phi3_lightning.errors import CheckpointError

TINY = str(Path(__file__).parents[2] / "src/phi3_lightning/assets/tiny_phi3")
ROWS = 23

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed"),
]


class Rows(pl.Callback):
    """Notes the rows that each rank trains, in a file of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        rows = [row for ids in batch["document_ids"] for row in ids]
        with (self.folder / f"epoch{trainer.current_epoch}-rank{trainer.global_rank}.txt").open("a") as file:
            file.write("".join(f"{row}\n" for row in rows))


def trained(folder: Path, epoch: int) -> list[int]:
    return [int(line) for path in folder.glob(f"epoch{epoch}-*") for line in path.read_text().splitlines()]


def run(folder: Path, ranks: int, accumulate: int, max_steps: int, resume: bool, rows: int = ROWS) -> None:
    chats = folder / "chats.jsonl"
    turns = [
        [{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": "so " * n}] for n in range(rows)
    ]
    chats.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    pl.seed_everything(5, verbose=False)
    module = Phi3LoRAModule(TINY, lora={"r": 2}, schedule={"name": "constant"}, gradient_checkpointing="none")
    data = ChatDataModule(
        train=str(chats), tokenizer=TINY, batch_size=1, max_length=64, packing=False, num_workers=0, val_fraction=0.0,
        cache_dir=str(folder / "cache"),
    )  # fmt: skip
    trainer = pl.Trainer(
        accelerator="cpu", devices=ranks, strategy="ddp_fork" if ranks > 1 else "auto", max_epochs=2,
        max_steps=max_steps, accumulate_grad_batches=accumulate, logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, callbacks=[Rows(folder), RunCheckpoint(str(folder))],
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=folder / "last.ckpt" if resume else None, weights_only=True)


@pytest.mark.parametrize(
    ("before", "after", "windows"),
    [
        (2, 1, (2, 2)),
        (1, 2, (2, 2)),
        (1, 1, (1, 4)),  # another accumulation is another window: none is cut, and no row is lost
    ],
)
def test_each_row_once_whatever_the_ranks(tmp_path, before, after, windows):
    run(tmp_path, before, windows[0], max_steps=3, resume=False)
    first = trained(tmp_path, 0)
    assert len(first) == 3 * windows[0] * before
    run(tmp_path, after, windows[1], max_steps=-1, resume=True)
    assert sorted(trained(tmp_path, 0)) == list(range(ROWS))
    assert sorted(trained(tmp_path, 1)) == list(range(ROWS))


def test_at_the_end_of_an_epoch_too(tmp_path):
    run(tmp_path, 2, 4, max_steps=3, resume=False)  # 12 batches on each of two ranks: 3 windows of 4
    assert sorted(trained(tmp_path, 0)) == list(range(ROWS))
    run(tmp_path, 1, 4, max_steps=-1, resume=True)
    assert sorted(trained(tmp_path, 0)) == list(range(ROWS))
    assert sorted(trained(tmp_path, 1)) == list(range(ROWS))
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 3 + 6


def test_other_data_in_the_middle_of_an_epoch_are_refused_whatever_says_where_it_ends(tmp_path):
    """Lightning asks for the loader before it knows the position where ``max_epochs`` is given."""
    run(tmp_path, 1, 2, max_steps=3, resume=False)
    with pytest.raises(CheckpointError, match=r"stopped within an epoch whose order cannot be continued: plan was"):
        run(tmp_path, 1, 2, max_steps=-1, resume=True, rows=ROWS + 5)
