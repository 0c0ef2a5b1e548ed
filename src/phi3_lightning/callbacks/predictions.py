"""Answers to a file of prompts, as JSON lines in the order of the prompts."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from phi3_lightning.batch import PromptBatch
from phi3_lightning.batch.padding import unpadded
from phi3_lightning.contracts import origins
from phi3_lightning.jsonl import PartialJsonl, all_gather_object, write_jsonl


class PredictionWriter(Callback):
    """Writes one line a prompt: its place, its row's own id, the prompt, the answer, and whether that ended by itself.

    Each rank keeps what it has so far in ``predictions.partial.RANK.jsonl`` beside the file, which a run that was
    interrupted or killed leaves behind. The datamodule has to have a ``tokenizer``, as ChatDataModule does; where it
    has no ``origins``, a place is the number of the row.

    Args:
        path: The file to write; what an earlier run wrote there is replaced when all answers are there.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._partial = PartialJsonl(self.path, 0)
        self._rows: list[int] = []

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._partial = PartialJsonl(self.path, trainer.global_rank)
        self._rows = []

    @override
    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: PromptBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]  # Lightning types it as None
        found = origins(data, "predict", batch["document_ids"])
        prompts = unpadded(batch)
        for document_id, origin, prompt, ids in zip(
            batch["document_ids"], found, prompts, outputs, strict=False
        ):  # no filler row
            finished = bool(ids) and ids[-1] in batch["stop_ids"]
            answer = data.tokenizer.decode(ids[:-1] if finished else ids, skip_special_tokens=True)
            line = {"prompt": data.tokenizer.decode(prompt), "answer": answer, "finished": finished}
            self._partial.add(origin.content() | line)
            self._rows.append(document_id)

    @override
    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        mine = dict(zip(self._rows, self._partial.lines, strict=True))
        answers = {row: line for lines in all_gather_object(trainer, mine) for row, line in lines.items()}
        if trainer.is_global_zero:
            write_jsonl(self.path, [answers[row] for row in sorted(answers)])
            rank_zero_info(f"{len(answers)} answers in {self.path}")
        self._partial.remove()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._partial.tell()
