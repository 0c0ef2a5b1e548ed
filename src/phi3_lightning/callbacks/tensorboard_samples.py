"""First training rows of a run, as a page of its loggers, and its results beside TensorBoard's hyper-parameters."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger
from typing_extensions import override

from phi3_lightning.batch import IGNORE_INDEX, Batch
from phi3_lightning.batch.segments import Segment, segments
from phi3_lightning.callbacks.tensorboard import literal, log_page, step_of
from phi3_lightning.config.checks import require
from phi3_lightning.contracts import HasTokenizer, data_module

MAX_SHOWN_TOKENS = 400
"""Tokens of a row that are shown; a packed one may have thousands."""

RESULT_PREFIXES = ("train/loss", "val/", "base_drift/")
"""Prefixes of the metrics that are logged as results of the hyper-parameters."""


class TensorBoardSamples(pl.Callback):
    """Shows the first training rows with the trained tokens marked, and at the end hyper-parameters with their results.

    The rows are those of the first training batch, as the model gets them: a page in TensorBoard, W&B and MLflow. The
    results are for TensorBoard alone; the others compare runs by their last numbers.
    """

    def __init__(self, rows: int = 3) -> None:
        require(rows >= 0, "monitor.rows", rows, "it is 0 or more")
        self.rows = rows

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        data = data_module(trainer)
        if trainer.global_step or batch_idx or not isinstance(data, HasTokenizer):
            return
        if trainer.loggers:
            count = min(self.rows, len(batch["document_lengths"]))
            rows = [row_segments(batch, row, data.tokenizer) for row in range(count)]
            log_page(trainer, "data/first_rows", as_markdown(rows), 0)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        results = {
            f"result/{name.replace('/', '_')}": value.item()
            for name, value in trainer.callback_metrics.items()
            if name.startswith(RESULT_PREFIXES)
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


def row_segments(batch: Batch, row: int, tokenizer: Any) -> list[Segment]:
    """Divide the beginning of a row into segments of trained, special and other tokens."""
    end = min(sum(batch["document_lengths"][row]), MAX_SHOWN_TOKENS)
    ids, labels = (batch[name][row, :end].tolist() for name in ("input_ids", "labels"))
    return segments(ids, [label != IGNORE_INDEX for label in labels], tokenizer)


def as_markdown(rows: list[list[Segment]]) -> str:
    """Return rows as Markdown with the trained segments in bold."""
    texts = ["Bold is trained, everything else is context."]
    for row in rows:
        words = (f"<strong>{literal(each.text)}</strong>" if each.trained else literal(each.text) for each in row)
        texts.append(f"<pre>{''.join(words)}</pre>")
    return "\n\n".join(texts)
