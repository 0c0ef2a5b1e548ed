"""What a run was made of, and what came of it, on TensorBoard's pages for text and hyper-parameters."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger
from typing_extensions import override

from phi3_lightning.batch import IGNORE_INDEX, Batch
from phi3_lightning.batch.segments import Segment, segments
from phi3_lightning.callbacks.tensorboard import boards, literal, step_of
from phi3_lightning.contracts import HasTokenizer

SHOWN_TOKENS = 400
"""Tokens of a row that are shown; a packed one may have thousands."""

RESULTS = ("train/loss", "val/", "base_drift/")
"""Beginnings of the names of the numbers that hyper-parameters are judged by."""


class TensorBoardSamples(pl.Callback):
    """Shows the first training rows with the trained tokens marked, and at the end hyper-parameters with their results.

    The rows are those of the first batch that is trained, as the model gets them. A logger that has no page for text
    is left alone.

    Args:
        rows: How many rows are shown.
    """

    def __init__(self, rows: int = 3) -> None:
        self.rows = rows

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]  # Lightning types it as None
        if trainer.global_step or batch_idx or not isinstance(data, HasTokenizer):
            return
        for writer in boards(trainer):
            shown = [parts(batch, row, data.tokenizer) for row in range(min(self.rows, len(batch["document_lengths"])))]
            writer.add_text("data/first_rows", as_markdown(shown), 0)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        results = {
            f"result/{name.replace('/', '_')}": value.item()
            for name, value in trainer.callback_metrics.items()
            if name.startswith(RESULTS)
        }
        hyper_parameters = dict(pl_module.hparams) | {
            "max_epochs": trainer.max_epochs,
            "max_steps": trainer.max_steps,
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "world_size": trainer.world_size,
            "precision": trainer.precision,
        }
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and results:
                logger.log_hyperparams(hyper_parameters, results, step=step_of(trainer))


def parts(batch: Batch, row: int, tokenizer: Any) -> list[Segment]:
    """Divide the beginning of a row by what becomes of its tokens.

    Args:
        batch: The batch.
        row: Which row.
        tokenizer: Turns tokens into text.
    """
    end = min(sum(batch["document_lengths"][row]), SHOWN_TOKENS)
    ids, labels = (batch[name][row, :end].tolist() for name in ("input_ids", "labels"))
    return segments(ids, [label != IGNORE_INDEX for label in labels], tokenizer)


def as_markdown(rows: list[list[Segment]]) -> str:
    """Write rows as text with what is trained in bold.

    Args:
        rows: The parts of each.
    """
    written = []
    for row in rows:
        words = (literal(part.text) for part in row)
        marked = (f"<strong>{word}</strong>" if part.trained else word for part, word in zip(row, words, strict=True))
        written.append(f"<pre>{''.join(marked)}</pre>")
    return "Bold is trained, everything else is context.\n\n" + "\n\n".join(written)
