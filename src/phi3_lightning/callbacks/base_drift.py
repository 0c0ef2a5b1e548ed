"""Divergence of the tuned model from its base on data that it was not trained on."""

from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from typing_extensions import override

from phi3_lightning.batch import Batch
from phi3_lightning.model.loss import CHUNK, supervised_positions
from phi3_lightning.module import Phi3LoRAModule


class BaseDrift(pl.Callback):
    """Logs, at each validation, the divergence of the tuned model from its base on general chats.

    ``base_drift/kl`` is KL(tuned || base), the mean over the supervised tokens of ``data`` of the sum over the
    vocabulary of p_tuned * (log p_tuned - log p_base), in nats; ``base_drift/loss`` is the tuned model's loss on them,
    and ``base_drift/loss_change`` its difference to the base's loss. The base is the same model with the adapter
    switched off; its predictions are computed each time, so that memory does not grow with ``data``.

    Args:
        data: Has the general chats as validation data, such as a ChatDataModule; not the data of the run.
    """

    def __init__(self, data: pl.LightningDataModule) -> None:
        self.data = data
        self._sums: Tensor | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage not in ("fit", "validate"):
            return
        rank_zero_info("Drift from the base is measured on general chats:")
        if trainer.local_rank == 0:
            self.data.prepare_data()
        trainer.strategy.barrier()
        self.data.trainer = trainer  # for its ranks
        self.data.setup("validate")

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._sums = None

    @override
    @torch.no_grad()
    def on_validation_batch_start(  # type: ignore[override]
        self, trainer: pl.Trainer, pl_module: Phi3LoRAModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        # before the first batch and not at the end: by then WeightAveraging may have put the current weights back
        if trainer.sanity_checking or self._sums is not None:
            return
        self._sums = torch.zeros(4, dtype=torch.float64, device=pl_module.device)
        for general in self.data.val_dataloader():
            with trainer.precision_plugin.val_step_context(), pl_module.autocast():
                self._sums += compare(pl_module, trainer.strategy.batch_to_device(general))

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._sums is None:
            return
        sums = cast("Tensor", trainer.strategy.reduce(self._sums, reduce_op="sum"))
        divergence, tuned, base = (sums[:3] / sums[3]).float()
        for name, value in (("kl", divergence), ("loss", tuned), ("loss_change", tuned - base)):
            # reduced already; without sync_dist Lightning warns
            pl_module.log(f"base_drift/{name}", value, sync_dist=True)


def compare(module: Phi3LoRAModule, batch: Batch) -> Tensor:
    """Compare tuned and base model on a batch; the module is in evaluation mode.

    The result is KL(tuned || base), the tuned and the base model's loss, each summed over the supervised tokens, and
    the number of these tokens: shape (4,), float64.
    """
    tuned, labels = supervised_positions(module(batch), batch)
    with module.base_answers():
        base, _ = supervised_positions(module(batch), batch)
    sums = tuned.new_zeros(4, dtype=torch.float64)
    for tuned_part, base_part, part in zip(tuned.split(CHUNK), base.split(CHUNK), labels.split(CHUNK), strict=True):
        log_tuned = F.log_softmax(module.head(tuned_part).float(), dim=-1)
        with module.base_answers():  # the head may be adapted too
            log_base = F.log_softmax(module.head(base_part).float(), dim=-1)
        divergence = F.kl_div(log_base, log_tuned, log_target=True, reduction="sum")
        losses = [F.nll_loss(log, part, reduction="sum") for log in (log_tuned, log_base)]
        sums += torch.stack([divergence, *losses, divergence.new_tensor(len(part))])
    return sums
