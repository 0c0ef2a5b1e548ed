"""Answers to a file of prompts, as JSON lines in the order of the prompts."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from phi3_lightning.batch import PromptBatch
from phi3_lightning.partial import PartialLines, gather, write_lines


class PredictionWriter(Callback):
    """Writes one line a prompt: its place in the file, the answer, and whether the answer ended by itself.

    Each rank keeps what it has so far in ``predictions.partial.RANK.jsonl`` beside the file, which a run that was
    interrupted or killed leaves behind. The datamodule has to have a ``tokenizer``, as ChatDataModule does.

    Args:
        path: The file to write; what an earlier run wrote there is replaced when all answers are there.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._partial = PartialLines(self.path, 0)

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._partial = PartialLines(self.path, trainer.global_rank)

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
        tokenizer = trainer.datamodule.tokenizer  # type: ignore[attr-defined]  # Lightning types it as None
        for row_id, ids in zip(batch["row_ids"], outputs, strict=False):  # a filler row has no id
            finished = bool(ids) and ids[-1] in batch["stop_ids"]
            answer = tokenizer.decode(ids[:-1] if finished else ids, skip_special_tokens=True)
            self._partial.add({"row": row_id, "answer": answer, "finished": finished})

    @override
    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        answers = {line["row"]: line for lines in gather(trainer, self._partial.lines) for line in lines}
        if trainer.is_global_zero:
            write_lines(self.path, [answers[row] for row in sorted(answers)])
            rank_zero_info(f"{len(answers)} answers in {self.path}")
        self._partial.remove()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._partial.tell()
