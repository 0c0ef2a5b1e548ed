"""The answers of ``predict`` as JSON lines, in the order of the prompts."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from phi3_lightning.batch import PromptBatch
from phi3_lightning.batch.padding import unpadded
from phi3_lightning.contracts import data_module, origins
from phi3_lightning.distributed.collectives import all_gather_dict
from phi3_lightning.jsonl import PartialJsonl, write_jsonl


class PredictionWriter(pl.Callback):
    """Writes a line for each prompt: its place, its row's own id, the prompt, the answer, and whether that is finished.

    Each rank writes its answers so far to ``predictions.partial.RANK.jsonl`` beside the file, which stays when a run is
    interrupted or killed. The datamodule needs a ``tokenizer``, as ChatDataModule has; where it has no ``origins``, a
    place is the number of the row.

    Args:
        path: The file to write; an earlier one is replaced once all answers are there.
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
        data = data_module(trainer)
        document_ids = batch["document_ids"]
        rows = zip(document_ids, origins(data, "predict", document_ids), unpadded(batch), outputs, strict=False)
        for document_id, origin, prompt, ids in rows:  # filler rows have no document id
            finished = bool(ids) and ids[-1] in batch["stop_ids"]
            answer = data.tokenizer.decode(ids[:-1] if finished else ids, skip_special_tokens=True)
            line = {"prompt": data.tokenizer.decode(prompt), "answer": answer, "finished": finished}
            self._partial.add(origin.content() | line)
            self._rows.append(document_id)

    @override
    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        answers = all_gather_dict(trainer, dict(zip(self._rows, self._partial.lines, strict=True)))
        if trainer.is_global_zero:
            write_jsonl(self.path, [answers[row] for row in sorted(answers)])
            rank_zero_info(f"{len(answers)} answers in {self.path}")
        self._partial.remove()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._partial.log_path()
