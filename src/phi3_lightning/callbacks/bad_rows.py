"""Which rows have a loss that is not finite."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.distributed.fsdp import FSDPModule
from typing_extensions import override

from phi3_lightning.batch import Batch
from phi3_lightning.batch.documents import single_documents
from phi3_lightning.contracts import data_module, origins
from phi3_lightning.errors import DivergenceError
from phi3_lightning.module import Phi3LoRAModule


class BadRows(pl.Callback):
    """Finds the rows whose loss is not finite.

    When training diverges, the documents of the accumulation window are computed one by one, and the error names those
    whose own loss is not finite; where there is none, the gradient diverged, and the error names them all. A validation
    whose loss is not finite continues with a warning that names the first such rows, and does not change ``best.ckpt``.
    No rows are found over a sharded model, whose ranks would all have to compute the same number of documents.
    """

    def __init__(self) -> None:
        self._window: list[Batch] = []
        self._warned = False

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        self._window.append(batch)

    @override
    def on_before_zero_grad(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._window = self._window[-1:]  # a new window begins with the batch that has just begun

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, DivergenceError) and isinstance(pl_module, Phi3LoRAModule):
            pl_module.eval()
            rows = [row for batch in self._window for row in find_bad_documents(trainer, pl_module, batch)]
            exception.document_ids = rows or exception.document_ids

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._warned = False

    @override
    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._warned or not isinstance(pl_module, Phi3LoRAModule) or pl_module.val_metrics.loss.total.isfinite():
            return
        self._warned = True
        rows = find_bad_documents(trainer, pl_module, batch)
        data = data_module(trainer)
        places = [origin.place for origin in origins(data, "validate", rows)]
        rank_zero_warn(
            f"the validation loss is not finite. Rows: {', '.join(places) or 'not one of this batch by itself'}. "
            "The checkpoint best.ckpt stays as it is"
        )


def find_bad_documents(trainer: pl.Trainer, module: Phi3LoRAModule, batch: Batch) -> list[int]:
    """Return the ``document_ids`` of the documents whose own loss is not finite; none over a sharded model.

    The module is in evaluation mode; the Trainer's precision is used.
    """
    if isinstance(module.loaded_model.model, FSDPModule):
        return []
    bad = []
    for document in single_documents(batch):
        with torch.no_grad(), trainer.precision_plugin.val_step_context(), module.autocast():
            loss, _ = module.compute_loss(module(document), module.head, document)
        if not loss.isfinite():
            bad.append(document["document_ids"][0][0])
    return bad
