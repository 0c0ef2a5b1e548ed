"""Our module in a LightningCLI project of somebody else's, under their own datamodule.

    python examples/module_in_a_foreign_cli.py fit --model.base FOLDER --data.tokenizer FOLDER --data.file notes.txt

Their datamodule knows nothing of chats: it trains every token of each paragraph of a text file.
"""

from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LightningCLI
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from phi3_lightning import Phi3LoRAModule
from phi3_lightning.batch import IGNORE_INDEX, Batch


class Paragraphs(pl.LightningDataModule):
    """Paragraphs of a text file.

    Args:
        file: The text.
        tokenizer: Folder or hub id of the tokenizer.
        batch_size: Paragraphs of a batch.
    """

    def __init__(self, file: str, tokenizer: str, batch_size: int = 2) -> None:
        super().__init__()
        self.file, self.tokenizer, self.batch_size = Path(file), tokenizer, batch_size

    def setup(self, stage: str) -> None:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(self.tokenizer)
        paragraphs = self.file.read_text(encoding="utf-8").split("\n\n")
        self.rows = list(enumerate(tokenizer(text)["input_ids"] for text in paragraphs if text.strip()))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.rows, self.batch_size, shuffle=True, collate_fn=collate)


def collate(rows: list[tuple[int, list[int]]]) -> Batch:
    """Pad on the right; this is all that our module asks of a batch."""
    ids = [torch.tensor(row) for _, row in rows]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "labels": pad_sequence(ids, batch_first=True, padding_value=IGNORE_INDEX),
        "position_ids": pad_sequence([torch.arange(len(row)) for row in ids], batch_first=True),
        "document_lengths": [[len(row)] for row in ids],
        "document_ids": [[number] for number, _ in rows],
    }


def main() -> None:
    LightningCLI(Phi3LoRAModule, Paragraphs, seed_everything_default=42, auto_configure_optimizers=False)


if __name__ == "__main__":
    main()
