"""ChatDataModule under a foreign module, and under ours in a script, on the package's own chats."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from transformers import Phi3Config

import phi3_lightning
import synthetic
from phi3_lightning import ChatDataModule, Phi3LoRAModule
from phi3_lightning.batch import IGNORE_INDEX

TINY = Path(phi3_lightning.__file__).parent / "assets" / "tiny_phi3"


@pytest.fixture
def data(tmp_path):
    def data(**options) -> ChatDataModule:
        defaults = {
            "train": str(TINY / "chats_train.jsonl"),
            "val": str(TINY / "chats_val.jsonl"),
            "tokenizer": str(TINY),
            "max_length": 128,
            "batch_size": 8,
            "num_workers": 0,
            "cache_dir": str(tmp_path / "cache"),
        }
        return ChatDataModule(**defaults | options)

    return data


class TheirModel(pl.LightningModule):
    """Predicts the next token from the current one alone, without Phi-3."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        size = Phi3Config.from_pretrained(TINY).vocab_size
        self.table = nn.Sequential(nn.Embedding(size, 32), nn.Linear(32, size))
        self.seen: list[int] = []

    def loss(self, batch) -> torch.Tensor:
        logits = self.table(batch["input_ids"])[:, :-1]
        return nn.functional.cross_entropy(
            logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORE_INDEX
        )

    def training_step(self, batch, batch_idx):
        self.seen += [row for rows in batch["document_ids"] for row in rows]
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("their/loss", self.loss(batch), batch_size=int((batch["labels"] != IGNORE_INDEX).sum()))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.03)


@pytest.mark.parametrize("packing", [True, False])
def test_a_foreign_module_learns_from_our_data(tmp_path, data, packing):
    module, chats = TheirModel(), data(packing=packing)
    trainer = synthetic.trainer(tmp_path, max_epochs=1)
    (before,) = trainer.validate(module, chats, verbose=False)
    trainer.fit(module, chats)
    assert sorted(module.seen) == list(range(chats.train_documents))
    assert trainer.callback_metrics["their/loss"].item() < before["their/loss"] - 1


def test_both_classes_train_and_answer_in_a_script(tmp_path, data):
    chats = data(predict=str(TINY / "prompts.jsonl"))
    schedule = {"name": "constant", "warmup": 0}
    module = Phi3LoRAModule(str(TINY), optimizer={"lr": 5e-3}, schedule=schedule, generation={"max_new_tokens": 4})
    trainer = synthetic.trainer(tmp_path, max_steps=4, max_epochs=-1)
    (before,) = trainer.validate(module, chats, verbose=False)
    trainer.fit(module, chats)
    assert trainer.validate(module, chats, verbose=False)[0]["val/loss"] < before["val/loss"]
    answers = trainer.predict(module, chats)
    assert all(1 <= len(answer) <= 4 for batch in answers for answer in batch)
