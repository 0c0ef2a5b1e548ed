"""Which row made a loss that is not finite."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.distributed.fsdp import FSDPModule
from typing_extensions import override

from phi3_lightning.batch import Batch
from phi3_lightning.batch.documents import single_documents
from phi3_lightning.contracts import origins
from phi3_lightning.errors import DivergenceError
from phi3_lightning.module import Phi3LoRAModule


class BadRows(pl.Callback):
    """Narrows a loss that is not finite down to its rows.

    When training diverges, the documents of the window are computed one by one, and the error keeps those whose own
    loss is not finite; where there is none, the gradient is to blame, and it keeps them all. A validation whose loss is
    not finite goes on with a warning that names the first such rows, and makes no checkpoint the best one. Nothing is
    narrowed down over a sharded model, whose ranks would all have to compute as many documents.
    """

    def __init__(self) -> None:
        self._window: list[Batch] = []
        self._named = False

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        self._window.append(batch)

    @override
    def on_before_zero_grad(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._window = self._window[-1:]  # gradients start anew in the backward pass of the batch that has just begun

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, DivergenceError) and isinstance(pl_module, Phi3LoRAModule):
            pl_module.eval()
            found = [row for batch in self._window for row in find(trainer, pl_module, batch)]
            exception.document_ids = found or exception.document_ids

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._named = False

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
        if self._named or not isinstance(pl_module, Phi3LoRAModule) or pl_module.val_metrics.loss.total.isfinite():
            return
        self._named = True
        rows = find(trainer, pl_module, batch)
        data = trainer.datamodule  # type: ignore[attr-defined]  # Lightning types it as None
        places = [origin.place for origin in origins(data, "validate", rows)]
        rank_zero_warn(
            f"the validation loss is not finite. Rows: {', '.join(places) or 'not one of this batch by itself'}. "
            "The checkpoint best.ckpt stays as it is"
        )


def find(trainer: pl.Trainer, module: Phi3LoRAModule, batch: Batch) -> list[int]:
    """Return the documents of a batch whose own loss is not finite.

    Args:
        trainer: The Trainer, whose precision is used.
        module: The module, in evaluation mode.
        batch: The batch.

    Returns:
        Their ``document_ids``; none over a sharded model.
    """
    if isinstance(module.loaded_model.model, FSDPModule):
        return []
    found = []
    for document in single_documents(batch):
        with torch.no_grad(), trainer.precision_plugin.val_step_context(), module.autocast():
            loss, _ = module.compute_loss(module(document), module.head, document)
        if not loss.isfinite():
            found += document["document_ids"][0]
    return found
