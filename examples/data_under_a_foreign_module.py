"""Our datamodule under a module of somebody else's: packed chats, the assistant's tokens labelled, for any model.

python examples/data_under_a_foreign_module.py --chats chats.jsonl --tokenizer FOLDER
"""

import argparse

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from phi3_lightning import ChatDataModule
from phi3_lightning.batch import IGNORE_INDEX, Batch

TINY = "src/phi3_lightning/assets/tiny_phi3"


class Recurrent(pl.LightningModule):
    """A language model with a recurrent layer; it reads one chat at a time and keeps no state between them."""

    def __init__(self, vocabulary: int, width: int = 64) -> None:
        super().__init__()
        self.embed, self.read = nn.Embedding(vocabulary, width), nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def mean_loss(self, batch: Batch) -> tuple[Tensor, int]:
        """Return the loss of a supervised token, and how many there are."""
        # a packed row holds several chats, one after the other; their lengths are in the batch
        total, count = torch.zeros((), device=self.device), 0
        for ids, labels, lengths in zip(batch["input_ids"], batch["labels"], batch["document_lengths"], strict=True):
            rest = ids.numel() - sum(lengths)
            for one, wanted in zip(ids.split([*lengths, rest]), labels.split([*lengths, rest]), strict=True):
                supervised = wanted[1:] != IGNORE_INDEX  # position t predicts token t + 1
                if supervised.any():
                    logits = self.head(self.read(self.embed(one)[None])[0][0, :-1][supervised])
                    total = total + nn.functional.cross_entropy(logits, wanted[1:][supervised], reduction="sum")
                    count += int(supervised.sum())
        return total / max(count, 1), count

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.mean_loss(batch)[0]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        loss, count = self.mean_loss(batch)
        self.log("val/loss", loss, batch_size=count)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.01)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chats", default=f"{TINY}/chats_train.jsonl")
    parser.add_argument("--tokenizer", default=TINY)
    parser.add_argument("--epochs", type=int, default=1)
    given = parser.parse_args()

    data = ChatDataModule(train=given.chats, tokenizer=given.tokenizer, max_length=512, num_workers=0)
    data.prepare_data()
    data.setup("fit")
    trainer = pl.Trainer(max_epochs=given.epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
                         enable_progress_bar=False)  # fmt: skip
    trainer.fit(Recurrent(len(data.tokenizer)), data)
    print(f"{data.train_documents} chats in {data.train_rows} rows; loss {trainer.callback_metrics['val/loss']:.2f}")


if __name__ == "__main__":
    main()
