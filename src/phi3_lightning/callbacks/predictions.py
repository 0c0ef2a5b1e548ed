"""Answers to a file of prompts, as JSON lines in the order of the prompts."""

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch.distributed
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from phi3_lightning.batch import PromptBatch


class PredictionWriter(Callback):
    """Writes one line a prompt: its place in the file, the answer, and whether the answer ended by itself.

    The datamodule has to have a ``tokenizer``, as ChatDataModule does.

    Args:
        path: The file to write; what an earlier run wrote there is replaced when all answers are there.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._answers: dict[int, dict[str, Any]] = {}

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
            self._answers[row_id] = {"row": row_id, "answer": answer, "finished": finished}

    @override
    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        shares: list[Any] = [self._answers]
        if trainer.world_size > 1:
            shares = [None] * trainer.world_size
            torch.distributed.all_gather_object(shares, self._answers)
        if trainer.is_global_zero:
            answers = {row: answer for share in shares for row, answer in share.items()}
            self._write([answers[row] for row in sorted(answers)])

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self._answers:
            partial = self.path.with_suffix(f".partial.{trainer.global_rank}.jsonl")
            PredictionWriter._write_lines(partial, [self._answers[row] for row in sorted(self._answers)])

    def _write(self, answers: list[dict[str, Any]]) -> None:
        self._write_lines(self.path, answers)
        rank_zero_info(f"{len(answers)} answers in {self.path}")

    @staticmethod
    def _write_lines(path: Path, answers: list[dict[str, Any]]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.write_text("".join(json.dumps(a, ensure_ascii=False) + "\n" for a in answers), encoding="utf-8")
        temporary.replace(path)
